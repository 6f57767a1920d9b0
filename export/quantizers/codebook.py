"""Quantizers whose levels are sixteen uneven values, closer together near zero where most weights are (IQ4_NL, IQ4_XS).

ggml (ggml/src/ggml-quants.c, ``quantize_row_iq4_nl_impl``) finds the scale of 32 weights x by weighted least squares.
With the largest magnitude at the first value of the codebook, the nearest values v of all x give the scale

    scale = sum(w * x * v) / sum(w * v * v)        error removed = scale * sum(w * x * v)

and so do fifteen more ways to stretch the weights over the codebook; the one that removes most of the error wins. The
weights w are x * x, or follow an importance matrix. An IQ4_NL block is one such scale and its levels; an IQ4_XS block
of 256 weights rounds eight scales to six bits beside a common one.

Sixteen rows go side by side, a row in each lane. ggml looks the nearest value up by bisection; lanes cannot branch, so
here the value is the codebook's last one less every gap whose midpoint lies above x. That is the same value, as both
distances to neighbouring integers are exact in float32 where they are about equal.

    vector of scratch      VALUES + i                      WEIGHTS + i (of 32)         SCALES + s
    lane k                 rows[row + k, column + i]       w of that weight            scale of 32 weights, s = 0 .. 7
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as T

from export.quantizers.calls import by_blocks, by_rows
from export.quantizers.constants import ALL_ZEROS, ONE, ZERO
from export.quantizers.kernel import Kernel
from export.quantizers.lanes import (
    LANES,
    absolute,
    group_start,
    inlined,
    kernel,
    larger,
    load,
    nearest_int,
    repeat,
    select,
    smaller,
    square_root,
    store,
    store_halves,
    store_words,
    to_float,
    to_half,
    transpose_in,
)

CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
MIDPOINTS = (CODEBOOK[:-1] + CODEBOOK[1:]) / np.float32(2)
GAPS = np.diff(CODEBOOK)
FIRST, LAST = CODEBOOK[0], CODEBOOK[-1]
STRETCHES = 7  # in each direction

WEIGHTS, SCALES, VALUES = 0, 32, 40  # vectors where they begin in scratch


@inlined
def nearest_value(x: Any) -> Any:
    """The codebook's value that is nearest; the upper one of two."""
    value = repeat(LAST)
    for n in range(15):
        value = value - select(x < MIDPOINTS[n], GAPS[n], ZERO)
    return value


@inlined
def nearest_index(x: Any) -> Any:
    """The index of ``nearest_value``."""
    index = repeat(15)
    for n in range(15):
        index = index - select(x < MIDPOINTS[n], 1, 0)
    return index


@inlined
def quotient_or_zero(numerator: Any, denominator: Any) -> Any:
    return select(denominator != ZERO, numerator / denominator, ZERO)


@inlined
def set_weights(scratch: Any, values: int, mean_square: Any, importance: Any, column: int) -> None:
    """How much each of 32 errors counts; ``mean_square`` is ``twice_mean_square`` of the whole block."""
    for i in range(32):
        x = load(scratch, values + i)
        if importance is None:
            store(scratch, WEIGHTS + i, x * x)
        else:
            store(scratch, WEIGHTS + i, importance[column + i] * square_root(mean_square + x * x))


@inlined
def sums(scratch: Any, values: int, inverse: Any) -> Any:
    """sum(w * x * v) and sum(w * v * v) for the values v nearest to ``inverse * x``."""
    sum_xv = repeat(ZERO)
    sum_vv = repeat(ZERO)
    for i in range(32):
        x = load(scratch, values + i)
        value = nearest_value(inverse * x)
        weighted = load(scratch, WEIGHTS + i) * value
        sum_xv = sum_xv + weighted * x
        sum_vv = sum_vv + weighted * value
    return sum_xv, sum_vv


