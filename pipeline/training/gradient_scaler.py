"""Steps that the gradient scaler of a float16 training skips, because a gradient overflowed in 16 bit.

The scaler starts with a factor of 2^16 and halves it at every overflow, so a few skipped steps at the beginning are
normal; a skipped step changes no weight (https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling).
"""

from __future__ import annotations

from pipeline.errors import MedcotError

_TOLERATED = 0.2  # of all steps
_REMEDY = "raise training.max_steps (the scaler needs some steps to find its factor) or set model.dtype=float32"


def is_tolerable(skipped: int, steps: int) -> bool:
    """Whether so few of ``steps`` were skipped that the result needs no warning."""
    return skipped <= _TOLERATED * steps


def skipped_steps_sentence(skipped: int, steps: int) -> str | None:
    """For the terminal and the report, with the remedy where too many were skipped; None when there were none."""
    if skipped == 0:
        return None
    found = f"{skipped} of {steps} steps were skipped by the gradient scaler, because gradients overflowed in float16"
    return f"{found}." if is_tolerable(skipped, steps) else f"{found}, and changed nothing: {_REMEDY}."


def require_a_step_taken(skipped: int, steps: int) -> None:
    """Raise MedcotError when each of ``steps`` was skipped: the adapter would be the untrained one."""
    if 0 < steps <= skipped:
        raise MedcotError(
            f"Nothing was trained, because gradients overflowed in float16 and the gradient scaler skipped all {steps} "
            f"steps: {_REMEDY}."
        )
