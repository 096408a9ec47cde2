"""Many small arrays at once: one parallel region for all layers of a model.

To look at an array from Python takes about as long as to update a small layer. So compiled code
looks itself: it is given the addresses of the tuples of arrays, finds the arrays there, and reads
from them what NumPy's C interface keeps there (``PyArrayObject_fields``). That all of it lies so in
this interpreter is verified when the module is loaded; if not, :func:`express_all` takes nothing.

What is not plain (another class, dtype or order, overlaps, read-only) is left, untouched, to the
general route.
"""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from actreg_dispatch.backends.compiling import code_edition, compile_kernel, kernel_of
from actreg_dispatch.backends.numba_cpu import PARALLEL_FROM
from actreg_dispatch.backends.numba_rows import (
    BLOCK,
    UPDATES,
    address_of,
    bits_of,
    dense_row,
    leave,
    sum_nothing,
    summing_of,
)
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import (
    COMPUTE_DTYPES,
    FLOAT64,
    NATIVE_DTYPES,
    PLAIN_BOUND,
    REFUSED,
    UNDECIDED,
    anchored_bound,
    largest_lam,
)
from actreg_dispatch.runtime.threads import may_use_threads

__all__ = ["express_all"]

# Where a tuple has its items, and an array object its class and its fields, in bytes: behind the
# head that all Python objects have, of which the class is the end.
_HEAD = object.__basicsize__
_ITEMS, _CLASS = tuple.__basicsize__, _HEAD - 8
_DATA, _NDIM, _SHAPE, _DTYPE, _FLAGS = (_HEAD + 8 * k for k in (0, 1, 2, 5, 6))
_CONTIGUOUS, _ALIGNED, _WRITEABLE = 0x1, 0x100, 0x400  # NPY_ARRAY_C_CONTIGUOUS and so on
_TABLE = types.Array(types.int64, 2, "C")  # for each layer: where x and g are, size, batch


def express_all(
    activations: tuple[Any, ...],
    gradients: tuple[Any, ...],
    norm: ActivityNorm,
    lam: Any,
    scale: float,
    reduction: str,
    epsilon: float,
) -> np.ndarray[Any, Any] | None:
    """Update all gradients and return the penalties, or None, having written nothing.

    There is at least one layer, and the activations of the first are an array of NumPy. Where a
    penalty takes an exact sum it is ``UNDECIDED``, or ``REFUSED`` if its gradients are still to be
    updated. λ is as yet not divided as ``reduction`` says; ``epsilon`` is NaN for the default.
    """
    layers = len(activations)
    dtype = activations[0].dtype
    if not _LAYOUT_IS_KNOWN or dtype not in NATIVE_DTYPES or len(gradients) != layers:
        return None
    table = np.empty((layers, 4), np.int64)
    tuples, kinds = (id(activations), id(gradients)), (id(np.ndarray), id(dtype))
    size = kernel_of(_inspector)(*tuples, *kinds, dtype.itemsize, table)
    if size < 0:
        return None
    if reduction == "batch" and (table[:, 3] < 0).any():  # no axes, no batch
        return None
    counts = np.ones((layers, 1), np.int64)
    if reduction != "sum":
        column = 2 if reduction == "mean" else 3
        counts = np.maximum(counts, table[:, column : column + 1])
    compute = COMPUTE_DTYPES[dtype].type
    with np.errstate(all="ignore"):
        wide = np.reshape(lam, (1, -1)) / counts
        lams, strengths = (a.astype(compute).astype(float) for a in (wide, wide * scale))
    limited = np.maximum(lams[:, 0] / 2, lams[:, 1]) if lams.shape[1] == 2 else lams
    if not limited.max() <= largest_lam(norm, COMPUTE_DTYPES[dtype]):
        return None
    parallel = size >= PARALLEL_FROM and may_use_threads()
    kernel = kernel_of(_updater, norm, dtype, parallel)
    penalties = np.empty(layers)
    kernel(table, np.empty(0, bits_of(dtype)), lams, strengths, epsilon, penalties)
    return penalties


