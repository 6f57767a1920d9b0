"""Sixteen rows side by side: SIMD vectors as a type of numba, so that kernels read like the scalar algorithm.

A quantizer's search is a chain of float operations whose order decides the bytes, so one block cannot be summed in
pieces. Sixteen rows can be searched at once, though, each in its own lane of a vector and in the scalar order:

                          row 0   row 1   row 2  ...  row 15
    element i of each   [ lane 0, lane 1, lane 2, ... lane 15 ]   one vector
    element i + 1       [ lane 0, lane 1, lane 2, ... lane 15 ]   the next, in a flat scratch array

In a function compiled by ``kernel`` a float_lanes or int_lanes value is sixteen numbers (float32, int32). Operators
work lane by lane, a scalar operand is repeated in every lane, comparisons give a mask, and a branch of the scalar
algorithm becomes ``select(mask, then, otherwise)``. Each operation is one LLVM vector instruction, IEEE float32 without
contraction or reassociation, and LLVM splits it into what the processor has: one of 512 bits with AVX-512, two with
AVX2, four with SSE2 or NEON. This takes no luck with LLVM's vectorizer and no setting of numba, which would be one for
the whole process (numba prefers 256 bits for loops that it vectorizes, not for vectors that are given).

A float literal is float64 in numba and does not mix with lanes: constants are ``np.float32`` at module level.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model

LANES = 16

# Many threads run a kernel at once (nogil). Fast-math would reassociate sums; error_model "numpy" divides by zero as C.
_SEMANTICS: dict[str, Any] = {"nogil": True, "fastmath": False, "error_model": "numpy", "boundscheck": False}
# Called from Python; compiled once per machine.
kernel = njit(cache=True, no_cfunc_wrapper=True, **_SEMANTICS)
# Called by kernels only: as functions of their own where they are long ...
routine = njit(no_cfunc_wrapper=True, no_cpython_wrapper=True, **_SEMANTICS)
# ... and in place where they are short, since a call would spill the vectors.
inlined = njit(no_cfunc_wrapper=True, no_cpython_wrapper=True, forceinline=True, **_SEMANTICS)


class LanesType(types.Type):
    """Sixteen numbers of one LLVM type."""

    def __init__(self, name: str, element: ir.Type) -> None:
        self.vector = ir.VectorType(element, LANES)
        super().__init__(name=name)


float_lanes = LanesType("float_lanes", ir.FloatType())
int_lanes = LanesType("int_lanes", ir.IntType(32))
mask = LanesType("mask", ir.IntType(1))
_LANES_OF = {types.float32: float_lanes, types.int32: int_lanes}


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: LanesType) -> None:
        super().__init__(manager, lanes, lanes.vector)


@lower_cast(types.float32, float_lanes)
@lower_cast(types.Integer, int_lanes)
def _repeat(context: Any, builder: ir.IRBuilder, scalar: Any, lanes: LanesType, value: ir.Value) -> ir.Value:
    number = context.cast(builder, value, scalar, types.float32 if lanes is float_lanes else types.int32)
    first = builder.insert_element(ir.Constant(lanes.vector, ir.Undefined), number, _index(0))
    return builder.shuffle_vector(first, first, _order([0] * LANES))


def _index(number: int) -> ir.Constant:
    return ir.IntType(32)(number)


def _order(lanes: list[int]) -> ir.Constant:
    """Which lane of two vectors, counted on from the first to the second, each lane of a shuffled one is."""
    return ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes)


def _operator(function: Any, operand: LanesType, result: LanesType, emit: Callable[..., ir.Value]) -> None:
    """Gives one Python operator, and its in-place form, their meaning on lanes."""

    def accepts(argument: Any) -> bool:
        scalar = isinstance(argument, types.Integer) if operand is int_lanes else argument == types.float32
        return argument == operand or (scalar and operand is not mask)

    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if operand in args and all(accepts(argument) for argument in args):
                return signature(result, *[operand] * len(args))
            return None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return emit(builder, *args)

    arity = 1 if function in (operator.neg, operator.invert) else 2
    in_place = getattr(operator, f"i{function.__name__.strip('_')}", None)
    for each in filter(None, (function, in_place)):
        infer_global(each)(Template)
        lower_builtin(each, *[operand] * arity)(lower)


def _comparison(function: Any, symbol: str) -> None:
    # With NaN they are false, != true, as in C.
    compare = ir.IRBuilder.fcmp_unordered if symbol == "!=" else ir.IRBuilder.fcmp_ordered
    _operator(function, float_lanes, mask, lambda builder, a, b: compare(builder, symbol, a, b))
    _operator(function, int_lanes, mask, lambda builder, a, b: builder.icmp_signed(symbol, a, b))


_BUILD = ir.IRBuilder
for _lanes, _instructions in {
    float_lanes: {
        operator.add: _BUILD.fadd, operator.sub: _BUILD.fsub, operator.mul: _BUILD.fmul, operator.truediv: _BUILD.fdiv,
        operator.neg: _BUILD.fneg,
    },
    int_lanes: {
        operator.add: _BUILD.add, operator.sub: _BUILD.sub, operator.mul: _BUILD.mul, operator.neg: _BUILD.neg,
        operator.and_: _BUILD.and_, operator.or_: _BUILD.or_,
        operator.lshift: _BUILD.shl, operator.rshift: _BUILD.lshr,  # the right shift is unsigned
    },
    mask: {operator.and_: _BUILD.and_, operator.or_: _BUILD.or_, operator.invert: _BUILD.not_},
}.items():  # fmt: skip
    for _function, _instruction in _instructions.items():
        _operator(_function, _lanes, _lanes, _instruction)
for _name, _symbol in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items():
    _comparison(getattr(operator, _name), _symbol)


def _pointer(
    context: Any, builder: ir.IRBuilder, array: Any, value: ir.Value, at: list[ir.Value], to: ir.Type
) -> ir.Value:
    """The address of an array's element, to load or store another type there."""
    made = context.make_array(array)(context, builder, value)
    shape, strides = cgutils.unpack_tuple(builder, made.shape), cgutils.unpack_tuple(builder, made.strides)
    element = cgutils.get_item_pointer2(context, builder, made.data, shape, strides, array.layout, at)
    return builder.bitcast(element, to.as_pointer())


