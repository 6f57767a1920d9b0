"""How far the work in a stage's folder is, and which of two such folders is farther."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import CHECKPOINTS_NAME, RECORDS_PATTERN, read_in_progress, read_manifest
from pipeline.checkpoints import SEAL_NAME, newest_first, step_of


@dataclass(frozen=True)
class StageProgress:
    """``amount`` counts steps with a checkpoint, or evaluated records; ``trained`` says that it is a training."""

    fingerprint: str
    finished: bool
    amount: int
    trained: bool

    def goes_beyond(self, other: StageProgress) -> bool:
        return (self.finished, self.amount) > (other.finished, other.amount)


def stage_progress(folder: Path) -> StageProgress | None:
    """None where nothing is finished or under way. A training whose time was up is an artifact, and not finished."""
    manifest = read_manifest(folder)
    fingerprint = manifest.fingerprint if manifest is not None else read_in_progress(folder).get("fingerprint")
    if fingerprint is None:
        return None
    steps = [step_of(checkpoint) for checkpoint in sealed_checkpoints(folder)]
    evaluated = sum(path.read_bytes().count(b"\n") for path in records(folder))
    return StageProgress(
        fingerprint,
        finished=manifest is not None and bool(manifest.result.get("finished", True)),
        amount=max([*steps, evaluated]),
        trained=bool(steps) or (manifest is not None and manifest.stage == "train"),
    )


def why_not_replaced(folder: Path, copy: Path) -> str | None:
    """A sentence where ``copy`` goes beyond ``folder``: in the same work, or in another training, which cost hours."""
    ours, theirs = stage_progress(folder), stage_progress(copy)
    if ours is None or theirs is None or not theirs.goes_beyond(ours):
        return None
    if ours.fingerprint != theirs.fingerprint and not theirs.trained:
        return None
    there = "is finished" if theirs.finished else f"is at {'step' if theirs.trained else 'record'} {theirs.amount}"
    return (
        f"{copy} {there} and stays until this run's {folder.name} is as far: to keep both, give this run another name "
        "(--set name=...)"
    )


def sealed_checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    return [path for path in newest_first(folder / CHECKPOINTS_NAME) if (path / SEAL_NAME).is_file()]


def records(folder: Path) -> list[Path]:
    """The files that an evaluation's records are in, a line each."""
    return list(folder.glob(RECORDS_PATTERN))
