"""Whether an experiment differs from the primary one: paired bootstrap over the held-out records.

Both models answered the same records, so a draw takes the same ones of both and the difference of a measure is
resampled, not the measure (Koehn 2004, https://aclanthology.org/W04-3250). A sweep makes many such comparisons, of
which some would look like findings by chance alone: the intervals hold at 95 % for all of them together (Bonferroni).
Of few records a percentile interval is too narrow (Hesterberg 2015, https://arxiv.org/abs/1411.5279): there is no
verdict on fewer than LEAST_RECORDS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bench.text_metrics import bleu_4, bleu_counts, rouge_l
from pipeline.results import Measurement

MeasureKey = Literal["held_out_loss", "rouge_l", "bleu_4"]
Verdict = Literal["better", "worse", "no difference shown", "too few records"]
Floats = npt.NDArray[np.float64]
JOINT_ERROR = 0.05
LEAST_RECORDS = 20
_LEAST_RESAMPLES = 10_000
_RESAMPLES_PER_COMPARISON = 1_000  # 25 draws in either tail, whatever the number of comparisons
_CHUNK = 1_000


@dataclass(frozen=True)
class ScoredRecord:
    """One model on one held-out record: likelihood of the reference (nats, summed over its tokens), and its answer."""

    nll: float
    tokens: int
    answer: str
    reference: str


@dataclass(frozen=True)
class Measure:
    """``parts`` are a record's numbers; ``value`` is the measure, from sums of them: (draws, parts) -> (draws,)."""

    key: MeasureKey
    name: str
    higher_is_better: bool
    parts: Callable[[ScoredRecord], Sequence[float] | npt.NDArray[np.int64]]
    value: Callable[[Floats], Floats]


def _ratio(sums: Floats) -> Floats:
    return sums[:, 0] / sums[:, 1]


def _bleu_4(sums: Floats) -> Floats:
    return np.array([bleu_4(counts) for counts in np.rint(sums).astype(np.int64)])


MEASURES = (
    Measure("held_out_loss", "Held-out loss", False, lambda record: (record.nll, record.tokens), _ratio),
    Measure("rouge_l", "ROUGE-L", True, lambda record: (rouge_l(record.answer, record.reference), 1), _ratio),
    Measure("bleu_4", "BLEU-4", True, lambda record: bleu_counts(record.answer, record.reference), _bleu_4),
)


class Difference(Measurement):
    """Experiment minus primary with its joint 95 % interval; a verdict only where that does not contain zero."""

    value: float
    low: float
    high: float
    verdict: Verdict


def measured(measure: Measure, records: Sequence[ScoredRecord]) -> Floats:
    """The records' numbers for a measure, shape (records, parts)."""
    return np.array([measure.parts(record) for record in records], dtype=np.float64)


def total(measure: Measure, parts: Floats) -> float:
    """The measure over all records."""
    return float(measure.value(parts.sum(axis=0, keepdims=True))[0])


def compare(
    measure: Measure,
    experiment: Floats,
    primary: Floats,
    comparisons: int,
    seed: int,
) -> Difference:
    """``experiment`` and ``primary`` are ``measured`` on the same records, in order; one of so many ``comparisons``."""
    if experiment.shape != primary.shape:
        raise ValueError(f"not the same records: {experiment.shape} and {primary.shape}")
    resamples = max(_LEAST_RESAMPLES, _RESAMPLES_PER_COMPARISON * comparisons)
    differences = np.concatenate(
        [
            measure.value(drawn @ experiment) - measure.value(drawn @ primary)
            for drawn in _draws(len(primary), resamples, seed)
        ]
    )
    tail = 100 * JOINT_ERROR / comparisons / 2
    low, high = (float(bound) for bound in np.percentile(differences, (tail, 100 - tail)))
    verdict: Verdict
    if len(primary) < LEAST_RECORDS:
        verdict = "too few records"
    elif low <= 0 <= high:
        verdict = "no difference shown"
    else:
        verdict = "better" if (low > 0) == measure.higher_is_better else "worse"
    return Difference(value=total(measure, experiment) - total(measure, primary), low=low, high=high, verdict=verdict)


def _draws(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each record is in a draw of ``n`` with replacement; chunks of shape (draws, n)."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        yield random.multinomial(n, np.full(n, 1 / n), size=min(_CHUNK, resamples - start)).astype(np.float64)
