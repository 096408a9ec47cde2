"""What kernels are made of: numbers as bits, magnitudes, updates, and sums along a row.

A *row* function is the body of every pass: it sums the magnitudes, |x| or x² or both, along one
axis, plain or anchored (see :mod:`actreg_dispatch.sums.certified`), and updates the gradients on
the way. Which row of which array it is, is up to the block function that calls it. Sums stay in
vector registers.

Numba knows no 16-bit floats on the CPU. The kernels get the bits, float16 as uint16 and bfloat16 as
int16, and the type of the bits says how :func:`_widen` and :func:`_narrow` convert them.

What a kernel closes over is part of its key in Numba's cache on disk: functions at the top of a
module by their names, others, such as those that :func:`load_of` makes, by their code.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable

from actreg_dispatch.dtypes import FLOAT16, FLOAT64
from actreg_dispatch.norms import signed, sqrt
from actreg_dispatch.sums.certified import (
    ANCHORED_TERMS,
    PLAIN_TERMS,
    anchored_bound,
    certified_one,
    certified_two,
    merge_pairs,
    two_sum,
)
from actreg_dispatch.sums.exact import LIMB

__all__ = [
    "BLOCK",
    "Summing",
    "accumulate",
    "add_gradient",
    "bits_of",
    "load_of",
    "no_gradient",
    "no_update",
    "store_of",
    "summing_of",
]

BLOCK = PLAIN_TERMS
"""Elements that one thread does at a time."""
_LOW = (1 << LIMB) - 1  # the bits of a limb

# Compiled code calls the shared arithmetic by its own name.
for _function in (anchored_bound, two_sum, merge_pairs, certified_one, certified_two):
    register_jitable(_function)


# Numbers as bits.


def bits_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that a kernel knows ``dtype`` by."""
    if dtype.itemsize > 2:
        return dtype
    return np.dtype(np.uint16 if dtype == FLOAT16 else np.int16)


@intrinsic
def _widen(typingctx, value):  # type: ignore[no-untyped-def]
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
def _narrow(typingctx, like, value):  # type: ignore[no-untyped-def]
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
def _bits(typingctx, value):  # type: ignore[no-untyped-def]
    """Return the bits of a float64 as an int64."""

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), cast


@intrinsic
def _float(typingctx, bits):  # type: ignore[no-untyped-def]
    """Return the float64 that has these bits, an int64."""

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), cast


