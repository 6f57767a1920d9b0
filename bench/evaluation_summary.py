"""From the records' outcomes to a model's metrics, and to the difference of two models on the same records.

Intervals and verdicts hold one metric at a time: of twenty differences that are none, one is named by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from bench import statistics
from bench.multiple_choice import ChoiceOutcome, calibration_bins, calibration_error, calibration_parts
from bench.record_outcome import Likelihood, RecordOutcome
from bench.statistics import Difference, Floats, Statistic
from bench.text_metrics import bleu_4_of_sums
from pipeline.metrics import METRICS, MetricKey
from pipeline.results import Comparison, EngineName, Estimate, ModelEvaluation, Verdict

Role = Literal["tuned", "base"]


@dataclass(frozen=True)
class Measured:
    """A model's records in order: the first so many have a likelihood, and the first of these an answer too."""

    scored: Sequence[Likelihood]
    answered: Sequence[RecordOutcome]

    def of(self, key: MetricKey) -> Sequence[RecordOutcome]:
        # What a likelihood's metric reads is there in both.
        return cast("Sequence[RecordOutcome]", self.scored) if key in _OF_LIKELIHOOD else self.answered


@dataclass(frozen=True)
class _Numbers:
    """What a metric takes of the records it ``applies`` to; ``statistic`` None is a rate of successes."""

    parts: Callable[[Sequence[RecordOutcome]], Floats]
    statistic: Statistic | None = None
    applies: Callable[[RecordOutcome], bool] = lambda record: True


def _each(*values: Callable[[RecordOutcome], float]) -> Callable[[Sequence[RecordOutcome]], Floats]:
    return lambda records: np.array([[value(record) for value in values] for record in records], dtype=np.float64)


def _rate(success: Callable[[RecordOutcome], bool]) -> _Numbers:
    return _Numbers(_each(success))


def _mean(value: Callable[[RecordOutcome], float]) -> _Numbers:
    return _Numbers(_each(value, lambda record: 1), statistics.ratio)


def _perplexity(nll: Callable[[Likelihood], float], tokens: Callable[[Likelihood], int]) -> _Numbers:
    return _Numbers(_each(nll, tokens), statistics.exp_ratio, lambda record: tokens(record) > 0)


def _choice(record: RecordOutcome) -> ChoiceOutcome:
    if record.choice is None:
        raise ValueError(f"record {record.key} was not asked as multiple choice")
    return record.choice


def _choice_rate(success: Callable[[ChoiceOutcome], bool]) -> _Numbers:
    return _Numbers(_each(lambda record: success(_choice(record))), None, _was_asked)


def _was_asked(record: RecordOutcome) -> bool:
    return record.choice is not None


_OF_LIKELIHOOD: frozenset[MetricKey] = frozenset({"perplexity", "reasoning_perplexity", "answer_perplexity"})
_NUMBERS: dict[MetricKey, _Numbers] = {
    "perplexity": _perplexity(lambda r: r.reasoning_nll + r.answer_nll, lambda r: r.reasoning_tokens + r.answer_tokens),
    "reasoning_perplexity": _perplexity(lambda r: r.reasoning_nll, lambda r: r.reasoning_tokens),
    "answer_perplexity": _perplexity(lambda r: r.answer_nll, lambda r: r.answer_tokens),
    "rouge_1": _mean(lambda r: r.rouge_1),
    "rouge_2": _mean(lambda r: r.rouge_2),
    "rouge_l": _mean(lambda r: r.rouge_l),
    "bleu_4": _Numbers(lambda records: np.array([r.bleu_counts for r in records], dtype=np.float64), bleu_4_of_sums),
    "well_formed": _rate(lambda r: r.well_formed),
    "closed_thought": _rate(lambda r: r.closed_thought),
    "answered": _rate(lambda r: bool(r.answer)),
    "truncated": _rate(lambda r: not r.finished),
    "looping": _rate(lambda r: r.looping),
    "thought_tokens": _Numbers(
        _each(lambda r: r.thought_tokens or 0, lambda r: 1), statistics.ratio, lambda r: r.thought_tokens is not None
    ),
    "new_tokens": _mean(lambda r: r.new_tokens),
    "choice_accuracy": _choice_rate(lambda choice: choice.likeliest_is_right),
    "calibration_error": _Numbers(
        lambda records: calibration_parts([_choice(r) for r in records]), calibration_error, _was_asked
    ),
    "brier_score": _Numbers(_each(lambda r: _choice(r).brier_score, lambda r: 1), statistics.ratio, _was_asked),
    "generative_accuracy": _choice_rate(lambda choice: choice.extracted_is_right),
    "unextracted": _choice_rate(lambda choice: choice.extracted is None),
}


