"""The search for a block's scale and minimum: weight = scale * level + minimum, level 0 .. top, minimum <= 0.

ggml (`make_qkx2_quants` and `make_qkx3_quants` in ggml/src/ggml-quants.c) fits both by weighted least squares. The
first trial spreads the levels evenly from the least to the greatest value. Each further trial n stretches them a bit,

    level = round((value - minimum) * (top + first + step * n) / (greatest - minimum)),

solves the normal equations of sum(w * (scale * level + minimum - value)^2) for these levels, and is kept where the
error falls; the minimum it found is where the next trials start from. The scales and minima of a super-block's
sub-blocks then become codes, by the largest of them or by a search of their own (`make_qp_quants`).

Every variable here is sixteen lanes, a row or super-block each (export/quantizers/lanes.py); what the scalar algorithm
branches on becomes ``select``, and a lane that has nothing to gain goes along unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from export.quantizers.constants import ALL_ZEROS, ONE, TENTH, ZERO
from export.quantizers.lanes import (
    LANES,
    absolute,
    any_lane,
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
    to_float,
)


class Method(NamedTuple):
    """How one type is fitted; float32, since numba takes Python's floats for float64."""

    width: int  # values that share a scale and a minimum
    top: np.float32  # the highest level
    first: np.float32
    step: np.float32
    last: int  # n runs from 0 up to and including this
    by_magnitude: bool  # the error is the sum of w * |difference|, not of squares
    spread: np.float32  # with importance: the mean square's part in the weights
    top_code: np.float32  # the highest code of a scale or minimum; 0 where there are no super-blocks


class Scratch(NamedTuple):
    """What a kernel keeps of sixteen super-blocks, a vector an element; SUBS vectors for a quantity of sub-blocks."""

    values: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]  # of one sub-block
    trial: npt.NDArray[np.float32]  # the levels of one trial
    fitted: npt.NDArray[np.float32]  # scales, then minima (without their sign), which the codes stand for
    weight_sums: npt.NDArray[np.float32]
    stretches: npt.NDArray[np.float32]  # levels per unit in the trial that was kept ...
    origins: npt.NDArray[np.float32]  # ... and the minimum that it started from: together they give its levels
    codes: npt.NDArray[np.int32]  # of the scales, then of the minima
    units: npt.NDArray[np.float32]  # what a scale's code counts, what a minimum's does
    levels: npt.NDArray[np.int32]


SUBS = 16  # sub-blocks of a super-block, at most
MINIMA = SUBS  # where minima begin after the scales


def scratch() -> Scratch:
    def vectors(count: int) -> npt.NDArray[np.float32]:
        return np.empty(count * LANES, np.float32)

    return Scratch(
        values=vectors(256), weights=vectors(32), trial=vectors(32), fitted=vectors(2 * SUBS),
        weight_sums=vectors(SUBS), stretches=vectors(SUBS), origins=vectors(SUBS),
        codes=np.empty(2 * SUBS * LANES, np.int32), units=vectors(2), levels=np.empty(256 * LANES, np.int32),
    )  # fmt: skip


@routine
def search(scratch, sub, method):  # type: ignore[no-untyped-def]
    """Scale, minimum, sum of weights and the kept trial of sub-block ``sub``, whose weights are in the scratch."""
    values, weights, trial, start, width, top = (
        scratch.values, scratch.weights, scratch.trial, sub * method.width, method.width, method.top,
    )  # fmt: skip
    minimum = greatest = load(values, start)
    sum_w = load(weights, 0)
    sum_x = sum_w * minimum
    for i in range(1, width):
        value = load(values, start + i)
        weight = load(weights, i)
        minimum = smaller(value, minimum)
        greatest = larger(value, greatest)
        sum_w += weight
        sum_x += weight * value
    minimum = select(minimum > ZERO, ZERO, minimum)
    uneven = greatest != minimum  # elsewhere all levels are 0 and so is the scale

    stretch = top / (greatest - minimum)
    scale = ONE / stretch
    least_error = repeat(ZERO)
    for i in range(width):
        value = load(values, start + i)
        level = nearest_level(stretch * (value - minimum), ZERO, top)
        difference = scale * level + minimum - value
        difference = absolute(difference) if method.by_magnitude else difference * difference
        least_error += load(weights, i) * difference
    kept_scale, kept_stretch, kept_origin = scale, stretch, minimum

    for n in range(method.last + 1):
        stretch = (method.first + method.step * np.float32(n) + top) / (greatest - minimum)
        sum_l = repeat(ZERO)
        sum_ll = repeat(ZERO)
        sum_xl = repeat(ZERO)
        for i in range(width):
            value = load(values, start + i)
            level = nearest_level(stretch * (value - minimum), ZERO, top)
            store(trial, i, level)
            weighted = load(weights, i) * level
            sum_l += weighted
            sum_ll += weighted * level
            sum_xl += weighted * value
        determinant = sum_w * sum_ll - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        fitted = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        above = fitted > ZERO
        scale = select(above, sum_xl / sum_ll, scale)
        fitted = select(above, ZERO, fitted)
        error = repeat(ZERO)
        for i in range(width):
            difference = scale * load(trial, i) + fitted - load(values, start + i)
            difference = absolute(difference) if method.by_magnitude else difference * difference
            error += load(weights, i) * difference
        better = uneven & (determinant > ZERO) & (error < least_error)
        least_error = select(better, error, least_error)
        kept_scale = select(better, scale, kept_scale)
        kept_stretch = select(better, stretch, kept_stretch)
        kept_origin = select(better, minimum, kept_origin)
        minimum = select(better, fitted, minimum)

    store(scratch.fitted, sub, select(uneven, kept_scale, ZERO))
    store(scratch.fitted, MINIMA + sub, -minimum)
    store(scratch.weight_sums, sub, sum_w)
    store(scratch.stretches, sub, kept_stretch)
    store(scratch.origins, sub, kept_origin)


