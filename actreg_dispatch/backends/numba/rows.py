"""What kernels are made of: magnitudes, updates, and sums along a row.

A *row* function is the body of every pass: it sums the magnitudes, |x| or x² or both, times a
weight, along one axis, plain or anchored (see :mod:`actreg_dispatch.sums.certified`), and updates
the gradients on the way. Which row of which array it is, is up to the block function that calls it.
Sums stay in vector registers. Without weights, each is the constant 1, of which the compiler leaves
nothing.

What a kernel closes over is part of its key in Numba's cache on disk: functions at the top of a
module by their names, others, such as those that :func:`load_of` makes, by their code.
"""

from __future__ import annotations

import math
import zlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from actreg_dispatch.backends.numba.bits import (
    as_float,
    as_int,
    exponent_of,
    extremes,
    multiply_add,
    narrow,
    power_of_two,
    select,
    widen,
    word_of,
)
from actreg_dispatch.dtypes import FLOAT64
from actreg_dispatch.norms import Norm, signed, sqrt
from actreg_dispatch.sums.certified import (
    ANCHORED_TERMS,
    HIGHEST_EXPONENT,
    LOWEST_EXPONENT,
    MOST_WEIGHT,
    anchored_bound,
    certified_one,
    certified_two,
    merge_pairs,
    two_sum,
)

__all__ = [
    "ONE",
    "Summing",
    "absolute",
    "add_gradient",
    "bad_and_large",
    "gradient_of",
    "named",
    "no_gradient",
    "no_update",
    "plus",
    "rounded_tile",
    "set_gradient",
    "square",
    "store_of",
    "summing_of",
    "update_only",
]

# Compiled code calls the shared arithmetic by its own name.
for _function in (anchored_bound, two_sum, merge_pairs, certified_one, certified_two):
    register_jitable(_function)


# Weights: the value of element j in T, 0 if it is left out, and its weight.


@register_jitable
def _without(x, w, j):  # type: ignore[no-untyped-def]
    value = widen(x[j])
    return value, type(value)(1.0)


@register_jitable
def _with_weight(x, w, j):  # type: ignore[no-untyped-def]
    value, each = widen(x[j]), w[j]
    return select(each != 0, value, type(value)(0.0)), each


@register_jitable
def _with_one_weight(x, w, j):  # type: ignore[no-untyped-def]
    """Do it for a row whose elements have one weight, a number, which is not 0."""
    return widen(x[j]), w


def _part_of(w: Any, start: int, end: int) -> Any:
    """Return the weights from ``start`` to ``end``; one weight is that of any part."""


@overload(_part_of)
def _(w, start, end):  # type: ignore[no-untyped-def]
    if isinstance(w, types.Array):
        return lambda w, start, end: w[start:end]
    return lambda w, start, end: w


# Magnitudes: |x| or x², times the weight w, in binary64, less the second result, which is what
# rounding added.


@register_jitable
def absolute(value, w):  # type: ignore[no-untyped-def]
    """Return |x|."""
    return abs(value), 0.0


@register_jitable
def square(value, w):  # type: ignore[no-untyped-def]
    """Return x²."""
    rounded = value * value
    return rounded, -multiply_add(value, value, -rounded)


@register_jitable
def _weighted_absolute(value, w):  # type: ignore[no-untyped-def]
    magnitude = abs(value)
    rounded = w * magnitude
    return rounded, -multiply_add(w, magnitude, -rounded)


@register_jitable
def _weighted_square(value, w):  # type: ignore[no-untyped-def]
    squared = value * value
    rounded = w * squared
    lost = w * multiply_add(value, value, -squared)
    return rounded, -(multiply_add(w, squared, -rounded) + lost)


# Updates: add the gradient at x to g[j], or write it there, if the weight is not 0; λ and
# coefficients are tuples of the compute dtype.


@register_jitable
def no_update(g, j, x, w, gradient, lam, c):  # type: ignore[no-untyped-def]
    """Leave the gradients alone, for a pass that sums."""


@register_jitable
def add_gradient(g, j, x, w, gradient, lam, c):  # type: ignore[no-untyped-def]
    """Add, rounding after every operation.

    Where the weight is 0, what is added is -0, which leaves every number as it is. To choose
    between the new gradient and the old one becomes a masked store, ten times as slow on Zen.
    """
    old = g[j]
    added = select(w != 0, gradient(x, w, lam, c), type(x)(-0.0))
    g[j] = narrow(old, widen(old) + added)


@register_jitable
def set_gradient(g, j, x, w, gradient, lam, c):  # type: ignore[no-untyped-def]
    """Do :func:`add_gradient` as if the gradients were 0."""
    zero = type(x)(0.0)
    g[j] = narrow(g[j], zero + select(w != 0, gradient(x, w, lam, c), zero))


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
def no_gradient(x, w, lam, c):  # type: ignore[no-untyped-def]
    """Stand in where there is no norm."""
    return x


