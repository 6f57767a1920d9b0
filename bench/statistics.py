"""Intervals for what a benchmark reports: rates, means and perplexities over records.

Every interval is 95 % and every estimate carries its number of records: thirty held-out records decide much
less than their mean suggests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.results import Estimate

NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal
RESAMPLES = 2000


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


def perplexity(nll: Sequence[float], tokens: Sequence[int], seed: int = 0) -> Estimate:
    """Token-weighted perplexity over records, ``exp(sum(nll) / sum(tokens))``, with a percentile bootstrap.

    ``nll`` holds one sum of negative log-likelihoods (nats) a record. Records are resampled, since the tokens
    of one record depend on each other (Efron and Tibshirani 1993, chapter 13).
    """
    numerator, denominator = np.asarray(nll, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if numerator.shape != denominator.shape or numerator.ndim != 1 or denominator.sum() <= 0:
        raise ValueError(f"{numerator.shape} sums of log-likelihood, {denominator.sum():.0f} tokens")
    low, high = np.percentile(_resampled_ratios(numerator, denominator, seed), (2.5, 97.5))
    value = numerator.sum() / denominator.sum()
    return Estimate(value=math.exp(value), low=math.exp(low), high=math.exp(high), n=len(numerator))


def _resampled_ratios(
    numerator: npt.NDArray[np.float64], denominator: npt.NDArray[np.float64], seed: int
) -> npt.NDArray[np.float64]:
    """``sum(numerator) / sum(denominator)`` of RESAMPLES draws of the records with replacement."""
    random = np.random.default_rng(seed)
    n = len(numerator)
    ratios = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = random.integers(0, n, n)
        ratios[index] = numerator[drawn].sum() / denominator[drawn].sum()
    return ratios


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of the values lie, interpolated linearly."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), 100 * share))
