"""What an unfinished export surely has on the disk: the journal beside its partial files.

``.export.journal`` in the folder of the files holds JSON lines. The first says what the files are made of, each next
one how many steps (tensors, in the order of the export) are complete and synced in every partial file. A line is
written after the bytes that it speaks of were synced, so bytes behind the last whole line are worth nothing. The file
also is the folder's lock: it goes with the process, however that ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import MedcotError
from pipeline.file_lock import try_lock

JOURNAL_NAME = ".export.journal"
_FORMAT = 1


def partial_path(final: Path) -> Path:
    """The name of a file while it is unfinished; the same in every attempt."""
    return final.with_name(f".{final.name}.partial")


@dataclass(frozen=True)
class Unfinished:
    """What the journal says: ``steps`` of the export with this ``fingerprint`` are in each of ``files``.

    ``inodes`` are the numbers of the files where all steps are done and only the renaming may be missing: a file that
    already has its final name is known by its number.
    """

    fingerprint: str
    files: tuple[str, ...]
    steps: int = 0
    inodes: Mapping[str, int] = field(default_factory=dict)


class Journal:
    """The journal of one folder, open and locked. Methods raise OSError."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path = path
        self._stream = stream
        self._understood = 0  # bytes of the lines that were read and made sense

    @property
    def folder(self) -> Path:
        return self._path.parent

    def read(self) -> Unfinished | None:
        """The state of the unfinished export; None where there is none that can be understood."""
        self._stream.seek(0)
        unfinished, self._understood = None, 0
        # A line without its end is one that a killed export did not finish.
        for line in self._stream.read().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    break
                unfinished = _after(unfinished, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            self._understood += len(line)
        return unfinished

    def begin(self, fingerprint: str, files: Sequence[str]) -> None:
        """Forget what was and describe a new export."""
        self._stream.truncate(0)
        self._append({"format": _FORMAT, "fingerprint": fingerprint, "files": list(files)})
        sync_folder(self.folder)

    def go_on(self) -> None:
        """Cut off the half line that a killed export may have left, so that new ones can follow."""
        self._stream.truncate(self._understood)

    def record(self, steps: int, inodes: Mapping[str, int] | None = None) -> None:
        """The files hold so many steps, synced."""
        self._append({"steps": steps} | ({"inodes": dict(inodes)} if inodes else {}))

    def remove(self) -> None:
        """The export is finished or given up."""
        self._path.unlink(missing_ok=True)

    def _append(self, entry: Mapping[str, object]) -> None:
        self._stream.write(json.dumps(entry).encode() + b"\n")
        os.fsync(self._stream.fileno())


def _after(unfinished: Unfinished | None, entry: Mapping[str, Any]) -> Unfinished:
    """The state after one more line; KeyError and its kin for a line that is none of ours."""
    if unfinished is None:
        if entry["format"] != _FORMAT:
            raise ValueError
        return Unfinished(str(entry["fingerprint"]), tuple(Path(str(name)).name for name in entry["files"]))
    inodes = {str(name): int(number) for name, number in entry.get("inodes", {}).items()}
    return replace(unfinished, steps=int(entry["steps"]), inodes=inodes)


@contextmanager
def locked_journal(folder: Path) -> Iterator[Journal]:
    """The journal of ``folder``, which is made where it is missing; MedcotError where another export holds it."""
    path = folder / JOURNAL_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = _locked(path)
    except OSError as error:
        raise MedcotError(f"{folder} cannot be written: {error.strerror}.") from error
    with stream:
        try:
            yield Journal(path, stream)
        finally:
            if path.exists() and not path.stat().st_size:
                path.unlink()


def _locked(path: Path) -> BinaryIO:
    while True:
        # Unbuffered, so that a line that did not fit the disk is not written a second time when closing.
        stream: BinaryIO = path.open("a+b", buffering=0)
        if not try_lock(stream):
            stream.close()
            raise MedcotError(
                f"Another export is writing into {path.parent}: wait until it is done or choose another folder."
            )
        # Its last holder may have removed the file between our opening and our locking it.
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            return stream
        stream.close()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, as fsync of a file does for its bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
