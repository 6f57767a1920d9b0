"""An 8B base that is stored in 16 bit, quantized to NF4 while it loads: time, memory, and whether it is the same model.

It is trained next to a base that is stored in NF4 and holds the same random weights: the losses have to agree.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from one_training import OneTraining
from part import Recorder, Request, perform
from synthetic import Kind, prepared_run, random_base
from training_record import train_and_record

from pipeline.config import load_config

_PRESET = "deepseek-r1-8b"
_LENGTH, _REHEARSED_LENGTH = 512, 128
_STEPS = 3
_HELD_OUT = 2
_BASES: dict[str, Kind] = {"16-bit base": "r1-16-bit", "NF4 base": "r1-nf4"}
_TOLERANCE = 1e-3  # of a loss: two trainings of the same weights, on a GPU that does not add in one order


def measure(recorder: Recorder) -> None:
    request = recorder.request
    requests = [
        OneTraining(name=name, run_dir=_prepared(request, kind), out_dir=request.work / f"sixteen-{kind}" / "trained")
        for name, kind in _BASES.items()
    ]
    results = train_and_record(recorder, requests)
    if not request.rehearse:
        shutil.rmtree(random_base(request.work, request.rehearse, "r1-16-bit"))  # 16 GB of disk
    if len(results) < len(_BASES):
        return
    sixteen, four = results.values()
    for what, one, other in (
        ("held-out loss before training", sixteen.trained.eval_loss_before, four.trained.eval_loss_before),
        ("loss of the first step", sixteen.steps[0].loss, four.steps[0].loss),
    ):
        apart = abs(one / other - 1)
        recorder.check(
            f"{what} is the stored NF4's", apart <= _TOLERANCE, f"{one:.5f} and {other:.5f} ({apart:.3%} apart)"
        )
    recorder.check(
        "the trained parameters are the stored NF4's",
        (sixteen.trained.trainable_parameters, sixteen.trained.total_parameters)
        == (four.trained.trainable_parameters, four.trained.total_parameters),
        f"{sixteen.trained.trainable_parameters:,} of {sixteen.trained.total_parameters:,}",
    )


def _prepared(request: Request, kind: Kind) -> Path:
    length = _REHEARSED_LENGTH if request.rehearse else _LENGTH
    rows = load_config(_PRESET).training.effective_batch * _STEPS + _HELD_OUT
    overrides = {"model.max_seq_length": length, "data.eval_rows": _HELD_OUT, "training.max_steps": _STEPS}
    base = random_base(request.work, request.rehearse, kind)
    return prepared_run(request, f"sixteen-{kind}", _PRESET, overrides, base, [length] * rows)


if __name__ == "__main__":
    perform(measure)
