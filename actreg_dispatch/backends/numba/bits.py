"""Numbers as bits, compiled: what Numba has no functions for.

Numba knows no 16-bit floats on the CPU. The kernels get the bits, float16 as uint16 and bfloat16 as
int16, and the type of the bits says how :func:`widen` and :func:`narrow` convert them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable

from actreg_dispatch.dtypes import FLOAT16

__all__ = [
    "as_float",
    "as_int",
    "bits_of",
    "counts_of",
    "exponent_of",
    "extremes",
    "larger",
    "multiply_add",
    "narrow",
    "power_of_two",
    "select",
    "value_of",
    "weighted_counts_of",
    "widen",
    "word_of",
]


def bits_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that a kernel knows ``dtype`` by."""
    if dtype.itemsize > 2:
        return dtype
    return np.dtype(np.uint16 if dtype == FLOAT16 else np.int16)


@intrinsic
def widen(typingctx, value):  # type: ignore[no-untyped-def]
    """Return ``value`` in the compute dtype, exactly; a float is itself."""

    def float16(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        half = builder.bitcast(arguments[0], ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    def bfloat16(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(32)  # a float32 whose lower half is cut off
        bits = builder.shl(builder.zext(arguments[0], word), word(16))
        return builder.bitcast(bits, ir.FloatType())

    def same(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return arguments[0]

    if isinstance(value, types.Float):
        return value(value), same
    return types.float32(value), float16 if value == types.uint16 else bfloat16


@intrinsic
def narrow(typingctx, like, value):  # type: ignore[no-untyped-def]
    """Return ``value`` rounded to nearest-even in the type of ``like``; NaN stays quiet NaN."""

    def float16(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        half = builder.fptrunc(arguments[1], ir.HalfType())
        return builder.bitcast(half, ir.IntType(16))

    def bfloat16(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word, short = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(arguments[1], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        even = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
        sign = builder.and_(builder.lshr(bits, word(16)), word(0x8000))
        quiet = builder.or_(sign, word(0x7FC0))  # as ml_dtypes has it: the payload is not kept
        is_nan = builder.fcmp_unordered("uno", arguments[1], arguments[1])
        return builder.trunc(builder.select(is_nan, quiet, even), short)

    def same(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return arguments[1]

    if isinstance(like, types.Float):
        return like(like, like), same
    return like(like, types.float32), float16 if like == types.uint16 else bfloat16


@intrinsic
def _as_int(typingctx, value):  # type: ignore[no-untyped-def]
    """Return the bits of a float64 as an int64."""

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), cast


@intrinsic
def as_float(typingctx, bits):  # type: ignore[no-untyped-def]
    """Return the float64 that has these bits, an int64."""

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), cast


@intrinsic
def multiply_add(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """Return ``a * b + c`` of float64 rounded once: an instruction, or the C library's ``fma``."""

    def fused(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return types.float64(types.float64, types.float64, types.float64), fused


@intrinsic
def select(typingctx, condition, a, b):  # type: ignore[no-untyped-def]
    """Return ``a`` if a bool holds, else ``b``, which is of its type: both, and no branch."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.select(*arguments)

    return a(types.boolean, a, a), generate


@intrinsic
def _magnitude_bits(typingctx, value):  # type: ignore[no-untyped-def]
    """Return the bits of a number but its sign, unsigned: in the order of the magnitudes."""
    width = value.bitwidth

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(width)
        return builder.and_(builder.bitcast(arguments[0], word), word((1 << width - 1) - 1))

    return getattr(types, f"uint{width}")(value), cast


@intrinsic
def _as_number(typingctx, like, magnitude):  # type: ignore[no-untyped-def]
    """Return the number in the type of ``like`` that has these bits, and no sign."""

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[1], context.get_value_type(like))

    return like(like, magnitude), cast


@intrinsic
def _negated(typingctx, magnitude):  # type: ignore[no-untyped-def]
    """Return 0 less an unsigned integer, in its range: the greater the smaller it was; 0 of 0."""

    def negate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.neg(arguments[0])

    return magnitude(magnitude), negate


# Closures may name what follows. Numba pickles a closure, with what it names, for the key of its
# cache on disk: functions by their names, but an intrinsic by a number that no other process has.


@register_jitable
def as_int(value):  # type: ignore[no-untyped-def]
    """Return the bits of a float64 as an int64."""
    return _as_int(value)


@register_jitable
def value_of(x):  # type: ignore[no-untyped-def]
    """Return an element in binary64."""
    return np.float64(widen(x))


@register_jitable
def extremes(xs):  # type: ignore[no-untyped-def]
    """Return the largest and the smallest magnitude but 0, in binary64; NaN is the largest."""
    largest = _magnitude_bits(xs[0])
    nearest = _negated(largest)
    for j in range(xs.size):
        magnitude = _magnitude_bits(xs[j])
        largest = max(largest, magnitude)
        nearest = max(nearest, _negated(magnitude))
    smallest = _negated(nearest)
    return value_of(_as_number(xs[0], largest)), value_of(_as_number(xs[0], smallest))


def word_of(xs: Any) -> Any:
    """Return the unsigned integers as wide as an element, which can count those of a block."""


@overload(word_of)
def _word_of(xs):  # type: ignore[no-untyped-def]
    word = getattr(types, f"uint{xs.dtype.bitwidth}")
    return lambda xs: word


@register_jitable
def counts_of(xs):  # type: ignore[no-untyped-def]
    """Return how many elements are not 0, and the largest magnitude."""
    word = word_of(xs)
    largest, nonzero = _magnitude_bits(xs[0]), word(0)
    for j in range(xs.size):
        magnitude = _magnitude_bits(xs[j])
        largest = max(largest, magnitude)
        nonzero = word(nonzero + (magnitude != 0))
    return int(nonzero), value_of(_as_number(xs[0], largest))


@register_jitable
def weighted_counts_of(xs, ws):  # type: ignore[no-untyped-def]
    """Do :func:`counts_of` for elements whose weight is not 0, of which there are so many."""
    word = word_of(xs)
    largest, nonzero, kept = word(0), word(0), word(0)
    for j in range(xs.size):
        magnitude = select(ws[j] != 0, _magnitude_bits(xs[j]), word(0))
        largest = max(largest, magnitude)
        nonzero = word(nonzero + (magnitude != 0))
        kept = word(kept + (ws[j] != 0))
    return int(kept), int(nonzero), value_of(_as_number(xs[0], largest))


@register_jitable
def larger(a, b):  # type: ignore[no-untyped-def]
    """Return the larger of two magnitudes; NaN is larger than any."""
    return a if a != a or a >= b else b


@register_jitable
def exponent_of(magnitude):  # type: ignore[no-untyped-def]
    """Return the exponent e of a number in [2ᵉ, 2ᵉ⁺¹); -1023 for 0, 1024 if it is not finite."""
    return ((as_int(magnitude) >> 52) & 2047) - 1023


@register_jitable
def power_of_two(exponent):  # type: ignore[no-untyped-def]
    """Return 2 to the power ``exponent``, of a normal number."""
    return as_float((exponent + 1023) << 52)
