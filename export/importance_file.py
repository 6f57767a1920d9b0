"""Importance matrices in llama.cpp's GGUF format, as ``llama-imatrix`` writes and ``llama-quantize`` reads them.

For every measured matrix the file holds ``<name>.in_sum2``, the sums of squares of the activations that its
columns are multiplied with, and ``<name>.counts``, over how many tokens. Format: llama.cpp
``tools/imatrix/imatrix.cpp`` (``save_imatrix``) and ``common/imatrix-loader.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from pipeline.artifacts import atomic_path
from pipeline.errors import MedcotError

AUTO, NONE = "auto", "none"  # what may be given instead of a file: measured, or done without

_SUMS = ".in_sum2"
_COUNTS = ".counts"
_DATASETS = "imatrix.datasets"
_CHUNK_COUNT = "imatrix.chunk_count"
_CHUNK_SIZE = "imatrix.chunk_size"
_MEASURED_FROM = "medcot.measured_from"


@dataclass(frozen=True)
class Activations:
    """What one matrix was multiplied with: sums of squares, float32 [columns], over ``tokens`` tokens."""

    square_sums: npt.NDArray[np.float32]
    tokens: int

    @property
    def mean_squares(self) -> npt.NDArray[np.float32]:
        """Float32 [columns]; ones where nothing was measured, as ``llama-quantize`` has it."""
        if self.tokens == 0:
            return np.ones_like(self.square_sums)
        mean: npt.NDArray[np.float32] = self.square_sums / np.float32(self.tokens)
        return mean


@dataclass(frozen=True)
class ImportanceMatrix:
    """Activations by the GGUF name of the matrix, and what they were measured on.

    ``chunk_size`` is the longest sequence (tokens) that was evaluated in one piece, ``path`` the file that holds
    the matrix, ``measured_from`` a hash of the model and the text where medcot measured it.
    """

    matrices: Mapping[str, Activations]
    datasets: tuple[str, ...]
    chunk_size: int
    path: Path | None = None
    measured_from: str | None = None

    @property
    def tokens(self) -> int:
        return max(each.tokens for each in self.matrices.values())

    @property
    def chunk_count(self) -> int:
        return max(1, self.tokens // self.chunk_size)

    def of(self, name: str) -> npt.NDArray[np.float32] | None:
        """Mean squares, float32 [columns], for the tensor ``name``; None where it has none (embeddings, output)."""
        matrix = self.matrices.get(name)
        return None if matrix is None else matrix.mean_squares

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Say in a quantized GGUF what guided its quantizers, under the keys of ``llama-quantize``."""
        if self.path is not None:
            writer.add_string("quantize.imatrix.file", self.path.name)
        if self.datasets:
            writer.add_string("quantize.imatrix.dataset", self.datasets[0])
        writer.add_uint32("quantize.imatrix.entries_count", len(self.matrices))
        writer.add_uint32("quantize.imatrix.chunks_count", self.chunk_count)

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise MedcotError naming the first tensor in which this is not the matrix of the model.

        ``shapes`` are those of the model's tensors by GGUF name, [rows, columns]. Every matrix of a layer must
        have an entry: llama.cpp would quantize those without one as if there were no importance matrix.
        """
        for name, matrix in self.matrices.items():
            found = len(matrix.square_sums)
            if name not in shapes:
                raise self._other_model(f"it has {name}, which the model has not")
            if len(shapes[name]) != 2 or shapes[name][1] != found:
                raise self._other_model(f"{name} has {found} columns in it and {shapes[name][-1]} in the model")
        for name, shape in shapes.items():
            if name.startswith("blk.") and len(shape) == 2 and name not in self.matrices:
                raise self._other_model(f"it lacks {name}")

    def _other_model(self, what: str) -> MedcotError:
        name = self.path or "The importance matrix"
        return MedcotError(f"{name} was measured on another model: {what}; name the right file or pass --imatrix auto.")


def write_importance(path: Path, importance: ImportanceMatrix) -> ImportanceMatrix:
    """Write the file whole or not at all; matrices in the order of their names, as llama-imatrix has them.

    Returns the matrix with its ``path``.
    """
    with atomic_path(path) as temporary:
        writer = _Writer(temporary, arch="")
        try:
            writer.add_type("imatrix")
            writer.add_array(_DATASETS, list(importance.datasets))
            writer.add_uint32(_CHUNK_COUNT, importance.chunk_count)
            writer.add_uint32(_CHUNK_SIZE, importance.chunk_size)
            if importance.measured_from is not None:
                writer.add_string(_MEASURED_FROM, importance.measured_from)
            for name, matrix in sorted(importance.matrices.items()):
                writer.add_tensor(name + _SUMS, matrix.square_sums.astype(np.float32).reshape(1, -1))
                writer.add_tensor(name + _COUNTS, np.array([[matrix.tokens]], dtype=np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return replace(importance, path=path)


def read_importance(path: Path) -> ImportanceMatrix:
    """Read a file of ``write_importance`` or ``llama-imatrix``; raises MedcotError with what is wrong with it."""
    reader = _open(path)
    kind = _value(reader, "general.type")
    if kind != "imatrix":
        raise MedcotError(
            f"{path} is a GGUF of type {kind or 'model'}, not an importance matrix: name a file that "
            "medcot export or llama-imatrix wrote, or pass --imatrix auto."
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    matrices = {
        name.removesuffix(_SUMS): _activations(path, name.removesuffix(_SUMS), tensors)
        for name in tensors
        if name.endswith(_SUMS)
    }
    if not matrices:
        raise MedcotError(f"{path} holds no activations (no tensor ends in {_SUMS}): measure it again.")
    chunk_size = _value(reader, _CHUNK_SIZE)
    if chunk_size is None:
        raise MedcotError(f"{path} lacks {_CHUNK_SIZE}, so llama-quantize would refuse it too: measure it again.")
    datasets, measured_from = tuple(_value(reader, _DATASETS) or ()), _value(reader, _MEASURED_FROM)
    return ImportanceMatrix(matrices, datasets, max(1, int(chunk_size)), path, measured_from)


class _Writer(gguf.GGUFWriter):
    """gguf's writer without the architecture, which an importance matrix has none of."""

    def add_architecture(self) -> None:
        pass


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except FileNotFoundError as error:
        raise MedcotError(
            f"{path} does not exist: --imatrix takes auto, none, or a file that medcot export or llama-imatrix wrote."
        ) from error
    except OSError as error:
        raise MedcotError(f"{path} cannot be read: {error.strerror}.") from error
    if magic != b"GGUF":
        raise MedcotError(
            f"{path} is not a GGUF; an importance matrix in llama.cpp's older .dat format becomes one with: "
            "llama-imatrix --in-file old.dat -o new.gguf."
        )
    try:
        return gguf.GGUFReader(path)
    # What gguf's reader raises where the bytes end early or make no sense.
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise MedcotError(f"{path} is damaged or cut short ({error}): copy or measure it again.") from error


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _activations(path: Path, name: str, tensors: Mapping[str, gguf.ReaderTensor]) -> Activations:
    sums, counts = tensors[name + _SUMS], tensors.get(name + _COUNTS)
    if counts is None:
        raise MedcotError(f"{path} has sums for {name} but no counts: it is damaged; measure it again.")
    if {sums.tensor_type, counts.tensor_type} != {gguf.GGMLQuantizationType.F32}:
        raise MedcotError(f"{path}: {name} is not in float32: it is no file of llama-imatrix; measure it again.")
    if counts.n_elements != 1:
        raise MedcotError(
            f"{path}: {name} has counts for {counts.n_elements} experts, and medcot quantizes dense models: "
            "it was measured on another model."
        )
    values = np.array(sums.data, dtype=np.float32).reshape(-1)
    tokens = float(np.asarray(counts.data).reshape(-1)[0])
    if not (np.isfinite(values).all() and (values >= 0).all() and np.isfinite(tokens) and tokens >= 0):
        raise MedcotError(f"{path}: {name} has sums of squares that are negative or not finite: measure it again.")
    return Activations(values, round(tokens))
