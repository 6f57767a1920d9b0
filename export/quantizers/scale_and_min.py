"""Quantizers of a scale and a minimum: Q4_K, Q5_K, Q2_K, and Q4_1 and Q5_1 where an importance matrix guides them.

The search is in export/quantizers/scale_and_min_search.py; here are each type's weights, and its bytes. Sources:
ggml/src/ggml-quants.c (`quantize_row_*`), the layouts ggml/src/ggml-common.h (`block_*`).

Lanes are sixteen rows, and a super-block is 256 vectors of the scratch, one after another:

                   super-block 0                              super-block 1
              sub-block 0    sub-block 1   ...
    row 0   [ 0  1 ... 31   32 33 ... 63   ... 255 ]    [ 0  1 ...           lane 0
    row 1   [ 0  1 ... 31   32 33 ... 63   ... 255 ]    [ 0  1 ...           lane 1
      ...     |
              vector 0

A column's importance is thereby one scalar for all lanes. Without importance a super-block's bytes do not depend on its
place, so that each is made a row, and a tensor of few rows fills the lanes as well.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as T

from export.quantizers.calls import by_blocks, by_rows
from export.quantizers.constants import ZERO
from export.quantizers.fields import four_bytes
from export.quantizers.kernel import Importance, Kernel, Packed, Rows
from export.quantizers.lanes import (
    LANES,
    absolute,
    any_lane,
    from_half,
    group_start,
    inlined,
    kernel,
    larger,
    load,
    nearest_int,
    repeat,
    routine,
    select,
    smaller,
    square_root,
    store,
    store_words,
    to_float,
    to_half,
    transpose_in,
)
from export.quantizers.scale_and_min_search import (
    MINIMA,
    Method,
    code_by_largest,
    code_by_search,
    kept_level,
    scratch,
    search,
)

SUPER_BLOCK = 256
FOUR_BITS = np.float32(15)


@inlined
def _sum_of_squares(values, first, count, total):  # type: ignore[no-untyped-def]
    for i in range(first, first + count):
        value = load(values, i)
        total += value * value
    return total


@inlined
def _guide(scratch, sub, width, importance, column, spread):  # type: ignore[no-untyped-def]
    """Weights of a sub-block: importance * sqrt(spread + value^2), so that large values count more."""
    for i in range(width):
        value = load(scratch.values, sub * width + i)
        store(scratch.weights, i, importance[column + i] * square_root(spread + value * value))


@routine
def _fit(rows, row, column, importance, method, scratch):  # type: ignore[no-untyped-def]
    """Codes of the scales and minima of a super-block, and the codes' units, from its weights and values."""
    values, width = scratch.values, method.width
    sub_blocks = SUPER_BLOCK // width
    for i in range(0, SUPER_BLOCK, LANES):
        transpose_in(rows, row, column + i, values, i)
    if importance is not None:
        squares = _sum_of_squares(values, 0, SUPER_BLOCK, repeat(ZERO))
        spread = method.spread * squares / np.float32(SUPER_BLOCK)
    for sub in range(sub_blocks):
        if importance is not None:
            _guide(scratch, sub, width, importance, column + sub * width, spread)
        else:
            typical = repeat(ZERO)
            if not method.by_magnitude:
                typical = square_root(_sum_of_squares(values, sub * width, width, typical) / np.float32(width))
            for i in range(width):
                store(scratch.weights, i, typical + absolute(load(values, sub * width + i)))
        search(scratch, sub, method)
    for part in range(2):
        if importance is not None:
            code_by_search(scratch, part, sub_blocks, method.top_code)
        else:
            code_by_largest(scratch, part, sub_blocks, method.top_code)


@routine
def _requantize(scratch, sub, method, scale, minimum):  # type: ignore[no-untyped-def]
    """The levels of a sub-block for the scale and minimum of its codes; the search's where that scale is zero."""
    highest, first = np.int32(method.top), sub * method.width
    for i in range(first, first + method.width):
        level = nearest_int((load(scratch.values, i) + minimum) / scale)
        store(scratch.levels, i, larger(smaller(level, highest), 0))
    vanished = scale == ZERO
    if any_lane(vanished):
        for i in range(first, first + method.width):
            kept = kept_level(scratch, sub, load(scratch.values, i), method.top)
            store(scratch.levels, i, select(vanished, kept, load(scratch.levels, i)))