def _plus(builder: ir.IRBuilder, index: ir.Value, number: int) -> ir.Value:
    return builder.add(index, index.type(number))


def _start(builder: ir.IRBuilder, index: ir.Value) -> list[ir.Value]:
    """Where vector ``index`` begins in a flat scratch array."""
    return [builder.mul(index, index.type(LANES))]


@intrinsic
def load(typing_context: Any, scratch: Any, index: Any) -> Any:
    """Vector number ``index`` of a flat scratch array of float32 or int32."""
    lanes = _LANES_OF[scratch.dtype]

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        start = _start(builder, args[1])
        return builder.load(_pointer(context, builder, scratch, args[0], start, lanes.vector), align=4)

    return signature(lanes, scratch, types.intp), emit


@intrinsic
def store(typing_context: Any, scratch: Any, index: Any, value: Any) -> Any:
    """The inverse of ``load``; a scalar is repeated."""
    lanes = _LANES_OF[scratch.dtype]

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        start = _start(builder, args[1])
        builder.store(args[2], _pointer(context, builder, scratch, args[0], start, lanes.vector), align=4)
        return context.get_dummy_value()

    return signature(types.none, scratch, types.intp, lanes), emit


@intrinsic
def transpose_in(typing_context: Any, rows: Any, row: Any, column: Any, scratch: Any, index: Any) -> Any:
    """Sixteen columns of sixteen float32 rows, from [row, column] on, as scratch vectors ``index`` to ``index + 15``.

    Lane k of vector i is rows[row + k, column + i]. Each row is read once and in one piece, and the square is turned in
    registers: for d = 1, 2, 4, 8 every two vectors d apart exchange their lanes that are d apart.
    """

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _, row, column, _, index = args
        square = []
        for lane in range(LANES):
            at = [_plus(builder, row, lane), column]
            square.append(builder.load(_pointer(context, builder, rows, args[0], at, float_lanes.vector), align=4))
        for d in (1, 2, 4, 8):
            for n in (n for n in range(LANES) if not n & d):
                first, second = square[n], square[n + d]
                kept = [LANES + k - d if k & d else k for k in range(LANES)]
                square[n] = builder.shuffle_vector(first, second, _order(kept))
                square[n + d] = builder.shuffle_vector(first, second, _order([k + d for k in kept]))
        for n, vector in enumerate(square):
            start = _start(builder, _plus(builder, index, n))
            builder.store(vector, _pointer(context, builder, scratch, args[3], start, float_lanes.vector), align=4)
        return context.get_dummy_value()

    return signature(types.none, rows, types.intp, types.intp, scratch, types.intp), emit


