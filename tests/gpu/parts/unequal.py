"""Rows of unequal length, as real records are: the first steps, which choose and compile kernels, are timed apart."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

from one_training import OneTraining
from part import Recorder, Request, perform
from synthetic import prepared_run, random_base
from training_record import train_and_record

from bench.statistics import percentile
from pipeline.config import load_config

_PRESET = "deepseek-r1-8b"
_SHORTEST, _LONGEST = 256, 2048
_REHEARSED_SHORTEST, _REHEARSED_LONGEST = 96, 192
_FIRST = 5  # steps timed one by one
_STEPS, _REHEARSED_STEPS = 17, 7
_HELD_OUT = 2


def prepare(request: Request) -> None:
    _prepared(request)


def measure(recorder: Recorder) -> None:
    request = recorder.request
    out_dir = request.work / "unequal" / "trained"
    one = OneTraining(name="unequal rows", run_dir=_prepared(request), out_dir=out_dir)
    results = train_and_record(recorder, [one])
    if not results:
        return
    done = results[one.name]
    ends = [0.0, *(step.seconds for step in done.steps)]
    tokens = [0, *(step.tokens for step in done.steps)]
    seconds = [after - before for before, after in pairwise(ends)]
    for number, each in enumerate(seconds[:_FIRST], start=1):
        recorder.figure(f"step {number}", each, "s")
    later = ends[-1] - ends[_FIRST]
    recorder.figure(f"after step {_FIRST}", (tokens[-1] - tokens[_FIRST]) / later, "tokens/s")
    per_token = [each / (b - a) for each, (a, b) in zip(seconds[_FIRST:], pairwise(tokens[_FIRST:]), strict=True)]
    recorder.figure("slowest later step over the median, per token", max(per_token) / percentile(per_token, 0.5))
    recorder.check(
        "rows of many lengths", len({b - a for a, b in pairwise(tokens)}) > 1, f"{tokens[-1]:,} tokens in all"
    )


def _prepared(request: Request) -> Path:
    shortest, longest, steps = _SHORTEST, _LONGEST, _STEPS
    if request.rehearse:
        shortest, longest, steps = _REHEARSED_SHORTEST, _REHEARSED_LONGEST, _REHEARSED_STEPS
    generator = random.Random(0)
    rows = load_config(_PRESET).training.effective_batch * steps + _HELD_OUT
    lengths = [round(math.exp(generator.uniform(math.log(shortest), math.log(longest)))) for _ in range(rows)]
    overrides = {"model.max_seq_length": longest, "data.eval_rows": _HELD_OUT, "training.max_steps": steps}
    base = random_base(request.work, request.rehearse)
    return prepared_run(request, "unequal", _PRESET, overrides, base, lengths)


if __name__ == "__main__":
    perform(measure, prepare)