@inlined
def _store_halves(out, row, column, scale, minimum):  # type: ignore[no-untyped-def]
    """Both as halves, four bytes; returns them as a decoder reads them."""
    scale, minimum = to_half(scale), to_half(minimum)
    store_words(out, row, column, scale | (minimum << 16))
    return from_half(scale), from_half(minimum)


@routine
def _store_six_bit_codes(codes, out, row, column):  # type: ignore[no-untyped-def]
    """Twelve bytes, and ``codes`` as a decoder reads them.

    Scales 0-3, minima 0-3, then the low four bits of scales and minima 4-7, whose high bits are on top of the first
    eight bytes. A code above 63 (a negative one, wrapped; guided Q4_K only) spills into the bits above its own.
    """
    scales = repeat(0)
    minima = repeat(0)
    low_bits = repeat(0)
    for n in range(4):
        later_scale, later_minimum = load(codes, n + 4), load(codes, MINIMA + n + 4)
        scale = (load(codes, n) | (later_scale >> 4 << 6)) & 0xFF
        minimum = (load(codes, MINIMA + n) | (later_minimum >> 4 << 6)) & 0xFF
        scales |= scale << 8 * n
        minima |= minimum << 8 * n
        low_bits |= ((later_scale & 15) | ((later_minimum & 15) << 4)) << 8 * n
        store(codes, n, scale & 63)
        store(codes, MINIMA + n, minimum & 63)
        store(codes, n + 4, (later_scale & 15) | (scale >> 6 << 4))
        store(codes, MINIMA + n + 4, (later_minimum & 15) | (minimum >> 6 << 4))
    store_words(out, row, column, scales)
    store_words(out, row, column + 4, minima)
    store_words(out, row, column + 8, low_bits)


@routine
def _store_q4_k_or_q5_k(scratch, method, six_bits, out, row, column):  # type: ignore[no-untyped-def]
    """Two half units, 12 bytes of codes, for Q5_K 32 bytes of fifth bits, and 128 bytes of low bits."""
    codes, levels = scratch.codes, scratch.levels
    if six_bits:
        for n in range(8):
            store(codes, n, smaller(load(codes, n), 63))
            store(codes, MINIMA + n, smaller(load(codes, MINIMA + n), 63))
    units = _store_halves(out, row, column, load(scratch.units, 0), load(scratch.units, 1))
    _store_six_bit_codes(codes, out, row, column + 4)
    for sub in range(8):
        scale, minimum = to_float(load(codes, sub)), to_float(load(codes, MINIMA + sub))
        _requantize(scratch, sub, method, units[0] * scale, units[1] * minimum)
    column += 16
    if method.top > FOUR_BITS:
        for i in range(0, 32, 4):
            store_words(out, row, column + i, four_bytes(levels, i, 32, 1, 4))
        column += 32
    for pair in range(4):
        for i in range(0, 32, 4):
            store_words(out, row, column + 32 * pair + i, four_bytes(levels, 64 * pair + i, 32, 4, 0))


@routine
def _store_q2_k(scratch, method, out, row, column):  # type: ignore[no-untyped-def]
    """16 bytes of codes (a scale's, above it a minimum's), 64 bytes of levels, and two half units."""
    units = _store_halves(out, row, column + 80, load(scratch.units, 0), load(scratch.units, 1))
    for four in range(0, 16, 4):
        word = repeat(0)
        for byte in range(4):
            sub = four + byte
            code = (load(scratch.codes, sub) | (load(scratch.codes, MINIMA + sub) << 4)) & 0xFF
            word |= code << 8 * byte
            scale, minimum = to_float(code & 15), to_float(code >> 4)
            _requantize(scratch, sub, method, units[0] * scale, units[1] * minimum)
        store_words(out, row, column + four, word)
    for half in range(2):
        for i in range(0, 32, 4):
            word = four_bytes(scratch.levels, 128 * half + i, 32, 2, 0)
            store_words(out, row, column + 16 + 32 * half + i, word)


