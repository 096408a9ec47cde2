"""What drives the functions of a norm, which it calls by address, and is the same for all norms.

* The *pass* runs one block function over all blocks, in series or in parallel; the *exact* one runs
  an exact function.
* The *whole* call sums, finishes, and updates, if that is still to be done.
* The *fused* kernel checks contiguous arrays, whose types its signature tells, and does the whole
  call; it is compiled for each number of axes.
* The *batch* is the whole call for many layers, in one parallel region; before it, layers are
  described and compared.

All but the fused kernel are compiled for series and for parallel; what is given λ, for each number
of them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from actreg_dispatch.backends.numba.addresses import (
    BAD,
    BLOCK,
    LARGE,
    SHARES,
    SUMS,
    TOTALS,
    WHOLE_SIGNATURE,
    Call,
    address_of,
    call_at,
    call_block,
    call_function,
    call_whole,
    dense_row,
    new_call,
    new_total,
    new_totals,
    plan_at,
)
from actreg_dispatch.backends.numba.bits import larger, widen
from actreg_dispatch.backends.numba.compiling import compile_function, compile_kernel
from actreg_dispatch.backends.numba.functions import GRADIENT, UNCERTAIN
from actreg_dispatch.backends.numba.rows import store_of
from actreg_dispatch.sums.certified import NEEDS_EXACT_SUM, NOT_HANDLED, merge_pairs

__all__ = [
    "EXACT_SHARES",
    "PARALLEL_FROM",
    "active_kernel",
    "apartness_kernel",
    "batch_kernel",
    "describing_kernel",
    "exact_kernel",
    "fused_kernel",
    "pass_kernel",
    "rows_kernel",
    "whole_function",
]

# Elements from which on the threads are woken. Measured on two cores, L1, µs serial and parallel:
# float32 3.0 and 3.7 at 24,000, 3.7 and 3.7 at 30,000, 5.4 and 4.6 at 45,000; float64 5.3 and 6.4
# at 16,000, 9.1 and 6.6 at 30,000.
PARALLEL_FROM = 30_000
EXACT_SHARES = 64  # of an exact sum, each of which has words of its own

_CALL_BYTES = ctypes.sizeof(Call)
_INT, _FLOAT, _REAL = types.int64, types.float64, np.float64


@register_jitable
def _clear(there):  # type: ignore[no-untyped-def]
    """Set the total there to 0; not within parallel code, which takes it for dead."""
    dense_row(_REAL, there, TOTALS, 8)[:] = 0.0


@register_jitable
def _add_to(there, part):  # type: ignore[no-untyped-def]
    """Add the total of a block to the total there."""
    total, more = dense_row(_REAL, there, TOTALS, 8), dense_row(_REAL, part, TOTALS, 8)
    for k in range(0, SUMS, 2):
        total[k], total[k + 1] = merge_pairs(total[k], total[k + 1], more[k], more[k + 1])
    total[SUMS] += more[SUMS]
    total[SUMS + 1] += more[SUMS + 1]
    total[SUMS + 2] = larger(total[SUMS + 2], more[SUMS + 2])
    total[BAD] += more[BAD]
    total[LARGE] += more[LARGE]


@register_jitable
def _keep_counts(there, total):  # type: ignore[no-untyped-def]
    counts, found = dense_row(_REAL, there, TOTALS - SUMS, 8), dense_row(_REAL, total, TOTALS, 8)
    for k in range(TOTALS - SUMS):
        counts[k] = found[SUMS + k]


@register_jitable
def _run_blocks(function, address, first, last, there):  # type: ignore[no-untyped-def]
    """Run a block function over some blocks, and leave the total there."""
    _clear(there)
    part = new_total()
    for b in range(first, last):
        call_block(function, (address, b, part))
        _add_to(there, part)


@register_jitable
def _in_series(function, address):  # type: ignore[no-untyped-def]
    """Run a block function over all blocks, and leave the total in the call."""
    call = call_at(address)
    _run_blocks(function, address, 0, call.blocks, address_of(call.total))


@register_jitable(parallel=True)
def _in_parallel(function, address):  # type: ignore[no-untyped-def]
    call = call_at(address)
    blocks, shares = call.blocks, min(call.blocks, SHARES)
    parts = new_totals()  # on the stack: a C function must not fail for want of memory
    for k in numba.prange(shares):
        first, last = k * blocks // shares, (k + 1) * blocks // shares
        _run_blocks(function, address, first, last, parts + k * 8 * TOTALS)
    _clear(address_of(call.total))
    for k in range(shares):
        _add_to(address_of(call.total), parts + k * 8 * TOTALS)


def _pass_in(parallel: bool) -> Any:
    return _in_parallel if parallel else _in_series


def pass_kernel(parallel: bool) -> Any:
    """Compile the driver of one block function over a call, which leaves the total there."""
    run_pass = _pass_in(parallel)

    def kernel(function, address):  # type: ignore[no-untyped-def]
        run_pass(function, address)

    return compile_kernel(kernel, types.void(_INT, _INT), parallel, _nrt=False)


def exact_kernel(parallel: bool) -> Any:
    """Compile the driver of an exact function over a call, with words for each share of it."""

    def kernel(function, address, words):  # type: ignore[no-untyped-def]
        blocks, shares = call_at(address).blocks, len(words)
        for k in numba.prange(shares):
            for b in range(k * blocks // shares, (k + 1) * blocks // shares):
                call_block(function, (address, b, address_of(words[k])))

    words = types.Array(_INT, 2, "C")
    return compile_kernel(kernel, types.void(_INT, _INT, words), parallel, parallel=parallel)


def whole_function(parallel: bool) -> Any:
    """Compile the driver of a call that is prepared, a C function.

    It takes the plan and the call, and returns the penalty, or ``NOT_HANDLED`` or
    ``NEEDS_EXACT_SUM``, which are negative, as a penalty is not.
    """
    run_pass = _pass_in(parallel)

    def whole(plan, address):  # type: ignore[no-untyped-def]
        functions, call = plan_at(plan), call_at(address)
        run_pass(functions.first, address)
        _keep_counts(address_of(call.counts), address_of(call.total))
        call.check_weights = call.count_elements = 0  # that has been done
        found = call_function(functions.finish, (address,))
        if found == UNCERTAIN:
            return NOT_HANDLED if functions.second != 0 else NEEDS_EXACT_SUM
        if functions.second != 0 and found == GRADIENT:
            run_pass(functions.second, address)
        return call.penalty

    return compile_function(whole, WHOLE_SIGNATURE, parallel)


def fused_kernel(bits: np.dtype[Any], axes: int, n_lams: int, writes: bool) -> Any:
    """Compile what checks contiguous arrays, whose bits and number of axes are these, and runs all.

    It takes the plan, activations, gradients, λ, what λ is multiplied by for the gradient, and
    epsilon (NaN for the default), or, without ``writes``, the plan, activations, λ and epsilon, and
    returns what the whole call does. The signature is explicit: arrays of another dtype, layout or
    writability are a TypeError. The address of the plan, below 2⁵³ like every address, is a float,
    which Numba takes 20 ns less to read than an int.
    """
    as_tuple, store = _as_tuple(n_lams), store_of(n_lams)

    def reading(plan, x, lam, epsilon):  # type: ignore[no-untyped-def]
        return _fused(np.int64(plan), x, x, as_tuple(lam), 1.0, epsilon, store)

    def writing(plan, x, g, lam, scale, epsilon):  # type: ignore[no-untyped-def]
        apart = abs(address_of(x) - address_of(g)) >= x.size * x.itemsize
        if not (apart and x.shape == g.shape):
            return NOT_HANDLED
        return _fused(np.int64(plan), x, g, as_tuple(lam), scale, epsilon, store)

    element, lam = numba.from_dtype(bits), _lam_type(n_lams)
    x, g = types.Array(element, axes, "C", readonly=True), types.Array(element, axes, "C")
    key = bits, axes, n_lams, writes
    # Without Numba's reference counts, which it has no use for, a call takes 50 ns less.
    if writes:
        return compile_kernel(writing, _FLOAT(_FLOAT, x, g, lam, _FLOAT, _FLOAT), *key, _nrt=False)
    return compile_kernel(reading, _FLOAT(_FLOAT, x, lam, _FLOAT), *key, _nrt=False)


@register_jitable
def _fused(plan, x, g, lam, scale, epsilon, store):  # type: ignore[no-untyped-def]
    functions, start, g_start = plan_at(plan), address_of(x), address_of(g)
    aligned = (start | g_start) % x.itemsize == 0  # which Numba takes for granted
    if not aligned or (x.size >= PARALLEL_FROM) != (functions.parallel != 0):
        return NOT_HANDLED
    address = new_call()
    call = call_at(address)
    _describe(call, start, g_start, x.size, x.itemsize)
    store(call.lam, lam)
    call.count = _count(x.shape, functions.divides)
    call.scale, call.epsilon = scale, epsilon
    if not call_function(functions.prepare, (address,)):
        return NOT_HANDLED
    return call_whole(functions.whole, (plan, address))


@register_jitable
def _count(shape, divides):  # type: ignore[no-untyped-def]
    """Return what λ is divided by: the product of the lengths whose bits are set, at least 1."""
    count = 1
    for axis in range(len(shape)):
        if divides >> axis & 1:
            count *= shape[axis]
    return max(1, count)


def _lam_type(n_lams: int) -> Any:
    return _FLOAT if n_lams == 1 else types.UniTuple(_FLOAT, n_lams)


def _as_tuple(n_lams: int) -> Any:
    return _one_lam if n_lams == 1 else _several_lams


@register_jitable
def _one_lam(lam):  # type: ignore[no-untyped-def]
    """Return a single λ, which is passed as a number since that is quicker, as a tuple."""
    return (lam,)


@register_jitable
def _several_lams(lam):  # type: ignore[no-untyped-def]
    """Return several λ as they are."""
    return lam


@register_jitable
def _describe(call, x, g, size, itemsize):  # type: ignore[no-untyped-def]
    """Write down that the arrays are one row, without weights."""
    call.weights = call.gather = call.w_step = 0
    call.large_weights = call.check_weights = call.count_elements = 0
    call.activations, call.gradients, call.size, call.length = x, g, size, size
    call.x_step = call.g_step = itemsize
    call.n_axes = call.axes = 0
    call.blocks = call.pieces = call.all_pieces = -(-size // BLOCK)
    call.pieces_per_block = 1


# Many layers.


def describing_kernel(dtype: np.dtype[Any], axes: int, writes: bool) -> Any:
    """Compile the function that describes contiguous arrays of so many axes as one of many calls.

    It is given which axes divide λ, as bits, the calls, and the number of this one, and returns the
    number of elements, or -1 where shapes differ or an array is not aligned. Arrays of another
    dtype or layout, and gradients that are read-only if it ``writes``, are a TypeError.
    """

    def kernel(x, g, divides, calls, layer):  # type: ignore[no-untyped-def]
        start, g_start = address_of(x), address_of(g)
        if x.shape != g.shape or (start | g_start) % x.itemsize != 0:
            return -1
        call = call_at(calls + layer * _CALL_BYTES)
        _describe(call, start, g_start, x.size, x.itemsize)
        call.count = _count(x.shape, divides)
        return x.size

    element = numba.from_dtype(dtype)
    x = types.Array(element, axes, "C", readonly=True)
    g = types.Array(element, axes, "C", readonly=not writes)
    return compile_kernel(kernel, _INT(x, g, _INT, _INT, _INT), dtype, axes, writes, _nrt=False)


def active_kernel(dtype: np.dtype[Any], masked: bool, dense: bool, parallel: bool) -> Any:
    """Compile what counts, for each column of a matrix, the elements that are not 0.

    It is given the matrix, a mask of its shape if it is ``masked``, and counts for each share of
    the rows. If they are ``dense``, matrix and mask are contiguous.
    """

    def kernel(x, mask, counts):  # type: ignore[no-untyped-def]
        rows, shares = len(x), len(counts)
        for k in numba.prange(shares):
            mine = counts[k]
            for row in range(k * rows // shares, (k + 1) * rows // shares):
                values, kept = x[row], mask[row]
                for j in range(mine.size):
                    is_active = widen(values[j]) != 0
                    mine[j] += is_active & (not masked or kept[j] != 0)

    layout = "C" if dense else "A"
    x = types.Array(numba.from_dtype(dtype), 2, layout, readonly=True)
    mask = types.Array(types.boolean, 2, layout, readonly=True) if masked else x
    signature = types.void(x, mask, types.Array(_INT, 2, "C"))
    return compile_kernel(kernel, signature, dtype, masked, dense, parallel, parallel=parallel)


def rows_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the function that describes each row of contiguous arrays as one of many calls.

    It is given what λ is divided by for a row, and the first call.
    """

    def kernel(x, g, count, calls):  # type: ignore[no-untyped-def]
        rows, length = x.shape
        for row in range(rows):
            call, start = call_at(calls + row * _CALL_BYTES), row * length * x.itemsize
            _describe(call, address_of(x) + start, address_of(g) + start, length, x.itemsize)
            call.count = count

    rows = types.Array(numba.from_dtype(dtype), 2, "C", readonly=True)
    return compile_kernel(kernel, types.void(rows, rows, _INT, _INT), dtype, _nrt=False)