@inlined
def best_scale(scratch: Any, values: int) -> Any:
    """The scale of 32 weights; their extreme is at one end of the codebook, so a scale may be negative."""
    extreme = repeat(ZERO)
    magnitude = repeat(ZERO)
    for i in range(32):
        x = load(scratch, values + i)
        extreme = select(absolute(x) > magnitude, x, extreme)
        magnitude = larger(absolute(x), magnitude)
    sum_xv, sum_vv = sums(scratch, values, ONE / (-extreme / FIRST))
    scale = select(sum_vv > ZERO, sum_xv / sum_vv, ZERO)
    removed = scale * sum_xv
    for stretch in range(-STRETCHES, STRETCHES + 1):
        sum_xv, sum_vv = sums(scratch, values, (np.float32(stretch) + FIRST) / extreme)
        better = (sum_vv > ZERO) & (sum_xv * sum_xv > removed * sum_vv)
        scale = select(better, sum_xv / sum_vv, scale)
        removed = select(better, scale * sum_xv, removed)
    return select(magnitude < ALL_ZEROS, ZERO, scale)


@inlined
def twice_mean_square(scratch: Any, values: int, count: int) -> Any:
    total = repeat(ZERO)
    for i in range(count):
        x = load(scratch, values + i)
        total = total + x * x
    return total * np.float32(2 / count)


@inlined
def store_levels(scratch: Any, values: int, inverse: Any, packed: Any, row: int, at: int) -> None:
    """32 levels in 16 bytes: level i in the low half of byte i, level i + 16 in the high half."""
    for first in range(0, 16, 4):
        word = repeat(0)
        for i in range(4):
            low = nearest_index(inverse * load(scratch, values + first + i))
            high = nearest_index(inverse * load(scratch, values + first + i + 16))
            word = word | (low << 8 * i) | (high << 8 * i + 4)
        store_words(packed, row, at + first, word)


@kernel
def iq4_nl(rows: Any, importance: Any, packed: Any) -> None:
    """A block: scale in half precision (2 bytes), levels (16)."""
    scratch = np.empty((VALUES + 32) * LANES, np.float32)
    for group in range(0, len(rows), LANES):
        row = group_start(group, len(rows))
        for block in range(rows.shape[1] // 32):
            column = 32 * block
            transpose_in(rows, row, column, scratch, VALUES)
            transpose_in(rows, row, column + 16, scratch, VALUES + 16)
            mean_square = twice_mean_square(scratch, VALUES, 32)
            set_weights(scratch, VALUES, mean_square, importance, column)
            scale = best_scale(scratch, VALUES)
            store_halves(packed, row, 18 * block, to_half(scale))
            store_levels(scratch, VALUES, quotient_or_zero(ONE, scale), packed, row, 18 * block + 2)


@kernel
def iq4_xs(rows: Any, importance: Any, packed: Any) -> None:
    """A block: common scale in half precision (2 bytes), eight scales' high bits (2) and low bits (4), levels (128)."""
    scratch = np.empty((VALUES + 256) * LANES, np.float32)
    for group in range(0, len(rows), LANES):
        row = group_start(group, len(rows))
        for block in range(rows.shape[1] // 256):
            for column in range(0, 256, 16):
                transpose_in(rows, row, 256 * block + column, scratch, VALUES + column)
            mean_square = twice_mean_square(scratch, VALUES, 256)
            largest = repeat(ZERO)
            magnitude = repeat(ZERO)
            for part in range(8):
                values = VALUES + 32 * part
                set_weights(scratch, values, mean_square, importance, 256 * block + 32 * part)
                scale = best_scale(scratch, values)
                store(scratch, SCALES + part, scale)
                largest = select(absolute(scale) > magnitude, scale, largest)
                magnitude = larger(absolute(scale), magnitude)
            common = -largest / np.float32(32)
            inverse_common = quotient_or_zero(ONE, common)
            at = 136 * block
            store_halves(packed, row, at, to_half(common))
            high = repeat(0)
            low = repeat(0)
            for part in range(8):
                rounded = nearest_int(inverse_common * load(scratch, SCALES + part))
                rounded = larger(-32, smaller(31, rounded))
                inverse = quotient_or_zero(ONE, common * to_float(rounded))
                store_levels(scratch, VALUES + 32 * part, inverse, packed, row, at + 8 + 16 * part)
                low = low | ((rounded + 32 & 15) << 4 * part)
                high = high | ((rounded + 32 >> 4) << 2 * part)
            store_halves(packed, row, at + 2, high)
            store_words(packed, row, at + 4, low)


KERNELS = {
    T.IQ4_NL: Kernel(by_blocks(iq4_nl, T.IQ4_NL, None), by_rows(iq4_nl)),
    T.IQ4_XS: Kernel(by_blocks(iq4_xs, T.IQ4_XS, None), by_rows(iq4_xs)),
}
