"""Which file to ship: the smallest that stays inside a quality budget and a memory budget."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import QualityBudget
from pipeline.results import FileQuality, Recommendation, Speed


def recommend(
    speeds: Sequence[Speed], quality: Sequence[FileQuality], budget: QualityBudget, memory_budget_gb: float | None
) -> Recommendation:
    """Of the files whose quality was measured; the reason is one sentence for people."""
    measured = {speed.model: speed for speed in speeds}
    pairs = [(measured[file.model], file) for file in quality if file.model in measured]
    if not pairs:
        return Recommendation(model=None, reason="None: quality was not measured, and speed alone decides nothing.")
    pairs.sort(key=lambda pair: pair[0].file_bytes or 0)
    refused: list[str] = []
    for speed, file in pairs:
        objection = _objection(speed, file, budget, memory_budget_gb)
        if objection is None:
            return Recommendation(model=speed.model, reason=_reason(speed, file, refused, memory_budget_gb))
        refused.append(f"{speed.model} {objection}")
    return Recommendation(model=None, reason=f"None is inside the budgets: {'; '.join(refused)}.")


def _objection(speed: Speed, file: FileQuality, budget: QualityBudget, memory_budget_gb: float | None) -> str | None:
    if file.whole.mean_kl.value > budget.max_mean_kl:
        return f"diverges by {file.whole.mean_kl.value:.3f} nats a token (at most {budget.max_mean_kl:g})"
    if file.whole.top1_agreement.value < budget.min_top1_agreement:
        agreement = file.whole.top1_agreement.value
        return f"finds the same token likeliest in {agreement:.1%} (at least {budget.min_top1_agreement:.1%})"
    if memory_budget_gb is not None and speed.peak_memory_bytes > memory_budget_gb * 1e9:
        return f"takes {speed.peak_memory_bytes / 1e9:.1f} GB of memory (at most {memory_budget_gb:g})"
    return None


def _reason(speed: Speed, file: FileQuality, refused: Sequence[str], memory_budget_gb: float | None) -> str:
    memory = f"{speed.peak_memory_bytes / 1e9:.2f} GB of memory"
    if memory_budget_gb is not None:
        memory += f" (of {memory_budget_gb:g})"
    if file.model == file.reference:
        kept = "it is the most exact file"
    else:
        kept = (
            f"against {file.reference} it diverges by {file.whole.mean_kl.value:.3f} nats a token and finds the same "
            f"token likeliest in {file.whole.top1_agreement.value:.1%} of {file.whole.tokens} tokens"
        )
    smaller = f"; smaller ones do not stay inside: {'; '.join(refused)}" if refused else ""
    return f"{speed.model} is the smallest file inside the budgets: {kept}, and it takes {memory}{smaller}."