@intrinsic
def _multiply_add(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """Return ``a * b + c`` of float64 rounded once: an instruction, or the C library's ``fma``."""

    def fused(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return types.float64(types.float64, types.float64, types.float64), fused


# Magnitudes: |x| or x² in binary64, less the second result, which is what the square lost.


@register_jitable
def _absolute(value):  # type: ignore[no-untyped-def]
    return abs(value), 0.0


@register_jitable
def _square(value):  # type: ignore[no-untyped-def]
    square = value * value
    return square, -_multiply_add(value, value, -square)


# Updates: add the gradient at x to g[j]; λ and coefficients are tuples of the compute dtype.


@register_jitable
def no_update(g, j, x, gradient, lam, c):  # type: ignore[no-untyped-def]
    """Leave the gradients alone, for a pass that sums."""


@register_jitable
def add_gradient(g, j, x, gradient, lam, c):  # type: ignore[no-untyped-def]
    """Add, rounding after every operation."""
    g[j] = _narrow(g[j], _widen(g[j]) + gradient(x, lam, c))


@overload(signed)
def _signed(a, x):  # type: ignore[no-untyped-def]
    def compiled(a, x):  # type: ignore[no-untyped-def]
        real = type(x)
        return a * math.copysign(real(1.0), x) if abs(x) > 0 else real(0.0)

    return compiled


@overload(sqrt)
def _sqrt(value):  # type: ignore[no-untyped-def]
    return lambda value: math.sqrt(value)


@register_jitable
def no_gradient(x, lam, c):  # type: ignore[no-untyped-def]
    """Stand in where there is no norm."""
    return x


@cache
def load_of(count: int) -> Any:
    """Return the compiled function that makes a tuple of so many ``values``, rounded to a type."""
    each = "".join(f"real(values[{k}]), " for k in range(count))
    return _compiled("load", f"def load(values, real): return ({each})")


@cache
def store_of(count: int) -> Any:
    """Return the compiled function that writes a tuple of so many ``values`` to an array."""
    each = "; ".join(f"there[{k}] = values[{k}]" for k in range(count))
    return _compiled("store", f"def store(there, values): {each or 'pass'}")


def _compiled(name: str, source: str) -> Any:
    """Return a function for tuples of one length, over which compiled code cannot loop."""
    functions: dict[str, Any] = {"__name__": __name__}
    exec(source, functions)
    return register_jitable(functions[name])


# Rows: update the gradients along one axis and add the magnitudes to the total, which is a sum in
# a pair (hi, lo), or two sums.


@register_jitable(fastmath={"reassoc"})
def _plus(total, term):  # type: ignore[no-untyped-def]
    """Add, in an order that the compiler may change: what makes a sum of vectors of it."""
    return total + term


@register_jitable
def _sum_plain(x, g, total, magnitude, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    hi, lo = total
    for j in range(x.size):
        value = _widen(x[j])
        hi = _plus(hi, magnitude(np.float64(value))[0])
        update(g, j, value, gradient, lam, c)
    return hi, lo


@register_jitable
def _sum_plain_both(x, g, total, magnitude, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    absolute, absolute_lo, squares, squares_lo = total
    for j in range(x.size):
        value = _widen(x[j])
        wide = np.float64(value)
        absolute = _plus(absolute, abs(wide))
        squares = _plus(squares, wide * wide)
        update(g, j, value, gradient, lam, c)
    return absolute, absolute_lo, squares, squares_lo


@register_jitable
def _sum_anchored(x, g, total, magnitude, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    for start in range(0, x.size, ANCHORED_TERMS):
        # Slices indexed from 0 need no check for negative indices, which would not vectorize.
        xs, gs = x[start : start + ANCHORED_TERMS], g[start : start + ANCHORED_TERMS]
        total = _merge(total, _sum_tile(xs, gs, magnitude, update, gradient, lam, c))
    return total


@register_jitable
def _sum_anchored_both(x, g, total, magnitude, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    for start in range(0, x.size, ANCHORED_TERMS):  # the second look at a tile is in the cache
        xs, gs = x[start : start + ANCHORED_TERMS], g[start : start + ANCHORED_TERMS]
        absolute = _sum_tile(xs, gs, _absolute, no_update, gradient, lam, c)
        squares = _sum_tile(xs, gs, _square, update, gradient, lam, c)
        total = _merge_both(total, (*absolute, *squares))
    return total


@register_jitable
def _sum_tile(xs, gs, magnitude, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    largest = 0
    for j in range(xs.size):  # the bits of magnitudes are in the order of the magnitudes
        largest = max(largest, _bits(abs(xs[j])))
    exponent = _bits(magnitude(_float(largest))[0]) >> 52  # biased by 1023
    anchor = _float((exponent + 10) << 52)
    total, rest = 0.0, 0.0
    for j in range(xs.size):
        term, excess = magnitude(xs[j])
        high = (term + anchor) - anchor
        total = _plus(total, high)
        rest = _plus(rest, (term - high) - excess)
        update(gs, j, xs[j], gradient, lam, c)
    if largest == 0 or 123 <= exponent <= 2036:
        return two_sum(total, rest)
    return math.inf, 0.0


@register_jitable
def update_only(x, g, total, magnitude, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    """Update only."""
    for j in range(x.size):
        update(g, j, _widen(x[j]), gradient, lam, c)
    return total


@register_jitable
def _merge(a, b):  # type: ignore[no-untyped-def]
    return merge_pairs(a[0], a[1], b[0], b[1])


@register_jitable
def _merge_both(a, b):  # type: ignore[no-untyped-def]
    first, second = merge_pairs(a[0], a[1], b[0], b[1]), merge_pairs(a[2], a[3], b[2], b[3])
    return first[0], first[1], second[0], second[1]


class Summing(NamedTuple):
    """How powers of |x| are summed: what a kernel closes over."""

    row: Any
    zero: tuple[float, ...]
    certified: Any
    magnitude: Any = _absolute


def summing_of(terms: tuple[int, ...], dtype: np.dtype[Any]) -> Summing:
    """Return how ``terms`` are summed; no terms are a pass that only updates."""
    anchored = dtype == FLOAT64
    if len(terms) == 2:
        return Summing(
            _sum_anchored_both if anchored else _sum_plain_both, (0.0,) * 4, certified_two
        )
    row = (_sum_anchored if anchored else _sum_plain) if terms else update_only
    return Summing(row, (0.0, 0.0), certified_one, _square if terms == (2,) else _absolute)


@register_jitable
def accumulate(row, bins, squares):  # type: ignore[no-untyped-def]
    """Add the limbs of every element, or of its square, to the bin of its exponent.

    Returns infinity or NaN once met, else 0. A limb is below 2²⁸, so a bin holds 2³⁵ of them.
    """
    special = 0.0
    for j in range(row.size):
        magnitude = abs(np.float64(_widen(row[j])))
        bits = _bits(magnitude)
        exponent = bits >> 52
        if exponent == 2047:
            special += magnitude
            continue
        significand = bits & ((1 << 52) - 1)
        if exponent > 0:
            significand |= 1 << 52  # implied, but in subnormal numbers
            exponent -= 1
        low, high = significand & _LOW, significand >> LIMB
        if squares:
            ends, middle, top = low * low, 2 * low * high, high * high
            bins[exponent, 0] += ends & _LOW
            bins[exponent, 1] += (ends >> LIMB) + (middle & _LOW)
            bins[exponent, 2] += (middle >> LIMB) + (top & _LOW)
            bins[exponent, 3] += top >> LIMB
        else:
            bins[exponent, 0] += low
            bins[exponent, 1] += high
    return special
