"""Base weights from a local Hugging Face folder, any rows of any tensor, as float32.

Reads ``model.safetensors`` or the shards that ``model.safetensors.index.json`` names. Files are mapped into
memory, so only the rows asked for are read, and PyTorch is not needed. Format (8 bytes of little-endian
header length, a JSON header, data): https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import MedcotError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# safetensors dtype -> what the bytes are read as; BF16 is the upper half of a float32.
_STORED_AS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

FloatRows = npt.NDArray[np.float32]
RowIndices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: byte range [begin, end) counted from the start of its file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One memory-mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = _read_header(path)
        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def rows(self, name: str, rows: RowIndices | slice) -> FloatRows:
        """Rows of a tensor as a new float32 array [n, columns]; a vector has one column."""
        tensor = self.tensors[name]
        stored_as = _STORED_AS.get(tensor.dtype)
        if stored_as is None:
            raise MedcotError(
                f"{self.path}: tensor {name} is stored as {tensor.dtype}; export reads 16- and 32-bit "
                f"weights ({', '.join(_STORED_AS)}). Give the unquantized base."
            )
        count = (tensor.end - tensor.begin) // stored_as.itemsize
        flat = np.frombuffer(self._map, dtype=stored_as, count=count, offset=tensor.begin)
        chosen = flat.reshape(tensor.shape[0], -1)[rows]
        if tensor.dtype == "BF16":
            return (chosen.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return chosen.astype(np.float32)


class BaseWeights:
    """All tensors of a base model. Raises MedcotError for missing or damaged files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = [SafetensorsFile(path) for path in _weight_files(folder)]
        self._files = {name: file for file in files for name in file.tensors}
        _check_index(folder, self._files)

    @property
    def names(self) -> Iterable[str]:
        return self._files.keys()

    def stored(self, name: str) -> StoredTensor:
        try:
            return self._files[name].tensors[name]
        except KeyError:
            raise MedcotError(
                f"{self.folder} has no tensor {name}: the checkpoint is incomplete or its config.json "
                "belongs to another model. Download it again."
            ) from None

    def rows(self, name: str, rows: RowIndices | slice) -> FloatRows:
        """Rows of a tensor as float32 [n, columns]. Raises MedcotError where a value is NaN or infinite."""
        self.stored(name)
        values = self._files[name].rows(name, rows)
        if not np.isfinite(values).all():
            raise MedcotError(
                f"{self._files[name].path}: tensor {name} holds NaN or infinite values; the file is "
                "damaged or the training that made it diverged."
            )
        return values


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises MedcotError when it is absent or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MedcotError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MedcotError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(value, dict):
        raise MedcotError(f"{path} holds a JSON {type(value).__name__}, not an object: it is not what it should be.")
    return value


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MedcotError(f"{index} names no shards (weight_map): download it again.")
        paths = [folder / name for name in sorted(set(map(str, weight_map.values())))]
    else:
        paths = [folder / SINGLE_NAME]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.glob("*.*"))[:8]) or "nothing"
        raise MedcotError(
            f"{folder} lacks {', '.join(missing)} (found {found}): give a folder with safetensors weights."
        )
    return paths


def _check_index(folder: Path, files: Mapping[str, SafetensorsFile]) -> None:
    index = folder / INDEX_NAME
    if not index.is_file():
        return
    for name, file_name in read_json(index)["weight_map"].items():
        if name not in files or files[name].path.name != file_name:
            raise MedcotError(
                f"{folder / file_name} lacks tensor {name}, which {INDEX_NAME} promises: download it again."
            )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise MedcotError(f"{path} is truncated or not a safetensors file ({size} bytes): download it again.")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise MedcotError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise MedcotError(f"{path} is not a safetensors file (its header is no JSON): download it again.") from error
    try:
        tensors = {
            name: StoredTensor(
                path,
                entry["dtype"],
                tuple(map(int, entry["shape"])),
                8 + length + int(entry["data_offsets"][0]),
                8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise MedcotError(f"{path} is not a safetensors file (its header is malformed): download it again.") from error
    _check_extents(path, size, tensors)
    return tensors


def _check_extents(path: Path, size: int, tensors: Mapping[str, StoredTensor]) -> None:
    needed = max((tensor.end for tensor in tensors.values()), default=0)
    if size < needed:
        raise MedcotError(f"{path} is truncated: it has {size} bytes of {needed}. Download it again.")
    for name, tensor in tensors.items():
        stored_as = _STORED_AS.get(tensor.dtype)
        if stored_as and tensor.end - tensor.begin != int(np.prod(tensor.shape)) * stored_as.itemsize:
            raise MedcotError(f"{path}: the size of tensor {name} does not fit its shape {list(tensor.shape)}.")
