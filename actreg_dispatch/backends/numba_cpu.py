"""The CPU backend: one fused pass over memory in Numba, serial or parallel.

An operation is a *term* that it sums and an *update* of the gradient; :func:`_kernel` makes one
loop of the two. The loop runs over views of three axes (see :mod:`actreg_dispatch.layout`), in
blocks of at most ``_BLOCK`` elements. A block is summed in ``_LANES`` double-doubles side by side,
which the compiler turns into vector instructions; lanes and blocks merge in a fixed order, so the
result does not depend on the number of threads.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from actreg_dispatch.backends import reference
from actreg_dispatch.layout import collapse
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import (
    FLOAT32,
    FLOAT64,
    DoubleDouble,
    merge_pairs,
    penalty_of,
    round_to,
    two_product,
    two_sum,
)

name = "numba"
dtypes = frozenset({FLOAT32, FLOAT64})
unavailable_because = ""

_LANES = 64
_BLOCK = 8192
_PARALLEL_FROM = 30_000  # elements; below, waking the threads costs more than they save

# Compiled code calls the shared arithmetic by its own name.
for _function in (two_sum, two_product, merge_pairs):
    register_jitable(_function)


def is_available() -> bool:
    """Return True: this module could be imported, so Numba is here."""
    return True


def partial_sum(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> DoubleDouble:
    """Return Σ|x| for ``L1``, Σx² for the others."""
    if not activations.flags.aligned:
        return reference.partial_sum(activations, norm)
    return _run(_term(norm, activations.dtype), _leave, activations, activations, 0.0, 0.0)


def penalty(activations: np.ndarray[Any, Any], norm: ActivityNorm, lam: float) -> Any:
    """Return the penalty, a NumPy scalar."""
    return penalty_of(norm, partial_sum(activations, norm).hi, lam, activations.dtype)


def apply(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: float,
    epsilon: float,
) -> Any:
    """Add the gradient to ``gradients`` in place and return the penalty."""
    if not (activations.flags.aligned and gradients.flags.aligned):
        return reference.apply(activations, gradients, norm, lam, epsilon)
    dtype = activations.dtype
    if norm is ActivityNorm.L2:  # the divisor is a sum over all elements, hence two passes
        total = partial_sum(activations, norm).hi
        if not total <= epsilon:
            divisor = float(round_to(dtype, math.sqrt(total)))
            _run(_add_nothing, _add_quotient, activations, gradients, lam, divisor)
    else:
        update = _add_signed if norm is ActivityNorm.L1 else _add_scaled
        total = _run(_term(norm, dtype), update, activations, gradients, lam, 0.0).hi
    return penalty_of(norm, total, lam, dtype)


# Terms: add |x| or x² to lane j of a block's double-double lanes.


@numba.njit
def _add_abs(hi, lo, j, value):  # type: ignore[no-untyped-def]
    hi[j], error = two_sum(hi[j], abs(np.float64(value)))
    lo[j] += error


@numba.njit
def _add_square_of_single(hi, lo, j, value):  # type: ignore[no-untyped-def]
    wide = np.float64(value)
    hi[j], error = two_sum(hi[j], wide * wide)  # 24 bits squared fit into 53
    lo[j] += error


@numba.njit
def _add_square_of_double(hi, lo, j, value):  # type: ignore[no-untyped-def]
    square, low = two_product(value, value)
    hi[j], error = two_sum(hi[j], square)
    lo[j] += error + low


def _term(norm: ActivityNorm, dtype: np.dtype[Any]) -> Any:
    if norm is ActivityNorm.L1:
        return _add_abs
    return _add_square_of_single if dtype == FLOAT32 else _add_square_of_double


@numba.njit
def _add_nothing(hi, lo, j, value):  # type: ignore[no-untyped-def]
    pass


# Updates: add the gradient at x[j] to g[j], rounding after every operation in the dtype of g.


@numba.njit
def _leave(g, x, j, lam, divisor):  # type: ignore[no-untyped-def]
    pass


@numba.njit
def _add_signed(g, x, j, lam, divisor):  # type: ignore[no-untyped-def]
    # A difference of comparisons vectorizes; a branch on the sign costs up to 2.5 times.
    real = g.dtype.type
    g[j] += real(lam) * (real(x[j] > 0) - real(x[j] < 0))


@numba.njit
def _add_scaled(g, x, j, lam, divisor):  # type: ignore[no-untyped-def]
    real = g.dtype.type
    g[j] += (real(lam) * real(2)) * x[j]


@numba.njit
def _add_quotient(g, x, j, lam, divisor):  # type: ignore[no-untyped-def]
    real = g.dtype.type
    g[j] += (real(lam) * x[j]) / real(divisor)


@functools.cache
def _kernel(term: Any, update: Any, dtype: np.dtype[Any], layout: str, parallel: bool) -> Any:
    """Compile the fused loop of ``term`` and ``update`` for one signature.

    The signature is explicit, so a read-only array, say, is converted and not compiled for anew.
    """

    @numba.njit
    def block(x, g, hi, lo, lam, divisor):  # type: ignore[no-untyped-def]
        whole = x.size // _LANES
        for i in range(whole):
            # Slices indexed from 0 need no check for negative indices, which would not vectorize.
            xs = x[i * _LANES : (i + 1) * _LANES]
            gs = g[i * _LANES : (i + 1) * _LANES]
            for j in range(_LANES):
                term(hi, lo, j, xs[j])
                update(gs, xs, j, lam, divisor)
        xs = x[whole * _LANES :]
        gs = g[whole * _LANES :]
        for j in range(xs.size):
            term(hi, lo, j, xs[j])
            update(gs, xs, j, lam, divisor)

    def kernel(x, g, lam, divisor):  # type: ignore[no-untyped-def]
        planes, rows, length = x.shape
        pieces = (length + _BLOCK - 1) // _BLOCK  # of a row
        units = planes * rows * pieces
        units_per_block = max(1, _BLOCK // length)
        blocks = (units + units_per_block - 1) // units_per_block
        sums = np.empty((blocks, 2))
        for b in numba.prange(blocks):
            hi = np.zeros(_LANES)
            lo = np.zeros(_LANES)
            for unit in range(b * units_per_block, min((b + 1) * units_per_block, units)):
                row, piece = divmod(unit, pieces)
                start = piece * _BLOCK
                stop = min(start + _BLOCK, length)
                plane, row = divmod(row, rows)
                block(x[plane, row, start:stop], g[plane, row, start:stop], hi, lo, lam, divisor)
            total, rest = hi[0], lo[0]
            for j in range(1, _LANES):
                total, rest = merge_pairs(total, rest, hi[j], lo[j])
            sums[b, 0], sums[b, 1] = total, rest
        total, rest = sums[0, 0], sums[0, 1]
        for b in range(1, blocks):
            total, rest = merge_pairs(total, rest, sums[b, 0], sums[b, 1])
        return merge_pairs(total, rest, 0.0, 0.0)

    element = numba.from_dtype(dtype)
    x = types.Array(element, 3, layout, readonly=True)
    g = types.Array(element, 3, layout, readonly=update is _leave)
    signature = types.UniTuple(types.float64, 2)(x, g, types.float64, types.float64)
    compiler: Callable[..., Any] = numba.njit(
        signature, parallel=parallel, nogil=True, error_model="numpy"
    )
    return compiler(kernel)


def _run(term: Any, update: Any, x: Any, g: Any, lam: float, divisor: float) -> DoubleDouble:
    """Run the fused loop over all elements and return the sum of the terms."""
    if x.size == 0:
        return DoubleDouble()
    total = DoubleDouble()
    for xs, gs in _three_axes(*collapse(np.asarray(x), np.asarray(g))):
        layout = "C" if xs.flags.c_contiguous and gs.flags.c_contiguous else "A"
        kernel = _kernel(term, update, x.dtype, layout, xs.size >= _PARALLEL_FROM)
        total = total.merge(DoubleDouble(*kernel(xs, gs, lam, divisor)))
    return total


def _three_axes(x: Any, g: Any) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of views with three axes that cover ``x`` and ``g``.

    Few arrays need more than three after :func:`collapse`; of those, Python loops over the
    shortest axes but the last.
    """
    if x.ndim <= 3:
        shape = (1,) * (3 - x.ndim) + x.shape
        yield x.reshape(shape), g.reshape(shape)
        return
    outer = sorted(range(x.ndim - 1), key=x.shape.__getitem__)
    order = (*outer[:-2], *sorted(outer[-2:]), x.ndim - 1)
    x, g = x.transpose(order), g.transpose(order)
    for index in itertools.product(*map(range, x.shape[:-3])):
        yield x[index], g[index]
