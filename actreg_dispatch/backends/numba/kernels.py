"""The compiled kernels: thin drivers round the rows of :mod:`~actreg_dispatch.backends.numba.rows`.

* The *fused* kernel takes contiguous arrays of one axis and does a whole call: it checks what a
  caller may get wrong, rounds λ, sums, tests the rounding, updates.
* The *pass* takes arrays of any strides, after validation, and returns the sums.
* The *batch* does for all layers of a table what the fused kernel does for one, in one parallel
  region.
* The *accumulator* sums exactly, into the bins of a superaccumulator (Kulisch).
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from actreg_dispatch.backends.numba.compiling import compile_kernel, source_hash
from actreg_dispatch.backends.numba.rows import (
    BLOCK,
    accumulate,
    add_gradient,
    address_of,
    bits_of,
    cast_of,
    dense_row,
    no_gradient,
    no_update,
    one_lam,
    several_lams,
    store_of,
    strided_row,
    summing_of,
    update_only,
)
from actreg_dispatch.dtypes import COMPUTE_DTYPES, FLOAT64
from actreg_dispatch.norms import Norm
from actreg_dispatch.sums.certified import (
    NEEDS_EXACT_SUM,
    NOT_HANDLED,
    PLAIN_BOUND,
    anchored_bound,
)

__all__ = [
    "PARALLEL_FROM",
    "accumulator",
    "apartness",
    "batch_kernel",
    "clearing",
    "describing",
    "fused_kernel",
    "pass_kernel",
]

# Elements from which on the threads are woken. Measured on two cores, L1, µs serial and parallel:
# float32 3.0 and 3.7 at 24,000, 3.7 and 3.7 at 30,000, 5.4 and 4.6 at 45,000; float64 5.3 and 6.4
# at 16,000, 9.1 and 6.6 at 30,000.
PARALLEL_FROM = 30_000

_PAGES = 1 << 18  # bytes that one thread clears at a time
_AXES = types.Array(types.int64, 2, "C")
_TABLE = types.Array(types.int64, 2, "C")  # for each layer: where x and g are, elements, samples
_TOTALS = types.Array(types.float64, 2, "C")


class _Formulas:
    """What a kernel closes over of a norm and a dtype, all of it compiled code and constants."""

    def __init__(self, norm: Norm, dtype: np.dtype[Any]) -> None:
        compute = COMPUTE_DTYPES[dtype]
        self.real: Any = compute.type
        self.summing = summing_of(norm.terms, dtype)
        self.gradient = register_jitable(norm.gradient)
        self.evaluate = register_jitable(norm.evaluate)
        self.rounded_lams = register_jitable(norm.rounded_lams)
        self.lam_fits = register_jitable(norm.lam_fits)
        self.widened = cast_of(norm.n_lams)
        self.as_tuple = one_lam if norm.n_lams == 1 else several_lams
        self.lam_type = _lam_type(norm)
        self.one = self.real(1)
        self.none = (self.one,) * norm.n_coefficients  # in place of coefficients that nothing uses
        self.epsilon = float(np.finfo(self.real).eps)
        self.key = source_hash(), norm.source  # what Numba's cache tells kernels apart by


def _lam_type(norm: Norm) -> Any:
    return types.float64 if norm.n_lams == 1 else types.UniTuple(types.float64, norm.n_lams)


def fused_kernel(norm: Norm, dtype: np.dtype[Any], writes: bool, parallel: bool) -> Any:
    """Compile the kernel that does a whole call on contiguous arrays of one axis.

    It takes activations, gradients, λ, what λ is divided by, what it is multiplied by for the
    gradient, and epsilon (NaN for the default), and returns the penalty, or ``NOT_HANDLED`` or
    ``NEEDS_EXACT_SUM``, which are negative, as a penalty is not. Without ``writes`` the gradients
    are the activations again. The signature is explicit: arrays of another dtype, layout or
    writability are a TypeError.
    """
    formulas, anchored = _Formulas(norm, dtype), dtype == FLOAT64
    sum_row, zero, merge, merged, certified, magnitude = formulas.summing
    gradient, evaluate, real = formulas.gradient, formulas.evaluate, formulas.real
    rounded_lams, lam_fits, widened = formulas.rounded_lams, formulas.lam_fits, formulas.widened
    as_tuple, one, none = formulas.as_tuple, formulas.one, formulas.none
    updates_later = writes and norm.two_pass
    update = add_gradient if writes and not updates_later else no_update
    default, columns, key = formulas.epsilon, len(zero), formulas.key

    def kernel(x, g, lam, count, scale, epsilon):  # type: ignore[no-untyped-def]
        _ = key
        size, reach = x.size, x.size * x.itemsize
        apart = abs(address_of(x) - address_of(g)) >= reach or not writes
        aligned = (address_of(x) | address_of(g)) % x.itemsize == 0  # which Numba takes for granted
        lams, gradient_lams = rounded_lams(as_tuple(lam), count, scale, real)
        plain = apart and aligned and size == g.size and lam_fits(lams, one)
        if not plain or (size >= PARALLEL_FROM) != parallel:
            return NOT_HANDLED
        blocks = -(-size // BLOCK)
        if parallel:
            totals = np.empty((blocks, columns))
            for b in numba.prange(blocks):
                xs, gs = x[b * BLOCK : (b + 1) * BLOCK], g[b * BLOCK : (b + 1) * BLOCK]
                totals[b] = sum_row(xs, gs, zero, magnitude, update, gradient, gradient_lams, none)
            total = merged(totals)
        else:
            total = zero
            for b in range(blocks):
                xs, gs = x[b * BLOCK : (b + 1) * BLOCK], g[b * BLOCK : (b + 1) * BLOCK]
                block = sum_row(xs, gs, zero, magnitude, update, gradient, gradient_lams, none)
                total = merge(total, block)
        found, certain = certified(
            total,
            anchored_bound(size) if anchored else PLAIN_BOUND,
            evaluate,
            widened(lams, np.float64),
            widened(gradient_lams, np.float64),
            default if math.isnan(epsilon) else epsilon,
            real,
        )
        penalty, c, has_gradient = found
        if not (certain and penalty >= 0.0):
            return NOT_HANDLED if updates_later else NEEDS_EXACT_SUM
        if updates_later and has_gradient:
            for b in numba.prange(blocks):
                xs, gs = x[b * BLOCK : (b + 1) * BLOCK], g[b * BLOCK : (b + 1) * BLOCK]
                update_only(xs, gs, zero, magnitude, add_gradient, gradient, gradient_lams, c)
        return np.float64(penalty)

    element = numba.from_dtype(bits_of(dtype))
    x = types.Array(element, 1, "C", readonly=True)
    g = types.Array(element, 1, "C", readonly=not writes)
    number = types.float64
    # Without Numba's reference counts, which it has no use for, a serial call takes 50 ns less.
    signature = number(x, g, formulas.lam_type, number, number, number)
    return compile_kernel(kernel, signature, parallel, _nrt=parallel)


def pass_kernel(
    terms: tuple[int, ...], norm: Norm | None, dtype: np.dtype[Any], parallel: bool
) -> Any:
    """Compile one pass over arrays of any strides, which sums ``terms``, if there are any.

    It adds the gradient of ``norm`` on the way, if there is one. It takes the first rows of both
    arrays, the lengths of the other axes and the bytes that both step along them, λ of the gradient
    and the coefficients, and returns the total.
    """
    sum_row, zero, _, merged, _, magnitude = summing_of(terms, dtype)
    n_lams, n_coefficients = (norm.n_lams, norm.n_coefficients) if norm else (0, 0)
    cast_lam, cast_c, columns = cast_of(n_lams), cast_of(n_coefficients), len(zero)
    update = add_gradient if norm else no_update
    gradient = register_jitable(norm.gradient) if norm else no_gradient
    real: Any = COMPUTE_DTYPES[dtype].type
    # With ``parallel``, or one twin would be taken from the cache for the other.
    key = source_hash(), norm and norm.source, parallel

    def kernel(x, g, axes, lam, c):  # type: ignore[no-untyped-def]
        _ = key
        lams, cs = cast_lam(lam, real), cast_c(c, real)
        length = x.size
        dense = x.strides[0] == x.itemsize and g.strides[0] == g.itemsize
        pieces = -(-length // BLOCK)  # of a row
        units = axes[0].prod() * pieces
        units_per_block = max(1, BLOCK // length)
        blocks = -(-units // units_per_block)
        totals = np.empty((blocks, columns))
        for b in numba.prange(blocks):
            total = zero
            for unit in range(b * units_per_block, min((b + 1) * units_per_block, units)):
                row, piece = divmod(unit, pieces)
                start = piece * BLOCK
                count = min(BLOCK, length - start)
                x_offset, g_offset = _offsets(axes, row)
                x_offset += start * x.strides[0]
                g_offset += start * g.strides[0]
                if dense:
                    xs, gs = dense_row(x, x_offset, count), dense_row(g, g_offset, count)
                    total = sum_row(xs, gs, total, magnitude, update, gradient, lams, cs)
                else:
                    xs, gs = strided_row(x, x_offset, count), strided_row(g, g_offset, count)
                    total = sum_row(xs, gs, total, magnitude, update, gradient, lams, cs)
            totals[b] = total
        return merged(totals)

    element = numba.from_dtype(bits_of(dtype))
    x = types.Array(element, 1, "A", readonly=True)
    g = types.Array(element, 1, "A", readonly=norm is None)
    lam, c = (types.UniTuple(types.float64, n) for n in (n_lams, n_coefficients))
    total = types.UniTuple(types.float64, columns)
    return compile_kernel(kernel, total(x, g, _AXES, lam, c), parallel)


@register_jitable
def _offsets(axes, row):  # type: ignore[no-untyped-def]
    """Return by how many bytes a row lies behind the first, in both arrays."""
    x_offset, g_offset = 0, 0
    for axis in range(axes.shape[1] - 1, -1, -1):
        row, place = divmod(row, axes[0, axis])
        x_offset += place * axes[1, axis]
        g_offset += place * axes[2, axis]
    return x_offset, g_offset


def describing(dtype: np.dtype[Any], axes: int) -> Any:
    """Compile the function that describes one layer, of so many axes, in a row of the table.

    It returns the number of elements, or -1 where shapes differ or an array is not aligned. Arrays
    of another dtype or layout, and read-only gradients, are a TypeError.
    """
    key = source_hash()

    def kernel(x, g, table, layer):  # type: ignore[no-untyped-def]
        _ = key
        start, g_start = address_of(x), address_of(g)
        if x.shape != g.shape or (start | g_start) % x.itemsize != 0:
            return -1
        table[layer, 0], table[layer, 1] = start, g_start
        table[layer, 2], table[layer, 3] = x.size, x.shape[0]
        return x.size

    element = numba.from_dtype(dtype)
    x = types.Array(element, axes, "C", readonly=True)
    g = types.Array(element, axes, "C")
    return compile_kernel(kernel, types.int64(x, g, _TABLE, types.int64), _nrt=False)


def apartness() -> Any:
    """Compile the function that says whether no gradients of the table share memory with anything.

    In the order of their addresses, nothing may begin before the gradients before it end, and no
    gradients before anything before them ends.
    """
    key = source_hash()

    def kernel(table, itemsize):  # type: ignore[no-untyped-def]
        _ = key
        layers = table.shape[0]
        starts = np.empty(2 * layers, np.int64)
        for layer in range(layers):
            starts[2 * layer], starts[2 * layer + 1] = table[layer, 0], table[layer, 1]
        end, written_end = 0, 0
        for k in np.argsort(starts):
            written, size = k % 2 == 1, table[k // 2, 2] * itemsize
            if size > 0:
                if starts[k] < (end if written else written_end):
                    return False
                end = max(end, starts[k] + size)
                if written:
                    written_end = max(written_end, starts[k] + size)
        return True

    return compile_kernel(kernel, types.boolean(_TABLE, types.int64))


def batch_kernel(norm: Norm, dtype: np.dtype[Any], parallel: bool) -> Any:
    """Compile the function that does for all layers of the table what a fused kernel does for one.

    It takes the table, λ, which column of it λ is divided by (0 for none), what λ is multiplied by
    for the gradient, epsilon (NaN for the default), and where the penalties go. It returns whether
    it took the layers; if not, nothing was written.
    """
    formulas, anchored = _Formulas(norm, dtype), dtype == FLOAT64
    sum_row, zero, merge, _, certified, magnitude = formulas.summing
    gradient, evaluate, real = formulas.gradient, formulas.evaluate, formulas.real
    rounded_lams, lam_fits, widened = formulas.rounded_lams, formulas.lam_fits, formulas.widened
    as_tuple, one, none = formulas.as_tuple, formulas.one, formulas.none
    two_pass, default, columns = norm.two_pass, formulas.epsilon, len(zero)
    update = no_update if two_pass else add_gradient
    n_coefficients = norm.n_coefficients
    cast_total, cast_c = cast_of(columns), cast_of(n_coefficients)
    store = store_of(n_coefficients)
    key = formulas.key, parallel

    def kernel(table, like, lam, column, scale, epsilon, penalties):  # type: ignore[no-untyped-def]
        _ = key
        layers = table.shape[0]
        for layer in range(layers):
            lams = rounded_lams(as_tuple(lam), _count(table, layer, column), scale, real)[0]
            if not lam_fits(lams, one):
                return False
        before = np.empty(layers + 1, np.int64)  # how many blocks the layers before have
        before[0] = 0
        for layer in range(layers):
            before[layer + 1] = before[layer] - (-table[layer, 2] // BLOCK)
        layer_of = np.empty(before[layers], np.int64)
        for layer in range(layers):  # by a loop: a slice would be a parallel region of its own
            for b in range(before[layer], before[layer + 1]):
                layer_of[b] = layer

        totals = np.empty((layer_of.size, columns))
        for b in numba.prange(layer_of.size):
            layer = layer_of[b]
            x, g = _block(like, table, layer, b - before[layer])
            count = _count(table, layer, column)
            gradient_lams = rounded_lams(as_tuple(lam), count, scale, real)[1]
            totals[b] = sum_row(x, g, zero, magnitude, update, gradient, gradient_lams, none)

        coefficients = np.empty((layers, n_coefficients))
        adds = np.zeros(layers, np.bool_)  # whether there is a gradient still to be added
        for layer in range(layers):
            total = zero
            for b in range(before[layer], before[layer + 1]):
                total = merge(total, cast_total(totals[b], np.float64))
            lams, gradient_lams = rounded_lams(
                as_tuple(lam), _count(table, layer, column), scale, real
            )
            found, certain = certified(
                total,
                anchored_bound(table[layer, 2]) if anchored else PLAIN_BOUND,
                evaluate,
                widened(lams, np.float64),
                widened(gradient_lams, np.float64),
                default if math.isnan(epsilon) else epsilon,
                real,
            )
            penalty, c, has_gradient = found
            if certain and penalty >= 0.0:
                penalties[layer], adds[layer] = penalty, has_gradient
                store(coefficients, layer, c)
            else:
                penalties[layer] = NOT_HANDLED if two_pass else NEEDS_EXACT_SUM

        if two_pass:
            for b in numba.prange(layer_of.size):
                layer = layer_of[b]
                if adds[layer]:
                    x, g = _block(like, table, layer, b - before[layer])
                    count = _count(table, layer, column)
                    gradient_lams = rounded_lams(as_tuple(lam), count, scale, real)[1]
                    c = cast_c(coefficients[layer], real)
                    update_only(x, g, zero, magnitude, add_gradient, gradient, gradient_lams, c)
        return True

    like = types.Array(numba.from_dtype(bits_of(dtype)), 1, "C")
    penalties, number = types.Array(types.float64, 1, "C"), types.float64
    signature = types.boolean(
        _TABLE, like, formulas.lam_type, types.int64, number, number, penalties
    )
    return compile_kernel(kernel, signature, parallel)


@register_jitable
def _count(table, layer, column):  # type: ignore[no-untyped-def]
    return np.float64(max(1, table[layer, column])) if column > 0 else 1.0


@register_jitable
def _block(like, table, layer, number):  # type: ignore[no-untyped-def]
    """Return that block of x and of g, arrays of the type of ``like``."""
    start = number * BLOCK
    length = min(BLOCK, table[layer, 2] - start)
    offset = start * like.itemsize - address_of(like)
    x = dense_row(like, table[layer, 0] + offset, length)
    return x, dense_row(like, table[layer, 1] + offset, length)


def accumulator(degree: int, dtype: np.dtype[Any]) -> Any:
    """Compile the exact sum over first rows and axes, as for a pass, into bins."""
    squares = degree == 2
    key = source_hash()

    def kernel(x, axes, bins):  # type: ignore[no-untyped-def]
        _ = key
        special = 0.0
        for row in range(axes[0].prod()):
            offset, _ = _offsets(axes, row)
            special += accumulate(strided_row(x, offset, x.size), bins, squares)
        return special

    x = types.Array(numba.from_dtype(bits_of(dtype)), 1, "A", readonly=True)
    bins = types.Array(types.int64, 2, "C")
    return compile_kernel(kernel, types.float64(x, _AXES, bins))


def clearing() -> Any:
    """Compile what fills bytes with zeros in parallel."""
    key = source_hash()

    def kernel(g):  # type: ignore[no-untyped-def]
        _ = key
        for b in numba.prange(-(-g.size // _PAGES)):
            g[b * _PAGES : (b + 1) * _PAGES] = 0

    return compile_kernel(kernel, types.void(types.Array(types.uint8, 1, "C")), parallel=True)
