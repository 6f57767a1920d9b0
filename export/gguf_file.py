"""A GGUF written from front to back: header, metadata, list of tensors, then tensors by blocks of rows.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from export.architecture import Architecture, ModelTensor
from export.ggml import IGNORES_IMPORTANCE, row_bytes
from export.importance_file import ImportanceMatrix
from export.quant_types import FileType, tensor_type
from export.recipe_metadata import add_recipe
from export.tokenizer_metadata import Vocabulary


@dataclass(frozen=True)
class PlannedTensor:
    name: str
    shape: tuple[int, ...]
    ggml_type: gguf.GGMLQuantizationType

    @property
    def bytes(self) -> int:
        rows = math.prod(self.shape[:-1])
        return rows * row_bytes(self.ggml_type, self.shape[-1])


@dataclass(frozen=True)
class GgufPlan:
    """What one file will hold; its size is known before anything is written."""

    title: str
    file_type: FileType
    architecture: Architecture
    vocabulary: Vocabulary
    tensors: tuple[PlannedTensor, ...]
    system: str | None = None
    importance: ImportanceMatrix | None = None

    @classmethod
    def of(
        cls,
        title: str,
        file_type: FileType,
        architecture: Architecture,
        vocabulary: Vocabulary,
        tensors: Sequence[ModelTensor],
        system: str | None = None,
        importance: ImportanceMatrix | None = None,
    ) -> GgufPlan:
        """``importance`` guides the quantizers; file types that ignore it are planned without."""
        if file_type.default in IGNORES_IMPORTANCE:
            importance = None
        shape = replace(architecture.shape, has_importance=importance is not None)
        planned = tuple(
            PlannedTensor(
                tensor.name,
                tensor.shape,
                tensor_type(file_type, tensor.name, tensor.shape, shape),
            )
            for tensor in tensors
        )
        return cls(title, file_type, architecture, vocabulary, planned, system, importance)

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(_padded(tensor.bytes) for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return sum(tensor.bytes for tensor in self.tensors) * 8 / self.parameters

    @property
    def type_counts(self) -> dict[str, int]:
        return dict(Counter(tensor.ggml_type.name for tensor in self.tensors).most_common())


class GgufFile:
    """One file being written. Tensors come in the plan's order, each complete before the next."""

    def __init__(self, plan: GgufPlan, path: Path) -> None:
        self.plan = plan
        self._next = 0
        self._written = 0
        self._writer = gguf.GGUFWriter(path, plan.architecture.name)
        try:
            self._stream = self._write_head()
        except BaseException:
            self.close()
            raise

    @property
    def current(self) -> PlannedTensor:
        """The tensor that the next block belongs to."""
        return self.plan.tensors[self._next]

    def write(self, block: npt.NDArray[np.uint8]) -> None:
        """Append bytes to the current tensor; the last ones move on to the next tensor."""
        tensor = self.current
        self._written += block.nbytes
        if self._written > tensor.bytes:
            raise ValueError(f"{tensor.name} is longer than planned")
        self._stream.write(block.data)
        if self._written == tensor.bytes:
            self._stream.write(bytes(_padded(tensor.bytes) - tensor.bytes))
            self._next, self._written = self._next + 1, 0

    def finish(self) -> None:
        """Check that every tensor is complete and flush."""
        if self._next != len(self.plan.tensors):
            raise ValueError(f"{self.current.name} was not written")
        self._stream.flush()

    def close(self) -> None:
        """Close the file, whatever state it is in."""
        self._writer.close()

    def _write_head(self) -> BinaryIO:
        plan, writer = self.plan, self._writer
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(plan.title)
        writer.add_size_label(gguf.size_label(plan.parameters, plan.parameters, 0, 0))
        plan.architecture.add_metadata(writer)
        writer.add_file_type(plan.file_type.number)
        plan.vocabulary.add_metadata(writer)
        add_recipe(writer, plan.vocabulary.chat_template, plan.system)
        if plan.importance is not None:
            plan.importance.add_metadata(writer)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for tensor in plan.tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=tensor.ggml_type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        stream: BinaryIO = writer.fout[0]
        stream.write(bytes(_padded(stream.tell()) - stream.tell()))
        return stream


def _padded(size: int) -> int:
    return -(-size // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT
