"""Shards of a base model on the hub: looked into by byte ranges, fetched when first used, deleted when done with.

A shard that the hub's own cache already holds is read there and stays. Others lie in a scratch folder that one
export holds at a time; what an earlier, broken export left of the shard at hand is gone on with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from export.checkpoint_shards import INDEX_NAME, LocalShard, Shard, check_index, shard_names
from export.hub_files import DownloadProgress, HubFile, HubRepository
from export.safetensors_file import ByteArray, SafetensorsFile, StoredTensor, read_header
from pipeline.errors import MedcotError
from pipeline.json_files import json_object

# Most headers fit (a quarter of a megabyte holds some 2,000 tensors); a longer one costs a second request.
_FIRST_READ_BYTES = 1 << 18
# A 4-bit base has hundreds of descriptions of some hundred bytes: the waiting for answers overlaps.
_PARALLEL_READS = 8


class ShardFolder:
    """A scratch folder with the shards in use, and nothing else. One process holds it at a time."""

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock, Timeout

        self.folder = folder
        self._in_use: set[Path] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder.with_name(f"{folder.name}.lock"))
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise MedcotError(
                f"Another export is reading this base through {folder}: wait until it is done."
            ) from error
        except OSError as error:
            raise MedcotError(f"{folder} cannot be written ({error.strerror}): set MEDCOT_CACHE.") from error

    def fetch(self, file: HubFile, commit: str, progress: DownloadProgress | None) -> Path:
        """The file's place in the folder, complete; what other shards left there earlier goes first."""
        path = self.folder / f"{file.sha256 or commit}-{Path(file.url).name}"
        self._in_use.add(path)
        for leftover in self.folder.iterdir():
            if leftover.with_name(leftover.name.removesuffix(".partial")) not in self._in_use:
                leftover.unlink()
        # A file gets this name only after its size and hash were checked.
        if not (path.is_file() and path.stat().st_size == file.size):
            file.download(path, progress)
        return path

    def drop(self, path: Path) -> None:
        self._in_use.discard(path)
        path.unlink(missing_ok=True)

    def close(self, *, keep: bool) -> None:
        """Give the folder back, with what lies there or without."""
        if not keep:
            for leftover in self.folder.iterdir():
                leftover.unlink()
            self.folder.rmdir()
        self._lock.release()


class HubShard:
    """One shard that is fetched when its first tensor is read."""

    def __init__(
        self, file: HubFile, commit: str, folder: ShardFolder, progress: DownloadProgress | None = None
    ) -> None:
        self._hub_file = file
        self._commit = commit
        self._folder = folder
        self._progress = progress
        self._lock = threading.Lock()
        self._local: SafetensorsFile | None = None
        self.tensors: Mapping[str, StoredTensor] = _remote_header(file)

    def file(self) -> SafetensorsFile:
        with self._lock:
            if self._local is None:
                self._local = SafetensorsFile(self._folder.fetch(self._hub_file, self._commit, self._progress))
            return self._local

    def peek(self, names: Iterable[str]) -> dict[str, ByteArray]:
        """Whole small tensors, without fetching the shard."""

        def read(name: str) -> tuple[str, ByteArray]:
            tensor = self.tensors[name]
            return name, np.frombuffer(self._hub_file.read(tensor.begin, tensor.end), dtype=np.uint8)

        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            return dict(pool.map(read, names))

    def discard(self) -> None:
        """Close the file and delete it; a later ``file()`` would fetch it again."""
        with self._lock:
            local, self._local = self._local, None
            if local is not None:
                local.close()
                self._folder.drop(local.path)

    def close(self) -> None:
        with self._lock:
            if self._local is not None:
                self._local.close()
                self._local = None


def open_shards(
    repository: HubRepository, folder: ShardFolder, progress: DownloadProgress | None = None
) -> list[Shard]:
    """The shards of a repository's checkpoint, those in the hub's cache as local files. Raises MedcotError."""
    index = None
    if INDEX_NAME in repository.files:
        file = repository.files[INDEX_NAME]
        index = json_object(file.read(0, file.size), file.title)
    shards: dict[str, Shard] = {}
    for name in shard_names(index, repository.name, repository.files):
        path = _cached_file(repository, name)
        hub_file = repository.files[name]
        shards[name] = LocalShard(path) if path else HubShard(hub_file, repository.commit, folder, progress)
    check_index(index, repository.name, shards)
    return list(shards.values())


def _cached_file(repository: HubRepository, name: str) -> Path | None:
    """The file in the hub's own cache, where it is complete."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository.name, name, revision=repository.commit)
    if not isinstance(path, str) or Path(path).stat().st_size != repository.files[name].size:
        return None
    return Path(path)


def _remote_header(file: HubFile) -> dict[str, StoredTensor]:
    first = file.read(0, min(file.size, _FIRST_READ_BYTES)) if file.size else b""

    def read(begin: int, end: int) -> bytes:
        return first[begin:end] if end <= len(first) else first[begin:] + file.read(max(begin, len(first)), end)

    return read_header(file.title, file.size, read)
