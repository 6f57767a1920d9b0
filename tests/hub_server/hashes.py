"""The hashes by which the hub knows a file; each is computed once."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf")
PIECE_BYTES = 1 << 20


def is_large(file: str) -> bool:
    return file.endswith(LARGE_SUFFIXES)


def sha256(path: Path) -> str:
    return _file_hash(path, path.stat().st_mtime_ns, "sha256", b"")


def git_hash(path: Path) -> str:
    return _file_hash(path, path.stat().st_mtime_ns, "sha1", b"blob %d\0" % path.stat().st_size)


def commit_of(folder: Path) -> str:
    """A name for what the folder holds."""
    digest = hashlib.sha1()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {git_hash(path)}\n".encode())
    return digest.hexdigest()


@cache
def _file_hash(path: Path, changed: int, algorithm: str, prefix: bytes) -> str:
    digest = hashlib.new(algorithm, prefix)
    with path.open("rb") as stream:
        while part := stream.read(PIECE_BYTES):
            digest.update(part)
    return digest.hexdigest()
