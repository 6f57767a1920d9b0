"""Artifacts: a folder of files with a manifest that says what they are made of.

An artifact is whole or absent. Files are written beside their final name and renamed; ``manifest.json`` comes
last, so a folder without one is unfinished work. The manifest's fingerprint covers everything the files depend
on; ``pipeline/run.py`` skips a stage whose fingerprint still matches.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import MedcotError

MANIFEST_NAME = "manifest.json"
IN_PROGRESS_NAME = "in_progress.json"
FAILURE_NAME = "failure.json"  # pipeline/failure.py
SCRATCH_NAME = "scratch"
CHECKPOINTS_NAME = "checkpoints"
# What an evaluation has measured, a line a record, and is resumed from: whole outcomes, and parts of those to come.
RECORDS_PATTERN = "records-*.jsonl"
BEGUN_RECORDS_PATTERNS = ("likelihoods-*.jsonl", "answers-*.jsonl")
LEFT_BEHIND_NAME = "left_behind.json"  # files that a copy on another machine does not have (pipeline/kept_copy.py)
TRACKING_NAME = "tracking"  # what Weights & Biases or TensorBoard keep of a training
# Working state that lives inside an artifact's folder without being part of the artifact.
WORKING_NAMES = frozenset(
    {MANIFEST_NAME, IN_PROGRESS_NAME, FAILURE_NAME, SCRATCH_NAME, TRACKING_NAME, CHECKPOINTS_NAME, LEFT_BEHIND_NAME}
)
# What a file under way is called, and the journal that tells how far it is.
WORKING_SUFFIXES = (".tmp", ".partial", ".journal")
MANIFEST_FORMAT = 1


class FileRecord(BaseModel):
    """One file of an artifact: path relative to the manifest, size in bytes, SHA-256 in hexadecimal."""

    model_config = ConfigDict(frozen=True)
    path: str
    size: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is made of and what making it took."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = MANIFEST_FORMAT
    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]
    created: str
    seconds: float
    peak_memory_bytes: int
    files: list[FileRecord]
    result: dict[str, Any]
    commits: dict[str, str] = {}  # of the hub's repositories, where they are known (pipeline/hub_commit.py)

    @property
    def digest(self) -> str:
        """Identity of the content, for the fingerprint of whatever is made from it (SHA-256)."""
        return sha256_json([self.fingerprint, [record.sha256 for record in self.files]])


Result = TypeVar("Result", bound=BaseModel)


@dataclass(frozen=True)
class Artifact(Generic[Result]):
    """A finished artifact: its folder, its manifest, and the stage's own typed result."""

    path: Path
    manifest: Manifest
    result: Result

    @classmethod
    def load(cls, path: Path, result_type: type[Result]) -> Artifact[Result]:
        """Read the artifact in ``path``; raises MedcotError when it is absent, unfinished or not readable."""
        manifest = read_manifest(path)
        if manifest is None:
            raise MedcotError(f"{path} holds no finished artifact (no {MANIFEST_NAME}): run the stage that makes it.")
        try:
            result = result_type.model_validate(manifest.result)
        except ValidationError as error:
            raise MedcotError(
                f"{path / MANIFEST_NAME} was written by another version of medcot "
                f"({error.error_count()} fields differ): delete the folder and run again."
            ) from error
        return cls(path, manifest, result)


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of the named distributions; one that is missing is recorded as absent."""
    versions = {"python": ".".join(map(str, sys.version_info[:2]))}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def fingerprint(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str], versions: Mapping[str, str]) -> str:
    """Hash of everything a stage's output depends on (SHA-256)."""
    return sha256_json([MANIFEST_FORMAT, stage, config, inputs, versions])


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed to ``path``.

    On any exception the temporary file is removed and ``path`` is what it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all, as far as a network folder can promise it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def artifact_files(folder: Path) -> list[Path]:
    """The artifact's own files, sorted, without the manifest, working state and leftover temporaries."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.relative_to(folder).parts[0] not in WORKING_NAMES
        and not path.name.endswith(WORKING_SUFFIXES)
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_text(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None when there is none or it cannot be understood (then the work is redone)."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def read_in_progress(folder: Path) -> dict[str, Any]:
    """What run.py noted of the work under way in an artifact's folder: its fingerprint, and the packages' versions.

    Empty where there is none, or nothing that can be read.
    """
    try:
        noted = json.loads((folder / IN_PROGRESS_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def left_behind(folder: Path) -> frozenset[str]:
    """Files of an artifact that stayed on the machine that made it."""
    try:
        return frozenset(json.loads((folder / LEFT_BEHIND_NAME).read_bytes()))
    except FileNotFoundError:
        return frozenset()


def changed_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or whose size differs from the manifest (contents are not hashed again)."""
    changed = []
    for record in manifest.files:
        path = folder / record.path
        if not path.is_file() or path.stat().st_size != record.size:
            changed.append(record.path)
    return changed
