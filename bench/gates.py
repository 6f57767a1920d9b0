"""Whether an evaluation passes its gates (``pipeline/gates.py``), and the numbers that say so."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import GateFailed
from pipeline.gates import Gate
from pipeline.results import (
    Comparison,
    Estimate,
    Evaluation,
    EvaluationEndedEarly,
    GateOutcome,
    ModelEvaluation,
)


def check_gates(
    gates: Sequence[Gate],
    models: Sequence[ModelEvaluation],
    comparisons: Sequence[Comparison],
    ended_early: EvaluationEndedEarly | None = None,
) -> list[GateOutcome]:
    """Each gate for each tuned model; what was not measured has not passed."""
    outcomes = []
    for model in models:
        if model.role != "tuned":
            continue
        for gate in gates:
            passed, detail = _check(gate, model, comparisons)
            if ended_early is not None:
                detail += (
                    f" (ended early: evaluation.max_minutes={ended_early.minutes:g}, of {ended_early.records} records; "
                    "with a larger limit the same command continues)"
                )
            outcomes.append(
                GateOutcome(
                    model=model.model, metric=gate.metric.key, condition=gate.condition, passed=passed, detail=detail
                )
            )
    return outcomes


def raise_if_failed(evaluation: Evaluation) -> None:
    """Raise GateFailed with the numbers of every gate that failed."""
    failed = [gate for gate in evaluation.gates if not gate.passed]
    if failed:
        several = f"{len(failed)} of {len(evaluation.gates)} gates" if len(evaluation.gates) > 1 else "The gate"
        raise GateFailed(f"{several} failed: {'; '.join(f'{gate.model}: {gate.detail}' for gate in failed)}.")


def _check(gate: Gate, model: ModelEvaluation, comparisons: Sequence[Comparison]) -> tuple[bool, str]:
    key = gate.metric.key
    wanted = f"{key} must be {gate.condition}"
    estimate: Estimate | None = getattr(model, key)
    if estimate is None:
        return False, gate.unmeasured
    found = f"is {_interval(estimate.value, estimate.low, estimate.high)} on {estimate.n} records"
    if gate.limit is not None:
        passed = estimate.value >= gate.limit if gate.relation == ">=" else estimate.value <= gate.limit
        return passed, f"{wanted} and {found}"
    compared = next((each for each in comparisons if (each.model, each.metric) == (model.model, key)), None)
    if compared is None:
        return False, f"{wanted}, it {found}, and no other model was measured to compare it with"
    passed = compared.verdict == "better" if gate.relation == "better" else compared.verdict != "worse"
    difference = _interval(compared.difference, compared.low, compared.high)
    p_value = "" if compared.p_value is None else f", McNemar's p {compared.p_value:.2g}"
    return passed, (
        f"{wanted} than {compared.reference}'s and {found}, a difference of {difference} on {compared.n}{p_value}: "
        f"{compared.verdict}"
    )


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.4g} ({low:.4g} to {high:.4g})"