@kernel
def _q4_k_or_q5_k(rows, importance, method, scratch, out):  # type: ignore[no-untyped-def]
    super_blocks = rows.shape[1] // SUPER_BLOCK
    six_bits = importance is None or method.top > FOUR_BITS  # ggml does not limit guided Q4_K's codes
    for first in range(0, len(rows), LANES):
        row = group_start(first, len(rows))
        for block in range(super_blocks):
            _fit(rows, row, SUPER_BLOCK * block, importance, method, scratch)
            column = out.shape[1] // super_blocks * block
            _store_q4_k_or_q5_k(scratch, method, six_bits, out, row, column)


@kernel
def _q2_k(rows, importance, method, scratch, out):  # type: ignore[no-untyped-def]
    super_blocks = rows.shape[1] // SUPER_BLOCK
    for first in range(0, len(rows), LANES):
        row = group_start(first, len(rows))
        for block in range(super_blocks):
            _fit(rows, row, SUPER_BLOCK * block, importance, method, scratch)
            _store_q2_k(scratch, method, out, row, out.shape[1] // super_blocks * block)


@kernel
def _q4_1_or_q5_1(rows, importance, method, scratch, out):  # type: ignore[no-untyped-def]
    """Blocks of 32: half scale and minimum, for Q5_1 four bytes of fifth bits, and 16 bytes of low bits."""
    blocks = rows.shape[1] // 32
    values, levels = scratch.values, scratch.levels
    for first in range(0, len(rows), LANES):
        row = group_start(first, len(rows))
        squares = repeat(ZERO)
        for column in range(0, rows.shape[1], LANES):
            transpose_in(rows, row, column, values, 0)
            squares = _sum_of_squares(values, 0, LANES, squares)
        spread = method.spread * squares / np.float32(rows.shape[1])
        for block in range(blocks):
            for i in range(0, 32, LANES):
                transpose_in(rows, row, 32 * block + i, values, i)
            _guide(scratch, 0, 32, importance, 32 * block, spread)
            search(scratch, 0, method)
            column = out.shape[1] // blocks * block
            _store_halves(out, row, column, load(scratch.fitted, 0), -load(scratch.fitted, MINIMA))
            column += 4
            fifth_bits = repeat(0)
            for i in range(32):
                level = kept_level(scratch, 0, load(values, i), method.top)
                store(levels, i, level)
                fifth_bits |= level >> 4 << i
            if method.top > FOUR_BITS:
                store_words(out, row, column, fifth_bits)
                column += 4
            for i in range(0, 16, 4):
                store_words(out, row, column + i, four_bytes(levels, i, 16, 4, 0))


def _plain(
    width: int, top: int, first: float, step: float, last: int, top_code: int, *, by_magnitude: bool = False
) -> Method:
    real = np.float32
    return Method(width, real(top), real(first), real(step), last, by_magnitude, real(0), real(top_code))


def _guided(width: int, top: int, spread: int, top_code: int = 0) -> Method:
    real = np.float32
    return Method(width, real(top), real(-0.9), real(0.05), 36, False, real(spread), real(top_code))


def _kernel(ggml_type: T, compiled: Callable[..., None], guided: Method, plain: Method | None = None) -> Kernel:
    def with_scratch(rows: Rows, importance: Importance | None, method: Method, out: Packed) -> None:
        # New for every call: threads call at the same time.
        compiled(rows, importance, method, scratch(), out)

    return Kernel(
        plain=by_blocks(with_scratch, ggml_type, None, plain) if plain else None,
        guided=by_rows(with_scratch, guided),
    )


KERNELS = {
    T.Q4_K: _kernel(T.Q4_K, _q4_k_or_q5_k, _guided(32, 15, 2, 63), _plain(32, 15, -1, 0.1, 20, 63)),
    T.Q5_K: _kernel(T.Q5_K, _q4_k_or_q5_k, _guided(32, 31, 2, 63), _plain(32, 31, -0.5, 0.1, 15, 63)),
    T.Q2_K: _kernel(T.Q2_K, _q2_k, _guided(16, 3, 1, 15), _plain(16, 3, -0.5, 0.1, 15, 15, by_magnitude=True)),
    T.Q4_1: _kernel(T.Q4_1, _q4_1_or_q5_1, _guided(32, 15, 1)),
    T.Q5_1: _kernel(T.Q5_1, _q4_1_or_q5_1, _guided(32, 31, 1)),
}
