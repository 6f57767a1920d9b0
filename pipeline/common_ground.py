"""Before several machines train together: the same files on each, whether or not they share storage.

The first process's storage is what counts. A file that another machine lacks, or has with other content, is sent
there; where storage is shared there is nothing to send.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import ranks
from pipeline.artifacts import IN_PROGRESS_NAME, MANIFEST_NAME, atomic_path, sha256_file
from pipeline.errors import MedcotError

if TYPE_CHECKING:
    from pipeline.run import StageIdentity

_PIECE_BYTES = 64 * 2**20  # sent at a time: a checkpoint need not fit into memory twice
_OWN_FILES = "rng_state_*"  # every process leaves its own in a checkpoint, on its own machine


def copy_from_first(path: Path) -> None:
    """Make a file, or a folder that a stage made, what it is for the first process; called by all of them.

    Raises MedcotError where this machine's folder holds files of others.
    """
    listed = ranks.from_first({file: sha256_file(path / file) for file in _files(path)} if ranks.is_first() else {})
    # One process of a machine writes; the first of all is the one that reads.
    writes = ranks.local_rank() == 0 and not ranks.is_first()
    lacking = set()
    if writes:
        _remove_leftovers(path, set(listed))
        lacking = {file for file, digest in listed.items() if not _is(path / file, digest)}
    for file in sorted(set().union(*ranks.from_all(lacking))):
        _send(path / file, file in lacking)
    ranks.wait_for_all()


def require_same_identity(identity: StageIdentity) -> None:
    """Raises MedcotError when a process would train from other settings, data or versions than the first."""
    own = {**identity.versions, "settings": identity.config, "data": identity.inputs}
    first = ranks.from_first(own)
    differing = [f"{name} ({own[name]}, there {first[name]})" for name in own if own[name] != first[name]]
    different = [f"{platform.node()} has other {differing[0]:.300}"] if differing else []
    told = [text for texts in ranks.from_all(different) for text in texts]
    if told:
        raise MedcotError(f"{told[0]} than the first machine: make them the same, then start all again.")


def _files(path: Path) -> list[str]:
    """Relative to ``path``; a file is "." of itself."""
    if path.is_file():
        return ["."]
    return [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_file(path) == digest


def _remove_leftovers(folder: Path, listed: set[str]) -> None:
    """What the first machine does not have: of an earlier attempt, for example a later checkpoint."""
    if not folder.is_dir():
        return
    extra = set(_files(folder)) - listed
    if extra and not any((folder / name).is_file() for name in (IN_PROGRESS_NAME, MANIFEST_NAME, *listed)):
        raise MedcotError(
            f"{folder} on {platform.node()} holds files that medcot did not make: choose another --run-dir or empty "
            "that folder."
        )
    there_too = {Path(file).parent for file in listed}
    for file in map(Path, extra):
        if not (file.match(_OWN_FILES) and file.parent in there_too):
            (folder / file).unlink()


def _send(path: Path, wanted: bool) -> None:
    if not wanted:
        for _ in _pieces(path):
            pass
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        for piece in _pieces(path):
            stream.write(piece)


def _pieces(path: Path) -> Iterator[bytes]:
    """The first process's file, piece by piece, in every process."""
    stream = path.open("rb") if ranks.is_first() else None
    try:
        while piece := ranks.from_first(stream.read(_PIECE_BYTES) if stream else b""):
            yield piece
    finally:
        if stream:
            stream.close()
