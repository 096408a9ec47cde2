"""The CPU backend: one fused pass over memory in Numba, serial or parallel.

An operation is a *term* that it sums and an *update* of the gradient; :func:`_kernel` makes one
loop of the two. The loop runs over views of three axes (see :mod:`actreg_dispatch.layout`), in
blocks of at most ``_BLOCK`` elements. A block is summed in ``_LANES`` partial sums side by side,
which the compiler turns into vector instructions; lanes and blocks merge as double-doubles.

The lanes of 16- and 32-bit floats are plain binary64, those of float64 double-doubles. Whether that
decides the result is asked of :func:`actreg_dispatch.rounding.certified`; if not, the sum, and the
sum only, is done again: 16- and 32-bit floats in double-doubles, then anything in integers.

Numba knows no 16-bit floats on the CPU. The kernels get the bits, float16 as uint16 and bfloat16 as
int16, and the type of the bits says how :func:`_widen` and :func:`_narrow` convert them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from actreg_dispatch.layout import collapse
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import (
    COMPUTE_DTYPES,
    FLOAT16,
    FLOAT64,
    LANE_TERMS,
    NATIVE_DTYPES,
    PLAIN_BOUND,
    DoubleDouble,
    Outcome,
    certified,
    compensated_bound,
    exact_outcome,
    merge_pairs,
    two_product,
    two_sum,
)

name = "numba"
dtypes = NATIVE_DTYPES
unavailable_because = (
    "NUMBA_DISABLE_JIT is set, which keeps Numba from compiling" if numba.config.DISABLE_JIT else ""
)

_LANES = 64
_BLOCK = 16384  # elements; large beside the merging of lanes, small beside a cache
_PARALLEL_FROM = 30_000  # elements; below, waking the threads costs more than they save

# Compiled code calls the shared arithmetic by its own name.
for _function in (two_sum, two_product, merge_pairs):
    register_jitable(_function)


def is_available() -> bool:
    """Return whether Numba compiles; it is here, since this module could be imported."""
    return not unavailable_because


def partial_sum(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> DoubleDouble:
    """Return Σ|x| for ``L1``, Σx² for the others, to the accuracy of :func:`compensated_bound`."""
    return _run(_TERMS[norm, True], _leave, activations, activations)


def penalty(activations: np.ndarray[Any, Any], norm: ActivityNorm, lam: float) -> Any:
    """Return the penalty, a NumPy scalar."""
    compute = COMPUTE_DTYPES[activations.dtype]
    return compute.type(_outcome(activations, norm, lam, 0.0).penalty)


def apply(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: float,
    epsilon: float,
) -> Any:
    """Add the gradient to ``gradients`` in place and return the penalty."""
    if norm is ActivityNorm.L2:  # the divisor is a sum over all elements, hence two passes
        found = _outcome(activations, norm, lam, epsilon)
        if found.has_gradient:
            _run(_add_nothing, _add_quotient, activations, gradients, lam, found.divisor)
    else:
        update = _add_signed if norm is ActivityNorm.L1 else _add_scaled
        found = _outcome(activations, norm, lam, epsilon, update, gradients)
    return COMPUTE_DTYPES[activations.dtype].type(found.penalty)


def _outcome(
    x: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: float,
    epsilon: float,
    update: Any = None,
    gradients: Any = None,
) -> Outcome:
    """Sum, with ``update`` of the gradients in the first pass, until the outcome is certain."""
    compute = COMPUTE_DTYPES[x.dtype]
    compensated = compute == FLOAT64
    bound = compensated_bound(x.size) if compensated else PLAIN_BOUND
    g = x if gradients is None else gradients
    total = _run(_TERMS[norm, compensated], update or _leave, x, g, lam)
    found = certified(total, bound, norm, lam, compute, epsilon)
    if found is None and not compensated:
        total = partial_sum(x, norm)
        found = certified(total, compensated_bound(x.size), norm, lam, compute, epsilon)
    return found or exact_outcome(x, norm, lam, epsilon)


# 16-bit floats, as the bits that hold them.


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


# Terms: add |x| or x² to lane j, in plain binary64 or as a double-double.


@numba.njit
def _add_nothing(hi, lo, j, value):  # type: ignore[no-untyped-def]
    pass


@numba.njit
def _add_abs(hi, lo, j, value):  # type: ignore[no-untyped-def]
    hi[j] += abs(np.float64(value))


@numba.njit
def _add_square(hi, lo, j, value):  # type: ignore[no-untyped-def]
    wide = np.float64(value)
    hi[j] += wide * wide


@numba.njit
def _add_abs_compensated(hi, lo, j, value):  # type: ignore[no-untyped-def]
    hi[j], error = two_sum(hi[j], abs(np.float64(value)))
    lo[j] += error


@numba.njit
def _add_square_compensated(hi, lo, j, value):  # type: ignore[no-untyped-def]
    wide = np.float64(value)
    square, low = two_product(wide, wide)
    hi[j], error = two_sum(hi[j], square)
    lo[j] += error + low


_TERMS = {
    (norm, compensated): term
    for norm, terms in {
        ActivityNorm.L1: (_add_abs, _add_abs_compensated),
        ActivityNorm.L2: (_add_square, _add_square_compensated),
        ActivityNorm.L2_SQUARED: (_add_square, _add_square_compensated),
    }.items()
    for compensated, term in enumerate(terms)
}


# Updates: add the gradient at x[j] to g[j], rounding after every operation in the compute dtype.


@numba.njit
def _leave(g, j, x, lam, divisor):  # type: ignore[no-untyped-def]
    pass


@numba.njit
def _add_signed(g, j, x, lam, divisor):  # type: ignore[no-untyped-def]
    # A difference of comparisons vectorizes; a branch on the sign costs up to 2.5 times.
    real = type(x)
    g[j] = _narrow(g[j], _widen(g[j]) + real(lam) * (real(x > 0) - real(x < 0)))


@numba.njit
def _add_scaled(g, j, x, lam, divisor):  # type: ignore[no-untyped-def]
    real = type(x)
    g[j] = _narrow(g[j], _widen(g[j]) + (real(lam) * real(2)) * x)


@numba.njit
def _add_quotient(g, j, x, lam, divisor):  # type: ignore[no-untyped-def]
    real = type(x)
    g[j] = _narrow(g[j], _widen(g[j]) + (real(lam) * x) / real(divisor))


_KERNELS: dict[tuple[Any, ...], Any] = {}
_COMPILING = threading.Lock()


def _kernel(*key: Any) -> Any:
    """Return the compiled loop for ``key``, the arguments of :func:`_compile`; compile it once."""
    kernel = _KERNELS.get(key)
    if kernel is None:
        with _COMPILING:  # other threads wait for the first rather than compile the same
            kernel = _KERNELS.get(key)
            if kernel is None:
                kernel = _KERNELS[key] = _compile(*key)
    return kernel


def _compile(term: Any, update: Any, dtype: np.dtype[Any], layout: str, parallel: bool) -> Any:
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
                value = _widen(xs[j])
                term(hi, lo, j, value)
                update(gs, j, value, lam, divisor)
        xs = x[whole * _LANES :]
        gs = g[whole * _LANES :]
        for j in range(xs.size):
            value = _widen(xs[j])
            term(hi, lo, j, value)
            update(gs, j, value, lam, divisor)

    def kernel(x, g, lam, divisor):  # type: ignore[no-untyped-def]
        planes, rows, length = x.shape
        pieces = (length + _BLOCK - 1) // _BLOCK  # of a row
        units = planes * rows * pieces
        units_per_block = max(1, min(_BLOCK // length, LANE_TERMS))  # short rows fill few lanes
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
            half = _LANES // 2
            while half > 0:
                for j in range(half):
                    hi[j], lo[j] = merge_pairs(hi[j], lo[j], hi[j + half], lo[j + half])
                half //= 2
            sums[b, 0], sums[b, 1] = hi[0], lo[0]
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


def _run(
    term: Any, update: Any, x: Any, g: Any, lam: float = 0.0, divisor: float = 0.0
) -> DoubleDouble:
    """Run the fused loop over all elements and return the sum of the terms."""
    if x.size == 0:
        return DoubleDouble()
    if x.itemsize == 2:
        bits = np.uint16 if x.dtype == FLOAT16 else np.int16
        x, g = x.view(bits), g.view(bits)
    if x.flags.c_contiguous and g.flags.c_contiguous:  # the usual case, at the least expense
        kernel = _kernel(term, update, x.dtype, "C", x.size >= _PARALLEL_FROM)
        return DoubleDouble(*kernel(x.reshape(1, 1, -1), g.reshape(1, 1, -1), lam, divisor))
    total = DoubleDouble()
    for xs, gs in _three_axes(*collapse(x, g)):
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
