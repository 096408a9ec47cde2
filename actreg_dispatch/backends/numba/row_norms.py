"""Norms of rows: each row is summed, and updated while it is in the cache, in one pass.

A row has a bracket for its sum, and so one for its size. What is added up are the lower ends, in a
pair, and *doubt*, how much more the upper ends are; so the bracket of the total says whether its
rounding is certain. Where the coefficients of a row are not, its gradients are left alone, to be
updated with the exact sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from actreg_dispatch.backend import Backend
from actreg_dispatch.backends.numba.addresses import (
    BLOCK,
    ENDS,
    SHARES,
    dense_row,
    new_ends,
    strided_row,
)
from actreg_dispatch.backends.numba.bits import bits_of
from actreg_dispatch.backends.numba.compiling import compile_kernel, kernel_of
from actreg_dispatch.backends.numba.drivers import PARALLEL_FROM
from actreg_dispatch.backends.numba.rows import (
    add_gradient,
    gradient_of,
    load_of,
    named,
    no_gradient,
    no_update,
    summing_of,
    update_only,
)
from actreg_dispatch.dtypes import COMPUTE_DTYPES, FLOAT64
from actreg_dispatch.layout import each_once
from actreg_dispatch.norms import L1, Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.row_norms import RowNorm, outcome_of_row
from actreg_dispatch.runtime.threads import interrupts_wait, may_use_threads
from actreg_dispatch.sums.certified import anchored_bound, merge_pairs, two_sum
from actreg_dispatch.sums.exact import PartialSum, Total, outcome_of

__all__ = ["apply_to_rows", "rows_kernel", "sum_of_rows"]

Array = np.ndarray[Any, Any]

_GROUP = ENDS // 2  # rows that are summed before they are updated, and their sizes normalized
_FEW, _MANY = 16, 64  # rows of fewer elements than many are done by the few, vectors and no loop
_COPIED = 1 << 18  # elements that are copied at a time where they do not lie in rows
# Of a share of the rows: the sum of the sizes that are finite (hi, lo), how much more it may be,
# and the sum of those that are not.
RESULTS, DOUBT, SPECIAL = 4, 2, 3


def rows_kernel(
    norm: Norm,
    dtype: np.dtype[Any],
    anchored: bool,
    writes: bool,
    weighted: bool,
    parallel: bool,
) -> Any:
    """Compile what finds the sizes of rows, and adds the gradient of ``norm`` if it ``writes``.

    It is given the addresses of activations, gradients and weights, the number of rows and their
    length, the steps in bytes from row to row and from weight to weight, λ of the gradient,
    epsilon, where the size of each row goes, if that has room, where the rows are marked that are
    left undone, and the results of each share. Rows of ``anchored`` sums are left if their size is
    not certain, others if the gradient is not.
    """
    key = norm.source, dtype, anchored, writes, weighted, parallel

    def inline(function: Any) -> Any:
        return register_jitable(forceinline=True)(named(function, *key))

    summing = summing_of(norm.terms, FLOAT64 if anchored else dtype, weighted)
    sum_row, zero, _, first, second, element_of, largest_of = summing
    evaluate, agree = (register_jitable(forceinline=True)(f) for f in (norm.evaluate, norm.agree))
    gradient = gradient_of(norm, weighted) if writes else no_gradient
    load_lam, load_c = load_of(norm.n_lams), load_of(norm.n_coefficients)
    element, itemsize = bits_of(dtype).type, dtype.itemsize
    real: Any = COMPUTE_DTYPES[dtype].type
    ones = (1.0,) * norm.n_lams
    weights_at = _weights_at if weighted else _no_weights

    @inline
    def sum_piece(x, w, count, w_step, total):  # type: ignore[no-untyped-def]
        xs, ws = _elements_at(element, x, count, itemsize), weights_at(real, w, count, w_step)
        return sum_row(
            *(xs, xs, ws, total, first, second, element_of, largest_of),
            *(no_update, no_gradient, ones, ones),
        )

    @inline
    def update_piece(x, g, w, count, w_step, lams, c):  # type: ignore[no-untyped-def]
        xs, ws = _elements_at(element, x, count, itemsize), weights_at(real, w, count, w_step)
        update_only(
            *(xs, _elements_at(element, g, count, itemsize), ws, zero, first, second),
            *(element_of, largest_of, add_gradient, gradient, lams, c),
        )

    @inline
    def sum_of(x, w, length, w_step):  # type: ignore[no-untyped-def]
        total = zero
        if not anchored and length < _MANY:
            while length >= _FEW:
                total = sum_piece(x, w, _FEW, w_step, total)
                x, w, length = x + _FEW * itemsize, w + _FEW * w_step, length - _FEW
        count = min(length, BLOCK)
        total = sum_piece(x, w, count, w_step, total)
        while length > count:
            x, w, length = x + count * itemsize, w + count * w_step, length - count
            count = min(length, BLOCK)
            part = sum_piece(x, w, count, w_step, zero)
            total = merge_pairs(total[0], total[1], part[0], part[1])
        return total

    @inline
    def bracket_of(x, w, length, w_step, bound):  # type: ignore[no-untyped-def]
        """Return the least and the largest that the sum may be; both are NaN or ∞ if it is."""
        hi, lo = sum_of(x, w, length, w_step)
        if math.isfinite(hi):
            margin = 2.0 * bound * hi  # twice, as in certified_one
            return hi + (lo - margin), hi + (lo + margin)
        xs, ws = _elements_at(element, x, length, itemsize), weights_at(real, w, length, w_step)
        special = 0.0
        for j in range(length):
            value, _ = element_of(xs, ws, j)
            if not math.isfinite(value):
                special += abs(value)
        return (special, special) if special != 0.0 else (0.0, math.inf)

    @inline
    def update(x, g, w, length, w_step, lams, c):  # type: ignore[no-untyped-def]
        if length < _MANY:
            while length >= _FEW:
                update_piece(x, g, w, _FEW, w_step, lams, c)
                x, g, w = x + _FEW * itemsize, g + _FEW * itemsize, w + _FEW * w_step
                length -= _FEW
        update_piece(x, g, w, length, w_step, lams, c)

    def kernel(
        x, g, w, rows, length, x_row, g_row, w_row, w_step, lam, epsilon, sizes, left, results
    ):  # type: ignore[no-untyped-def]
        shares = len(results)
        bound = anchored_bound(length) if anchored else (min(length, BLOCK) + 8) * 2.0**-53
        lams = load_lam(lam, real)
        for share in numba.prange(shares):
            begin, end = share * rows // shares, (share + 1) * rows // shares
            hi, lo, doubt, special = 0.0, 0.0, 0.0, 0.0
            ends = dense_row(np.float64, new_ends(), ENDS, 8)
            for start in range(begin, end, _GROUP):
                total, rest = 0.0, 0.0
                for k in range(min(_GROUP, end - start)):
                    x_here, w_here = x + (start + k) * x_row, w + (start + k) * w_row
                    ends[2 * k], ends[2 * k + 1] = bracket_of(x_here, w_here, length, w_step, bound)
                for k in range(min(_GROUP, end - start)):
                    row = start + k
                    below, above = ends[2 * k], ends[2 * k + 1]
                    x_here, w_here = x + row * x_row, w + row * w_row
                    one = evaluate((below,), ones, ones, epsilon, np.float64)
                    other = evaluate((above,), ones, ones, epsilon, np.float64)
                    its_size, more = one[0], other[0] - one[0]
                    if math.isfinite(its_size):
                        total, error = two_sum(total, its_size)
                        rest += error
                        doubt += more
                    else:
                        special += its_size
                    if len(sizes) > 0:
                        sizes[row] = its_size
                        left[row] = more > 0.0
                    if writes:
                        c = load_c(one[1], real)
                        certain = not math.isfinite(its_size) or agree(
                            (0.0, c, one[2]), (0.0, load_c(other[1], real), other[2])
                        )
                        left[row] = not certain
                        if certain and one[2]:
                            update(x_here, g + row * g_row, w_here, length, w_step, lams, c)
                total, rest = two_sum(total, rest)
                hi, lo = merge_pairs(hi, lo, total, rest)
            mine = results[share]
            mine[0], mine[1], mine[2], mine[3] = hi, lo, doubt, special

    whole, numbers = types.int64, types.Array(types.float64, 1, "C")
    signature = types.void(
        *(whole,) * 9,
        *(numbers, types.float64, numbers),
        *(types.Array(types.uint8, 1, "C"), types.Array(types.float64, 2, "C")),
    )
    return compile_kernel(kernel, signature, *key, parallel=parallel)


@register_jitable
def _elements_at(element, address, count, itemsize):  # type: ignore[no-untyped-def]
    return dense_row(element, address, count, itemsize)


@register_jitable
def _weights_at(real, address, count, step):  # type: ignore[no-untyped-def]
    return strided_row(real, address, count, step)


@register_jitable
def _no_weights(real, address, count, step):  # type: ignore[no-untyped-def]
    return dense_row(real, address, 0, step)


def apply_to_rows(
    backend: Backend,
    x: Array,
    g: Array | None,
    norm: RowNorm,
    constants: Constants,
    w: Array | None,
) -> Any:
    """Return the penalty of rows, and add the gradient to any gradients.

    Weights have been checked. What is not certain, ``backend`` sums exactly.
    """
    compute, n_rows = COMPUTE_DTYPES[x.dtype], 0
    hi, lo, doubt, special = 0.0, 0.0, 0.0, 0.0
    with interrupts_wait():
        for xs, gs, ws in _matrices(x, g, w, len(norm.axis)):
            results, left = _run(xs, gs, ws, norm.of_row, constants, _NO_SIZES)
            for share in results.tolist():
                hi, lo = merge_pairs(hi, lo, share[0], share[1])
                doubt, special = doubt + share[DOUBT], special + share[SPECIAL]
            if gs is not None:
                for row in np.flatnonzero(left):
                    _update_exactly(backend, xs[row], gs[row], norm.of_row, constants, ws, row)
            n_rows += len(xs)
    margin = 2.0 * anchored_bound(n_rows) * hi  # twice, as in certified_one
    ends = hi + (lo - margin), hi + (lo + (margin + 2.0 * doubt))
    if special != 0.0:
        ends = special, special
    below, above = (_penalty(norm, compute, constants, end) for end in ends)
    if below != above and not math.isnan(special):
        total = sum_of_rows(backend, x, norm, w)
        return compute.type(outcome_of(total, norm, constants).penalty)
    return below


def sum_of_rows(backend: Backend, x: Array, norm: RowNorm, w: Array | None) -> Total:
    """Return the sum of the sizes of rows, exactly."""
    compute = COMPUTE_DTYPES[x.dtype]
    total: Any = PartialSum(1, compute)
    for xs, _, ws in _matrices(x, None, w, len(norm.axis)):
        sizes = np.empty(len(xs))
        _, left = _run(xs, None, ws, norm.of_row, _NOTHING, sizes)
        for row in np.flatnonzero(left):
            exact = backend.partial_sum(xs[row], norm.of_row, None if ws is None else ws[row])
            sizes[row] = outcome_of_row(exact, norm.of_row, 0.0).penalty
        total += replace(backend.partial_sum(sizes, L1), dtype=compute)  # type: ignore[type-var]
    return total


def _penalty(norm: RowNorm, compute: np.dtype[Any], constants: Constants, total: float) -> Any:
    with np.errstate(all="ignore"):
        lam, real = tuple(map(np.float64, constants.lam)), compute.type
        return norm.evaluate((np.float64(total),), lam, lam, constants.epsilon, real)[0]


def _run(
    x: Array,
    g: Array | None,
    w: Array | None,
    norm: Norm,
    constants: Constants,
    sizes: Array,
) -> tuple[Array, Array]:
    """Run the kernel over matrices, and return the results of all shares, and which rows are left.

    Sizes are found in anchored sums if there is room for them.
    """
    n_rows, length = x.shape
    anchored = x.dtype == FLOAT64 or sizes.size > 0
    parallel = x.size >= PARALLEL_FROM and may_use_threads()
    shares = min(SHARES, -(-n_rows // _GROUP)) if parallel else 1
    results, left = np.zeros((shares, RESULTS)), np.empty(n_rows, np.uint8)
    kernel = kernel_of(rows_kernel, norm, x.dtype, anchored, g is not None, w is not None, parallel)
    lam, epsilon = (
        ((0.0,), 0.0) if constants is None else (constants.gradient_lam, constants.epsilon)
    )
    g, weights = x if g is None else g, x if w is None else w
    kernel(
        *(x.ctypes.data, g.ctypes.data, weights.ctypes.data, n_rows, length),
        *(x.strides[0], g.strides[0], *weights.strides),
        *(np.array(lam), epsilon, sizes, left, results),
    )
    return results, left


_NOTHING, _NO_SIZES = Constants((0.0,), (0.0,), 0.0), np.empty(0)


def _update_exactly(
    backend: Backend,
    x: Array,
    g: Array,
    norm: Norm,
    constants: Constants,
    weights: Array | None,
    row: int,
) -> None:
    """Add the gradient of a row, by its exact sum."""
    w = None if weights is None else weights[row]
    found = outcome_of_row(backend.partial_sum(x, norm, w), norm, constants.epsilon)
    if found.has_gradient:
        backend.add_gradient(x, g, norm, constants, found.coefficients, w)


def _matrices(x: Array, g: Array | None, w: Array | None, row_axes: int) -> Iterator[Any]:
    """Yield activations, gradients and weights as matrices, whose rows are those of the norm.

    Their axes are the last ``row_axes`` ones. The elements of a row are next to each other, and
    weights are of T. Where they do not lie so, some rows at a time are copied, and the gradients
    written back.
    """
    if not x.size:
        return
    compute = COMPUTE_DTYPES[x.dtype]
    if w is not None and w.dtype != compute and each_once(w).size <= _COPIED:
        w = np.broadcast_to(each_once(w).astype(compute), w.shape)
    matrices = [None if each is None else _as_matrix(each, row_axes) for each in (x, g, w)]
    if all(
        matrix is not None
        and (each is w or matrix.shape[1] == 1 or matrix.strides[1] == each.itemsize)
        for each, matrix in zip((x, g, w), matrices, strict=True)
        if each is not None
    ) and (w is None or w.dtype == compute):
        yield matrices
        return
    if x.ndim > row_axes + 1 and x[0].size > _COPIED:  # some of the rows of x[0], then of x[1]
        for k in range(len(x)):
            yield from _matrices(
                *(each if each is None else each[k] for each in (x, g, w)), row_axes
            )
        return
    step = max(1, _COPIED // x[0].size)
    for start in range(0, len(x), step):
        cut = slice(start, start + step)
        copies = [None if each is None else each[cut].copy() for each in (x, g)]
        copies.append(None if w is None else w[cut].astype(compute))
        yield [None if each is None else _as_matrix(each, row_axes) for each in copies]
        if g is not None:
            g[cut] = copies[1]


def _as_matrix(array: Array, row_axes: int) -> Array | None:
    """Return a view of the last axes as one, and of the others as one, if there is one."""
    outer = array.ndim - row_axes
    for axis in range(array.ndim - 1):
        steps = array.strides[axis], array.strides[axis + 1] * array.shape[axis + 1]
        if axis + 1 != outer and array.shape[axis] > 1 and steps[0] != steps[1]:
            return None
    return array.reshape(math.prod(array.shape[:outer]), math.prod(array.shape[outer:]))
