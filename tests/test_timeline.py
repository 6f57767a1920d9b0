"""When the GGUF is ready and the run done, with the builds of llama.cpp next to the first stages."""

import pytest

from pipeline.setup_time import SetUp
from pipeline.stage_estimate import StageEstimate
from pipeline.timeline import Timeline

STAGES = {"prepare": 10, "train": 990, "export": 600, "verify": 400, "evaluate": 500, "bench": 300, "report": 2}


def timeline(builds: tuple[float, float] | None, **changed: float | None) -> Timeline:
    estimates = [
        StageEstimate(stage=name, seconds=seconds, memory_bytes=1) for name, seconds in (STAGES | changed).items()
    ]
    return Timeline.of(
        estimates, None if builds is None else SetUp(packages=1, cpu_build=builds[0], cuda_build=builds[1])
    )


@pytest.mark.parametrize(
    ("builds", "left", "gguf", "whole"),
    [
        (None, 0, 2000, 2802),
        ((300, 700), 0, 2000, 2802),  # all of it next to training
        ((300, 1100), 400, 2300, 3102),  # next to export: 800 s at half of 1.25, which cost export 300
        ((300, 2700), 2000, 2600, 4602),  # export and verify take 1.6 times as long; then evaluation waits for 1,200
        ((1500, 0), 0, 2500, 3302),  # export waits for the build for the CPU
    ],
)
def test_what_is_not_built_next_to_training_costs_time(
    builds: tuple[float, float] | None, left: float, gguf: float, whole: float
) -> None:
    found = timeline(builds)
    assert (found.build_left, found.gguf_seconds, found.seconds) == pytest.approx((left, gguf, whole))


def test_what_is_not_known_is_not_told() -> None:
    assert timeline(None, train=None).gguf_seconds is None
    found = timeline(None, evaluate=None)
    assert found.gguf_seconds == 2000 and found.seconds is None


def test_a_run_that_ends_with_training_has_no_gguf() -> None:
    found = Timeline.of([StageEstimate(stage="train", seconds=9, memory_bytes=1)], None)
    assert (found.gguf_seconds, found.seconds) == (None, 9)