def summarize(model: str, role: Role, measured: Measured, seed: int, engine: EngineName) -> ModelEvaluation:
    """Every metric that the records allow; ``engine`` wrote the answers."""
    records = measured.answered
    found: dict[str, Estimate | None] = {
        metric.key: _estimate(metric.key, measured.of(metric.key), seed) for metric in METRICS
    }
    choices = [record.choice for record in records if record.choice is not None]
    return ModelEvaluation.model_validate(
        {
            "model": model,
            "role": role,
            "engine": engine,
            **found,
            "finished": statistics.wilson(sum(record.finished for record in records), len(records))
            if records
            else None,
            "mean_new_tokens": sum(record.new_tokens for record in records) / max(1, len(records)),
            "choice_chance": float(np.mean([1 / len(choice.log_probabilities) for choice in choices]))
            if choices
            else None,
            "choice_own_thoughts": sum(choice.own_thought for choice in choices) if choices else None,
            "calibration": calibration_bins(choices) if choices else [],
        }
    )


def _estimate(key: MetricKey, records: Sequence[RecordOutcome], seed: int) -> Estimate | None:
    numbers = _NUMBERS[key]
    chosen = [record for record in records if numbers.applies(record)]
    if not chosen:
        return None
    parts = numbers.parts(chosen)
    if numbers.statistic is None:
        return statistics.wilson(int(parts.sum()), len(parts))
    return statistics.bootstrap(numbers.statistic, parts, seed)


def compare(
    model: str, measured: Measured, reference: str, reference_measured: Measured, seed: int
) -> list[Comparison]:
    """``model`` minus ``reference`` for every metric that both have; their records are the same, in the same order."""
    comparisons = []
    for metric in METRICS:
        numbers = _NUMBERS[metric.key]
        pairs = [
            (one, other)
            for one, other in zip(measured.of(metric.key), reference_measured.of(metric.key), strict=True)
            if numbers.applies(one) and numbers.applies(other)
        ]
        if not pairs:
            continue
        ours, theirs = (numbers.parts([pair[side] for pair in pairs]) for side in (0, 1))
        p_value = None
        if numbers.statistic is None:
            successes, reference_successes = (list(map(bool, parts[:, 0])) for parts in (ours, theirs))
            difference = statistics.paired_rates(successes, reference_successes)
            p_value = statistics.mcnemar(successes, reference_successes)
        else:
            difference = statistics.paired_difference(numbers.statistic, ours, theirs, seed=seed)
        comparisons.append(
            Comparison(
                model=model,
                reference=reference,
                metric=metric.key,
                n=len(pairs),
                difference=difference.value,
                low=difference.low,
                high=difference.high,
                p_value=p_value,
                verdict=_verdict(difference, metric.better, len(pairs), p_value),
            )
        )
    return comparisons


def _verdict(
    difference: Difference, better: Literal["higher", "lower"] | None, n: int, p_value: float | None
) -> Verdict:
    """An exact test holds for any number of records, a bootstrap does not."""
    if p_value is None and n < statistics.LEAST_RECORDS:
        return "too few records"
    if p_value is not None and p_value > statistics.ERROR:
        return "no difference shown"
    return statistics.verdict(difference, better)
