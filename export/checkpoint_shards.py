"""Which safetensors files a checkpoint consists of, in a folder or on the hub.

One ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names with the tensors that each holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from export.safetensors_file import ByteArray, SafetensorsFile, StoredTensor
from pipeline.errors import MedcotError
from pipeline.json_files import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Shard(Protocol):
    """One safetensors file of a checkpoint, here or still on the hub."""

    tensors: Mapping[str, StoredTensor]

    def file(self) -> SafetensorsFile:
        """The file, fetched if it is not here."""

    def peek(self, names: Iterable[str]) -> dict[str, ByteArray]:
        """The bytes of small tensors, without fetching the file."""

    def discard(self) -> None:
        """Called when none of its tensors is needed any more."""

    def close(self) -> None:
        """Called at the end."""


class LocalShard:
    """A file that is the user's: read where it is, never deleted."""

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)
        self.tensors: Mapping[str, StoredTensor] = self._file.tensors

    def file(self) -> SafetensorsFile:
        return self._file

    def peek(self, names: Iterable[str]) -> dict[str, ByteArray]:
        return {name: self._file.read(name) for name in names}

    def discard(self) -> None:
        """It stays, and stays open: another tensor may yet be asked for."""

    def close(self) -> None:
        self._file.close()


def local_shards(folder: Path) -> list[Shard]:
    """All shards of a model's folder; raises MedcotError where one is missing or is not what the index says."""
    index_path = folder / INDEX_NAME
    index = read_json(index_path) if index_path.is_file() else None
    names = shard_names(index, str(folder), [path.name for path in folder.glob("*.*")])
    shards: dict[str, Shard] = {name: LocalShard(folder / name) for name in names}
    check_index(index, str(folder), shards)
    return list(shards.values())


def shard_names(index: Mapping[str, Any] | None, origin: str, present: Collection[str]) -> list[str]:
    """The checkpoint's files in the order of their names, which is that of the layers; all are among ``present``."""
    names = [SINGLE_NAME] if index is None else _indexed_names(index, origin)
    missing = [name for name in names if name not in present]
    if missing:
        raise _without_weights(origin, missing, present)
    return names


def check_index(index: Mapping[str, Any] | None, origin: str, shards: Mapping[str, Shard]) -> None:
    """Raise MedcotError unless every shard holds the tensors that the index promises."""
    for name, file_name in (index or {"weight_map": {}})["weight_map"].items():
        if name not in shards[str(file_name)].tensors:
            raise MedcotError(
                f"{origin}/{file_name} lacks tensor {name}, which {INDEX_NAME} promises: download it again."
            )


def _indexed_names(index: Mapping[str, Any], origin: str) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MedcotError(f"{origin}/{INDEX_NAME} names no shards (weight_map): download it again.")
    names = sorted(set(map(str, weight_map.values())))
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise MedcotError(
            f"{origin}/{INDEX_NAME} names a file outside the model's folder ({foreign[0]}): download it again."
        )
    return names


def _without_weights(origin: str, missing: list[str], found: Collection[str]) -> MedcotError:
    pickles = sorted(name for name in found if name.startswith("pytorch_model") and name.endswith(".bin"))
    if pickles and missing == [SINGLE_NAME]:
        return MedcotError(
            f"{origin} has its weights as PyTorch pickles ({pickles[0]}) only; export reads safetensors. Load it with "
            "transformers and save it with save_pretrained, then give that folder."
        )
    shown = ", ".join(sorted(found)[:8]) or "nothing"
    return MedcotError(f"{origin} lacks {', '.join(missing)} (found {shown}): give a model with safetensors weights.")
