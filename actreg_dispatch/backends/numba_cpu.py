"""The CPU backend: one fused pass over memory in Numba, serial or parallel.

Two kinds of kernel are built of the pieces in :mod:`~actreg_dispatch.backends.numba_rows`:

* *flat* kernels take one-dimensional contiguous arrays and do the whole call: they check what a
  caller may get wrong, sum, test the rounding, update. The API calls them before anything else, so
  that a small array costs little more than the call of compiled code. What they do not take they
  refuse, having written nothing.
* *strided* kernels take arrays of any strides, after validation, and return the sum. A pass over an
  array is one call of compiled code, during which no interrupt is heard, so the gradients are never
  left half updated.

Where the rounding test fails, the sum, and the sum only, is done again in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from actreg_dispatch.backends.compiling import code_edition, compile_kernel, kernel_of
from actreg_dispatch.backends.numba_rows import (
    BLOCK,
    UPDATES,
    add_both,
    add_quotient,
    address_of,
    bits_of,
    dense_row,
    leave,
    strided_row,
    sum_nothing,
    summing_of,
    tally_row,
)
from actreg_dispatch.layout import collapse
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import (
    COMPUTE_DTYPES,
    FLOAT32,
    FLOAT64,
    NATIVE_DTYPES,
    PLAIN_BOUND,
    REFUSED,
    UNDECIDED,
    Outcome,
    PairedSum,
    PartialSum,
    anchored_bound,
    decided,
    degree_of,
    largest_lam,
    limbs_of,
    units_of,
)
from actreg_dispatch.runtime.huge_pages import ask_for_huge_pages
from actreg_dispatch.runtime.threads import may_use_threads

name = "numba"
dtypes = NATIVE_DTYPES
unavailable_because = (
    "NUMBA_DISABLE_JIT is set, which keeps Numba from compiling" if numba.config.DISABLE_JIT else ""
)

# Elements from which on the threads are woken. Measured on two cores, L1, µs serial and parallel:
# float32 3.0 and 3.7 at 24,000, 3.7 and 3.7 at 30,000, 5.4 and 4.6 at 45,000; float64 5.3 and 6.4
# at 16,000, 9.1 and 6.6 at 30,000.
PARALLEL_FROM = 30_000

_PAGES = 1 << 18  # bytes that one thread clears at a time
_AXES = types.Array(types.int64, 2, "C")


def is_available() -> bool:
    """Return whether Numba compiles; it is here, since this module could be imported."""
    return not unavailable_because


def partial_sum(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> PartialSum | PairedSum:
    """Return the sum, or the two sums, that ``norm`` takes, exactly."""
    if norm is ActivityNorm.L1_L2_SQUARED:
        return PairedSum.of(activations, partial_sum)
    degree, compute = degree_of(norm), COMPUTE_DTYPES[activations.dtype]
    bins = np.zeros((2046, limbs_of(degree)), np.int64)
    special = 0.0
    if activations.size:
        x, _, axes = _rows(activations, activations)
        special = kernel_of(_tally, degree, x.dtype)(x, axes, bins)
    return PartialSum(degree, compute, units_of(bins, degree), special)


def penalty(activations: np.ndarray[Any, Any], norm: ActivityNorm, lam: Any) -> Any:
    """Return the penalty, a NumPy scalar."""
    compute = COMPUTE_DTYPES[activations.dtype]
    return compute.type(_outcome(activations, norm, lam, 0.0).penalty)


def apply(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: Any,
    strength: Any,
    epsilon: float,
) -> Any:
    """Add the gradient to ``gradients`` in place and return the penalty."""
    if norm is ActivityNorm.L2:  # the divisor is a sum over all elements, hence two passes
        found = _outcome(activations, norm, lam, epsilon)
        if found.has_gradient:
            add_gradient(activations, gradients, norm, strength, found.divisor)
    else:
        found = _outcome(activations, norm, lam, epsilon, gradients, strength)
    return COMPUTE_DTYPES[activations.dtype].type(found.penalty)


def add_gradient(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    strength: Any,
    divisor: float,
) -> None:
    """Add the gradient to ``gradients`` in place, dividing by ``divisor`` for L2."""
    _run(None, UPDATES[norm], activations, gradients, strength, divisor)


def clear(gradients: np.ndarray[Any, Any]) -> None:
    """Fill contiguous gradients with zeros, large ones by all threads; best if they are new."""
    if gradients.size < PARALLEL_FROM:
        gradients[...] = 0
        return
    ask_for_huge_pages(gradients.ctypes.data, gradients.nbytes)
    if may_use_threads():
        kernel_of(_clearing)(gradients.reshape(-1).view(np.uint8))
    else:
        gradients[...] = 0


def express(
    norm: ActivityNorm, dtype: np.dtype[Any], size: int, *, writes: bool
) -> Callable[[Any, Any, Any, Any, float], float] | None:
    """Return the flat kernel for ``size`` elements; see :func:`_flat` for what it takes.

    There is none where so many elements are for threads but threads may not be used.
    """
    parallel = size >= PARALLEL_FROM
    if parallel and not may_use_threads():
        return None
    factory = _flat if dtype.itemsize > 2 else _flat_on_bits
    return kernel_of(factory, norm, dtype, writes, parallel)  # type: ignore[no-any-return]


def express_all(*arguments: Any) -> np.ndarray[Any, Any] | None:
    """Do :func:`~actreg_dispatch.backends.many_arrays.express_all`, loaded when it is needed."""
    from actreg_dispatch.backends import many_arrays

    return many_arrays.express_all(*arguments)


def quick_sum(
    activations: np.ndarray[Any, Any],
    norm: ActivityNorm,
    gradients: Any = None,
    strength: Any = None,
) -> tuple[float, ...]:
    """Return the sum as a pair, or both as two, for :func:`~actreg_dispatch.rounding.decided`.

    The same pass updates the gradients of a norm other than L2, if they are given.
    """
    if gradients is None:
        return _run(norm, leave, activations, activations)
    return _run(norm, UPDATES[norm], activations, gradients, strength)


def _outcome(
    x: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: Any,
    epsilon: float,
    gradients: Any = None,
    strength: Any = None,
) -> Outcome:
    """Sum, as quickly as will do, and update the gradients if there are any."""
    total = quick_sum(x, norm, gradients, strength)
    found = decided(total, x.size, COMPUTE_DTYPES[x.dtype], norm, lam, epsilon)
    return found or partial_sum(x, norm).outcome(norm, lam, epsilon)


@register_jitable
def _offsets(axes, row):  # type: ignore[no-untyped-def]
    """Return by how many bytes a row lies behind the first, in both arrays."""
    x_offset, g_offset = 0, 0
    for axis in range(axes.shape[1] - 1, -1, -1):
        row, place = divmod(row, axes[0, axis])
        x_offset += place * axes[1, axis]
        g_offset += place * axes[2, axis]
    return x_offset, g_offset


# Kernels.


def _flat(norm: ActivityNorm, dtype: np.dtype[Any], writes: bool, parallel: bool) -> Any:
    """Compile the kernel that does a whole call on contiguous arrays of one axis.

    It takes activations, gradients, λ of the penalty, λ of the gradient, and epsilon (NaN for the
    default), and returns the penalty, or ``REFUSED`` or ``UNDECIDED``. Without ``writes`` the
    gradients are the activations again. The signature is explicit: arrays of another dtype, layout
    or writability are a TypeError.
    """
    summing = summing_of(norm, dtype)
    sum_row, zero, merge, merged, magnitude, numbers, rounded, largest_of, certified_of = summing
    compute = FLOAT64 if dtype == FLOAT64 else FLOAT32
    anchored, root, real = dtype == FLOAT64, norm is ActivityNorm.L2, compute.type
    update = UPDATES[norm] if writes and not root else leave
    largest = largest_lam(norm, compute)
    default = float(np.finfo(compute).eps)
    divides, columns = root and writes, len(zero)
    edition = code_edition()

    def kernel(x, g, lam, strength, epsilon):  # type: ignore[no-untyped-def]
        _ = edition
        size, reach = x.size, x.size * x.itemsize
        apart = abs(address_of(x) - address_of(g)) >= reach or not writes
        aligned = (address_of(x) | address_of(g)) % x.itemsize == 0  # which Numba takes for granted
        lam, strength = rounded(lam, real), rounded(strength, real)
        taken = apart and aligned and size == g.size and largest_of(lam) <= largest
        if not taken or (size >= PARALLEL_FROM) != parallel:
            return REFUSED
        blocks = -(-size // BLOCK)
        if parallel:
            totals = np.empty((blocks, columns))
            for b in numba.prange(blocks):
                xs, gs = x[b * BLOCK : (b + 1) * BLOCK], g[b * BLOCK : (b + 1) * BLOCK]
                totals[b] = sum_row(xs, gs, zero, magnitude, update, strength, 0.0)
            total = merged(totals)
        else:
            total = zero
            for b in range(blocks):
                xs, gs = x[b * BLOCK : (b + 1) * BLOCK], g[b * BLOCK : (b + 1) * BLOCK]
                block = sum_row(xs, gs, zero, magnitude, update, strength, 0.0)
                total = merge(total, block)
        bound = anchored_bound(size) if anchored else PLAIN_BOUND
        floor = default if math.isnan(epsilon) else epsilon
        penalty, divisor, has_gradient, certain = certified_of(total, bound, lam, floor, root, real)
        if not certain:
            return REFUSED if divides else UNDECIDED
        if divides and has_gradient:
            for b in numba.prange(blocks):
                xs, gs = x[b * BLOCK : (b + 1) * BLOCK], g[b * BLOCK : (b + 1) * BLOCK]
                sum_nothing(xs, gs, zero, magnitude, add_quotient, strength, divisor)
        return np.float64(penalty)

    element = numba.from_dtype(dtype)
    x = types.Array(element, 1, "C", readonly=True)
    g = types.Array(element, 1, "C", readonly=not writes)
    # Without Numba's reference counts, which it has no use for, a serial call takes 50 ns less.
    signature = types.float64(x, g, numbers, numbers, types.float64)
    compiled = compile_kernel(kernel, signature, parallel, _nrt=parallel)
    if not parallel:
        return compiled

    def guarded(x, g, lam, strength, epsilon):  # type: ignore[no-untyped-def]
        return compiled(x, g, lam, strength, epsilon) if may_use_threads() else REFUSED

    return guarded


def _flat_on_bits(*key: Any) -> Any:
    """Return the function that does the same for 16-bit floats."""
    norm, dtype, *rest = key
    bits = bits_of(dtype)
    kernel = _flat(norm, bits, *rest)
    return lambda x, g, *options: kernel(x.view(bits), g.view(bits), *options)


def _strided(norm: ActivityNorm | None, update: Any, dtype: np.dtype[Any], parallel: bool) -> Any:
    """Compile one pass over what :func:`_rows` returns, which returns the total."""
    summing = summing_of(norm, dtype)
    sum_row, zero, magnitude, merged = summing.row, summing.zero, summing.magnitude, summing.merged
    columns = len(zero)
    edition = code_edition(), parallel  # or one twin would be taken from the cache for the other

    def kernel(x, g, axes, strength, divisor):  # type: ignore[no-untyped-def]
        _ = edition
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
                    total = sum_row(xs, gs, total, magnitude, update, strength, divisor)
                else:
                    xs, gs = strided_row(x, x_offset, count), strided_row(g, g_offset, count)
                    total = sum_row(xs, gs, total, magnitude, update, strength, divisor)
            totals[b] = total
        return merged(totals)

    element = numba.from_dtype(dtype)
    x = types.Array(element, 1, "A", readonly=True)
    g = types.Array(element, 1, "A", readonly=update is leave)
    numbers = types.UniTuple(types.float64, 2) if update is add_both else types.float64
    total = types.UniTuple(types.float64, columns)
    return compile_kernel(kernel, total(x, g, _AXES, numbers, types.float64), parallel)


def _tally(degree: int, dtype: np.dtype[Any]) -> Any:
    """Compile the exact sum over what :func:`_rows` returns."""
    squares = degree == 2
    edition = code_edition()

    def kernel(x, axes, bins):  # type: ignore[no-untyped-def]
        _ = edition
        special = 0.0
        for row in range(axes[0].prod()):
            offset, _ = _offsets(axes, row)
            special += tally_row(strided_row(x, offset, x.size), bins, squares)
        return special

    x = types.Array(numba.from_dtype(dtype), 1, "A", readonly=True)
    bins = types.Array(types.int64, 2, "C")
    return compile_kernel(kernel, types.float64(x, _AXES, bins))


def _clearing() -> Any:
    """Compile what fills bytes with zeros in parallel."""
    edition = code_edition()

    def kernel(g):  # type: ignore[no-untyped-def]
        _ = edition
        for b in numba.prange(-(-g.size // _PAGES)):
            g[b * _PAGES : (b + 1) * _PAGES] = 0

    return compile_kernel(kernel, types.void(types.Array(types.uint8, 1, "C")), parallel=True)


def _run(
    norm: ActivityNorm | None,
    update: Any,
    x: Any,
    g: Any,
    strength: Any = 0.0,
    divisor: float = 0.0,
) -> tuple[float, ...]:
    """Run one pass over all elements and return the total that ``norm`` takes."""
    if x.size == 0:
        return summing_of(norm, x.dtype).zero
    parallel = x.size >= PARALLEL_FROM and may_use_threads()
    x, g, axes = _rows(x, g)
    kernel = kernel_of(_strided, norm, update, x.dtype, parallel)
    return kernel(x, g, axes, strength, divisor)  # type: ignore[no-any-return]


def _rows(x: Any, g: Any) -> tuple[Any, Any, np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the bits of the first rows of ``x`` and ``g``, and where the others are.

    A row is the last axis that :func:`collapse` leaves. The others come as three lists, of their
    lengths and of the bytes that ``x`` and ``g`` step along them.
    """
    bits = bits_of(x.dtype)
    x, g = collapse(x.view(bits), g.view(bits))
    axes = np.array([x.shape[:-1], x.strides[:-1], g.strides[:-1]], np.int64)
    first = (0,) * (x.ndim - 1)
    return x[first], g[first], axes
