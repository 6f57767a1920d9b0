"""Examples sorted by length within a step: the same steps as the trainer's own, with less padding."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from pipeline.training.step_order import StepOrder

LENGTHS = [int(length) for length in np.random.default_rng(0).lognormal(5, 0.5, 90)]
BATCH, PASSES = 4, 2


class Lengths(torch.utils.data.Dataset):
    """Each row is its own number."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> int:
        return index


class Sorted(Trainer):
    def _get_train_sampler(self, train_dataset: object = None) -> StepOrder:
        return StepOrder(LENGTHS, BATCH * PASSES, self.args.seed)


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[list[int]]]]:
    """The rows of every forward pass of two epochs, as the trainer's loader gives them, with each sampler."""
    folder = tmp_path_factory.mktemp("trainer")
    return {trainer.__name__: read(trainer, folder) for trainer in (Trainer, Sorted)}


def read(trainer_class: type[Trainer], folder: Path) -> list[list[list[int]]]:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, seed=7, use_cpu=True, report_to="none"
    )
    trainer = trainer_class(
        torch.nn.Linear(1, 1), arguments, train_dataset=Lengths(), data_collator=lambda rows: torch.tensor(rows)
    )
    torch.manual_seed(7)  # as the training loop does before it makes the loader
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([batch.tolist() for batch in loader])
    return epochs


def padded_tokens(batches: list[list[int]]) -> int:
    return sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)


def test_every_step_sees_the_same_examples(passes: dict[str, list[list[list[int]]]]) -> None:
    for plain, ordered in zip(passes["Trainer"], passes["Sorted"], strict=True):
        assert len(plain) == len(ordered) == 23
        for step in range(0, len(plain), PASSES):
            assert sorted(chain(*plain[step : step + PASSES])) == sorted(chain(*ordered[step : step + PASSES]))


def test_epochs_differ_and_a_seed_repeats(passes: dict[str, list[list[list[int]]]]) -> None:
    first, second = passes["Sorted"]
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(len(LENGTHS)))
    assert list(StepOrder(LENGTHS, 8, seed=7)) == list(StepOrder(LENGTHS, 8, seed=7))
    assert list(StepOrder(LENGTHS, 8, seed=7)) != list(StepOrder(LENGTHS, 8, seed=8))


def test_there_is_less_padding(passes: dict[str, list[list[list[int]]]]) -> None:
    """And no forward pass has more tokens than the largest one could have before: batch x longest row."""
    plain, ordered = (padded_tokens(passes[name][0]) for name in ("Trainer", "Sorted"))
    assert ordered < 0.93 * plain
    assert ordered > sum(LENGTHS)
