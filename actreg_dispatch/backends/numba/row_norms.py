"""Norms of rows: each row is summed, and updated while it is in the cache, in one pass.

A row has a bracket for its sum, and so one for its size. What is added up are the lower ends, in a
pair, and *doubt*, how much more the upper ends are; so the bracket of the total says whether its
rounding is certain. Where the coefficients of a row are not, its gradients are left alone, to be
updated with the exact sum.

The bounds are those of :mod:`actreg_dispatch.sums.certified`, but for a plain sum of n terms, which
is at most 2¹³: it is off by n·2⁻⁵³ of itself, and 8·2⁻⁵³ more is room for merges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from numba.extending import register_jitable

from actreg_dispatch.backend import Backend
from actreg_dispatch.backends.numba.addresses import (
    BLOCK,
    BLOCK_SIGNATURE,
    ROWS,
    SUMS,
    TOTALS,
    Call,
    call_at,
    dense_row,
    new_rows,
    strided_row,
)
from actreg_dispatch.backends.numba.bits import bits_of
from actreg_dispatch.backends.numba.calls import run
from actreg_dispatch.backends.numba.compiling import compile_function, kernel_of
from actreg_dispatch.backends.numba.rows import (
    add_gradient,
    gradient_of,
    load_of,
    named,
    no_gradient,
    no_update,
    plus,
    rounded_tile,
    store_of,
    summing_of,
    update_only,
)
from actreg_dispatch.dtypes import COMPUTE_DTYPES, FLOAT64
from actreg_dispatch.layout import as_matrix, each_once
from actreg_dispatch.norms import L1, Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.row_norms import RowNorm, outcome_of_row
from actreg_dispatch.runtime.threads import interrupts_wait
from actreg_dispatch.sums.certified import (
    ANCHORED_TERMS,
    anchored_bound,
    merge_pairs,
    merge_totals,
)
from actreg_dispatch.sums.exact import PartialSum, Total, outcome_of

__all__ = ["apply_to_rows", "rows_function", "sum_of_rows"]

Array = np.ndarray[Any, Any]

_FEW, _MANY = 16, 64  # rows of fewer elements than many are done by the few, vectors and no loop
_COPIED = 1 << 18  # elements that are copied at a time where they do not lie in rows


def rows_function(norm: Norm, dtype: np.dtype[Any], anchored: bool, weighted: bool) -> Any:
    """Compile what finds the sizes of a block of rows, and adds the gradient of ``norm``.

    It is a block function, of a call whose pieces are rows. It adds no gradient where the call has
    no gradients, and leaves the size of each row where there is room. A row is marked as undecided
    whose gradient is not certain, or, if sizes are wanted, whose size is not. The total is the sum
    of the sizes that are finite, a pair, how much more it may be, and the sum of the others, which
    are left as 0.
    """
    key = norm.source, dtype, anchored, weighted

    def inline(function: Any) -> Any:
        return register_jitable(forceinline=True)(named(function, *key))

    summing = summing_of(norm.terms, FLOAT64 if anchored else dtype, weighted)
    sum_row, zero, _, first, second, element_of, largest_of = summing
    evaluate, agree = (register_jitable(forceinline=True)(f) for f in (norm.evaluate, norm.agree))
    gradient = gradient_of(norm, weighted)
    load_lam, load_c = load_of(norm.n_lams), load_of(norm.n_coefficients)
    element, itemsize = bits_of(dtype).type, dtype.itemsize
    real: Any = COMPUTE_DTYPES[dtype].type
    ones, store = (1.0,) * norm.n_lams, store_of(TOTALS)
    sum_sizes, _, _, size_of, _, size_at, largest_size = summing_of(L1.terms, FLOAT64)
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
            return sum_piece(x, w, length, w_step, total)
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
            below, above = hi + (lo - margin), hi + (lo + margin)
            if anchored and below != above and length <= ANCHORED_TERMS:
                xs = _elements_at(element, x, length, itemsize)
                ws = weights_at(real, w, length, w_step)
                exponent = largest_of(xs, ws, first)
                total, is_exact = rounded_tile(xs, ws, exponent, first, element_of)
                if is_exact:
                    return total, total
            return below, above
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

    def block(address, number, there):  # type: ignore[no-untyped-def]
        call = call_at(address)
        length, w_step, epsilon = call.length, call.w_step, call.epsilon
        _, x_row, g_row, w_row = dense_row(np.int64, call.axes, 4, 8)
        lam = load_lam(call.gradient_lam, real)
        bound = anchored_bound(length) if anchored else (min(length, BLOCK) + 8) * 2.0**-53
        first_row = number * call.pieces_per_block
        count = min(call.pieces_per_block, call.all_pieces - first_row)
        x, g = call.activations + first_row * x_row, call.gradients + first_row * g_row
        w = call.weights + first_row * w_row
        # Of each row: the ends of its bracket, its size, and 1 if it is undecided. In one array, or
        # the compiler does not make vectors of it.
        found = dense_row(np.float64, new_rows(), 4 * ROWS, 8)
        for k in range(count):
            found[k], found[ROWS + k] = bracket_of(
                x + k * x_row, w + k * w_row, length, w_step, bound
            )
        writes, keeps_sizes, doubt, special = call.gradients != 0, call.sizes != 0, 0.0, 0.0
        for k in range(count):
            below, above = found[k], found[ROWS + k]
            one = evaluate((below,), ones, ones, epsilon, np.float64)
            other = evaluate((above,), ones, ones, epsilon, np.float64)
            size, more = min(one[0], other[0]), abs(other[0] - one[0])
            is_finite = math.isfinite(size)
            found[2 * ROWS + k] = size if is_finite else 0.0
            doubt = plus(doubt, more if is_finite else 0.0)
            special = plus(special, 0.0 if is_finite else size)
            at_one_end = 0.0, load_c(one[1], real), one[2]
            at_other_end = 0.0, load_c(other[1], real), other[2]
            certain = agree(at_one_end, at_other_end) if writes else more == 0.0
            found[3 * ROWS + k] = 1.0 if math.isfinite(below) and not certain else 0.0
        if writes or keeps_sizes:
            undecided = dense_row(np.uint8, call.undecided + first_row, count, 1)
            for k in range(count):
                undecided[k] = found[3 * ROWS + k] != 0.0
        if keeps_sizes:
            sizes = dense_row(np.float64, call.sizes + 8 * first_row, count, 8)
            for k in range(count):
                sizes[k] = found[2 * ROWS + k]
        if writes:
            for k in range(count):
                one = evaluate((found[k],), ones, ones, epsilon, np.float64)
                if one[2] and found[3 * ROWS + k] == 0.0:
                    c = load_c(one[1], real)
                    update(x + k * x_row, g + k * g_row, w + k * w_row, length, w_step, lam, c)
        finite = found[2 * ROWS : 2 * ROWS + count]
        total, rest = sum_sizes(
            *(finite, finite, finite, (0.0, 0.0), size_of, size_of, size_at, largest_size),
            *(no_update, no_gradient, ones, ones),
        )
        store(
            dense_row(np.float64, there, TOTALS, 8),
            (total, rest, doubt, 0.0, special, 0.0, 0.0, 0.0, 0.0),
        )
        return 0

    return compile_function(block, BLOCK_SIGNATURE, *key)


# What closures may name; see rows.py.


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

    Weights are such that quick sums may be made with them. What is not certain, ``backend`` sums
    exactly.
    """
    compute, size, total = COMPUTE_DTYPES[x.dtype], math.prod(x.shape), (0.0,) * TOTALS
    with nullcontext() if g is None else interrupts_wait():
        for xs, gs, ws in _matrices(x, g, w, len(norm.axis)):
            found, undecided = _run(xs, gs, ws, norm.of_row, constants)
            for row in np.flatnonzero(undecided).tolist():
                _update_exactly(backend, xs[row], gs[row], norm.of_row, constants, ws, row)
            total = (*merge_totals(total[:SUMS], found[:SUMS]), total[SUMS] + found[SUMS])
    hi, lo, doubt, _, special = total[: SUMS + 1]
    margin = 2.0 * anchored_bound(size) * hi  # twice, as in certified_one
    ends = hi + (lo - margin), hi + (lo + (margin + 2.0 * doubt))
    if special != 0.0:
        ends = special, special
    below, above = (_penalty(norm, compute, constants, end) for end in ends)
    if below == above or math.isnan(special):
        return below
    exact = sum_of_rows(backend, x, norm, w)
    return compute.type(outcome_of(exact, norm, constants).penalty)