@inlined
def kept_level(scratch, sub, value, top):  # type: ignore[no-untyped-def]
    """The level of a value in the trial that the search kept."""
    position = load(scratch.stretches, sub) * (value - load(scratch.origins, sub))
    return nearest_int(nearest_level(position, ZERO, top))


@routine
def code_by_largest(scratch, part, subs, top):  # type: ignore[no-untyped-def]
    """Codes 0 .. top of the scales (part 0) or minima (part 1) in proportion to their largest, and the codes' unit."""
    first = part * SUBS
    largest = repeat(ZERO)
    for n in range(first, first + subs):
        largest = larger(load(scratch.fitted, n), largest)
    per_unit = select(largest > ZERO, top / largest, ZERO)
    for n in range(first, first + subs):
        store(scratch.codes, n, nearest_int(per_unit * load(scratch.fitted, n)) & 0xFF)
    store(scratch.units, part, largest / top)


@routine
def code_by_search(scratch, part, subs, top):  # type: ignore[no-untyped-def]
    """As ``code_by_largest``, but the codes and the unit of the least error, weighted by each sub-block's weights.

    Nine units are tried; then each code in turn moves to where the others' best unit puts it, while that helps. Codes
    are unsigned bytes in ggml: a negative scale's wraps around, and so does ours.
    """
    fitted, codes, weight_sums = scratch.fitted, scratch.codes, scratch.weight_sums
    highest, first = np.int32(top), part * SUBS
    largest = repeat(ZERO)
    for sub in range(subs):
        largest = larger(largest, load(fitted, first + sub))
    some = ~(largest < ALL_ZEROS)

    per_unit = top / largest
    unit = ONE / per_unit
    least_error = repeat(ZERO)
    for sub in range(subs):
        value = load(fitted, first + sub)
        difference = value - unit * to_float(nearest_int(per_unit * value) & 0xFF)
        least_error += load(weight_sums, sub) * difference * difference
    for n in range(-4, 5):
        if n == 0:
            continue
        trial = (TENTH * np.float32(n) + top) / largest
        unit = ONE / trial
        error = repeat(ZERO)
        for sub in range(subs):
            value = load(fitted, first + sub)
            difference = value - unit * to_float(smaller(nearest_int(trial * value), highest))
            error += load(weight_sums, sub) * difference * difference
        better = error < least_error
        least_error = select(better, error, least_error)
        per_unit = select(better, trial, per_unit)

    sum_xl = repeat(ZERO)
    sum_ll = repeat(ZERO)
    for sub in range(subs):
        value = load(fitted, first + sub)
        code = smaller(nearest_int(per_unit * value), highest)
        store(codes, first + sub, select(some, code & 0xFF, 0))
        weight, level = load(weight_sums, sub), to_float(code)
        sum_xl += weight * value * level
        sum_ll += weight * level * level

    for _ in range(5):
        changed = some & ~some  # in no lane yet
        for sub in range(subs):
            value = load(fitted, first + sub)
            weight = load(weight_sums, sub)
            code = load(codes, first + sub)
            level = to_float(code)
            others_xl = sum_xl - weight * value * level
            others_ll = sum_ll - weight * level * level
            moved = smaller(nearest_int(value * others_ll / others_xl), highest)
            level = to_float(moved)
            moved_xl = others_xl + weight * value * level
            moved_ll = others_ll + weight * level * level
            better = some & (others_xl > ZERO) & (others_ll > ZERO) & (moved != code)
            better &= moved_xl * moved_xl * sum_ll > sum_xl * sum_xl * moved_ll
            store(codes, first + sub, select(better, moved & 0xFF, code))
            sum_xl = select(better, moved_xl, sum_xl)
            sum_ll = select(better, moved_ll, sum_ll)
            changed |= better
        if not any_lane(changed):
            break
    store(scratch.units, part, select(some & (sum_ll > ZERO), sum_xl / sum_ll, ZERO))
