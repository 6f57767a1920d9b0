"""The reference preset as a T4 trains it: float16, 2 x 2,048 tokens, held-out rows of 2,048, 15 GB of the memory."""

from __future__ import annotations

from pathlib import Path

from one_training import OneTraining
from part import Recorder, Request, perform
from smaller_card import T4
from synthetic import prepared_run, random_base
from training_record import train_and_record

from pipeline.config import load_config

_PRESET = "deepseek-r1-8b"
_LENGTH, _REHEARSED_LENGTH = 2048, 128
_STEPS, _REHEARSED_STEPS = 6, 2
_OVER_PLAN = 1.25  # what an estimate may be off by
_HELD_OUT, _REHEARSED_HELD_OUT = 8, 2  # two of the preset's evaluation batches


def measure(recorder: Recorder) -> None:
    request = recorder.request
    out_dir = request.work / "t4" / "trained"
    one = OneTraining(name="as a T4", run_dir=_prepared(request), out_dir=out_dir, card=T4)
    results = train_and_record(recorder, [one])
    if not results:
        return
    done = results[one.name]
    training = load_config(_PRESET).training
    recorder.check(
        "the preset's batch",
        (done.trained.batch_size, done.trained.gradient_accumulation)
        == (training.batch_size, training.gradient_accumulation),
        f"{done.trained.batch_size} x {done.trained.gradient_accumulation}",
    )
    if not request.rehearse:
        recorder.check(
            "the plan's GPU memory suffices",
            done.gpu_allocated_bytes <= _OVER_PLAN * done.planned_gpu_bytes,
            f"{done.gpu_allocated_bytes / 1e9:.2f} GB allocated, {done.planned_gpu_bytes / 1e9:.2f} planned",
        )


def _prepared(request: Request) -> Path:
    length, steps, held_out = _LENGTH, _STEPS, _HELD_OUT
    if request.rehearse:
        length, steps, held_out = _REHEARSED_LENGTH, _REHEARSED_STEPS, _REHEARSED_HELD_OUT
    rows = load_config(_PRESET).training.effective_batch * steps + held_out
    overrides = {"model.max_seq_length": length, "data.eval_rows": held_out, "training.max_steps": steps}
    base = random_base(request.work, request.rehearse)
    return prepared_run(request, "t4", _PRESET, overrides, base, [length] * rows)


if __name__ == "__main__":
    perform(measure)