def sum_of_rows(backend: Backend, x: Array, norm: RowNorm, w: Array | None) -> Total:
    """Return the sum of the sizes of rows, exactly."""
    compute, of_row = COMPUTE_DTYPES[x.dtype], norm.of_row
    total = PartialSum(1, FLOAT64)
    for xs, _, ws in _matrices(x, None, w, len(norm.axis)):
        sizes = np.empty(len(xs))
        found, undecided = _run(xs, None, ws, of_row, _NOTHING, sizes)
        for row in np.flatnonzero(undecided).tolist():
            exact = backend.partial_sum(xs[row], of_row, None if ws is None else ws[row])
            sizes[row] = outcome_of_row(exact, of_row, 0.0).penalty
        total += backend.partial_sum(sizes, L1)  # type: ignore[assignment]
        total += PartialSum(1, FLOAT64, 0, found[SUMS])
    return replace(total, dtype=compute)


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
    sizes: Array | None = None,
) -> tuple[tuple[float, ...], Array]:
    """Run the pass over matrices, and return its total, and which rows are undecided.

    If there is room for sizes, the sums are anchored.
    """
    n_rows, length = x.shape
    marks = np.empty(0 if g is None is sizes else n_rows, np.uint8)
    steps = [0 if each is None else each.strides[0] for each in (x, g, w)]
    axes = np.array([n_rows, *steps], np.int64)
    per_block = min(ROWS, max(1, BLOCK // length))
    call = Call(
        activations=x.ctypes.data,
        gradients=0 if g is None else g.ctypes.data,
        weights=0 if w is None else w.ctypes.data,
        sizes=0 if sizes is None else sizes.ctypes.data,
        undecided=marks.ctypes.data,
        size=x.size,
        length=length,
        w_step=0 if w is None else w.strides[1],
        axes=axes.ctypes.data,
        all_pieces=n_rows,
        pieces_per_block=per_block,
        blocks=-(-n_rows // per_block),
        epsilon=constants.epsilon,
    )
    call.gradient_lam[: norm.n_lams] = constants.gradient_lam
    anchored = x.dtype == FLOAT64 or sizes is not None
    function = kernel_of(rows_function, norm, x.dtype, anchored, w is not None)
    return run(call, function), marks


_NOTHING = Constants((0.0,), (0.0,), 0.0)


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
    matrices = [None if each is None else as_matrix(each, row_axes) for each in (x, g, w)]
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
            parts: Any = [None if each is None else each[k] for each in (x, g, w)]
            yield from _matrices(parts[0], parts[1], parts[2], row_axes)
        return
    step = max(1, _COPIED // x[0].size)
    for start in range(0, len(x), step):
        cut = slice(start, start + step)
        copies = [None if each is None else each[cut].copy() for each in (x, g)]
        copies.append(None if w is None else np.array(w[cut], compute, order="C"))
        yield [None if each is None else as_matrix(each, row_axes) for each in copies]
        if g is not None:
            g[cut] = copies[1]
