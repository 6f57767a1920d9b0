import math

import numpy as np
import pytest

from bench import statistics


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # R: prop.test(x, n, correct = FALSE)$conf.int
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (15, 30, 0.3315345, 0.6684655),
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_matches_published_values(successes: int, n: int, low: float, high: float) -> None:
    estimate = statistics.wilson(successes, n)
    assert estimate.value == successes / n
    assert estimate.n == n
    assert estimate.low == pytest.approx(low, abs=6e-5)
    assert estimate.high == pytest.approx(high, abs=6e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_counts_that_cannot_be(successes: int, n: int) -> None:
    with pytest.raises(ValueError):
        statistics.wilson(successes, n)


def test_perplexity_weighs_tokens_not_records() -> None:
    estimate = statistics.perplexity([1.0, 99.0], [1, 33])
    assert estimate.value == pytest.approx(math.exp(100 / 34))
    assert estimate.n == 2


def test_perplexity_of_records_that_agree_has_no_spread() -> None:
    estimate = statistics.perplexity([2.0, 4.0, 8.0], [1, 2, 4])
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((math.exp(2),) * 3)


def test_perplexity_interval_is_reproducible_and_close_to_the_normal_one() -> None:
    random = np.random.default_rng(5)
    tokens = [50] * 400
    nll = [float(value) for value in random.normal(100.0, 10.0, 400)]
    estimate = statistics.perplexity(nll, tokens, seed=1)
    assert estimate == statistics.perplexity(nll, tokens, seed=1)
    # With equal lengths the ratio is a mean, whose interval theory gives.
    half = 1.96 * np.std(nll, ddof=1) / math.sqrt(400) / 50
    assert math.log(estimate.low) == pytest.approx(math.log(estimate.value) - half, abs=0.1 * half)
    assert math.log(estimate.high) == pytest.approx(math.log(estimate.value) + half, abs=0.1 * half)


def test_perplexity_interval_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(11)
    covered = 0
    for _ in range(40):
        tokens = random.integers(20, 80, 60)
        nll = tokens * 1.5 + random.normal(0, 1, 60) * np.sqrt(tokens)
        estimate = statistics.perplexity(list(nll), list(tokens), seed=3)
        covered += estimate.low <= math.exp(1.5) <= estimate.high
    assert covered >= 33  # below 33 of 40 a true 95 % interval falls once in two hundred times


def test_perplexity_needs_tokens() -> None:
    with pytest.raises(ValueError):
        statistics.perplexity([], [])
    with pytest.raises(ValueError):
        statistics.perplexity([1.0], [0])


def test_percentile_interpolates() -> None:
    assert statistics.percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert statistics.percentile([5.0], 0.9) == 5.0


def pairs(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Altman, Machin, Bryant and Gardner 2000, Statistics with Confidence, table 6.2 and the example on page 52
        ((14, 5, 0, 22), 0.011, 0.226),
        # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850: airway hyper-responsiveness
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
)
def test_paired_rates_match_published_intervals(table: tuple[int, int, int, int], low: float, high: float) -> None:
    first, second = pairs(*table)
    found = statistics.paired_rates(first, second)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-4)
    assert found.value == pytest.approx((table[1] - table[2]) / sum(table))
    turned = statistics.paired_rates(second, first)
    assert (turned.low, turned.high) == pytest.approx((-high, -low), abs=6e-4)


def test_paired_rates_of_records_that_agree_keep_an_interval() -> None:
    all_or_none = statistics.paired_rates([True] * 24, [False] * 24)
    assert all_or_none.value == 1 and 0.7 < all_or_none.low < 1 and all_or_none.high == pytest.approx(1)
    same = statistics.paired_rates([True] * 24, [True] * 24)
    assert same.value == 0 and same.low < 0 < same.high


@pytest.mark.parametrize(
    ("table", "p_value"),
    [
        # R, exact2x2::mcnemar.exact on Agresti's (1990, p. 350) approval ratings
        ((794, 86, 150, 570), 3.716e-05),
        # scipy.stats.binomtest(1, 8).pvalue, the test of Fagerland et al. 2013 for the table above
        ((1, 1, 7, 12), 0.0703125),
        ((0, 5, 0, 0), 2 / 2**5),
        ((9, 3, 3, 9), 1.0),
        ((9, 0, 0, 9), 1.0),
    ],
)
def test_mcnemar_matches_published_values(table: tuple[int, int, int, int], p_value: float) -> None:
    assert statistics.mcnemar(*pairs(*table)) == pytest.approx(p_value, rel=2e-4)


def test_a_verdict_needs_a_direction_and_an_interval_without_zero() -> None:
    def difference(low: float, high: float) -> statistics.Difference:
        return statistics.Difference((low + high) / 2, low, high)

    assert statistics.verdict(difference(-1, 0), "lower") == "no difference shown"
    assert statistics.verdict(difference(0.1, 1), "higher") == "better"
    assert statistics.verdict(difference(0.1, 1), "lower") == "worse"
    assert statistics.verdict(difference(-1, -0.1), "lower") == "better"
    assert statistics.verdict(difference(-1, -0.1), None) == "lower"


def test_bootstrap_interval_of_a_mean_is_the_one_theory_gives() -> None:
    values = np.random.default_rng(8).normal(3.0, 1.0, 500)
    parts = np.column_stack([values, np.ones(500)])
    found = statistics.bootstrap(statistics.ratio, parts)
    half = 1.96 * values.std() / math.sqrt(500)
    assert found.value == pytest.approx(values.mean()) and found.n == 500
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.1 * half)
