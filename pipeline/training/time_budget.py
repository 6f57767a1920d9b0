"""``training.max_minutes``: end in time, before a session's own limit ends it in the middle of a step."""

from __future__ import annotations

import time

from pipeline import ranks


class TimeBudget:
    """Counts from the moment it is made, so that loading the model and going back to a checkpoint are part of it."""

    def __init__(self, minutes: float | None) -> None:
        self._started = self._step_began = time.monotonic()
        self._seconds = None if minutes is None else minutes * 60
        self._longest_step = 0.0
        self._closing = 0.0

    def closing_takes(self, seconds: float) -> None:
        """How long the evaluation takes that comes after the last step."""
        self._closing = max(self._closing, seconds)

    def loop_begins(self) -> None:
        self._step_began = time.monotonic()

    def is_up_after_step(self) -> bool:
        """Called at the end of every step: whether another one and what comes after it would last too long.

        One answer for all processes, whose clocks differ.
        """
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._step_began)
        self._step_began = now
        if self._seconds is None:
            return False
        return ranks.from_first(now - self._started + self._longest_step + self._closing > self._seconds)
