"""Whether an experiment differs from the primary one: paired bootstrap over the held-out records.

A sweep makes many comparisons, of which some would look like findings by chance alone: the intervals hold at 95 % for
all of them together (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bench import statistics
from bench.statistics import Floats, Statistic, ratio
from bench.text_metrics import bleu_4_of_sums, bleu_counts, rouge
from pipeline.results import Measurement, Verdict

MeasureKey = Literal["held_out_loss", "rouge_l", "bleu_4"]
JOINT_ERROR = statistics.ERROR


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
    value: Statistic


MEASURES = (
    Measure("held_out_loss", "Held-out loss", False, lambda record: (record.nll, record.tokens), ratio),
    Measure("rouge_l", "ROUGE-L", True, lambda record: (rouge(record.answer, record.reference).rouge_l, 1), ratio),
    Measure("bleu_4", "BLEU-4", True, lambda record: bleu_counts(record.answer, record.reference), bleu_4_of_sums),
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


def compare(
    measure: Measure,
    experiment: Floats,
    primary: Floats,
    comparisons: int,
    seed: int,
) -> Difference:
    """``experiment`` and ``primary`` are ``measured`` on the same records, in order; one of so many ``comparisons``."""
    found = statistics.paired_difference(measure.value, experiment, primary, comparisons=comparisons, seed=seed)
    better: Literal["higher", "lower"] = "higher" if measure.higher_is_better else "lower"
    few = len(primary) < statistics.LEAST_RECORDS
    return Difference(
        value=found.value,
        low=found.low,
        high=found.high,
        verdict="too few records" if few else statistics.verdict(found, better),
    )