def gradient_of(norm: Norm, weighted: bool) -> Any:
    """Return the compiled gradient at x, whose weight w, if there are any, multiplies λ."""
    gradient, times = register_jitable(norm.gradient), _times_of(norm.n_lams)

    def with_weight(x, w, lam, c):  # type: ignore[no-untyped-def]
        return gradient(x, times(lam, w), c)

    def without(x, w, lam, c):  # type: ignore[no-untyped-def]
        return gradient(x, lam, c)

    return register_jitable(named(with_weight if weighted else without, norm.source))


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


@cache
def _times_of(count: int) -> Any:
    """Return the compiled function that multiplies each of so many ``values``."""
    each = "".join(f"values[{k}] * w, " for k in range(count))
    return _compiled("times", f"def times(values, w): return ({each})")


def _compiled(name: str, source: str) -> Any:
    """Return a function for tuples of one length, over which compiled code cannot loop."""
    functions: dict[str, Any] = {"__name__": __name__}
    exec(source, functions)
    return register_jitable(named(functions[name], source))


def named(function: Any, *key: Any) -> Any:
    """Give a function that is made of ``key`` a name of its own, and return it.

    Compiled code that is loaded from the cache is linked by names, in which another process may
    have meant another function.
    """
    function.__qualname__ += f".{zlib.crc32(repr(key).encode()):08x}"
    return function


_LEAST_EXACT = -400  # exponent of the largest term of a tile that is summed without an error

# Rows: update the gradients along one axis and add the magnitudes to the total, which is a sum in
# a pair (hi, lo), or two sums.


@register_jitable(fastmath={"reassoc"})
def plus(total, term):  # type: ignore[no-untyped-def]
    """Add, in an order that the compiler may change: what makes a sum of vectors of it."""
    return total + term


@register_jitable
def _sum_plain(  # type: ignore[no-untyped-def]
    x, g, w, total, first, second, element_of, largest_of, update, gradient, lam, c
):
    hi, lo = total
    for j in range(x.size):
        value, each = element_of(x, w, j)
        hi = plus(hi, first(np.float64(value), np.float64(each))[0])
        update(g, j, value, each, gradient, lam, c)
    return hi, lo


@register_jitable
def _sum_plain_both(  # type: ignore[no-untyped-def]
    x, g, w, total, first, second, element_of, largest_of, update, gradient, lam, c
):
    hi, lo, second_hi, second_lo = total
    for j in range(x.size):
        value, each = element_of(x, w, j)
        hi = plus(hi, first(np.float64(value), np.float64(each))[0])
        second_hi = plus(second_hi, second(np.float64(value), np.float64(each))[0])
        update(g, j, value, each, gradient, lam, c)
    return hi, lo, second_hi, second_lo


@register_jitable
def _sum_anchored(  # type: ignore[no-untyped-def]
    x, g, w, total, first, second, element_of, largest_of, update, gradient, lam, c
):
    for start in range(0, x.size, ANCHORED_TERMS):
        # Slices indexed from 0 need no check for negative indices, which would not vectorize.
        end = start + ANCHORED_TERMS
        xs, gs, ws = x[start:end], g[start:end], _part_of(w, start, end)
        exponent = largest_of(xs, ws, first)
        part = _sum_tile(xs, gs, ws, exponent, first, element_of, update, gradient, lam, c)
        total = _merge(total, part)
    return total


@register_jitable
def _sum_anchored_both(  # type: ignore[no-untyped-def]
    x, g, w, total, first, second, element_of, largest_of, update, gradient, lam, c
):
    for start in range(0, x.size, ANCHORED_TERMS):  # the second look at a tile is in the cache
        end = start + ANCHORED_TERMS
        xs, gs, ws = x[start:end], g[start:end], _part_of(w, start, end)
        exponent, other = largest_of(xs, ws, first), largest_of(xs, ws, second)
        one = _sum_tile(xs, gs, ws, exponent, first, element_of, no_update, gradient, lam, c)
        two = _sum_tile(xs, gs, ws, other, second, element_of, update, gradient, lam, c)
        total = _merge_both(total, (*one, *two))
    return total


