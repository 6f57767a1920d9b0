"""Training checkpoints that are known to be whole.

The trainer writes a checkpoint file by file; a killed session leaves a torn one. Each finished checkpoint gets a
seal, written last, with the size and hash of every file; only sealed checkpoints that still match are used.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from pipeline.artifacts import FileRecord, sha256_file, write_text

SEAL_NAME = "medcot_seal.json"


@dataclass(frozen=True)
class TrainingProgress:
    """How far training was when the checkpoint was taken, over all sessions."""

    step: int
    seconds: float
    tokens: int


class Seal(BaseModel):
    step: int
    seconds: float
    tokens: int
    files: list[FileRecord]


def seal(checkpoint: Path, progress: TrainingProgress) -> None:
    """Mark a checkpoint as complete."""
    files = [
        FileRecord(path=str(path.relative_to(checkpoint)), size=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL_NAME
    ]
    text = json.dumps({**asdict(progress), "files": [record.model_dump() for record in files]})
    write_text(checkpoint / SEAL_NAME, text)


def latest_whole(folder: Path) -> tuple[Path, TrainingProgress] | None:
    """The most recent checkpoint whose files all match its seal; torn ones are removed."""
    candidates = sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)
    for checkpoint in candidates:
        progress = _check(checkpoint)
        if progress is not None:
            return checkpoint, progress
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _check(checkpoint: Path) -> TrainingProgress | None:
    try:
        found = Seal.model_validate_json((checkpoint / SEAL_NAME).read_bytes())
        for record in found.files:
            path = checkpoint / record.path
            if path.stat().st_size != record.size or sha256_file(path) != record.sha256:
                return None
    except (OSError, ValidationError):
        return None
    return TrainingProgress(found.step, found.seconds, found.tokens)


def _step(checkpoint: Path) -> int:
    suffix = checkpoint.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1
