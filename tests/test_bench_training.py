"""The comparison of training speeds: its arithmetic, and the three ways on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_model

from bench.training import (
    WARM_UP,
    TrainingComparison,
    WaySpeed,
    require_not_slower,
    require_same_batches,
    way_speed,
)
from bench.training_probe import TimedSteps, Way
from bench.turns import Turn
from pipeline.errors import GateFailed, MedcotError


def timed(way: Way, seconds: list[float], first_loss: float = 2.0, tokens: list[int] | None = None) -> TimedSteps:
    losses = [first_loss, *[1.0] * (len(seconds) - 1)]
    return TimedSteps(
        way=way, seconds=seconds, losses=losses, tokens=tokens or [], peak_memory_bytes=10, peak_gpu_bytes=0
    )


def comparison(ours: list[float], unsloth: list[float]) -> TrainingComparison:
    ways = [
        WaySpeed(way=way, tokens_per_second=speeds, peak_memory_bytes=[1], peak_gpu_bytes=[0], losses=[1.0])
        for way, speeds in (("medcot", ours), ("unsloth", unsloth), ("trl", unsloth))
    ]
    return TrainingComparison(
        machine="m",
        threads=None,
        preset="p",
        overrides=[],
        versions={},
        steps=3,
        warm_up=WARM_UP,
        in_turns=False,
        ways=ways,
    )


def test_the_first_steps_are_not_timed() -> None:
    """100 tokens a step; the first two steps take 10 s each, the others 1 s and 3 s."""
    speed = way_speed("unsloth", [timed("unsloth", [10, 20, 21, 24])], tokens=[100, 200, 300, 400])
    assert speed.tokens_per_second == [50.0]


def test_steps_that_took_turns_are_timed_one_by_one() -> None:
    speed = way_speed("unsloth", [timed("unsloth", [10, 20, 21, 25])], tokens=[100, 200, 300, 500], by_step=True)
    assert speed.tokens_per_second == [100.0, 50.0]


CHILD = """
import os, sys
read, write = map(int, sys.argv[1:])
os.write(write, b".")
for _ in range(2):
    os.read(read, 1)
    os.write(write, b".")
os.read(read, 1)
"""


def test_a_turn_ends_with_the_step_or_with_the_child() -> None:
    turn = Turn.make()
    with subprocess.Popen([sys.executable, "-c", CHILD, *map(str, turn.childs)], pass_fds=turn.childs) as child:
        turn.started()
        assert turn.wait() and turn.take() and turn.take()
        assert not turn.take(), "the child has ended instead"
        child.wait()
        assert not turn.take(), "nobody reads any more"
        turn.end()


def test_slower_than_unsloth_is_judged_by_the_median_of_paired_repeats() -> None:
    # The machine halves its speed in the second repeat, for both.
    require_not_slower(comparison([99, 50, 98], [100, 50, 100]))
    with pytest.raises(GateFailed, match=r"0\.960 of the tokens/s"):
        require_not_slower(comparison([96, 48, 120], [100, 50, 100]))


def test_other_batches_are_no_comparison() -> None:
    ours = timed("medcot", [1, 2, 3], first_loss=2.0)
    require_same_batches({"medcot": [ours], "trl": [timed("trl", [1, 2, 3], first_loss=2.02)]})
    with pytest.raises(MedcotError, match=r"2\.0000 by medcot and 2\.1000 by TRL \+ PEFT: they did not train on"):
        require_same_batches({"medcot": [ours], "trl": [timed("trl", [1, 2, 3], first_loss=2.1)]})


@pytest.mark.e2e
def test_the_three_ways_train_the_same(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", hidden=128, feed_forward=256, layers=2)
    command = [sys.executable, "-m", "bench.training", "--set", f"model.base={base}", "--steps", "4"]
    command += ["--set", "training.batch_size=2", "--set", "training.gradient_accumulation=2"]
    outcome = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    result = TrainingComparison.model_validate(json.loads(outcome.stdout))
    assert [each.way for each in result.ways] == ["medcot", "unsloth", "trl"]
    assert all(each.tokens_per_second[0] > 0 and each.peak_memory_bytes[0] > 100e6 for each in result.ways)
    for each in result.ways[1:]:
        assert each.losses == pytest.approx(result.ways[0].losses, rel=0.03)
    assert "Unsloth directly" in outcome.stderr
