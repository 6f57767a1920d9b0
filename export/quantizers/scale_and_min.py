"""Quantizers of a scale and a minimum: Q4_K, Q5_K, Q2_K, and Q4_1 and Q5_1 where an importance matrix guides them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as T

from export.quantizers.kernel import Importance, Kernel, Packed, Rows
from export.quantizers.lanes import (
    LANES,
    absolute,
    any_lane,
    from_half,
    group_start,
    in_lanes,
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
    ZERO,
    Trials,
    code_by_largest,
    code_by_search,
    kept_level,
    scratch,
    search,
)

TWO = np.float32(2)
SIX_BITS = np.float32(63)
FOUR_BITS = np.float32(15)


@inlined
def _sum_of_squares(values, first, count, total):  # type: ignore[no-untyped-def]
    for i in range(first, first + count):
        value = load(values, i)
        total += value * value
    return total


@inlined
def _guide(scratch, sub, count, importance, column, spread):  # type: ignore[no-untyped-def]
    """Weights of a sub-block: importance * sqrt(spread + value^2), so that large values count a little more."""
    for i in range(count):
        value = load(scratch.values, sub * count + i)
        store(scratch.weights, i, importance[column + i] * square_root(spread + value * value))


@routine
def _requantize(scratch, sub, trials, scale, minimum):  # type: ignore[no-untyped-def]
    """The levels of a sub-block for the scale and minimum that its codes stand for; the search's where that is 0."""
    highest = np.int32(trials.top)
    for i in range(sub * trials.count, (sub + 1) * trials.count):
        level = nearest_int((load(scratch.values, i) + minimum) / scale)
        store(scratch.levels, i, larger(smaller(level, highest), 0))
    vanished = scale == ZERO
    if any_lane(vanished):
        for i in range(sub * trials.count, (sub + 1) * trials.count):
            kept = kept_level(scratch, sub, load(scratch.values, i), trials.top)
            store(scratch.levels, i, select(vanished, kept, load(scratch.levels, i)))


@routine
def _pack_six_bit_codes(scratch, out, row, column):  # type: ignore[no-untyped-def]
    """Twelve bytes: scales 0-3, minima 0-3, low nibbles of scales and minima 4-7 with their high bits on the first eight.

    Reads back what a decoder will: guided Q4_K of ggml lets codes above 63 (negative ones) spill into their neighbours.
    """
    codes = scratch.codes
    scales = minima = nibbles = repeat(0)
    for n in range(4):
        scale, later_scale = load(codes, n), load(codes, n + 4)
        minimum, later_minimum = load(codes, MINIMA + n), load(codes, MINIMA + n + 4)
        scale = (scale | (later_scale >> 4 << 6)) & 0xFF
        minimum = (minimum | (later_minimum >> 4 << 6)) & 0xFF
        later = (later_scale & 15) | ((later_minimum & 15) << 4)
        scales |= scale << 8 * n
        minima |= minimum << 8 * n
        nibbles |= later << 8 * n
        store(codes, n, scale & 63)
        store(codes, MINIMA + n, minimum & 63)
        store(codes, n + 4, (later & 15) | (scale >> 6 << 4))
        store(codes, MINIMA + n + 4, (later >> 4) | (minimum >> 6 << 4))
    store_words(out, row, column, scales)
    store_words(out, row, column + 4, minima)
    store_words(out, row, column + 8, nibbles)


@inlined
def _store_units(out, row, column, scale_unit, minimum_unit):  # type: ignore[no-untyped-def]
    """Both as halves, four bytes; returns them as a decoder reads them."""
    scale_unit, minimum_unit = to_half(scale_unit), to_half(minimum_unit)
    store_words(out, row, column, scale_unit | (minimum_unit << 16))
    return from_half(scale_unit), from_half(minimum_unit)


