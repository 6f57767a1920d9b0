"""What later stages would refuse, asked before the first one: each stage's own check, named in the stage table.

A check is a function ``check(preview) -> list of sentences without full stop``; it runs the code that the stage itself
refuses with, so that both say the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.records import Record
from pipeline.run import STAGES


@dataclass(frozen=True)
class Preview:
    """What is known before anything is made.

    ``base`` is a folder with the base's config.json and tokenizer, perhaps its weights; ``records`` are the first
    usable ones of the data, None where they could not be read.
    """

    config: Config
    base: Path
    records: Sequence[Record] | None = None


def refusals(preview: Preview, stages: Sequence[str] | None) -> list[str]:
    """What the named stages (default: all) would refuse, each sentence once."""
    found: list[str] = []
    for stage in STAGES:
        if stage.check is not None and (stages is None or stage.name in stages):
            module, _, name = stage.check.partition(":")
            check: Callable[[Preview], list[str]] = getattr(importlib.import_module(module), name)
            found += [sentence for sentence in check(preview) if sentence not in found]
    return found


def refusal_of(work: Callable[[], object]) -> list[str]:
    """What ``work`` refuses: its error as a sentence without full stop, or nothing."""
    try:
        work()
    except MedcotError as error:
        return [str(error).removesuffix(".")]
    return []
