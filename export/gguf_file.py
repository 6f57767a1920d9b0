"""A GGUF written from front to back: header, metadata, list of tensors, then tensors by blocks of rows.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.gguf_writer import WriterState

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
    def size(self) -> int:
        """Bytes of the finished file."""
        return self.offset(len(self.tensors))

    def offset(self, tensors: int) -> int:
        """Where the file ends when so many tensors are complete."""
        return len(self.head) + sum(_padded(tensor.bytes) for tensor in self.tensors[:tensors])

    @cached_property
    def head(self) -> bytes:
        """All bytes before the first tensor: header, metadata and the list of tensors."""
        writer = gguf.GGUFWriter(None, self.architecture.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.title)
        writer.add_size_label(gguf.size_label(self.parameters, self.parameters, 0, 0))
        self.architecture.add_metadata(writer)
        writer.add_file_type(self.file_type.number)
        self.vocabulary.add_metadata(writer)
        add_recipe(writer, self.vocabulary.chat_template, self.system)
        if self.importance is not None:
            self.importance.add_metadata(writer)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for tensor in self.tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=tensor.ggml_type
            )
        stream = BytesIO()
        # What ``open_output_file`` would set up for a path.
        writer.fout, writer.state = [stream], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return stream.getvalue().ljust(_padded(stream.tell()), b"\0")

    @property
    def bits_per_weight(self) -> float:
        return sum(tensor.bytes for tensor in self.tensors) * 8 / self.parameters

    @property
    def type_counts(self) -> dict[str, int]:
        return dict(Counter(tensor.ggml_type.name for tensor in self.tensors).most_common())


class GgufFile:
    """One file being written. Tensors come in the plan's order, each complete before the next.

    With ``tensors_done`` the file at ``path`` is gone on with behind so many tensors: what lies further is cut off.
    Methods raise OSError.
    """

    def __init__(self, plan: GgufPlan, path: Path, tensors_done: int = 0) -> None:
        self.plan = plan
        self._next = tensors_done
        self._written = 0
        # Unbuffered: after a failed write nothing is left that closing would try to write again.
        self._stream = path.open("r+b" if tensors_done else "w+b", buffering=0)
        try:
            if not tensors_done:
                self._write(memoryview(plan.head))
            self.cut(tensors_done)
        except BaseException:
            self.close()
            raise

    @property
    def current(self) -> PlannedTensor:
        """The tensor that the next block belongs to."""
        return self.plan.tensors[self._next]

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._stream.tell()

    def write(self, block: npt.NDArray[np.uint8]) -> None:
        """Append bytes to the current tensor; the last ones move on to the next tensor."""
        tensor = self.current
        self._written += block.nbytes
        if self._written > tensor.bytes:
            raise ValueError(f"{tensor.name} is longer than planned")
        self._write(np.ascontiguousarray(block).data.cast("B"))
        if self._written == tensor.bytes:
            self._write(memoryview(bytes(_padded(tensor.bytes) - tensor.bytes)))
            self._next, self._written = self._next + 1, 0

    def cut(self, tensors_done: int) -> None:
        """Go back to where so many tensors are complete."""
        self._stream.seek(self.plan.offset(tensors_done))
        self._stream.truncate()
        self._next, self._written = tensors_done, 0

    def sync(self) -> None:
        """Return when what is written is on the disk; other threads may write meanwhile."""
        os.fsync(self._stream.fileno())

    def finish(self) -> None:
        """Check that every tensor is complete."""
        if self._next != len(self.plan.tensors):
            raise ValueError(f"{self.current.name} was not written")

    def close(self) -> None:
        """Close the file, whatever state it is in."""
        self._stream.close()

    def _write(self, content: memoryview) -> None:
        # A disk that fills up takes a part first, and refuses only the next call.
        while content:
            content = content[self._stream.write(content) :]


def _padded(size: int) -> int:
    return -(-size // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT
