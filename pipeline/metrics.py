"""The metrics of an evaluation: what each is called, which way is better, and how it is shown.

``ModelEvaluation`` has a field for each ``key``, None where it was not measured; ``evaluation.gates`` names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MetricKey = Literal[
    "perplexity", "reasoning_perplexity", "answer_perplexity", "rouge_1", "rouge_2", "rouge_l", "bleu_4",
    "well_formed", "closed_thought", "answered", "truncated", "looping", "thought_tokens", "new_tokens",
    "choice_accuracy", "calibration_error", "brier_score", "generative_accuracy", "unextracted",
]  # fmt: skip
Kind = Literal["perplexity", "rate", "score", "tokens"]


@dataclass(frozen=True)
class Metric:
    """A ``rate`` is a share of records with Wilson's interval; a ``score`` lies between 0 and 1 (Brier: 0 and 2).

    ``needs`` is what a record must have for it.
    """

    key: MetricKey
    name: str
    kind: Kind
    better: Literal["higher", "lower"] | None
    needs: Literal["reasoning", "options"] | None = None


METRICS = (
    Metric("perplexity", "Perplexity of the reference, reasoning and answer", "perplexity", "lower"),
    Metric("reasoning_perplexity", "Perplexity of the reference reasoning", "perplexity", "lower", needs="reasoning"),
    Metric("answer_perplexity", "Perplexity of the reference answer", "perplexity", "lower"),
    Metric("rouge_1", "ROUGE-1 of the answer", "score", "higher"),
    Metric("rouge_2", "ROUGE-2 of the answer", "score", "higher"),
    Metric("rouge_l", "ROUGE-L of the answer", "score", "higher"),
    Metric("bleu_4", "BLEU-4 of the answers", "score", "higher"),
    Metric("well_formed", "One closed thought, then an answer", "rate", "higher"),
    Metric("closed_thought", "Exactly one closed thought", "rate", "higher"),
    Metric("answered", "Answer that is not empty", "rate", "higher"),
    Metric("truncated", "Cut off at the limit", "rate", "lower"),
    Metric("looping", "Ended in a loop", "rate", "lower"),
    Metric("thought_tokens", "Tokens of the thought, mean", "tokens", None),
    Metric("new_tokens", "New tokens, mean", "tokens", None),
    Metric("choice_accuracy", "Multiple choice by likelihood, accuracy", "rate", "higher", needs="options"),
    Metric("calibration_error", "Expected calibration error", "score", "lower", needs="options"),
    Metric("brier_score", "Brier score (0 to 2)", "score", "lower", needs="options"),
    Metric("generative_accuracy", "Multiple choice by its own answer, accuracy", "rate", "higher", needs="options"),
    Metric("unextracted", "No option found in its answer", "rate", "lower", needs="options"),
)
METRIC_BY_KEY = {metric.key: metric for metric in METRICS}
