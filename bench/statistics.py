"""Intervals for what a benchmark reports, and for the difference of two models on the same records.

Every interval is 95 % and every estimate carries its number of records: thirty held-out records decide much
less than their mean suggests. A statistic is made of numbers that each record contributes and that are added up
(``parts``, shape (records, parts)) and a function of their sums, shape (draws, parts) -> (draws,): resampling is then
a matter of counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.results import Estimate, Verdict

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal
RESAMPLES = 2000
ERROR = 0.05
# Of few records a percentile interval is too narrow (Hesterberg 2015, https://arxiv.org/abs/1411.5279).
LEAST_RECORDS = 20
_PAIRED_RESAMPLES = 10_000
_RESAMPLES_PER_COMPARISON = 1_000  # 25 draws in either tail, whatever the number of comparisons
_CHUNK = 1_000


@dataclass(frozen=True)
class Difference:
    """One model minus another, with its interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int) -> Estimate:
    """A rate with Wilson's score interval, which stays in [0, 1] and does not collapse at 0 or n successes.

    https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval#Wilson_score_interval
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}")
    z2 = NORMAL_95**2
    rate = successes / n
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # The exact bounds are 0 and 1 at the extremes; rounding would put them a hair inside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Estimate(value=rate, low=low, high=high, n=n)


def ratio(sums: Floats) -> Floats:
    """The statistic of parts (numerator, denominator)."""
    return sums[:, 0] / sums[:, 1]


def exp_ratio(sums: Floats) -> Floats:
    """Token-weighted perplexity, of parts (negative log-likelihood in nats, tokens)."""
    return np.exp(ratio(sums))


def total(statistic: Statistic, parts: Floats) -> float:
    """The statistic over all records."""
    return float(statistic(parts.sum(axis=0, keepdims=True))[0])


def bootstrap(statistic: Statistic, parts: Floats, seed: int = 0) -> Estimate:
    """The statistic with its percentile interval over records drawn with replacement.

    Records are drawn, since the tokens of one depend on each other (Efron and Tibshirani 1993, chapter 13).
    """
    drawn = np.concatenate([statistic(counts @ parts) for counts in _draws(len(parts), RESAMPLES, seed)])
    low, high = np.percentile(drawn, (100 * ERROR / 2, 100 - 100 * ERROR / 2))
    return Estimate(value=total(statistic, parts), low=float(low), high=float(high), n=len(parts))


def perplexity(nll: Sequence[float], tokens: Sequence[int], seed: int = 0) -> Estimate:
    """Token-weighted perplexity over records, ``exp(sum(nll) / sum(tokens))``.

    ``nll`` holds one sum of negative log-likelihoods (nats) a record.
    """
    if len(nll) != len(tokens) or sum(tokens) <= 0:
        raise ValueError(f"{len(nll)} sums of log-likelihood, {sum(tokens)} tokens of {len(tokens)} records")
    return bootstrap(exp_ratio, np.column_stack([nll, tokens]).astype(np.float64), seed)


def paired_difference(
    statistic: Statistic, parts: Floats, reference: Floats, *, comparisons: int = 1, seed: int = 0
) -> Difference:
    """The statistic of ``parts`` minus that of ``reference``, both of the same records in the same order.

    A draw takes the same records of both, and the difference is resampled, not the statistic (Koehn 2004,
    https://aclanthology.org/W04-3250). The interval is wide enough for so many ``comparisons`` to hold together at
    95 % (Bonferroni).
    """
    if parts.shape != reference.shape:
        raise ValueError(f"not the same records: {parts.shape} and {reference.shape}")
    resamples = max(_PAIRED_RESAMPLES, _RESAMPLES_PER_COMPARISON * comparisons)
    differences = np.concatenate(
        [statistic(counts @ parts) - statistic(counts @ reference) for counts in _draws(len(parts), resamples, seed)]
    )
    tail = 100 * ERROR / comparisons / 2
    low, high = np.percentile(differences, (tail, 100 - tail))
    return Difference(total(statistic, parts) - total(statistic, reference), float(low), float(high))


def paired_rates(successes: Sequence[bool], reference: Sequence[bool]) -> Difference:
    """The difference of two rates on the same records with Newcombe's score interval.

    Newcombe 1998, Statistics in Medicine 17:2635, method 10: Wilson's intervals of both rates, squared and added, with
    the correlation corrected for continuity. Unlike a bootstrap's it does not collapse where all records agree.
    """
    n, both, only_first, only_second = _paired_counts(successes, reference)
    neither = n - both - only_first - only_second
    first, second = wilson(both + only_first, n), wilson(both + only_second, n)
    product = both * neither - only_first * only_second
    corrected = max(product - n / 2, 0) if product > 0 else product
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    difference = first.value - second.value
    return Difference(
        difference,
        difference - distance(first.value - first.low, second.high - second.value),
        difference + distance(first.high - first.value, second.value - second.low),
    )


def mcnemar(successes: Sequence[bool], reference: Sequence[bool]) -> float:
    """McNemar's exact two-sided p-value: of the records where only one succeeded, each is a fair coin's throw.

    Fay 2010, https://doi.org/10.1093/biostatistics/kxp050.
    """
    _, _, only_first, only_second = _paired_counts(successes, reference)
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def verdict(difference: Difference, better: Literal["higher", "lower"] | None) -> Verdict:
    """What a difference shows; nothing where the interval contains zero."""
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    direction: Literal["higher", "lower"] = "higher" if difference.low > 0 else "lower"
    if better is None:
        return direction
    return "better" if direction == better else "worse"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of the values lie, interpolated linearly."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), 100 * share))


def _paired_counts(successes: Sequence[bool], reference: Sequence[bool]) -> tuple[int, int, int, int]:
    """Records, and of them those where both, only the first and only the second succeeded."""
    pairs = list(zip(successes, reference, strict=True))
    return (
        len(pairs),
        sum(one and other for one, other in pairs),
        sum(one and not other for one, other in pairs),
        sum(other and not one for one, other in pairs),
    )


def _draws(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each record is in a draw of ``n`` with replacement; chunks of shape (draws, n)."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        yield random.multinomial(n, np.full(n, 1 / n), size=min(_CHUNK, resamples - start)).astype(np.float64)
