"""An 8B model in NF4 trained with the reference preset's arguments: through our path (Unsloth), and TRL + PEFT alone.

The same comparison as bench/training.py: the same batches, each training in a process of its own, in turns.
"""

from __future__ import annotations

import time
from pathlib import Path

from part import Recorder, Request, perform
from synthetic import random_base, write_rows

from bench.statistics import percentile
from bench.training import (
    NAMES,
    SLOWER_AT_MOST,
    WARM_UP,
    prepare_run,
    require_same_batches,
    train_one_way,
    way_speed,
)
from bench.training_probe import TimedSteps, TrainingRequest, Way
from pipeline.config import load_config
from pipeline.errors import MedcotError

_PRESET = "deepseek-r1-8b"
_WAYS: tuple[Way, Way] = ("medcot", "trl")
_LENGTHS = (1024, 2048)
_REHEARSED_LENGTHS = (128,)
_STEPS, _REHEARSED_STEPS = 6, 3
_REPEATS = 3  # as far as the time goes; the first is the one that must be
_SPARE = 1.2  # a training that took so long may take this much longer the next time


def prepare(request: Request) -> None:
    for length in _lengths(request):
        _prepared(request, length)


def measure(recorder: Recorder) -> None:
    request = recorder.request
    lengths = _lengths(request)
    measured: dict[int, dict[Way, list[TimedSteps]]] = {length: {way: [] for way in _WAYS} for length in lengths}
    seconds: dict[tuple[int, Way], float] = {}
    runs = {length: _prepared(request, length) for length in lengths}
    for repeat in range(1 if request.rehearse else _REPEATS):
        for length in lengths:
            for way in _WAYS if repeat % 2 == 0 else _WAYS[::-1]:
                longest = max(seconds.values(), default=0.0)
                if recorder.seconds_left() < _SPARE * seconds.get((length, way), longest):
                    if repeat == 0:
                        recorder.check(f"{NAMES[way]} at {length} tokens", False, "no time was left for it")
                    continue
                begun = time.monotonic()
                try:
                    out_dir = runs[length].parent / f"{way}-{repeat}"
                    out_dir.mkdir()
                    one = TrainingRequest(way=way, run_dir=runs[length], out_dir=out_dir)
                    measured[length][way].append(train_one_way(one))
                except MedcotError as error:
                    recorder.check(f"{NAMES[way]} at {length} tokens", False, str(error))
                seconds[length, way] = time.monotonic() - begun
                _record(recorder, length, measured[length])
    for length in lengths:
        _judge(recorder, length, measured[length])


def _lengths(request: Request) -> tuple[int, ...]:
    return _REHEARSED_LENGTHS if request.rehearse else _LENGTHS


def _prepared(request: Request, length: int) -> Path:
    """A prepared run whose records have exactly ``length`` tokens; made once."""
    base = random_base(request.work, request.rehearse)
    folder = request.work / f"training-{length}"
    folder.mkdir(exist_ok=True)
    steps = _REHEARSED_STEPS if request.rehearse else _STEPS
    examples = load_config(_PRESET).training.effective_batch * steps
    rows = write_rows(folder / "rows.jsonl", load_config(_PRESET), base, [length] * (examples + 1))  # one is held out
    overrides = [
        f"model.base={base}", f"model.max_seq_length={length}", f"data.source={rows}", "data.config=null",
        "data.limit=null", "data.train_rows=null", "data.duplicates=keep", "data.leakage=keep",
    ]  # fmt: skip
    return prepare_run(_PRESET, overrides, steps, folder / "run")


def _record(recorder: Recorder, length: int, measured: dict[Way, list[TimedSteps]]) -> None:
    per_step = load_config(_PRESET).training.effective_batch * length
    speeds: dict[Way, list[float]] = {}
    for way, repeats in measured.items():
        if not repeats:
            continue
        tokens = [per_step * (step + 1) for step in range(len(repeats[0].seconds))]
        found = way_speed(way, repeats, tokens)
        speeds[way] = found.tokens_per_second
        _spread(recorder, f"{NAMES[way]}, {length} tokens", speeds[way], "tokens/s")
        if any(found.peak_gpu_bytes):
            recorder.figure(f"{NAMES[way]}, {length} tokens, peak memory", max(found.peak_gpu_bytes) / 1e9, "GB")
    ratios = [ours / theirs for ours, theirs in zip(speeds.get("medcot", []), speeds.get("trl", []), strict=False)]
    if ratios:
        _spread(recorder, f"medcot over TRL + PEFT, {length} tokens", ratios, "")


def _spread(recorder: Recorder, name: str, values: list[float], unit: str) -> None:
    recorder.figure(name, percentile(values, 0.5), unit)
    if len(values) > 1:
        recorder.figure(f"{name}, least", min(values), unit)
        recorder.figure(f"{name}, most", max(values), unit)


def _judge(recorder: Recorder, length: int, measured: dict[Way, list[TimedSteps]]) -> None:
    if not all(measured.values()):
        return  # what is missing has been told
    try:
        require_same_batches(measured)
        recorder.check(f"the same batches at {length} tokens", True, "the first step's losses are equal within 2 %")
    except MedcotError as error:
        recorder.check(f"the same batches at {length} tokens", False, str(error))
    timed = slice(WARM_UP - 1, None)
    ours, theirs = (min(r.seconds[timed][-1] - r.seconds[timed][0] for r in measured[way]) for way in _WAYS)
    if not recorder.request.rehearse:
        recorder.check(
            f"not slower than TRL + PEFT at {length} tokens",
            ours <= theirs * (1 + SLOWER_AT_MOST),
            f"{ours:.2f} s and {theirs:.2f} s for the timed steps",
        )


if __name__ == "__main__":
    perform(measure, prepare)
