"""``evaluation.max_minutes`` and ``bench.max_minutes``: a stage ends in time with what it has measured by then.

The limit is a session's: each start of the stage has all of it. A stage that its limit ended is finished for this
limit, and continues once the limit is raised or removed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import Config


@dataclass(frozen=True)
class TimeLimit:
    """``ends`` is a reading of ``clock`` (seconds), None for no limit.

    time.monotonic counts from the machine's start, so it reads the same in a child process.
    """

    minutes: float | None = None
    ends: float | None = None
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def starting_now(cls, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> TimeLimit:
        return cls(minutes, None if minutes is None else clock() + 60 * minutes, clock)

    @property
    def is_set(self) -> bool:
        return self.ends is not None

    @property
    def seconds_left(self) -> float | None:
        """At least 0; None without a limit."""
        return None if self.ends is None else max(0.0, self.ends - self.clock())

    def is_up(self, needed: float = 0.0) -> bool:
        """Whether what takes ``needed`` seconds would end too late."""
        return self.ends is not None and self.clock() + needed >= self.ends

    def at_most(self, seconds: float) -> TimeLimit:
        """The limit of a turn that ends after so many seconds, or with this limit."""
        ends = self.clock() + seconds
        return replace(self, ends=ends if self.ends is None else min(ends, self.ends))

    def first(self, share: float) -> TimeLimit:
        """The limit of a part of the work that may take this ``share`` (0 to 1) of what is left."""
        left = self.seconds_left
        return self if left is None else replace(self, ends=self.clock() + share * left)


NO_LIMIT = TimeLimit()


def is_raised(result: Mapping[str, Any], stage: str, config: Config) -> bool:
    """Whether ``result``, of a manifest, was ended early by a limit that is now larger or gone."""
    ended = result.get("ended_early")
    if ended is None:
        return False
    limit = config.bench.max_minutes if stage == "bench" else config.evaluation.max_minutes
    return limit is None or limit > float(ended["minutes"])
