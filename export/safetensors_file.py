"""One safetensors file: what it holds, and any rows or bytes of it, without PyTorch.

Format (8 bytes of little-endian header length, a JSON header, data):
https://huggingface.co/docs/safetensors/index#format

The file is read by position, not mapped into memory: what has been read of a mapped file counts as the process's
memory, and a file that is cut or a disk that fails while it is mapped ends the process with SIGBUS.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import MedcotError

# safetensors dtype -> what the bytes are read as; BF16 is the upper half of a float32.
FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_OTHER_TYPES = {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4,
                "F64": 8, "U64": 8, "I64": 8}  # fmt: skip
ITEM_BYTES = {name: stored_as.itemsize for name, stored_as in FLOAT_TYPES.items()} | _OTHER_TYPES
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# Weights handled at a time: bytes, indices and results of a piece stay in a core's second-level cache (measured).
_PIECE_WEIGHTS = 1 << 19

FloatRows = npt.NDArray[np.float32]
RowIndices = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
# Fills its target [last - first, columns] with the consecutive rows [first, last) of a tensor.
RunReader = Callable[[int, int, FloatRows], None]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: byte range [begin, end) counted from the start of its file.

    ``path`` names the file in messages; one on the hub that is not here has ``owner/name/file``. ``shape`` is the
    tensor's own, also where it is stored packed (``dtype`` NF4 or FP4).
    """

    path: Path | str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def float_type(name: str, tensor: StoredTensor) -> np.dtype[Any]:
    """NumPy's type of the values as they are stored; MedcotError for one that is not read."""
    stored_as = FLOAT_TYPES.get(tensor.dtype)
    if stored_as is None:
        raise MedcotError(
            f"{tensor.path}: tensor {name} is stored as {tensor.dtype}; export reads "
            f"{', '.join(FLOAT_TYPES)} and bitsandbytes' 4-bit weights. Give the unquantized base."
        )
    return stored_as


class SafetensorsFile:
    """One local file. Several threads may read at once. Raises MedcotError for a damaged one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            self._stream = path.open("rb", buffering=0)
        except OSError as error:
            raise MedcotError(f"{path} cannot be read: {error.strerror}.") from error
        try:
            self.tensors = read_header(path, size, lambda begin, end: self._read(begin, end).tobytes())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._stream.close()

    def read(self, name: str, begin: int = 0, end: int | None = None) -> ByteArray:
        """Bytes [begin, end) of a tensor as it is stored."""
        tensor = self.tensors[name]
        return self._read(tensor.begin + begin, tensor.end if end is None else tensor.begin + end)

    def read_ahead(self, name: str, begin: int, end: int) -> None:
        """Let the system fetch bytes [begin, end) of a tensor meanwhile: they will be read soon."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            start = self.tensors[name].begin + begin
            os.posix_fadvise(self._stream.fileno(), start, end - begin, os.POSIX_FADV_WILLNEED)

    def rows(self, name: str, rows: RowIndices | slice) -> FloatRows:
        """Rows of a tensor as a new float32 array [n, columns]; a vector has one column."""
        tensor = self.tensors[name]
        stored_as = float_type(name, tensor)
        count, columns = row_layout(tensor.shape)
        row_bytes = columns * stored_as.itemsize

        def read_run(first: int, last: int, target: FloatRows) -> None:
            _widen(self.read(name, first * row_bytes, last * row_bytes).view(stored_as), target)

        return gather_rows(rows, count, columns, read_run)

    def _read(self, begin: int, end: int) -> ByteArray:
        content = np.empty(end - begin, dtype=np.uint8)
        done = 0
        try:
            while done < content.size:
                got = os.preadv(self._stream.fileno(), [content[done:].data], begin + done)
                if not got:
                    raise MedcotError(f"{self.path} became shorter while it was read: download it again.")
                done += got
        except OSError as error:
            raise MedcotError(f"{self.path} cannot be read: {error.strerror}.") from error
        return content


def row_layout(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor that is read by its first dimension; a number is one row of one column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def gather_rows(rows: RowIndices | slice, count: int, columns: int, read_run: RunReader) -> FloatRows:
    """Any of ``count`` rows in the order asked for, by a reader of consecutive ones.

    Works through pieces that stay in a core's cache, so little memory is needed beside the result. A piece of rows in
    another order is read by its runs of consecutive rows: heads whose rows are interleaved are a run each.
    """
    if isinstance(rows, slice):
        first, last, stride = rows.indices(count)
        wanted: range | RowIndices = range(first, last, stride)
    else:
        wanted = rows
    found = np.empty((len(wanted), columns), dtype=np.float32)
    step = max(1, _PIECE_WEIGHTS // max(1, columns))
    for start in range(0, len(wanted), step):
        piece = wanted[start : start + step]
        target = found[start : start + step]
        if isinstance(piece, range) and piece.step == 1:
            read_run(piece.start, piece.stop, target)
        else:
            _read_piece(np.asarray(piece, dtype=np.int64), count, target, read_run)
    return found


def _read_piece(rows: RowIndices, count: int, target: FloatRows, read_run: RunReader) -> None:
    wanted, places = np.unique(rows, return_inverse=True)
    if wanted[0] < 0 or wanted[-1] >= count:
        raise IndexError(f"rows {wanted[0]} to {wanted[-1]} of {count}")
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
    found = np.empty((len(wanted), target.shape[1]), dtype=np.float32)
    place = 0
    for run in runs:
        read_run(int(run[0]), int(run[-1]) + 1, found[place : place + len(run)])
        place += len(run)
    # In the default mode numpy would write to a buffer first; the places are in range.
    np.take(found, places.reshape(-1), axis=0, out=target, mode="clip")


def read_header(path: Path | str, size: int, read: Callable[[int, int], bytes]) -> dict[str, StoredTensor]:
    """The tensors of a file of ``size`` bytes, read through ``read(begin, end)``.

    Raises MedcotError where the file is cut, malformed, or smaller than its tensors.
    """
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else 0
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise MedcotError(f"{path} is truncated or not a safetensors file ({size} bytes): download it again.")
    try:
        header = json.loads(read(8, 8 + length))
    except (ValueError, RecursionError) as error:
        raise MedcotError(f"{path} is not a safetensors file (its header is no JSON): download it again.") from error
    try:
        tensors = {
            name: StoredTensor(
                path,
                str(entry["dtype"]),
                tuple(map(int, entry["shape"])),
                8 + length + int(entry["data_offsets"][0]),
                8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise MedcotError(f"{path} is not a safetensors file (its header is malformed): download it again.") from error
    _check_extents(path, size, 8 + length, tensors)
    return tensors


def _widen(values: npt.NDArray[Any], target: FloatRows) -> None:
    shaped = values.reshape(target.shape)
    if values.dtype == FLOAT_TYPES["BF16"]:
        np.left_shift(shaped, np.uint32(16), out=target.view(np.uint32), dtype=np.uint32)
    else:
        target[...] = shaped


def _check_extents(path: Path | str, size: int, data_begin: int, tensors: Mapping[str, StoredTensor]) -> None:
    needed = max((tensor.end for tensor in tensors.values()), default=0)
    if size < needed:
        raise MedcotError(f"{path} is truncated: it has {size} bytes of {needed}. Download it again.")
    for name, tensor in tensors.items():
        expected = math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 0)
        stored = tensor.end - tensor.begin
        misfit = tensor.dtype in ITEM_BYTES and stored != expected
        if misfit or stored < 0 or tensor.begin < data_begin or min(tensor.shape, default=0) < 0:
            raise MedcotError(f"{path}: the size of tensor {name} does not fit its shape {list(tensor.shape)}.")
