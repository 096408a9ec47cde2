"""What kernels are made of: magnitudes, updates, and sums along a row.

A *row* function is the body of every pass: it sums the magnitudes, |x| or x² or both, along one
axis, plain or anchored (see :mod:`actreg_dispatch.sums.certified`), and updates the gradients on
the way. Which row of which array it is, is up to the block function that calls it. Sums stay in
vector registers.

What a kernel closes over is part of its key in Numba's cache on disk: functions at the top of a
module by their names, others, such as those that :func:`load_of` makes, by their code.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload, register_jitable

from actreg_dispatch.backends.numba.bits import (
    exponent_of,
    extremes,
    multiply_add,
    narrow,
    power_of_two,
    widen,
)
from actreg_dispatch.dtypes import FLOAT64
from actreg_dispatch.norms import signed, sqrt
from actreg_dispatch.sums.certified import (
    ANCHORED_TERMS,
    HIGHEST_EXPONENT,
    LOWEST_EXPONENT,
    anchored_bound,
    certified_one,
    certified_two,
    merge_pairs,
    two_sum,
)

__all__ = [
    "Summing",
    "absolute",
    "add_gradient",
    "load_of",
    "no_gradient",
    "no_update",
    "plus",
    "set_gradient",
    "square",
    "store_of",
    "summing_of",
]

# Compiled code calls the shared arithmetic by its own name.
for _function in (anchored_bound, two_sum, merge_pairs, certified_one, certified_two):
    register_jitable(_function)


# Magnitudes: |x| or x² in binary64, less the second result, which is what the square lost.


@register_jitable
def absolute(value):  # type: ignore[no-untyped-def]
    """Return |x|."""
    return abs(value), 0.0


@register_jitable
def square(value):  # type: ignore[no-untyped-def]
    """Return x², rounded, and by how much that is too large."""
    rounded = value * value
    return rounded, -multiply_add(value, value, -rounded)


# Updates: add the gradient at x to g[j], or write it there; λ and coefficients are tuples of the
# compute dtype.


@register_jitable
def no_update(g, j, x, gradient, lam, c):  # type: ignore[no-untyped-def]
    """Leave the gradients alone, for a pass that sums."""


@register_jitable
def add_gradient(g, j, x, gradient, lam, c):  # type: ignore[no-untyped-def]
    """Add, rounding after every operation."""
    g[j] = narrow(g[j], widen(g[j]) + gradient(x, lam, c))


@register_jitable
def set_gradient(g, j, x, gradient, lam, c):  # type: ignore[no-untyped-def]
    """Do :func:`add_gradient` as if the gradients were 0."""
    g[j] = narrow(g[j], type(x)(0.0) + gradient(x, lam, c))


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
def plus(total, term):  # type: ignore[no-untyped-def]
    """Add, in an order that the compiler may change: what makes a sum of vectors of it."""
    return total + term


@register_jitable
def _sum_plain(x, g, total, magnitude, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    hi, lo = total
    for j in range(x.size):
        value = widen(x[j])
        hi = plus(hi, magnitude(np.float64(value))[0])
        update(g, j, value, gradient, lam, c)
    return hi, lo


@register_jitable
def _sum_plain_both(x, g, total, magnitude, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    hi, lo, squares, squares_lo = total
    for j in range(x.size):
        value = widen(x[j])
        wide = np.float64(value)
        hi = plus(hi, abs(wide))
        squares = plus(squares, wide * wide)
        update(g, j, value, gradient, lam, c)
    return hi, lo, squares, squares_lo


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
        magnitudes = _sum_tile(xs, gs, absolute, no_update, gradient, lam, c)
        squares = _sum_tile(xs, gs, square, update, gradient, lam, c)
        total = _merge_both(total, (*magnitudes, *squares))
    return total


@register_jitable
def _sum_tile(xs, gs, magnitude, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    largest, _ = extremes(xs)
    exponent = exponent_of(magnitude(largest)[0])
    anchor = power_of_two(exponent + 10)
    total, rest = 0.0, 0.0
    for j in range(xs.size):
        term, excess = magnitude(xs[j])
        high = (term + anchor) - anchor
        total = plus(total, high)
        rest = plus(rest, (term - high) - excess)
        update(gs, j, xs[j], gradient, lam, c)
    if largest == 0.0 or LOWEST_EXPONENT <= exponent <= HIGHEST_EXPONENT:
        return two_sum(total, rest)
    return math.inf, 0.0


@register_jitable
def update_only(x, g, total, magnitude, update, gradient, lam, c):  # type: ignore[no-untyped-def]
    """Update only."""
    for j in range(x.size):
        update(g, j, widen(x[j]), gradient, lam, c)
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
    magnitude: Any = absolute


def summing_of(terms: tuple[int, ...], dtype: np.dtype[Any]) -> Summing:
    """Return how ``terms`` are summed; no terms are a pass that only updates."""
    anchored = dtype == FLOAT64
    if len(terms) == 2:
        return Summing(
            _sum_anchored_both if anchored else _sum_plain_both, (0.0,) * 4, certified_two
        )
    row = (_sum_anchored if anchored else _sum_plain) if terms else update_only
    return Summing(row, (0.0, 0.0), certified_one, square if terms == (2,) else absolute)