def apartness_kernel() -> Any:
    """Compile the function that says whether no gradients share memory with anything.

    In the order of their addresses, nothing may begin before the gradients before it end, and no
    gradients before anything before them ends.
    """

    def kernel(calls, layers):  # type: ignore[no-untyped-def]
        starts = np.empty(2 * layers, np.int64)
        for layer in range(layers):
            call = call_at(calls + layer * _CALL_BYTES)
            starts[2 * layer], starts[2 * layer + 1] = call.activations, call.gradients
        end, written_end = 0, 0
        for k in np.argsort(starts):
            call, written = call_at(calls + k // 2 * _CALL_BYTES), k % 2 == 1
            size = call.size * call.x_step
            if size > 0:
                if starts[k] < (end if written else written_end):
                    return False
                end = max(end, starts[k] + size)
                if written:
                    written_end = max(written_end, starts[k] + size)
        return True

    return compile_kernel(kernel, types.boolean(_INT, _INT))


def batch_kernel(n_lams: int, parallel: bool) -> Any:
    """Compile the driver of one whole call for each layer.

    It takes the plan, the calls and their number, λ, what λ is multiplied by for the gradient,
    epsilon (NaN for the default), and where the penalties go. It returns whether it took the
    layers; if not, nothing was written.
    """
    as_tuple, store = _as_tuple(n_lams), store_of(n_lams)
    run_blocks = _layers_in_parallel if parallel else _layers_in_series

    def kernel(plan, calls, layers, lam, scale, epsilon, penalties):  # type: ignore[no-untyped-def]
        functions = plan_at(plan)
        before = np.empty(layers + 1, np.int64)  # how many blocks the layers before have
        before[0] = 0
        for layer in range(layers):
            address = calls + layer * _CALL_BYTES
            call = call_at(address)
            store(call.lam, as_tuple(lam))
            call.scale, call.epsilon = scale, epsilon
            if not call_function(functions.prepare, (address,)):
                return False
            before[layer + 1] = before[layer] + call.blocks
        layer_of = np.empty(before[layers], np.int64)
        for layer in range(layers):
            layer_of[before[layer] : before[layer + 1]] = layer

        parts = run_blocks(functions.first, calls, layer_of, before)
        updates = False
        for layer in range(layers):
            address = calls + layer * _CALL_BYTES
            call = call_at(address)
            _clear(address_of(call.total))
            for b in range(before[layer], before[layer + 1]):
                _add_to(address_of(call.total), address_of(parts[b]))
            found = call_function(functions.finish, (address,))
            penalties[layer] = call.penalty
            if found == UNCERTAIN:
                penalties[layer] = NOT_HANDLED if functions.second != 0 else NEEDS_EXACT_SUM
            if found == GRADIENT:
                updates = True
            else:  # and so nothing is left to be done
                call.all_pieces = 0
        if functions.second != 0 and updates:
            run_blocks(functions.second, calls, layer_of, before)
        return True

    penalties = types.Array(_FLOAT, 1, "C")
    signature = types.boolean(_INT, _INT, _INT, _lam_type(n_lams), _FLOAT, _FLOAT, penalties)
    return compile_kernel(kernel, signature, n_lams, parallel)


@register_jitable
def _block_of_layers(function, calls, layer_of, before, parts, b):  # type: ignore[no-untyped-def]
    layer = layer_of[b]
    number = b - before[layer]
    call_block(function, (calls + layer * _CALL_BYTES, number, address_of(parts[b])))


@register_jitable
def _layers_in_series(function, calls, layer_of, before):  # type: ignore[no-untyped-def]
    """Run a block function over all blocks of all layers, and return their totals."""
    parts = np.empty((layer_of.size, TOTALS))
    for b in range(layer_of.size):
        _block_of_layers(function, calls, layer_of, before, parts, b)
    return parts


@register_jitable(parallel=True)
def _layers_in_parallel(function, calls, layer_of, before):  # type: ignore[no-untyped-def]
    parts = np.empty((layer_of.size, TOTALS))
    for b in numba.prange(layer_of.size):
        _block_of_layers(function, calls, layer_of, before, parts, b)
    return parts
