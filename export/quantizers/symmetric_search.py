"""The search for a scale with levels around zero: weight = scale * level, level -most .. most - 1.

ggml (`make_qx_quants` in ggml/src/ggml-quants.c) fits the scale by weighted least squares. The value of largest
magnitude, the extreme, goes to about the lowest level; the levels l nearest to the values x then allow one best scale:

    scale = sum(w x l) / sum(w l l)        which lowers the error sum(w (x - scale l)^2) by scale * sum(w x l)

Nineteen places of the extreme, at -(most + 0.1 step) with step = 0, then -9 .. -1 and 1 .. 9, give nineteen sets of
levels; a later one is taken where it lowers the error by more.

Scratch arrays hold vectors of sixteen lanes (lanes.py); ``first`` is the number of a vector. Levels are stored as the
formats have them, counted from 0. Values that are all zero get 0 too, not ``most``, as in ggml: their scale is zero.
"""

from __future__ import annotations

import numpy as np

from export.quantizers.constants import ALL_ZEROS, ONE, TENTH, ZERO
from export.quantizers.lanes import (
    absolute,
    inlined,
    larger,
    load,
    nearest_int,
    nearest_level,
    repeat,
    routine,
    select,
    smaller,
    store,
)


@inlined
def extreme_of(values, first, count):  # type: ignore[no-untyped-def]
    """The first value of largest magnitude; 0 where all are 0 or NaN."""
    extreme = repeat(ZERO)
    for i in range(first, first + count):
        value = load(values, i)
        extreme = select(absolute(value) > absolute(extreme), value, extreme)
    return extreme


@inlined
def stored_level(position, most):  # type: ignore[no-untyped-def]
    """The level, counted from 0, next to a value that was divided by its scale."""
    return larger(smaller(nearest_int(position), most - 1), -most) + most


@inlined
def requantize(values, levels, first, count, scale, most):  # type: ignore[no-untyped-def]
    """The levels for a scale that was rounded; where it was rounded to zero, the levels stay what they are."""
    for i in range(first, first + count):
        level = stored_level(load(values, i) / scale, most)
        store(levels, i, select(scale == ZERO, load(levels, i), level))


@inlined
def _sums(values, first, weights, weighted, count, most, inverse):  # type: ignore[no-untyped-def]
    """sum(w x l) and sum(w l l) for the levels nearest to ``inverse`` times the values."""
    sum_xl = repeat(ZERO)
    sum_ll = repeat(ZERO)
    for i in range(count):
        level = nearest_level(inverse * load(values, first + i), -most, most - ONE)
        sum_xl += load(weighted, i) * level
        sum_ll += load(weights, i) * level * level
    return sum_xl, sum_ll


@routine
def search(values, first, weights, weighted, levels, count, most):  # type: ignore[no-untyped-def]
    """The best scale for ``count`` vectors of values, and in ``levels`` theirs.

    ``weights`` holds ``count`` vectors; ``weighted`` has room for as many.
    """
    for i in range(count):
        store(weighted, i, load(weights, i) * load(values, first + i))
    extreme = extreme_of(values, first, count)
    highest = np.float32(most)
    best_inverse = -highest / extreme
    sum_xl, sum_ll = _sums(values, first, weights, weighted, count, highest, best_inverse)
    scale = select(sum_ll != ZERO, sum_xl / sum_ll, ZERO)
    lowered = scale * sum_xl
    for step in range(-9, 10):
        if step != 0:
            inverse = -(highest + TENTH * np.float32(step)) / extreme
            sum_xl, sum_ll = _sums(values, first, weights, weighted, count, highest, inverse)
            better = (sum_ll > ZERO) & (sum_xl * sum_xl > lowered * sum_ll)
            scale = select(better, sum_xl / sum_ll, scale)
            lowered = select(better, scale * sum_xl, lowered)
            best_inverse = select(better, inverse, best_inverse)
    zeros = absolute(extreme) < ALL_ZEROS
    for i in range(first, first + count):
        store(levels, i, select(zeros, 0, stored_level(best_inverse * load(values, i), most)))
    return select(zeros, ZERO, scale)
