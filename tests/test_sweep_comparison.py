"""Paired bootstrap: its intervals hold what they promise, and noise is not called a finding."""

import numpy as np
import pytest

from bench.statistics import LEAST_RECORDS, total
from bench.sweep_comparison import MEASURES, ScoredRecord, compare, measured

LOSS, ROUGE, BLEU = MEASURES


def losses(values: np.ndarray) -> np.ndarray:
    """Records of a hundred tokens each with these losses a token."""
    return np.stack([values * 100, np.full(len(values), 100.0)], axis=1)


def test_a_measure_over_records_is_weighted_by_its_parts() -> None:
    records = [ScoredRecord(10.0, 5, "the cat is here now", "the cat is here now")]
    records += [ScoredRecord(2.0, 10, "a dog", "no cat")]
    assert total(LOSS.value, measured(LOSS, records)) == pytest.approx(12 / 15)
    assert total(ROUGE.value, measured(ROUGE, records)) == pytest.approx(0.5)
    assert 0 < total(BLEU.value, measured(BLEU, records)) < 1


def test_the_same_answers_show_no_difference() -> None:
    records = [ScoredRecord(float(n), 5, f"answer {n}", f"answer number {n}") for n in range(1, 31)]
    for measure in MEASURES:
        parts = measured(measure, records)
        difference = compare(measure, parts, parts, comparisons=9, seed=0)
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)
        assert difference.verdict == "no difference shown"


def test_pairing_finds_a_small_difference_that_spread_between_records_would_hide() -> None:
    random = np.random.default_rng(0)
    primary = random.normal(2.0, 0.5, 50)
    experiment = primary - 0.05 + random.normal(0, 0.02, 50)
    difference = compare(LOSS, losses(experiment), losses(primary), comparisons=9, seed=0)
    assert difference.verdict == "better"
    assert difference.low < -0.05 < difference.high < 0
    worse = compare(LOSS, losses(primary), losses(experiment), comparisons=9, seed=0)
    assert worse.verdict == "worse" and worse.value == pytest.approx(-difference.value)


def test_the_interval_has_the_width_that_theory_gives() -> None:
    change = np.random.default_rng(1).normal(0, 0.1, 400)
    primary = np.full(400, 2.0)
    difference = compare(LOSS, losses(primary + change), losses(primary), comparisons=1, seed=0)
    half = 1.96 * change.std() / 20
    assert difference.high - difference.low == pytest.approx(2 * half, rel=0.05)
    # Two-sided normal quantile of 0.05 / 10.
    joint = compare(LOSS, losses(primary + change), losses(primary), comparisons=10, seed=0)
    assert (joint.high - joint.low) / (difference.high - difference.low) == pytest.approx(2.807 / 1.96, rel=0.06)


@pytest.mark.broad
def test_noise_is_seldom_called_a_finding_in_a_whole_sweep() -> None:
    """Five experiments that do not differ, thirty records each: at most about 5 % of sweeps may name a difference."""
    random = np.random.default_rng(2)
    sweeps_with_a_finding = 0
    for seed in range(60):
        primary = random.normal(2.0, 0.5, 30)
        found = {
            compare(LOSS, losses(primary + random.normal(0, 0.1, 30)), losses(primary), 5, seed).verdict
            for _ in range(5)
        }
        sweeps_with_a_finding += found != {"no difference shown"}
    assert sweeps_with_a_finding <= 8  # exceeded by chance once in a thousand if the rate is 5 %


def test_few_records_have_no_verdict() -> None:
    primary = np.full(LEAST_RECORDS - 1, 2.0)
    difference = compare(LOSS, losses(primary - 1), losses(primary), comparisons=1, seed=0)
    assert difference.verdict == "too few records" and difference.value == pytest.approx(-1)


def test_records_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="not the same records"):
        compare(LOSS, losses(np.ones(30)), losses(np.ones(29)), comparisons=1, seed=0)
