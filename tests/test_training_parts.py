"""The parts of the train stage that need no model: log, guard, patience, time, batch, encoded rows."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from tiny_models import save_tokenizer

from pipeline import ranks
from pipeline.base_model import load_tokenizer
from pipeline.config import Config, load_config
from pipeline.errors import MedcotError
from pipeline.prompts import ChatFormat, Example
from pipeline.results import LossPoint
from pipeline.run import stage_config, stage_named
from pipeline.training.batch import Batch, first_batch, is_out_of_memory, keep_batch, memory_advice
from pipeline.training.held_out import best_of, out_of_patience
from pipeline.training.lora_model import autocast_asked_of
from pipeline.training.loss_guard import LossGuard, TrainingDiverged
from pipeline.training.metrics_log import MetricsLog
from pipeline.training.rows import Collator, TokenCounts, encode_all, encoded_rows
from pipeline.training.time_budget import TimeBudget
from pipeline.vocabulary import TransformersVocabulary


def config_with(*settings: str) -> Config:
    return load_config("deepseek-r1-8b", settings)


# metrics.jsonl


def test_a_torn_metrics_file_keeps_its_whole_lines_up_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (0, 5, 10, 15))
    path.write_text(whole + '{"step": 20, "lo')
    log = MetricsLog(path, 10)
    assert [row["step"] for row in log.rows] == [0, 5, 10]
    seen: list[object] = []
    log.follow = seen.append
    log.append({"step": 15, "eval_loss": 2.0})
    assert MetricsLog(path, 100).rows == log.rows and seen == [{"step": 15, "eval_loss": 2.0}]
    assert log.points("eval_loss") == [LossPoint(step=15, loss=2.0)]


def test_only_the_first_process_writes_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.append({"step": 1, "loss": 1.0})
    assert log.rows and list(tmp_path.iterdir()) == []


# What follows from the held-out losses


def points(*losses: float) -> list[LossPoint]:
    return [LossPoint(step=10 * number, loss=loss) for number, loss in enumerate(losses)]


def test_the_base_alone_is_never_the_best() -> None:
    assert best_of(points(1.0)) is None
    assert best_of(points(1.0, 3.0, 2.0, 2.0)) == LossPoint(step=20, loss=2.0)


@pytest.mark.parametrize(
    ("losses", "patience", "out"),
    [
        ([3.0], 1, False),
        ([3.0, 2.0], 1, False),
        ([3.0, 2.0, 2.0], 1, True),
        ([3.0, 2.0, 2.1, 1.9], 2, False),
        ([3.0, 2.0, 2.1, 2.0], 2, True),
        ([3.0, 2.0, 2.1, 2.2], None, False),
    ],
)
def test_patience_counts_evaluations_without_a_lower_loss(losses: list[float], patience: int | None, out: bool) -> None:
    assert out_of_patience(points(*losses), patience) is out


def test_patience_without_evaluations_is_an_error_of_the_configuration() -> None:
    with pytest.raises(MedcotError, match="set eval_steps too"):
        config_with("training.patience=2")
    assert config_with("training.patience=2", "training.eval_steps=10").training.patience == 2


# LossGuard


def take(guard: LossGuard, *losses: float, norm: float = 1.0, scaled: bool = False) -> None:
    for step, loss in enumerate(losses, start=1):
        guard.check(step, [loss / 2, loss / 2], [[3], [4]], norm, scaled)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_records_of_its_pass(loss: float) -> None:
    with pytest.raises(TrainingDiverged, match=r"not finite at step 8, in line 5 of train\.jsonl"):
        LossGuard(2.0).check(8, [1.0, loss], [[3, 4], [5]], 1.0, scaled=False)


def test_gradients_that_are_not_finite_stop_it_unless_a_scaler_leaves_the_step_out() -> None:
    with pytest.raises(TrainingDiverged, match=r"gradients are not finite at step 1, in lines 3, 4 of train\.jsonl"):
        take(LossGuard(2.0), 1.0, norm=math.inf)
    guard = LossGuard(2.0)
    take(guard, *[1.0] * 16, norm=math.inf, scaled=True)
    take(guard, 1.0, scaled=True)  # a finite one begins the count again
    take(guard, *[1.0] * 16, norm=math.nan, scaled=True)
    with pytest.raises(TrainingDiverged, match="gradients"):
        take(guard, 1.0, norm=math.inf, scaled=True)


def test_one_odd_batch_is_no_explosion_and_five_in_a_row_are() -> None:
    guard = LossGuard(2.0)
    assert guard.limit == 5.0
    take(guard, 1.9, 9.0, 9.0, 9.0, 9.0, 4.9, 9.0)
    assert guard.suspicious
    take(guard, 2.0)
    assert not guard.suspicious
    with pytest.raises(TrainingDiverged, match=r"above 5\.0 for 5 steps and is 9\.0 at step 5, in lines 3, 4"):
        take(guard, 9.0, 9.0, 9.0, 9.0, 9.0)


def test_a_large_gradient_is_clipped_and_no_reason_to_stop() -> None:
    take(LossGuard(2.0), *[2.0] * 20, norm=1e6)


# Time


def test_time_is_up_when_another_step_and_the_evaluation_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = TimeBudget(minutes=10)
    budget.closing_takes(100)
    now = 200.0  # loading the model, going back to the checkpoint
    budget.loop_begins()
    answers = []
    for _ in range(3):
        now += 100.0
        answers.append(budget.is_up_after_step())
    # At 300 s another step of 100 s and 100 s behind it still fit into 600 s, at 400 s to the second, at 500 s not.
    assert answers == [False, False, True]
    assert not TimeBudget(None).is_up_after_step()


# Batch


def test_a_smaller_batch_keeps_the_examples_of_a_step() -> None:
    sizes = []
    batch: Batch | None = Batch(12, 1)
    while batch is not None:
        assert batch.size * batch.accumulation == 12
        sizes.append(batch.size)
        batch = batch.smaller()
    assert sizes == [12, 6, 3, 1]


def test_auto_starts_with_what_fits_and_later_sessions_keep_it(tmp_path: Path) -> None:
    training = config_with("training.batch_size=auto", "training.step_examples=12").training
    assert first_batch(training, tmp_path, lambda: 6) == Batch(6, 2)
    assert first_batch(training, tmp_path, lambda: 12) == Batch(6, 2)
    keep_batch(Batch(3, 4), tmp_path)
    assert first_batch(training, tmp_path, lambda: 12) == Batch(3, 4)


def test_a_configured_batch_is_taken_as_it_is_and_shared_by_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = config_with("training.batch_size=4", "training.gradient_accumulation=3").training
    unused = pytest.fail
    assert first_batch(training, tmp_path, lambda: unused("asked")) == Batch(4, 3)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    shared = first_batch(training, tmp_path, lambda: unused("asked"))
    assert shared.size <= 4 and shared.size * shared.accumulation == 6
    assert list(tmp_path.iterdir()) == []


def test_memory_errors_are_told_from_others() -> None:
    import torch

    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"))
    assert not is_out_of_memory(RuntimeError("shapes do not match")) and not is_out_of_memory(ValueError("bad_alloc"))


@pytest.mark.parametrize(
    ("settings", "batch", "advice"),
    [
        (["training.batch_size=8"], Batch(8, 4), "training.batch_size=4 and training.gradient_accumulation=8, or"),
        # An evaluation has a batch of its own, which is not what a training step ran out of memory with.
        (["training.batch_size=2"], Batch(2, 4), "training.batch_size=1 and training.gradient_accumulation=8, or"),
        (
            ["training.batch_size=1", "training.gradient_checkpointing=false"],
            Batch(1, 8),
            "training.gradient_checkpointing=true",
        ),
        (
            ["training.batch_size=1", "model.load_in_4bit=false"],
            Batch(1, 8),
            "model.load_in_4bit=true",
        ),
        (["training.batch_size=1"], Batch(1, 8), "lower model.max_seq_length"),
    ],
)
def test_the_setting_that_helps_most_is_named(settings: list[str], batch: Batch, advice: str) -> None:
    assert advice in memory_advice(config_with(*settings), batch, 0)


@pytest.mark.parametrize(
    ("settings", "batch", "change"),
    [
        ([], Batch(2, 4), ["training.batch_size=1", "training.gradient_accumulation=8"]),
        ([], Batch(2, 4), ["training.batch_size=auto", "training.step_examples=8"]),
        (["training.gradient_checkpointing=false"], Batch(1, 8), ["training.gradient_checkpointing=true"]),
        (["model.load_in_4bit=false"], Batch(1, 8), ["model.load_in_4bit=true"]),
    ],
)
def test_the_advice_says_whether_it_costs_the_training(settings: list[str], batch: Batch, change: list[str]) -> None:
    settings = [f"training.batch_size={batch.size}", f"training.gradient_accumulation={batch.accumulation}", *settings]
    given, changed = config_with(*settings), config_with(*settings, *change)
    told = memory_advice(given, batch, 20)
    assert all(setting in told for setting in change)
    train = stage_named("train")
    kept = stage_config(train, changed) == stage_config(train, given)
    assert ("training is kept, and resumes from step 20" if kept else "that starts training again") in told
    assert "step" not in memory_advice(given, batch, 0).replace("step_examples", "")


# Encoded rows


def test_rows_are_read_from_disk_as_they_were_encoded(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    chat_format = ChatFormat(tokenizer.chat_template, TransformersVocabulary(tokenizer), None)
    examples = [Example(f"Is {n} even?", "I halve it." if n % 2 else None, "Yes. " * n) for n in range(1, 6)]
    records = tmp_path / "train.jsonl"
    records.write_text("".join(json.dumps(vars(example)) + "\n" for example in examples))
    rows, counts = encoded_rows(chat_format, records, tmp_path / "scratch" / "train.arrow", None)
    expected = list(encode_all(chat_format, examples, None))
    assert [(row["input_ids"], row["labels"]) for row in rows] == [(each.input_ids, each.labels) for each in expected]
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5]
    lengths = [len(each.input_ids) for each in expected]
    assert counts == TokenCounts(5, sum(lengths) / 5, max(lengths))
    assert [Path(file["filename"]).name for file in rows.cache_files] == ["train.arrow"]  # mapped, not in memory

    batch = Collator(tokenizer)([rows[0], rows[4]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, lengths[4])
    assert batch["line"].tolist() == [1, 5]
    assert batch["attention_mask"].sum(dim=1).tolist() == [lengths[0], lengths[4]]
    assert batch["labels"][0].tolist() == expected[0].labels + [-100] * (lengths[4] - lengths[0])


# autocast


def test_on_the_cpu_autocast_is_asked_of_the_cpu() -> None:
    """peft and Unsloth ask without naming a device, PyTorch itself names one."""
    with autocast_asked_of("cpu"), torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled() and torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cuda")
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.is_autocast_enabled(), "without it the answer is CUDA's"
