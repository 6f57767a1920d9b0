"""Stops a training whose loss has left all bounds, before the optimizer makes it worse."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from pipeline.errors import MedcotError

# A single odd batch may lie anywhere, above all with a batch of one; what lasts so many steps is no odd batch.
_STEPS = 5
# Worse by far than the base that training began with: it does not learn, it forgets. The extra nat is for data that
# the base knows already, where twice its loss is still little.
_FACTOR, _EXTRA_NATS = 2.0, 1.0
# GradScaler starts at 2^16 and halves its factor after every step whose gradients overflow in 16 bit; such a step
# changes nothing and is no fault until the factor has reached 1.
_OVERFLOWS = 16


class TrainingDiverged(MedcotError):
    """The loss or the gradients are not finite, or the loss has risen far above the base's."""


class LossGuard:
    """Looks at every optimizer step before it is taken.

    A large gradient is not judged: it is clipped to norm 1, and what harm it still does shows in the loss.
    ``base_loss`` is the base's on the held-out records (nats per token).
    """

    def __init__(self, base_loss: float) -> None:
        self.limit = _FACTOR * base_loss + _EXTRA_NATS
        self._high: deque[bool] = deque(maxlen=_STEPS)
        self._overflows = 0

    @property
    def suspicious(self) -> bool:
        """Whether the last step's loss was above the limit: a checkpoint of this is not worth to go on from."""
        return bool(self._high and self._high[-1])

    def check(
        self, step: int, losses: Sequence[float], records: Sequence[Sequence[int]], grad_norm: float, scaled: bool
    ) -> None:
        """Raise TrainingDiverged if ``step`` must not be taken.

        ``losses`` of the step's forward passes, whose sum is the step's loss; ``records`` are the lines of train.jsonl
        in each; ``scaled`` says that a GradScaler is at work, which leaves out steps that overflow.
        """
        broken = [lines for loss, lines in zip(losses, records, strict=True) if not math.isfinite(loss)]
        if broken:
            raise TrainingDiverged(
                f"The loss is not finite at step {step}, in {_lines(broken)}: look at those records, lower "
                "training.learning_rate, or set model.dtype=float32"
            )
        self._overflows = 0 if math.isfinite(grad_norm) else self._overflows + 1
        if self._overflows > (_OVERFLOWS if scaled else 0):
            raise TrainingDiverged(
                f"The gradients are not finite at step {step}, in {_lines(records)}: look at those records, lower "
                "training.learning_rate, or set model.dtype=float32"
            )
        loss = sum(losses)
        self._high.append(loss > self.limit)
        if len(self._high) == _STEPS and all(self._high):
            raise TrainingDiverged(
                f"The loss has been above {self.limit:.1f} for {_STEPS} steps and is {loss:.1f} at step {step}, in "
                f"{_lines(records)}: lower training.learning_rate or raise training.warmup_steps"
            )


def _lines(records: Sequence[Sequence[int]]) -> str:
    numbers = [str(line) for lines in records for line in lines]
    return f"line{'s' if len(numbers) > 1 else ''} {', '.join(numbers)} of train.jsonl"
