"""The loss of our path (Unsloth) and of plain TRL + PEFT on the real small model, step by step on the same batches."""

from __future__ import annotations

import statistics

from part import Recorder, perform
from synthetic import random_base, write_rows

from bench.training import NAMES, prepare_run, train_one_way
from bench.training_probe import TrainingRequest, Way
from pipeline.config import load_config

_TOLERANCE = 0.02
_WAYS: tuple[Way, Way] = ("medcot", "trl")
# Larger batches and a lower rate than the preset's: single records at 3e-3 turn rounding into another course.
_SETTINGS = ["training.batch_size=4", "training.gradient_accumulation=1", "training.learning_rate=1e-3"]
_STEPS = 20
_REHEARSED_STEPS = 4


def measure(recorder: Recorder) -> None:
    request = recorder.request
    overrides, steps = list(_SETTINGS), _STEPS
    if request.rehearse:
        base = random_base(request.work, rehearse=True)
        rows = write_rows(request.work / "agreement-rows.jsonl", load_config("smollm2-cpu"), base, [120] * 20)
        overrides += [f"model.base={base}", f"data.source={rows}", "data.duplicates=keep", "data.leakage=keep"]
        steps = _REHEARSED_STEPS
    folder = request.work / "agreement"
    folder.mkdir()
    run_dir = prepare_run("smollm2-cpu", overrides, steps, folder / "run")
    losses: dict[Way, list[float]] = {}
    for way in _WAYS:
        out_dir = folder / way
        out_dir.mkdir()
        losses[way] = train_one_way(TrainingRequest(way=way, run_dir=run_dir, out_dir=out_dir)).losses
        recorder.figure(f"mean loss, {NAMES[way]}", statistics.fmean(losses[way]), "nats")
    ours, theirs = losses["medcot"], losses["trl"]
    last = slice(-(steps // 4), None)
    for name, one, other in (
        ("loss of the first step", ours[0], theirs[0]),
        ("mean loss over all steps", statistics.fmean(ours), statistics.fmean(theirs)),
        ("mean loss over the last quarter", statistics.fmean(ours[last]), statistics.fmean(theirs[last])),
    ):
        apart = abs(one / other - 1)
        recorder.check(name, apart <= _TOLERANCE, f"{one:.4f} and {other:.4f}, {apart:.2%} apart ({_TOLERANCE:.0%})")
    recorder.figure("largest difference of a step", max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)))


if __name__ == "__main__":
    perform(measure)