@kernel
def _q4_k_or_q5_k(rows, importance, trials, scratch, out):  # type: ignore[no-untyped-def]
    """Super-blocks: two half units, 12 bytes of codes, for Q5_K 32 bytes of fifth bits, 128 bytes of nibbles."""
    super_blocks = rows.shape[1] // 256
    for first in range(0, len(rows), LANES):
        row = group_start(first, len(rows))
        for block in range(super_blocks):
            for i in range(0, 256, LANES):
                transpose_in(rows, row, 256 * block + i, scratch.values, i)
            if importance is not None:
                spread = TWO * _sum_of_squares(scratch.values, 0, 256, repeat(ZERO)) / np.float32(256)
            for sub in range(8):
                if importance is not None:
                    _guide(scratch, sub, 32, importance, 256 * block + 32 * sub, spread)
                else:
                    squares = _sum_of_squares(scratch.values, 32 * sub, 32, repeat(ZERO))
                    typical = square_root(squares / np.float32(32))
                    for i in range(32):
                        store(scratch.weights, i, typical + absolute(load(scratch.values, 32 * sub + i)))
                search(scratch, sub, trials)
            column = out.shape[1] // super_blocks * block
            for part in range(2):
                if importance is not None:
                    code_by_search(scratch, part, 256 // trials.count, SIX_BITS)
                else:
                    code_by_largest(scratch, part, 256 // trials.count, SIX_BITS)
            scale_unit, minimum_unit = _store_units(out, row, column, load(scratch.units, 0), load(scratch.units, 1))
            if importance is None or trials.top > FOUR_BITS:
                for n in range(8):
                    store(scratch.codes, n, smaller(load(scratch.codes, n), 63))
                    store(scratch.codes, MINIMA + n, smaller(load(scratch.codes, MINIMA + n), 63))
            _pack_six_bit_codes(scratch, out, row, column + 4)
            for sub in range(8):
                scale = scale_unit * to_float(load(scratch.codes, sub))
                minimum = minimum_unit * to_float(load(scratch.codes, MINIMA + sub))
                _requantize(scratch, sub, trials, scale, minimum)
            column += 16
            if trials.top > FOUR_BITS:
                _pack_bits(scratch.levels, 4, out, row, column)
                column += 32
            _pack_nibbles(scratch.levels, out, row, column)


@routine
def _pack_bits(levels, bit, out, row, column):  # type: ignore[no-untyped-def]
    """Byte i of 32: one bit of levels i, 32 + i, ... 224 + i, from the lowest up."""
    for i in range(0, 32, 4):
        word = repeat(0)
        for n in range(32):
            word |= (load(levels, 32 * (n & 7) + i + (n >> 3)) >> bit & 1) << n
        store_words(out, row, column + i, word)


@routine
def _pack_nibbles(levels, out, row, column):  # type: ignore[no-untyped-def]
    """Byte 32 n + i of 128: the low four bits of levels 64 n + i and, above them, 64 n + 32 + i."""
    for n in range(4):
        for i in range(0, 32, 4):
            word = repeat(0)
            for byte in range(4):
                low, high = load(levels, 64 * n + i + byte), load(levels, 64 * n + 32 + i + byte)
                word |= ((low & 15) | ((high & 15) << 4)) << 8 * byte
            store_words(out, row, column + 32 * n + i, word)


@kernel
def _q2_k(rows, importance, trials, scratch, out):  # type: ignore[no-untyped-def]
    """Super-blocks: 16 bytes of codes (scale, minimum above it), 64 bytes of levels, two half units."""
    super_blocks = rows.shape[1] // 256
    for first in range(0, len(rows), LANES):
        row = group_start(first, len(rows))
        for block in range(super_blocks):
            for i in range(0, 256, LANES):
                transpose_in(rows, row, 256 * block + i, scratch.values, i)
            if importance is not None:
                spread = _sum_of_squares(scratch.values, 0, 256, repeat(ZERO)) / np.float32(256)
            for sub in range(16):
                if importance is not None:
                    _guide(scratch, sub, 16, importance, 256 * block + 16 * sub, spread)
                else:
                    for i in range(16):
                        store(scratch.weights, i, absolute(load(scratch.values, 16 * sub + i)))
                search(scratch, sub, trials)
            column = 84 * block
            for part in range(2):
                if importance is not None:
                    code_by_search(scratch, part, 256 // trials.count, FOUR_BITS)
                else:
                    code_by_largest(scratch, part, 256 // trials.count, FOUR_BITS)
            scale_unit, minimum_unit = _store_units(
                out, row, column + 80, load(scratch.units, 0), load(scratch.units, 1)
            )
            for four in range(0, 16, 4):
                word = repeat(0)
                for byte in range(4):
                    sub = four + byte
                    code = (load(scratch.codes, sub) | (load(scratch.codes, MINIMA + sub) << 4)) & 0xFF
                    word |= code << 8 * byte
                    scale, minimum = scale_unit * to_float(code & 15), minimum_unit * to_float(code >> 4)
                    _requantize(scratch, sub, trials, scale, minimum)
                store_words(out, row, column + four, word)
            for half in range(2):
                for i in range(0, 32, 4):
                    word = repeat(0)
                    for byte in range(4):
                        for quarter in range(4):
                            level = load(scratch.levels, 128 * half + 32 * quarter + i + byte)
                            word |= level << 8 * byte + 2 * quarter
                    store_words(out, row, column + 16 + 32 * half + i, word)


@kernel
def _q4_1_or_q5_1(rows, importance, trials, scratch, out):  # type: ignore[no-untyped-def]
    """Blocks of 32: half scale and minimum, for Q5_1 the fifth bits of levels 0-31, 16 bytes of nibbles i and 16 + i."""
    blocks = rows.shape[1] // 32
    size = out.shape[1] // blocks
    for first in range(0, len(rows), LANES):
        row = group_start(first, len(rows))
        squares = repeat(ZERO)
        for column in range(0, rows.shape[1], LANES):
            transpose_in(rows, row, column, scratch.values, 0)
            squares = _sum_of_squares(scratch.values, 0, LANES, squares)
        spread = squares / np.float32(rows.shape[1])
        for block in range(blocks):
            for i in range(0, 32, LANES):
                transpose_in(rows, row, 32 * block + i, scratch.values, i)
            _guide(scratch, 0, 32, importance, 32 * block, spread)
            search(scratch, 0, trials)
            column = size * block
            _store_units(out, row, column, load(scratch.fitted, 0), -load(scratch.fitted, MINIMA))
            column += 4
            fifths = repeat(0)
            for i in range(32):
                level = kept_level(scratch, 0, load(scratch.values, i), trials.top)
                store(scratch.levels, i, level)
                fifths |= level >> 4 << i
            if trials.top > FOUR_BITS:
                store_words(out, row, column, fifths)
                column += 4
            for i in range(0, 16, 4):
                word = repeat(0)
                for byte in range(4):
                    low, high = load(scratch.levels, i + byte), load(scratch.levels, 16 + i + byte)
                    word |= ((low & 15) | ((high & 15) << 4)) << 8 * byte
                store_words(out, row, column + i, word)


def _trials(count: int, top: int, first: float, step: float, last: int, by_magnitude: bool = False) -> Trials:
    return Trials(count, np.float32(top), np.float32(first), np.float32(step), last, by_magnitude)


def _kernel(function: Callable[..., None], top: int, guided: Trials, plain: Trials | None) -> Kernel:
    def run_plain(rows: Rows, out: Packed) -> None:
        # Without importance a super-block's bytes do not depend on its place: each is a row, so that few rows fill the lanes.
        super_blocks = rows.size // 256
        in_lanes(function, rows.reshape(super_blocks, 256), None, plain, scratch(), out.reshape(super_blocks, -1))

    def run_guided(rows: Rows, importance: Importance, out: Packed) -> None:
        in_lanes(function, rows, importance, guided, scratch(), out)

    return Kernel(plain=run_plain if plain else None, guided=run_guided)


KERNELS = {
    T.Q4_K: _kernel(_q4_k_or_q5_k, 15, _trials(32, 15, -0.9, 0.05, 36), _trials(32, 15, -1, 0.1, 20)),
    T.Q5_K: _kernel(_q4_k_or_q5_k, 31, _trials(32, 31, -0.9, 0.05, 36), _trials(32, 31, -0.5, 0.1, 15)),
    T.Q2_K: _kernel(_q2_k, 3, _trials(16, 3, -0.9, 0.05, 36), _trials(16, 3, -0.5, 0.1, 15, True)),
    T.Q4_1: _kernel(_q4_1_or_q5_1, 15, _trials(32, 15, -0.9, 0.05, 36), None),
    T.Q5_1: _kernel(_q4_1_or_q5_1, 31, _trials(32, 31, -0.9, 0.05, 36), None),
}
