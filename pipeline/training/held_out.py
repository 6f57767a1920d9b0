"""The loss on the held-out records, and what follows from its course: which adapter is best, when to stop early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline import ranks
from pipeline.prompts import IGNORED_LABEL
from pipeline.results import LossPoint

_POSITIONS = 128  # of the sequence at a time


def held_out_loss(trainer: Any) -> float:
    """Mean negative log-likelihood per labelled token of the trainer's ``eval_dataset`` (nats), over all processes.

    Draws no random number that training would have drawn, and leaves the model in the mode it was in.
    """
    import torch

    model, rows, size = trainer.model, trainer.eval_dataset, trainer.args.per_device_eval_batch_size
    own = ranks.own_share(range(len(rows)))
    loss = tokens = 0.0
    was_training = model.training
    model.eval()
    # Without a list every GPU's random state is taken, and a context made on those of the other processes.
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        for first in range(0, len(own), size):
            batch = trainer.data_collator([rows[index] for index in own[first : first + size]])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            with trainer.accelerator.autocast():
                # On a GPU Unsloth leaves the trainer's model ready to generate: it would keep keys and values.
                logits = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                ).logits
            loss += _summed_loss(logits, batch["labels"])
            tokens += int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
    model.train(was_training)
    return ranks.total(loss) / ranks.total(tokens)


def _summed_loss(logits: Any, labels: Any) -> float:
    import torch

    loss = 0.0
    shifted = labels[:, 1:]
    # In pieces: the 32-bit copies of all logits at once were a third of the whole training's peak memory.
    for start in range(0, shifted.shape[1], _POSITIONS):
        piece = slice(start, min(start + _POSITIONS, shifted.shape[1]))
        loss += float(
            torch.nn.functional.cross_entropy(
                logits[:, piece].flatten(0, 1).float(),
                shifted[:, piece].flatten(),
                ignore_index=IGNORED_LABEL,
                reduction="sum",
            )
        )
    return loss


def best_of(points: Sequence[LossPoint]) -> LossPoint | None:
    """The evaluation of a trained adapter with the lowest loss, the first of several; step 0 is the base alone."""
    return min((point for point in points if point.step > 0), key=lambda point: point.loss, default=None)


def out_of_patience(points: Sequence[LossPoint], patience: int | None) -> bool:
    """Whether the last ``patience`` evaluations have brought no lower loss than the ones before."""
    trained = [point for point in points if point.step > 0]
    best = best_of(trained)
    return patience is not None and best is not None and len(trained) - trained.index(best) > patience
