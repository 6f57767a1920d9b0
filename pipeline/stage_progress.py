"""How far the work in a stage's folder is, and which of two such folders is farther."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import (
    BEGUN_RECORDS_PATTERNS,
    CHECKPOINTS_NAME,
    IN_PROGRESS_NAME,
    RECORDS_PATTERN,
    Manifest,
    read_in_progress,
    read_manifest,
    write_json,
)
from pipeline.checkpoints import SEAL_NAME, newest_first, step_of


@dataclass(frozen=True)
class StageProgress:
    """``amount`` counts steps with a checkpoint, or what is known of records; ``trained`` says it is a training."""

    fingerprint: str
    finished: bool
    amount: int
    trained: bool

    def goes_beyond(self, other: StageProgress) -> bool:
        return (self.finished, self.amount) > (other.finished, other.amount)


def stage_progress(folder: Path) -> StageProgress | None:
    """None where nothing is finished or under way. What ran out of time is an artifact, and not finished."""
    manifest, fingerprint = read_manifest(folder), work_in(folder)
    if fingerprint is None:
        return None
    steps = [step_of(checkpoint) for checkpoint in sealed_checkpoints(folder)]
    # Each record counts once when begun and again when done; what was begun goes when its file's records are all done.
    done = _keys(folder.glob(RECORDS_PATTERN))
    evaluated = len(_keys(records(folder))) + len(done)
    result = {} if manifest is None else manifest.result
    return StageProgress(
        fingerprint,
        finished=manifest is not None and bool(result.get("finished", True)) and not result.get("ended_early"),
        amount=max([*steps, evaluated]),
        trained=bool(steps) or (manifest is not None and manifest.stage == "train"),
    )


def work_in(folder: Path) -> str | None:
    """The fingerprint of what is finished or under way there."""
    manifest = read_manifest(folder)
    return manifest.fingerprint if manifest is not None else read_in_progress(folder).get("fingerprint")


def why_not_replaced(folder: Path, copy: Path) -> str | None:
    """A sentence where ``copy`` goes beyond ``folder``: in the same work, or in another training, which cost hours."""
    ours, theirs = stage_progress(folder), stage_progress(copy)
    if ours is None or theirs is None or not theirs.goes_beyond(ours):
        return None
    if ours.fingerprint != theirs.fingerprint and not theirs.trained:
        return None
    there = "has more records"
    if theirs.finished or theirs.trained:
        there = "is finished" if theirs.finished else f"is at step {theirs.amount}"
    return (
        f"{copy} {there} and stays until this run's {folder.name} is as far: to keep both, give this run another name "
        "(--set name=...)"
    )


def mark_resumable(folder: Path, manifest: Manifest) -> bool:
    """Make an artifact's folder one that is resumed once its ``manifest`` is gone; False where nothing is to resume."""
    if not (sealed_checkpoints(folder) or records(folder)):
        return False
    work = {"fingerprint": manifest.fingerprint, "versions": manifest.versions}
    write_json(folder / IN_PROGRESS_NAME, work)
    return True


def sealed_checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    return [path for path in newest_first(folder / CHECKPOINTS_NAME) if (path / SEAL_NAME).is_file()]


def records(folder: Path) -> list[Path]:
    """The files that an evaluation's records are in, a line each."""
    return [path for pattern in (RECORDS_PATTERN, *BEGUN_RECORDS_PATTERNS) for path in folder.glob(pattern)]


def _keys(paths: Iterable[Path]) -> set[str]:
    """By which the lines are known; a torn line has none."""
    found = set()
    for line in (line for path in paths for line in path.read_bytes().splitlines()):
        try:
            found.add(str(json.loads(line)["key"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found
