"""Checks on what a GGUF predicts: its logits, whether the adapter is in it, and that a turn ends where it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from export.verify_limits import LogitLimits
from export.verify_logits import LogitComparison, Logits, probability
from export.verify_probe import Answer
from pipeline.results import Check

# A reference that gives the end of the turn this probability ends it; without quantization the GGUF does so too.
_SURE = 0.9
# Quantized files end at least this share of those turns. Q4_0 of SmolLM2 brought 0.98 down to 0.43 once in 8.
_QUANTIZED_SHARE = 0.5
# An adapter that moves the predictions less than this share of the file's limit cannot be seen behind quantization.
_VISIBLE_SHARE = 0.1
_VISIBLE_KL = 1e-3  # nats; for files without quantization

Role = Literal["tuned", "base"]


@dataclass(frozen=True)
class Ending:
    """What follows the last word of a conversation's answer.

    ``probability`` is what the reference gives to ``end``, the token that ends the turn; ``found`` the GGUF's
    likeliest token.
    """

    end: int
    probability: float
    found: int

    @classmethod
    def of(cls, ids: Sequence[int], expected: Logits, found: Logits) -> Ending:
        return cls(ids[-1], probability(expected[-2], ids[-1]), int(found[-2].argmax()))


@dataclass(frozen=True)
class Distances:
    """Mean Kullback-Leibler divergences on one conversation (nats): of a file from the tuned model and from the base,
    and of the base from the tuned model."""

    from_tuned: float
    from_base: float
    between: float


def logit_checks(
    comparison: LogitComparison, limits: LogitLimits, sequences: Sequence[Sequence[int]], text: Callable[..., str]
) -> list[Check]:
    """Error or divergence, and agreement of the most likely token; ``text`` shows the end of a sequence of ids."""
    if not comparison.finite:
        return [Check(name="logits", passed=False, detail="the logits are not finite")]
    where = _first_disagreement(comparison, sequences, text)
    checks = []
    if limits.max_nmse is not None:
        passed = comparison.nmse < limits.max_nmse
        figures = f"normalized square error {comparison.nmse:.3g}, limit {limits.max_nmse:g}"
        detail = f"{figures}, {comparison.positions} positions"
        checks.append(Check(name="logit error", passed=passed, detail=detail if passed else detail + where))
    if limits.max_mean_kl is not None:
        passed = comparison.mean_kl < limits.max_mean_kl
        detail = (
            f"mean KL divergence {comparison.mean_kl:.3g} nats, limit {limits.max_mean_kl:.3g}; 99th percentile "
            f"{comparison.p99_kl:.3g}, {comparison.positions} positions"
        )
        checks.append(Check(name="logit divergence", passed=passed, detail=detail if passed else detail + where))
    passed = comparison.top1_agreement >= limits.min_top1
    detail = (
        f"{comparison.agreeing} of {comparison.positions} positions ({comparison.top1_agreement:.2%}), "
        f"limit {limits.min_top1:.2%}"
    )
    checks.append(Check(name="top-1 agreement", passed=passed, detail=detail if passed else detail + where))
    return checks


def _first_disagreement(
    comparison: LogitComparison, sequences: Sequence[Sequence[int]], text: Callable[..., str]
) -> str:
    first = comparison.first_disagreement
    if first is None:
        return ""
    before = sequences[first.sequence][: first.position + 1]
    return (
        f"; first at token {first.position} of conversation {first.sequence + 1}: after {text(before)!r} comes "
        f"{text([first.found])!r} instead of {text([first.expected])!r}"
    )


def adapter_check(role: Role, distances: Distances, limits: LogitLimits) -> Check:
    """The file has to be nearer to what it should be, the tuned model or the base, than to the other one."""
    visible = _VISIBLE_KL if limits.max_mean_kl is None else _VISIBLE_SHARE * limits.max_mean_kl
    figures = f"KL divergence {distances.from_tuned:.3g} from the tuned model, {distances.from_base:.3g} from the base"
    if distances.between < visible:
        detail = f"not to be seen: it changes predictions by {distances.between:.2g} nats only ({figures})"
        return Check(name="adapter", passed=True, detail=detail)
    nearer_to_tuned = distances.from_tuned < distances.from_base
    if nearer_to_tuned == (role == "tuned"):
        return Check(name="adapter", passed=True, detail=figures)
    fault = "the adapter is not merged" if role == "tuned" else "the adapter is in the base"
    return Check(name="adapter", passed=False, detail=f"{fault}: {figures}")


def end_of_turn_check(
    endings: Sequence[Ending], answer: Answer, limits: LogitLimits, text: Callable[..., str]
) -> Check:
    """Greedy decoding behind the reference's answers: where the reference ends its turn, llama.cpp has to stop.

    A model that does not end its turns, untrained as it is, is not blamed for it.
    """
    sure = [(number, each) for number, each in enumerate(endings, start=1) if each.probability >= _SURE]
    wrong = [(number, each) for number, each in sure if each.found != each.end or each.found not in answer.stop_ids]
    needed = len(sure) if limits.max_mean_kl is None else _QUANTIZED_SHARE * len(sure)
    passed = len(sure) - len(wrong) >= needed
    detail = f"llama.cpp stops after {len(sure) - len(wrong)} of {len(sure)} answers that the model surely ends"
    if not passed:
        number, ending = wrong[0]
        does = "stops" if ending.found in answer.stop_ids else "goes on"
        detail += (
            f"; first in conversation {number}: the model writes {text([ending.end])!r} (probability "
            f"{ending.probability:.3f}), llama.cpp {does} with {text([ending.found])!r}"
        )
    if answer.answer_tokens is not None:
        ended = "and ends" if answer.answer_ended else "without an end"
        detail += f"; it answers a question in {answer.answer_tokens} tokens {ended}"
    return Check(name="end of turn", passed=passed, detail=detail)
