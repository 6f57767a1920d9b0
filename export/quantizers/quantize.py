"""Rows of float32 in the bytes of a ggml type: the one interface that export knows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from export import ggml
from export.quantizers.choice import chooser


def quantize(
    rows: npt.NDArray[np.float32],
    ggml_type: T,
    importance: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.uint8]:
    """Rows [n, columns] in the bytes of a ggml type, [n, bytes per row]; F32, F16 and BF16 included.

    ``importance`` [columns] is the mean square of the activation that each column is multiplied with: the
    quantizers make the error small where it is large (export/importance.py). Raises OverflowError where a value does
    not fit the type (a weight above 65504 in F16).

    Every row is quantized by itself, so any split into blocks of rows gives the same bytes. The work is done in the
    calling thread with the interpreter's lock released: several threads with a block each use as many cores.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, columns = rows.shape
    if columns % GGML_QUANT_SIZES[ggml_type][0]:
        raise ValueError(f"{columns} columns are no whole number of {ggml_type.name} blocks")
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != (columns,):
            raise ValueError(f"importance of shape {importance.shape} for {columns} columns")
    elif ggml.requires_importance(ggml_type):
        raise ValueError(f"{ggml_type.name} needs an importance matrix")  # ggml would end the process
    packed = np.empty((count, ggml.row_bytes(ggml_type, columns)), dtype=np.uint8)
    chooser().function(ggml_type, importance is not None)(rows, importance, packed)
    if not ggml.is_valid(packed, ggml_type):
        raise OverflowError(f"a weight of magnitude {np.abs(rows).max():.3g} does not fit {ggml_type.name}")
    return packed