def _store_low(width: int, doc: str) -> Any:
    element = ir.IntType(width)

    def typed(typing_context: Any, out: Any, row: Any, column: Any, value: Any) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            _, row, column, words = args
            for lane in range(LANES):
                number = builder.trunc(builder.extract_element(words, _index(lane)), element)
                at = [_plus(builder, row, lane), column]
                builder.store(number, _pointer(context, builder, out, args[0], at, element), align=1)
            return context.get_dummy_value()

        return signature(types.none, out, types.intp, types.intp, int_lanes), emit

    typed.__doc__ = doc
    return intrinsic(typed)


# Each writes int lanes into sixteen rows of bytes, little-endian: lane k to out[row + k, column] and on.
store_bytes = _store_low(8, "The low byte of every lane.")
store_halves = _store_low(16, "The two low bytes of every lane.")
store_words = _store_low(32, "The four bytes of every lane.")


@intrinsic
def repeat(typing_context: Any, value: Any) -> Any:
    """A scalar float32 or integer in every lane."""
    lanes = float_lanes if value == types.float32 else int_lanes
    return signature(lanes, lanes), lambda context, builder, sig, args: args[0]


@intrinsic
def select(typing_context: Any, condition: Any, then: Any, otherwise: Any) -> Any:
    """Lane by lane ``then if condition else otherwise``; scalars are repeated."""
    lanes = int_lanes if isinstance(then, types.Integer) or then == int_lanes else float_lanes
    return signature(lanes, mask, lanes, lanes), lambda context, builder, sig, args: builder.select(*args)


def _choice(symbol: str, doc: str) -> Any:
    def typed(typing_context: Any, a: Any, b: Any) -> Any:
        lanes = float_lanes if float_lanes in (a, b) else int_lanes

        def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            compare = builder.fcmp_ordered if lanes is float_lanes else builder.icmp_signed
            return builder.select(compare(symbol, *args), *args)

        return signature(lanes, lanes, lanes), emit

    typed.__doc__ = doc
    return intrinsic(typed)


smaller = _choice("<", "C's ``a < b ? a : b``: b where one is NaN.")
larger = _choice(">", "C's ``a > b ? a : b``: b where one is NaN.")


def _conversion(operand: LanesType, result: LanesType, convert: Callable[..., ir.Value], doc: str) -> Any:
    def typed(typing_context: Any, value: Any) -> Any:
        return (
            signature(result, operand),
            lambda context, builder, sig, args: convert(builder, args[0], result.vector),
        )

    typed.__doc__ = doc
    return intrinsic(typed)


to_float = _conversion(int_lanes, float_lanes, _BUILD.sitofp, "Integers as floats.")
to_int = _conversion(float_lanes, int_lanes, _BUILD.fptosi, "Floats truncated towards zero; they must fit an int32.")
bits = _conversion(float_lanes, int_lanes, _BUILD.bitcast, "Floats' bit patterns.")
from_bits = _conversion(int_lanes, float_lanes, _BUILD.bitcast, "The floats of bit patterns.")


