"""When what is ready: the GGUF, and the whole run, with set-up's build of llama.cpp running next to the first stages."""

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
    """Seconds from the run's start; None where a stage's time is not known or the GGUF is not made.

    ``setup`` is what comes before on a machine where medcot is not installed yet; ``build_left`` is how long the build
    of llama.cpp with CUDA goes on after training when nothing else runs.
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
        left = 0.0 if setup is None or begun is None else max(0.0, setup.cuda - begun)
        # Next to export and verification the build has half of what the core's two threads do together.
        done = left if 2 * left * _SHARED <= (exported or 0) else (exported or 0) / _SHARED / 2
        gguf_later = 2 * done * (1 - _SHARED)
        ready = begun is not None and exported is not None and set(_UNTIL_THE_GGUF) <= set(seconds)
        return cls(
            setup=setup,
            build_left=left,
            gguf_seconds=(begun or 0) + (exported or 0) + gguf_later if ready else None,
            seconds=None if whole is None else whole + gguf_later + (left - done),
        )
