"""Training checkpoints that are known to be whole.

The trainer writes a checkpoint file by file; a killed session leaves a torn one. Each finished checkpoint gets a
seal, written last, with the size and hash of every file; only sealed checkpoints that still match are used. Older
ones go when the newest is sealed, never before.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from pipeline.artifacts import FileRecord, sha256_file, write_text
from pipeline.errors import MedcotError

SEAL_NAME = "medcot_seal.json"
KEPT = 2  # what happens to the newest on a disk or on its way to another must not cost the whole training
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class TrainingProgress:
    """How far training was when the checkpoint was taken, over all sessions.

    ``pending_loss`` is the sum of the losses of the steps after ``logged_step``, which the next logged mean includes;
    ``skipped_steps`` were left out by the gradient scaler.
    """

    step: int
    seconds: float
    tokens: int
    planned_steps: int = 0
    logged_step: int = 0
    pending_loss: float = 0.0
    skipped_steps: int = 0


class Seal(BaseModel):
    progress: TrainingProgress
    files: list[FileRecord]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the trainer puts the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def seal(checkpoint: Path, progress: TrainingProgress) -> None:
    """Mark a checkpoint as complete."""
    files = [
        FileRecord(path=str(path.relative_to(checkpoint)), size=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL_NAME
    ]
    write_text(checkpoint / SEAL_NAME, Seal(progress=progress, files=files).model_dump_json())


def whole(checkpoint: Path) -> TrainingProgress | None:
    """What the seal says, if there is one and every file still matches it."""
    try:
        found = Seal.model_validate_json((checkpoint / SEAL_NAME).read_bytes())
        for record in found.files:
            path = checkpoint / record.path
            if path.stat().st_size != record.size or sha256_file(path) != record.sha256:
                return None
    except (OSError, ValidationError):
        return None
    return found.progress


def latest_whole(folder: Path) -> tuple[Path, TrainingProgress] | None:
    """The most recent checkpoint whose files all match its seal."""
    for checkpoint in newest_first(folder):
        progress = whole(checkpoint)
        if progress is not None:
            return checkpoint, progress
    return None


def remove_after(folder: Path, step: int) -> None:
    """Remove the torn checkpoints of later steps: the trainer would write into them."""
    for checkpoint in newest_first(folder):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


def prune(folder: Path, best_step: int | None) -> None:
    """Keep the newest checkpoints and the best one. To be called when the newest is sealed."""
    for checkpoint in newest_first(folder)[KEPT:]:
        if step_of(checkpoint) != best_step:
            shutil.rmtree(checkpoint)


@contextmanager
def disk_errors_told(what: str, folder: Path, last_step: int) -> Iterator[None]:
    """Turn what libraries raise when ``what`` cannot be written into one sentence, with the checkpoint that is left.

    PyTorch and safetensors have no error type for a full disk; their message is told as it is.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        reason = "the disk is full" if full else str(error).strip().splitlines()[0].rstrip(".")
        free = shutil.disk_usage(folder).free / 1e9
        after = f"from step {last_step}, whose checkpoint is whole" if last_step else "from the beginning"
        raise MedcotError(
            f"{what} cannot be written to {folder} ({reason}; {free:.2f} GB are free): free some space, and the same "
            f"command goes on {after}."
        ) from error


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not."""
    return sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    suffix = checkpoint.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1