def _llvm(name: str) -> Callable[..., ir.Value]:
    def call(builder: ir.IRBuilder, value: ir.Value, result: ir.Type) -> ir.Value:
        kind = ir.FunctionType(result, [value.type])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{LANES}f32"), [value])

    return call


square_root = _conversion(float_lanes, float_lanes, _llvm("llvm.sqrt"), "Correctly rounded square roots.")
absolute = _conversion(float_lanes, float_lanes, _llvm("llvm.fabs"), "The floats without their signs.")


@intrinsic
def any_lane(typing_context: Any, condition: Any) -> Any:
    """Whether the mask is true in a lane."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        lanes = builder.bitcast(args[0], ir.IntType(LANES))
        return builder.icmp_unsigned("!=", lanes, lanes.type(0))

    return signature(types.boolean, mask), emit


ROUNDING = np.float32(12582912)  # 1.5 * 2**23: a float32 next to it has no fraction bits left
HALF = np.float32(0.5)
SUBNORMAL_HALF = np.float32(2.0**-24)  # the unit of subnormal binary16


@inlined
def nearest_int(value):  # type: ignore[no-untyped-def]
    """The nearest integer, ties to even, as ggml's ``nearest_int`` also for values out of its range (beyond 2**22)."""
    return (bits(value + ROUNDING) & 0x007FFFFF) - 0x00400000


@inlined
def nearest_level(value, lowest, highest):  # type: ignore[no-untyped-def]
    """``nearest_int`` clamped to float32 ``lowest`` .. ``highest``, as floats: cheaper than through integers.

    Forcing the exponent of ``ROUNDING`` onto the sum is what ggml's masking of the sum's bits does to its range.
    """
    rounded = from_bits((bits(value + ROUNDING) & 0x007FFFFF) | 0x4B000000)
    return smaller(larger(rounded, ROUNDING + lowest), ROUNDING + highest) - ROUNDING


@inlined
def to_half(value):  # type: ignore[no-untyped-def]
    """The IEEE binary16 nearest to each float as 16 bits: ties to even, subnormals kept, too large ones infinite."""
    magnitude = bits(value) & 0x7FFFFFFF
    # A normal half keeps 10 of 23 mantissa bits: add half of the last kept bit (less one, unless it is odd), drop 13,
    # and move the exponent's bias from 127 to 15. A carry out of the mantissa goes on into the exponent, as it should.
    normal = ((magnitude + 0xFFF + (magnitude >> 13 & 1)) - (112 << 23)) >> 13
    # A subnormal half counts 2**-24s: beside 0.5 that is the last bit of a float32.
    subnormal = bits(from_bits(magnitude) + HALF) - 0x3F000000
    half = select(magnitude < 113 << 23, subnormal, normal)
    half = select(magnitude >= 0x477FF000, 0x7C00, half)  # 65520, half way from the largest half to 2**16
    half = select(magnitude > 0x7F800000, 0x7E00, half)
    return half | (bits(value) >> 16 & 0x8000)


@inlined
def from_half(half):  # type: ignore[no-untyped-def]
    """The floats of IEEE binary16 bit patterns."""
    magnitude = half & 0x7FFF
    normal = from_bits((magnitude << 13) + (112 << 23))
    value = select(magnitude < 0x400, to_float(magnitude) * SUBNORMAL_HALF, normal)
    value = select(magnitude >= 0x7C00, from_bits((magnitude << 13) + (224 << 23)), value)
    return from_bits(bits(value) | ((half & 0x8000) << 16))


@inlined
def group_start(row, count):  # type: ignore[no-untyped-def]
    """The first of the sixteen rows at ``row``: an earlier one, and some rows twice, where fewer are left."""
    return min(row, count - LANES)
