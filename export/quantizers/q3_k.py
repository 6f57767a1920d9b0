"""Q3_K: levels -4 .. 3, in super-blocks of 256 weights with sixteen scales of 6 bits, -32 .. 31 times a half float.

With an importance matrix, the search of symmetric_search.py finds the scale of each sub-block of 16, and then the scale
of these scales, weighted with the sums of their sub-blocks' weights.

Without one, ggml (`make_q3_quants` in ggml/src/ggml-quants.c) starts with the extreme at level -4 and goes through a
sub-block up to five times. Each value in turn is taken out of the sums, gets the level nearest to it at the scale of
the others, and keeps it if that raises what the fit lowers the error by:

    sum(w x l)^2 / sum(w l l)        weights w = x x

So every value waits for a division of the one before it. The sixteen sub-blocks of the lanes' super-blocks take turns,
to have other divisions under way meanwhile; a sub-block in which no lane changed is done and leaves the round.
"""

from __future__ import annotations

import numpy as np

from export.quantizers.constants import ALL_ZEROS, ONE, ZERO
from export.quantizers.fields import four_bytes
from export.quantizers.lanes import (
    LANES,
    absolute,
    any_lane,
    from_half,
    group_start,
    inlined,
    kernel,
    load,
    nearest_level,
    repeat,
    select,
    square_root,
    store,
    store_halves,
    store_words,
    to_float,
    to_half,
    to_int,
    transpose_in,
)
from export.quantizers.symmetric_search import extreme_of, requantize, search, stored_level

LOWEST = np.float32(-4)
HIGHEST = np.float32(3)


@inlined
def _exchange(values, fitted, sums_xl, sums_ll):  # type: ignore[no-untyped-def]
    """Levels as floats in ``fitted``, 256 vectors, and the sums of the fit for each of the sixteen sub-blocks."""
    active, changed = np.empty((2, 16), np.int64)  # sub-blocks by number, and whether each of them has changed
    for sub in range(16):
        inverse = LOWEST / extreme_of(values, 16 * sub, 16)
        sum_xl = repeat(ZERO)
        sum_ll = repeat(ZERO)
        for i in range(16 * sub, 16 * sub + 16):
            value = load(values, i)
            level = nearest_level(inverse * value, LOWEST, HIGHEST)
            store(fitted, i, level)
            sum_xl += value * value * value * level
            sum_ll += value * value * level * level
        store(sums_xl, sub, sum_xl)
        store(sums_ll, sub, sum_ll)
        active[sub] = sub
        changed[sub] = False
    count = 16
    for _ in range(5):
        for i in range(16):
            for n in range(count):
                sub = active[n]
                sum_xl, sum_ll = load(sums_xl, sub), load(sums_ll, sub)
                value = load(values, 16 * sub + i)
                weight = value * value
                level = load(fitted, 16 * sub + i)
                others_xl = sum_xl - weight * value * level
                others_ll = sum_ll - weight * level * level
                other_level = nearest_level(value * others_ll / others_xl, LOWEST, HIGHEST)
                new_xl = others_xl + weight * value * other_level
                new_ll = others_ll + weight * other_level * other_level
                improves = new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll
                better = (others_xl > ZERO) & (other_level != level) & (new_ll > ZERO) & improves
                store(fitted, 16 * sub + i, select(better, other_level, level))
                store(sums_xl, sub, select(better, new_xl, sum_xl))
                store(sums_ll, sub, select(better, new_ll, sum_ll))
                changed[n] |= any_lane(better)
        still = 0
        for n in range(count):
            if changed[n]:
                active[still] = active[n]
                still += 1
                changed[n] = False
        count = still


@inlined
def _scales(values, levels, scales, scale_levels):  # type: ignore[no-untyped-def]
    """The scale of the scales, and in ``levels`` and ``scale_levels`` the levels of the values and of the scales."""
    fitted = np.empty(256 * LANES, np.float32)
    sums_xl, sums_ll = np.empty((2, 16 * LANES), np.float32)
    _exchange(values, fitted, sums_xl, sums_ll)
    for sub in range(16):
        zeros = absolute(extreme_of(values, 16 * sub, 16)) < ALL_ZEROS
        sum_xl, sum_ll = load(sums_xl, sub), load(sums_ll, sub)
        store(scales, sub, select(~zeros & (sum_ll > ZERO), sum_xl / sum_ll, ZERO))
        for i in range(16 * sub, 16 * sub + 16):
            store(levels, i, select(zeros, 0, to_int(load(fitted, i)) + 4))
    extreme = extreme_of(scales, 0, 16)
    inverse = np.float32(-32) / extreme
    for sub in range(16):
        level = stored_level(inverse * load(scales, sub), 32)
        store(scale_levels, sub, select(extreme == ZERO, 0, level))
    return select(extreme == ZERO, ZERO, ONE / inverse)


@inlined
def _guided_scales(values, importance, column, levels, scales, scale_levels):  # type: ignore[no-untyped-def]
    """As ``_scales``, with the importance of 256 columns from ``column`` on."""
    weights, weighted, weight_sums = np.empty((3, 16 * LANES), np.float32)
    sum_of_squares = repeat(ZERO)
    for i in range(256):
        sum_of_squares += load(values, i) * load(values, i)
    spread = np.float32(2) * sum_of_squares / np.float32(256)
    for sub in range(16):
        weight_sum = repeat(ZERO)
        for i in range(16):
            value = load(values, 16 * sub + i)
            weight = importance[column + 16 * sub + i] * square_root(spread + value * value)
            store(weights, i, weight)
            weight_sum += weight
        store(weight_sums, sub, weight_sum)
        store(scales, sub, search(values, 16 * sub, weights, weighted, levels, 16, 4))
    return search(scales, 0, weight_sums, weighted, scale_levels, 16, 32)


@kernel
def q3_k(rows, importance, out):  # type: ignore[no-untyped-def]
    """Each super-block: 32 bytes of highest bits, 64 of lower bit pairs, 12 of scales, a half float.

    Compiled without the other branch for an importance that is None and for one that is an array.
    """
    values = np.empty(256 * LANES, np.float32)
    levels = np.empty(256 * LANES, np.int32)
    scales = np.empty(16 * LANES, np.float32)
    scale_levels = np.empty(16 * LANES, np.int32)
    for first in range(0, len(rows), LANES):
        row = group_start(first, len(rows))
        for block in range(rows.shape[1] // 256):
            for i in range(0, 256, LANES):
                transpose_in(rows, row, 256 * block + i, values, i)
            if importance is None:
                scale = _scales(values, levels, scales, scale_levels)
            else:
                scale = _guided_scales(values, importance, 256 * block, levels, scales, scale_levels)
            half = to_half(scale)
            for sub in range(16):
                step = from_half(half) * to_float(load(scale_levels, sub) - 32)
                requantize(values, levels, 16 * sub, 16, step, 4)
            at = 110 * block
            for i in range(0, 32, 4):
                store_words(out, row, at + i, four_bytes(levels, i, 32, 1, 2))
                store_words(out, row, at + 32 + i, four_bytes(levels, i, 32, 2, 0))
                store_words(out, row, at + 64 + i, four_bytes(levels, 128 + i, 32, 2, 0))
            store_words(out, row, at + 96, four_bytes(scale_levels, 0, 8, 4, 0))
            store_words(out, row, at + 100, four_bytes(scale_levels, 4, 8, 4, 0))
            store_words(out, row, at + 104, four_bytes(scale_levels, 0, 4, 2, 4))
            store_halves(out, row, at + 108, half)
