"""Whether activations are computed again for the backward pass: much less memory, for a third of the speed.

Chen et al. 2016, https://arxiv.org/abs/1604.06174. The same operations run on the same inputs with the same random
numbers, so the adapter is the same: ``training.gradient_checkpointing: auto`` may choose otherwise on another machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.artifacts import write_text
from pipeline.config import Config
from pipeline.hardware import GIBIBYTE, Choice

_SHARE = 0.8  # of the memory: an estimate can be off by a quarter
_FILE_NAME = "gradient-checkpointing"
TURNED_ON = Choice("on", "training.gradient_checkpointing=auto: there was not enough memory without it")


def checkpointing_choice(config: Config, peak: Callable[[Config], float], memory_bytes: int) -> Choice:
    """ "on" or "off": as configured; with auto off where training fits the memory without.

    ``peak`` gives the bytes that training takes with a configuration, ``memory_bytes`` are those that are there.
    """
    chosen = config.training.gradient_checkpointing
    if chosen != "auto":
        return Choice("on" if chosen else "off", "set by training.gradient_checkpointing")
    without = peak(with_checkpointing(config, False))
    fits = without <= _SHARE * memory_bytes
    return Choice(
        "off" if fits else "on",
        f"training.gradient_checkpointing=auto: without it training takes about {without / GIBIBYTE:.1f} GiB, which "
        f"{'fits into' if fits else 'is too much for'} {memory_bytes / GIBIBYTE:.1f} GiB",
    )


def with_checkpointing(config: Config, is_on: bool) -> Config:
    training = config.training.model_copy(update={"gradient_checkpointing": is_on})
    return config.model_copy(update={"training": training})


def keep_on(folder: Path) -> None:
    """Leave word for later sessions that memory did not suffice without."""
    write_text(folder / _FILE_NAME, "on\n")


def session_choice(config: Config, folder: Path, choice: Choice) -> Choice:
    """``choice``, unless an earlier session in ``folder`` ran out of memory with it."""
    is_auto = config.training.gradient_checkpointing == "auto"
    return TURNED_ON if is_auto and (folder / _FILE_NAME).is_file() else choice
