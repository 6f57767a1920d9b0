"""Why a stage left no artifact: ``failure.json`` in its folder, which the report reads and the next attempt removes.

The stage's own process writes it, since it knows the reason; ``pipeline/run.py`` when a signal has ended that process.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.artifacts import FAILURE_NAME, write_text
from pipeline.errors import GateFailed

FILE_VARIABLE = "MEDCOT_FAILURE_FILE"  # where a stage's process leaves its failure; set by its parent


class Failure(BaseModel):
    """What the user was told when a stage failed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    message: str
    exit_status: int = Field(description="1 for an error, 3 for a gate whose threshold was missed.")
    created: str = Field(description="UTC, ISO 8601.")

    @property
    def is_gate(self) -> bool:
        return self.exit_status == GateFailed.exit_status


def write_failure(path: Path, message: str, exit_status: int) -> None:
    failure = Failure(message=message, exit_status=exit_status, created=datetime.now(UTC).isoformat(timespec="seconds"))
    write_text(path, failure.model_dump_json(indent=2) + "\n")


def read_failure(folder: Path) -> Failure | None:
    """Why the stage of this folder failed; None where it did not, or where that cannot be read any more."""
    try:
        return Failure.model_validate_json((folder / FAILURE_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
