"""How NumPy's rows reach a compiled quantizer, which takes sixteen of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from export.quantizers.kernel import Guided, Importance, Packed, Plain, Rows
from export.quantizers.lanes import LANES


def by_blocks(compiled: Callable[..., None], ggml_type: GGMLQuantizationType, *given: Any) -> Plain:
    """Calls ``compiled(blocks, *given, out)``.

    Without importance a block's bytes do not depend on its place in the row, so each counts as a row of its own: the
    lanes are full however few rows there are.
    """
    block, size = GGML_QUANT_SIZES[ggml_type]

    def run(rows: Rows, packed: Packed) -> None:
        _in_lanes(compiled, rows.reshape(-1, block), *given, packed.reshape(-1, size))

    return run


def by_rows(compiled: Callable[..., None], *given: Any) -> Guided:
    """Calls ``compiled(rows, importance, *given, out)``."""

    def run(rows: Rows, importance: Importance, packed: Packed) -> None:
        _in_lanes(compiled, rows, importance, *given, packed)

    return run


def _in_lanes(compiled: Callable[..., None], *arguments: Any) -> None:
    """Calls ``compiled(rows, ..., out)`` with at least sixteen rows: fewer are filled up with zeros."""
    # To numba a read-only or unaligned array is a type of its own, for which it would compile anew.
    rows, *between, out = (
        np.require(each, requirements=["C", "A", "W"]) if isinstance(each, np.ndarray) else each for each in arguments
    )
    if len(rows) >= LANES:
        compiled(rows, *between, out)
    elif len(rows):
        padded = np.zeros((LANES, rows.shape[1]), np.float32)
        padded[: len(rows)] = rows
        packed = np.empty((LANES, out.shape[1]), np.uint8)
        compiled(padded, *between, packed)
        out[:] = packed[: len(rows)]
