"""Base against tuned on held-out records."""

from __future__ import annotations

from dataclasses import dataclass

from bench.page import Section, Table, Tone, percent
from pipeline.results import Estimate, Evaluation, ModelEvaluation


@dataclass(frozen=True)
class Metric:
    """One measure of both models; ``decisive`` ones are part of the decision."""

    name: str
    tuned: Estimate
    base: Estimate
    higher_is_better: bool
    is_rate: bool
    decisive: bool = False

    @property
    def verdict(self) -> tuple[str, Tone]:
        """Better or worse only where the 95 % intervals are apart, which is stricter than a paired test."""
        above, below = self.tuned.low > self.base.high, self.tuned.high < self.base.low
        if not above and not below:
            return "no difference shown", "neutral"
        return ("tuned is better", "good") if above == self.higher_is_better else ("tuned is worse", "bad")

    def show(self, estimate: Estimate) -> str:
        if self.is_rate:
            return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"
        return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def metrics(tuned: ModelEvaluation, base: ModelEvaluation) -> list[Metric]:
    metrics = [
        Metric(
            "Perplexity of the reference answer",
            tuned.answer_perplexity,
            base.answer_perplexity,
            False,
            False,
            True,
        )
    ]
    if tuned.reasoning_perplexity is not None and base.reasoning_perplexity is not None:
        metrics += [
            Metric(
                "Perplexity of the reference reasoning",
                tuned.reasoning_perplexity,
                base.reasoning_perplexity,
                False,
                False,
            ),
            Metric("One closed thought, then an answer", tuned.well_formed, base.well_formed, True, True, True),
        ]
    return [*metrics, Metric("Ended its turn itself", tuned.finished, base.finished, True, True)]


def by_role(evaluation: Evaluation) -> tuple[ModelEvaluation | None, ModelEvaluation | None]:
    first = {model.role: model for model in reversed(evaluation.models)}
    return first.get("tuned"), first.get("base")


def evaluation_section(evaluation: Evaluation | None) -> Section | None:
    if evaluation is None:
        return None
    tuned, base = by_role(evaluation)
    if tuned is None or base is None:
        return _single_evaluations(evaluation)
    rows = tuple(
        (
            metric.name,
            metric.show(metric.base),
            metric.show(metric.tuned),
            metric.verdict[0],
            str(metric.tuned.n),
        )
        for metric in metrics(tuned, base)
    )
    length = ("New tokens, mean", f"{base.mean_new_tokens:.0f}", f"{tuned.mean_new_tokens:.0f}", "", "")
    return Section(
        "Base against tuned",
        (f"Base is {base.model}, tuned is {tuned.model}; held-out records, greedy decoding.",),
        (
            Table(
                ("Measure", "Base", "Tuned", "Verdict", "Records"),
                "lrrlr",
                (*rows, length),
                "In brackets the 95 % interval: bootstrap over records for perplexities, Wilson for rates. "
                "A verdict other than 'no difference shown' needs intervals that do not overlap. "
                "Lower perplexity is better.",
            ),
        ),
    )


def _single_evaluations(evaluation: Evaluation) -> Section:
    rows = tuple(
        (model.model, metric.name, metric.show(metric.tuned), str(metric.tuned.n))
        for model in evaluation.models
        for metric in metrics(model, model)
    )
    note = "In brackets the 95 % interval."
    return Section("Evaluation", tables=(Table(("Model", "Measure", "Value", "Records"), "llrr", rows, note),))