@intrinsic
def _load(typingctx, address):  # type: ignore[no-untyped-def]
    """Return the int64 at ``address``."""

    def load(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = ir.IntType(64).as_pointer()
        return builder.load(builder.inttoptr(arguments[0], pointer))

    return types.int64(types.int64), load


def _inspector() -> Any:
    """Compile the function that fills the table and returns the number of elements of all layers.

    It takes the addresses of two tuples, each of as many items as the table has rows. It returns -1
    where an array is not plain or gradients share memory with anything. It holds the interpreter's
    lock, so that no thread changes an array meanwhile.
    """
    edition = code_edition()

    def kernel(activations, gradients, array, dtype, itemsize, table):  # type: ignore[no-untyped-def]
        _ = edition
        layers, total = table.shape[0], 0
        starts, ends = np.empty(2 * layers, np.int64), np.empty(2 * layers, np.int64)
        for layer in range(layers):
            x = _load(activations + _ITEMS + 8 * layer)
            g = _load(gradients + _ITEMS + 8 * layer)
            if _load(x + _CLASS) != array or _load(g + _CLASS) != array:
                return -1
            axes = _load(x + _NDIM) & 0xFFFFFFFF
            flags = _load(x + _FLAGS) & (_load(g + _FLAGS) | _WRITEABLE) & 0xFFFFFFFF
            plain = _CONTIGUOUS | _ALIGNED
            if (
                _load(x + _DTYPE) != dtype
                or _load(g + _DTYPE) != dtype
                or flags & plain != plain
                or _load(g + _FLAGS) & _WRITEABLE == 0
                or axes != _load(g + _NDIM) & 0xFFFFFFFF
            ):
                return -1
            size, x_shape, g_shape = 1, _load(x + _SHAPE), _load(g + _SHAPE)
            for axis in range(axes):
                length = _load(x_shape + 8 * axis)
                if length != _load(g_shape + 8 * axis):
                    return -1
                size *= length
            table[layer, 0], table[layer, 1] = _load(x + _DATA), _load(g + _DATA)
            table[layer, 2], table[layer, 3] = size, _load(x_shape) if axes else -1
            for k in range(2):
                starts[2 * layer + k] = table[layer, k]
                ends[2 * layer + k] = table[layer, k] + size * itemsize
            total += size
        # In the order of their addresses, nothing may begin before the gradients before it end, and
        # no gradients before anything before them ends.
        end, written_end = 0, 0
        for k in np.argsort(starts):
            written = k % 2 == 1
            if ends[k] > starts[k]:
                if starts[k] < (end if written else written_end):
                    return -1
                end = max(end, ends[k])
                if written:
                    written_end = max(written_end, ends[k])
        return total

    signature = types.int64(*[types.int64] * 5, _TABLE)
    return compile_kernel(kernel, signature, nogil=False)


@register_jitable
def _one(rows, k):  # type: ignore[no-untyped-def]
    return rows[k, 0]


@register_jitable
def _both(rows, k):  # type: ignore[no-untyped-def]
    return rows[k, 0], rows[k, 1]


@register_jitable
def _pair(totals, b):  # type: ignore[no-untyped-def]
    return totals[b, 0], totals[b, 1]


@register_jitable
def _two_pairs(totals, b):  # type: ignore[no-untyped-def]
    return totals[b, 0], totals[b, 1], totals[b, 2], totals[b, 3]


@register_jitable
def _block(like, table, layer, number):  # type: ignore[no-untyped-def]
    """Return that block of x and of g, arrays of the type of ``like``."""
    start = number * BLOCK
    length = min(BLOCK, table[layer, 2] - start)
    offset = start * like.itemsize - address_of(like)
    x = dense_row(like, table[layer, 0] + offset, length)
    return x, dense_row(like, table[layer, 1] + offset, length)


def _updater(norm: ActivityNorm, dtype: np.dtype[Any], parallel: bool) -> Any:
    """Compile the function that does for all layers of the table what a flat kernel does for one.

    λ of the penalty and of the gradient come in a row for each layer.
    """
    element = bits_of(dtype)
    sum_row, zero, merge, _, magnitude, _, _, _, certified_of = summing_of(norm, element)
    root, anchored = norm is ActivityNorm.L2, dtype == FLOAT64
    real = COMPUTE_DTYPES[dtype].type
    update, quotient = leave if root else UPDATES[norm], UPDATES[ActivityNorm.L2]
    default, columns = float(np.finfo(real).eps), len(zero)
    lam_of, total_of = (_both, _two_pairs) if columns == 4 else (_one, _pair)
    edition = code_edition(), parallel

    def kernel(table, like, lams, strengths, epsilon, penalties):  # type: ignore[no-untyped-def]
        _ = edition
        layers = table.shape[0]
        # By loops: what sets a whole array, or a part of it, would be a parallel region of its own.
        before = np.empty(layers + 1, np.int64)  # how many blocks the layers before have
        before[0] = 0
        for layer in range(layers):
            before[layer + 1] = before[layer] - (-table[layer, 2] // BLOCK)
        layer_of = np.empty(before[layers], np.int64)
        for layer in range(layers):
            for b in range(before[layer], before[layer + 1]):
                layer_of[b] = layer

        totals = np.empty((layer_of.size, columns))
        for b in numba.prange(layer_of.size):
            layer = layer_of[b]
            x, g = _block(like, table, layer, b - before[layer])
            strength = lam_of(strengths, layer)
            totals[b] = sum_row(x, g, zero, magnitude, update, strength, 0.0)

        divisors = np.empty(layers)  # of L2; 0 where nothing is added
        for layer in range(layers):
            total = zero
            for b in range(before[layer], before[layer + 1]):
                total = merge(total, total_of(totals, b))
            bound = anchored_bound(table[layer, 2]) if anchored else PLAIN_BOUND
            floor = default if math.isnan(epsilon) else epsilon
            penalty, divisor, adds, certain = certified_of(
                total, bound, lam_of(lams, layer), floor, root, real
            )
            penalties[layer] = penalty if certain else REFUSED if root else UNDECIDED
            divisors[layer] = divisor if adds and certain else 0.0

        if root:
            for b in numba.prange(layer_of.size):
                layer = layer_of[b]
                if divisors[layer] != 0.0:
                    x, g = _block(like, table, layer, b - before[layer])
                    strength, divisor = strengths[layer, 0], divisors[layer]
                    sum_nothing(x, g, (0.0, 0.0), magnitude, quotient, strength, divisor)

    like = types.Array(numba.from_dtype(element), 1, "C")
    rows, floats = types.Array(types.float64, 2, "C"), types.Array(types.float64, 1, "C")
    signature = types.void(_TABLE, like, rows, rows, types.float64, floats)
    return compile_kernel(kernel, signature, parallel)


def _layout_is_known() -> bool:
    """Return whether an array object has its fields where :func:`_inspector` reads them."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    probe = np.zeros((3, 10), np.float32)[1:, ::2]
    pair = None, probe

    def read(offset: int, kind: Any = ctypes.c_int64, found_in: Any = probe) -> Any:
        return kind.from_address(id(found_in) + offset).value

    shape = read(_SHAPE)
    return (
        np.ndarray.__basicsize__ >= _FLAGS + 4
        and tuple.__itemsize__ == 8
        and [read(_ITEMS + 8 * k, found_in=pair) for k in range(2)] == [id(None), id(probe)]
        and read(_CLASS) == id(np.ndarray)
        and read(_DATA) == probe.__array_interface__["data"][0]
        and read(_NDIM, ctypes.c_int32) == 2
        and read(_DTYPE) == id(probe.dtype)
        and read(_FLAGS, ctypes.c_int32) == probe.flags.num
        and [ctypes.c_int64.from_address(shape + 8 * k).value for k in range(2)] == [2, 5]
    )


_LAYOUT_IS_KNOWN = _layout_is_known()