@register_jitable
def _sum_tile(xs, gs, ws, exponent, magnitude, element_of, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    anchor = power_of_two(exponent + 10)
    total, rest = 0.0, 0.0
    for j in range(xs.size):
        value, each = element_of(xs, ws, j)
        term, excess = magnitude(np.float64(value), np.float64(each))
        high = (term + anchor) - anchor
        total = plus(total, high)
        rest = plus(rest, (term - high) - excess)
        update(gs, j, value, each, gradient, lam, c)
    if LOWEST_EXPONENT <= exponent <= HIGHEST_EXPONENT:
        return two_sum(total, rest)
    return math.inf, 0.0


@register_jitable
def rounded_tile(xs, ws, exponent, magnitude, element_of):  # type: ignore[no-untyped-def]
    """Return the sum of a tile, and whether it is exact but for one rounding.

    So it is with numbers of few bits, whose sums may be half way between two of binary64, where no
    bracket decides: if every term, the square in it too, is a product without an error, and a
    multiple of 2ᵉ⁻⁸⁶. Then so are the remainders, whose sum is below 2ᵉ⁻³³ and needs at most 53
    bits. Where e is ``_LEAST_EXACT`` or more, no error of such a term is lost to underflow.
    """
    anchor, unit = power_of_two(exponent + 10), 1.5 * power_of_two(exponent - 34)
    total, rest, inexact = 0.0, 0.0, 0
    for j in range(xs.size):
        value, each = element_of(xs, ws, j)
        value, each = np.float64(value), np.float64(each)
        term, excess = magnitude(value, each)
        high = (term + anchor) - anchor
        low = term - high
        has_vanished = term == 0.0 and value != 0.0
        is_multiple = (low + unit) - unit == low
        inexact += has_vanished or excess != 0.0 or square(value, each)[1] != 0.0 or not is_multiple
        total += high
        rest += low
    return total + rest, inexact == 0 and exponent >= _LEAST_EXACT


@register_jitable
def _largest_of_x(xs, ws, magnitude):  # type: ignore[no-untyped-def]
    """Return the exponent of the largest magnitude of a tile; that of 1 if all are 0."""
    largest, _ = extremes(xs)
    return exponent_of(magnitude(largest, 1.0)[0]) if largest != 0.0 else 0


@register_jitable
def _largest_of_one_weight(xs, w, magnitude):  # type: ignore[no-untyped-def]
    """Do :func:`_largest_of_x` with one weight; a product that underflows is not 0."""
    largest, _ = extremes(xs)
    return exponent_of(magnitude(largest, np.float64(w))[0]) if largest != 0.0 else 0


@register_jitable
def _largest_of_terms(xs, ws, magnitude):  # type: ignore[no-untyped-def]
    """Do :func:`_largest_of_x` with weights; a product that underflows is not 0."""
    largest, nonzero = 0, 0
    for j in range(xs.size):
        value, each = _with_weight(xs, ws, j)
        largest = max(largest, as_int(magnitude(np.float64(value), np.float64(each))[0]))
        nonzero |= (value != 0.0) & (each != 0.0)
    return exponent_of(as_float(largest)) if nonzero else 0


@register_jitable
def update_only(  # type: ignore[no-untyped-def]
    x, g, w, total, first, second, element_of, largest_of, update, gradient, lam, c
):
    """Update only."""
    for j in range(x.size):
        value, each = element_of(x, w, j)
        update(g, j, value, each, gradient, lam, c)
    return total


@register_jitable
def _merge(a, b):  # type: ignore[no-untyped-def]
    return merge_pairs(a[0], a[1], b[0], b[1])


@register_jitable
def _merge_both(a, b):  # type: ignore[no-untyped-def]
    first, second = merge_pairs(a[0], a[1], b[0], b[1]), merge_pairs(a[2], a[3], b[2], b[3])
    return first[0], first[1], second[0], second[1]


@register_jitable
def bad_and_large(w):  # type: ignore[no-untyped-def]
    """Return how many weights are negative or not finite, and how many are MOST_WEIGHT or more."""
    word = word_of(w)
    bad, large = word(0), word(0)
    for j in range(w.size):
        each = widen(w[j])
        bad = word(bad + (not (0.0 <= each < math.inf)))
        large = word(large + (each >= MOST_WEIGHT))
    return int(bad), int(large)


ONE = "one"


class Summing(NamedTuple):
    """How powers of |x| are summed: what a kernel closes over."""

    row: Any
    zero: tuple[float, ...]
    certified: Any
    first: Any  # the magnitude, and that of the second sum
    second: Any
    element_of: Any
    largest_of: Any


def summing_of(
    terms: tuple[int, ...], dtype: np.dtype[Any], weighted: bool | str = False
) -> Summing:
    """Return how ``terms`` are summed; no terms are a pass that only updates.

    Elements are ``weighted`` each on its own, or by ``ONE`` weight, a number in place of an array.
    """
    magnitudes = (_weighted_absolute, _weighted_square) if weighted else (absolute, square)
    first, second = magnitudes if terms != (2,) else magnitudes[::-1]
    element_of, largest_of = {
        False: (_without, _largest_of_x),
        True: (_with_weight, _largest_of_terms),
        ONE: (_with_one_weight, _largest_of_one_weight),
    }[weighted]
    how = first, second, element_of, largest_of
    anchored = dtype == FLOAT64
    if len(terms) == 2:
        row = _sum_anchored_both if anchored else _sum_plain_both
        return Summing(row, (0.0,) * 4, certified_two, *how)
    row = (_sum_anchored if anchored else _sum_plain) if terms else update_only
    return Summing(row, (0.0, 0.0), certified_one, *how)
