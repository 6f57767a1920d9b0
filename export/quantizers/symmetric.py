"""Quantizers with levels around zero: Q6_K, Q8_0 and, with an importance matrix, Q4_0 and Q5_0; Q3_K is in q3_k.py.

Sources: `quantize_row_*` in ggml/src/ggml-quants.c, and the layout of `block_*` in ggml/src/ggml-common.h. The bytes
are ggml's because every lane goes through its float operations in its order.

Lanes are rows, and the vectors of a scratch array the columns of one block at a time, here a Q6_K super-block:

                   sub-block 0             ...  sub-block 15
    vector         0      1    ...    15   ...  240  ...  255
    lane 0       [ row 0's 256 weights, one scale per 16 of them ]
    ...
    lane 15      [ row 15's                                      ]

Without an importance matrix each block counts as a row (export/quantizers/calls.py).
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as T

from export.quantizers.calls import by_blocks, by_rows
from export.quantizers.constants import ALL_ZEROS, ONE, ZERO
from export.quantizers.fields import four_bytes
from export.quantizers.kernel import Kernel
from export.quantizers.lanes import (
    LANES,
    absolute,
    from_half,
    group_start,
    kernel,
    load,
    nearest_int,
    repeat,
    select,
    smaller,
    square_root,
    store,
    store_bytes,
    store_halves,
    store_words,
    to_float,
    to_half,
    to_int,
    transpose_in,
)
from export.quantizers.q3_k import q3_k
from export.quantizers.symmetric_search import extreme_of, requantize, search

BEFORE_HALF = np.float32(0.49999997)  # the float32 before 0.5
UNGUIDED = np.empty(0, np.float32)  # the importance that stands for weights x x


@kernel
def q6_k(rows, importance, out):  # type: ignore[no-untyped-def]
    """Super-blocks of 256 weights with sixteen int8 scales: 128 bytes of low nibbles, 64 of upper bit pairs, 16 of
    scales, a half float.

    With UNGUIDED for the importance one compilation serves both variants, which differ in the weights alone.
    """
    values = np.empty(256 * LANES, np.float32)
    weights, weighted, scales = np.empty((3, 16 * LANES), np.float32)
    levels = np.empty(256 * LANES, np.int32)
    for first in range(0, len(rows), LANES):
        row = group_start(first, len(rows))
        for block in range(rows.shape[1] // 256):
            for sub in range(16):
                column = 256 * block + 16 * sub
                transpose_in(rows, row, column, values, 16 * sub)
                for i in range(16):
                    if len(importance):
                        store(weights, i, importance[column + i])
                    else:
                        store(weights, i, load(values, 16 * sub + i) * load(values, 16 * sub + i))
                store(scales, sub, search(values, 16 * sub, weights, weighted, levels, 16, 32))
            extreme = extreme_of(scales, 0, 16)
            zeros = absolute(extreme) < ALL_ZEROS
            inverse = np.float32(-128) / extreme
            half = select(zeros, 0, to_half(ONE / inverse))
            at = 210 * block
            for sub in range(16):
                scale = select(zeros, 0, smaller(nearest_int(inverse * load(scales, sub)), 127))
                store_bytes(out, row, at + 192 + sub, scale)
                requantize(values, levels, 16 * sub, 16, from_half(half) * to_float(scale), 32)
            for i in range(256):  # all bytes of such a super-block are zero
                store(levels, i, select(zeros, 0, load(levels, i)))
            for part in range(2):
                for i in range(0, 32, 4):
                    level = 128 * part + i
                    store_words(out, row, at + 64 * part + i, four_bytes(levels, level, 64, 4, 0))
                    store_words(out, row, at + 64 * part + 32 + i, four_bytes(levels, level + 32, 64, 4, 0))
                    store_words(out, row, at + 128 + 32 * part + i, four_bytes(levels, level, 32, 2, 4))
            store_halves(out, row, at + 208, half)


@kernel
def q4_0_or_q5_0(rows, importance, most, out):  # type: ignore[no-untyped-def]
    """Blocks of 32 weights: a half float, for Q5_0 (``most`` 16, not 8) 4 bytes of fifth bits, 16 of low nibbles."""
    columns = rows.shape[1]
    values, weights, weighted = np.empty((3, 32 * LANES), np.float32)
    levels = np.empty(32 * LANES, np.int32)
    header = 2 if most == 8 else 6
    for first in range(0, len(rows), LANES):
        row = group_start(first, len(rows))
        sum_of_squares = repeat(ZERO)
        for column in range(0, columns, LANES):
            transpose_in(rows, row, column, values, 0)
            for i in range(LANES):
                sum_of_squares += load(values, i) * load(values, i)
        spread = sum_of_squares / np.float32(columns)
        for block in range(columns // 32):
            transpose_in(rows, row, 32 * block, values, 0)
            transpose_in(rows, row, 32 * block + 16, values, 16)
            for i in range(32):
                value = load(values, i)
                store(weights, i, importance[32 * block + i] * square_root(spread + value * value))
            scale = search(values, 0, weights, weighted, levels, 32, most)
            at = (header + 16) * block
            store_halves(out, row, at, to_half(scale))
            if most == 16:
                fifth_bits = repeat(0)
                for i in range(32):
                    fifth_bits |= load(levels, i) >> 4 << i
                store_words(out, row, at + 2, fifth_bits)
            for i in range(0, 16, 4):
                store_words(out, row, at + header + i, four_bytes(levels, i, 16, 4, 0))


@kernel
def q8_0(rows, out):  # type: ignore[no-untyped-def]
    """Blocks of 32 weights: a half float, 32 int8 levels. The largest magnitude is at 127."""
    values = np.empty(32 * LANES, np.float32)
    levels = np.empty(32 * LANES, np.int32)
    for first in range(0, len(rows), LANES):
        row = group_start(first, len(rows))
        for block in range(rows.shape[1] // 32):
            transpose_in(rows, row, 32 * block, values, 0)
            transpose_in(rows, row, 32 * block + 16, values, 16)
            scale = absolute(extreme_of(values, 0, 32)) / np.float32(127)
            inverse = select(scale != ZERO, ONE / scale, ZERO)
            store_halves(out, row, 34 * block, to_half(scale))
            for i in range(32):
                position = inverse * load(values, i)
                # C's roundf: to the nearest, ties away from zero. An infinite position, of a subnormal scale, becomes
                # what the processor makes of it in ggml too.
                store(levels, i, to_int(position + select(position < ZERO, -BEFORE_HALF, BEFORE_HALF)))
            for i in range(0, 32, 4):
                store_words(out, row, 34 * block + 2 + i, four_bytes(levels, i, 0, 8, 0))


KERNELS = {
    T.Q6_K: Kernel(by_blocks(q6_k, T.Q6_K, UNGUIDED), by_rows(q6_k)),
    T.Q3_K: Kernel(by_blocks(q3_k, T.Q3_K, None), by_rows(q3_k)),
    T.Q8_0: Kernel(by_blocks(q8_0, T.Q8_0)),
    T.Q4_0: Kernel(guided=by_rows(q4_0_or_q5_0, 8)),
    T.Q5_0: Kernel(guided=by_rows(q4_0_or_q5_0, 16)),
}
