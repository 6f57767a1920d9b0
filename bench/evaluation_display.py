"""An evaluation on the terminal: a row a metric, a column a model, and what the comparison with the base shows."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.sections.evaluation import conditions
from pipeline.metrics import METRICS, Metric
from pipeline.results import Comparison, Estimate, Evaluation


def print_evaluation(evaluation: Evaluation) -> None:
    """On standard output: 95 % intervals in brackets, ``n`` records."""
    compared = {(each.model, each.metric): each for each in evaluation.comparisons}
    table = Table("metric", "n")
    for model in evaluation.models:
        table.add_column(model.model, justify="right", overflow="fold")
        if model.role == "tuned" and evaluation.comparisons:
            table.add_column("against the base")
    for metric in METRICS:
        estimates: list[Estimate | None] = [getattr(model, metric.key) for model in evaluation.models]
        if not any(estimates):
            continue
        cells = [metric.name, "/".join(sorted({str(estimate.n) for estimate in estimates if estimate}))]
        for model, estimate in zip(evaluation.models, estimates, strict=True):
            cells.append("-" if estimate is None else _estimate(metric, estimate))
            if model.role == "tuned" and evaluation.comparisons:
                cells.append(_comparison(compared.get((model.model, metric.key))))
        table.add_row(*cells)
    console = Console()
    console.print(table)
    for sentence in conditions(evaluation):
        console.print(sentence, markup=False, highlight=False)
    for model in evaluation.models:
        if model.choice_chance is not None:
            console.print(f"{model.model}: guessing reaches {model.choice_chance:.0%} of the multiple choice.")
    for gate in evaluation.gates:
        console.print(f"{'ok    ' if gate.passed else 'FAILED'}  {gate.detail}", markup=False)


def _estimate(metric: Metric, estimate: Estimate) -> str:
    numbers = (estimate.value, estimate.low, estimate.high)
    if metric.kind == "rate":
        value, low, high = (f"{100 * number:.0f} %" for number in numbers)
    else:
        digits = {"perplexity": 2, "score": 3, "tokens": 0}[metric.kind]
        value, low, high = (f"{number:.{digits}f}" for number in numbers)
    return f"{value} ({low} to {high})"


def _comparison(comparison: Comparison | None) -> str:
    if comparison is None:
        return "-"
    return comparison.verdict if comparison.p_value is None else f"{comparison.verdict} (p={comparison.p_value:.2g})"
