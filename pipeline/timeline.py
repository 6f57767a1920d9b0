"""When the GGUF is ready and the whole run done, while set-up's builds of llama.cpp run next to the first stages."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from pipeline.setup_time import SetUp
from pipeline.speeds import SECOND_THREAD
from pipeline.stage_estimate import StageEstimate

_BEFORE_EXPORT, _UNTIL_THE_GGUF = ("prepare", "train"), ("export", "verify")
# Of two programs on a core with two hardware threads each runs at this share of the speed that it has on its own.
_SHARED = SECOND_THREAD / 2


class Timeline(BaseModel):
    """Seconds from the run's start; None where a stage's time is not known, or the GGUF is not made.

    ``setup`` is what comes before, and next to it, on a machine where medcot is not installed yet; ``build_left`` is
    what of its builds is left when export begins.
    """

    model_config = ConfigDict(frozen=True)
    setup: SetUp | None
    build_left: float
    gguf_seconds: float | None
    seconds: float | None

    @classmethod
    def of(cls, estimates: Sequence[StageEstimate], setup: SetUp | None) -> Timeline:
        seconds = {each.stage: each.seconds for each in estimates}

        def together(names: Sequence[str]) -> float | None:
            found = [seconds[name] for name in names if name in seconds]
            return None if None in found else sum(each or 0 for each in found)

        begun, exported, whole = together(_BEFORE_EXPORT), together(_UNTIL_THE_GGUF), together(list(seconds))
        if begun is None or exported is None:
            return cls(setup=setup, build_left=0, gguf_seconds=None, seconds=None)
        waited = left = 0.0
        if setup is not None:
            waited = max(0.0, setup.cpu_build - begun)
            left = max(0.0, setup.builds - begun - waited)
        # Next to export and verification the build has half of what a core's two threads do together.
        done = min(left, exported / _SHARED / 2)
        ready = begun + waited + exported + 2 * done * (1 - _SHARED)
        measured = None if whole is None else whole - begun - exported
        return cls(
            setup=setup,
            build_left=left,
            gguf_seconds=ready if set(_UNTIL_THE_GGUF) <= set(seconds) else None,
            seconds=None if measured is None else ready + left - done + measured,
        )
