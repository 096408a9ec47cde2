"""What knows the norm and the dtype, compiled: C functions that the drivers call by address.

Of a norm there are three: a *block* function sums and updates one block of the arrays, and is the
only one that looks at elements; *prepare* rounds λ, and *finish* tests the rounding of the sums and
evaluates penalty and coefficients. The *exact* function adds one block to superaccumulators.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from actreg_dispatch.backends.numba.addresses import (
    BAD,
    BLOCK,
    BLOCK_SIGNATURE,
    CALL_SIGNATURE,
    LARGE,
    SUMS,
    TOTALS,
    call_at,
    call_block,
    dense_row,
    new_block,
    strided_row,
)
from actreg_dispatch.backends.numba.bits import (
    bits_of,
    counts_of,
    larger,
    weighted_counts_of,
    widen,
)
from actreg_dispatch.backends.numba.compiling import compile_function
from actreg_dispatch.backends.numba.exact import (
    add_products,
    no_tile,
    sum_exactly,
    tile_of,
)
from actreg_dispatch.backends.numba.rows import (
    ONE,
    add_gradient,
    bad_and_large,
    gradient_of,
    load_of,
    no_gradient,
    no_update,
    set_gradient,
    store_of,
    summing_of,
)
from actreg_dispatch.dtypes import COMPUTE_DTYPES, FLOAT64
from actreg_dispatch.norms import Norm
from actreg_dispatch.sums.certified import PLAIN_BOUND, anchored_bound
from actreg_dispatch.sums.exact import COUNTERS

__all__ = [
    "GRADIENT",
    "NO_GRADIENT",
    "UNCERTAIN",
    "block_function",
    "checking_function",
    "counting_function",
    "exact_function",
    "finish_function",
    "gathering_function",
    "prepare_function",
    "weighted_exact_function",
]

UNCERTAIN, NO_GRADIENT, GRADIENT = 0, 1, 2  # what finish returns


def block_function(
    terms: tuple[int, ...],
    norm: Norm | None,
    dtype: np.dtype[Any],
    dense: bool,
    overwrites: bool,
    weighted: bool,
) -> Any:
    """Compile what sums ``terms``, if there are any, over one block of a call.

    It adds the gradient of ``norm`` on the way, if there is one, or ``overwrites`` what is there.
    The elements of a row are next to each other in both arrays if they are ``dense``. It is given
    the call, the number of the block, and where the total goes, and returns 0.
    """
    summing = summing_of(terms, dtype, weighted)
    sum_row, zero, _, first_term, second_term, element_of, largest_of = summing
    *_, element_of_one, largest_of_one = summing_of(terms, dtype, ONE)
    n_lams, n_coefficients = (norm.n_lams, norm.n_coefficients) if norm else (0, 0)
    load_lam, load_c, store = load_of(n_lams), load_of(n_coefficients), store_of(TOTALS)
    update = (set_gradient if overwrites else add_gradient) if norm else no_update
    gradient = gradient_of(norm, weighted) if norm else no_gradient
    real: Any = COMPUTE_DTYPES[dtype].type
    element, size = bits_of(dtype).type, COMPUTE_DTYPES[dtype].itemsize
    padding = (0.0,) * (TOTALS - len(zero))

    def block(address, number, there):  # type: ignore[no-untyped-def]
        call = call_at(address)
        lam, c = load_lam(call.gradient_lam, real), load_c(call.coefficients, real)
        x_step, g_step = call.x_step, call.g_step
        first = number * call.pieces_per_block
        total = zero
        for piece in range(first, min(first + call.pieces_per_block, call.all_pieces)):
            x, g, _w, count = _piece(call, piece)
            if dense:
                xs = dense_row(element, x, count, x_step)
                gs = dense_row(element, g, count, g_step)
            else:
                xs = strided_row(element, x, count, x_step)
                gs = strided_row(element, g, count, g_step)
            w = call_block(call.gather, (address, piece, new_block())) if weighted else 0
            ws = dense_row(real, w, count if weighted else 0, size)
            if not weighted or call.w_step != 0:
                total = sum_row(
                    *(xs, gs, ws, total, first_term, second_term, element_of, largest_of),
                    *(update, gradient, lam, c),
                )
            elif ws[0] != 0:
                total = sum_row(
                    *(xs, gs, ws[0], total, first_term, second_term, element_of_one),
                    *(largest_of_one, update, gradient, lam, c),
                )
            elif overwrites:
                gs[:] = 0
        store(dense_row(np.float64, there, TOTALS, 8), total + padding)
        if weighted and call.check_weights != 0:
            call_block(call.check_weights, (address, number, there))
        if call.count_elements != 0:
            call_block(call.count_elements, (address, number, there))
        return 0

    key = terms, norm and norm.source, dtype, dense, overwrites, weighted
    return compile_function(block, BLOCK_SIGNATURE, *key)


def prepare_function(norm: Norm, compute: np.dtype[Any]) -> Any:
    """Compile what divides, scales and rounds λ of a call, and returns whether they fit T."""
    rounded_lams, lam_fits = register_jitable(norm.rounded_lams), register_jitable(norm.lam_fits)
    load, store = load_of(norm.n_lams), store_of(norm.n_lams)
    real: Any = compute.type
    one = real(1)

    def prepare(address):  # type: ignore[no-untyped-def]
        call = call_at(address)
        lam = load(call.lam, np.float64)
        lams, gradient_lams = rounded_lams(lam, call.count, call.scale, real)
        store(call.lam, lams)
        store(call.gradient_lam, gradient_lams)
        return int(lam_fits(lams, one))

    return compile_function(prepare, CALL_SIGNATURE, norm.source, compute)


def finish_function(norm: Norm, compute: np.dtype[Any]) -> Any:
    """Compile what finds penalty and coefficients of a call that has been summed.

    It returns whether these are certain and whether there is a gradient.
    """
    _, zero, certified, *_ = summing_of(norm.terms, compute)
    evaluate, agree = register_jitable(norm.evaluate), register_jitable(norm.agree)
    anchored = compute == FLOAT64
    load_lam, load_total = load_of(norm.n_lams), load_of(len(zero))
    store = store_of(norm.n_coefficients)
    real: Any = compute.type
    default = float(np.finfo(real).eps)

    def finish(address):  # type: ignore[no-untyped-def]
        call = call_at(address)
        found, certain = certified(
            load_total(call.total, np.float64),
            anchored_bound(call.size) if anchored else PLAIN_BOUND,
            evaluate,
            agree,
            load_lam(call.lam, np.float64),
            load_lam(call.gradient_lam, np.float64),
            default if math.isnan(call.epsilon) else call.epsilon,
            real,
        )
        penalty, c, has_gradient = found
        bad, large = call.total[BAD] != 0.0, call.total[LARGE] != 0.0 or call.large_weights != 0
        if bad or (large and anchored) or not (certain and penalty >= 0.0):
            return UNCERTAIN
        call.penalty = penalty
        store(call.coefficients, c)
        return GRADIENT if has_gradient else NO_GRADIENT

    return compile_function(finish, CALL_SIGNATURE, norm.source, compute)


@register_jitable
def _piece(call, number):  # type: ignore[no-untyped-def]
    """Return where a piece lies in the arrays, and its number of elements."""
    x, g, w, start = call.activations, call.gradients, call.weights, number * BLOCK
    if call.n_axes > 0:
        row, piece = divmod(number, call.pieces)
        start = piece * BLOCK
        axes = dense_row(np.int64, call.axes, 4 * call.n_axes, 8)
        for axis in range(4 * call.n_axes - 4, -1, -4):
            row, place = divmod(row, axes[axis])
            x += place * axes[axis + 1]
            g += place * axes[axis + 2]
            w += place * axes[axis + 3]
    x, g, w = x + start * call.x_step, g + start * call.g_step, w + start * call.w_step
    return x, g, w, min(BLOCK, call.length - start)


def checking_function(weights: np.dtype[Any]) -> Any:
    """Compile what counts, of the weights of a block, the bad ones, and those that are too large.

    It is called as a block function is, by one or in its place, and leaves the counts next to the
    total.
    """
    bits = bits_of(weights)
    element, itemsize = bits.type, bits.itemsize

    def check(address, number, there):  # type: ignore[no-untyped-def]
        call, total = call_at(address), dense_row(np.float64, there, TOTALS, 8)
        first = number * call.pieces_per_block
        total[BAD] = total[LARGE] = 0.0
        for piece in range(first, min(first + call.pieces_per_block, call.all_pieces)):
            _x, _g, w, count = _piece(call, piece)
            if call.w_step == itemsize:
                bad, large = bad_and_large(dense_row(element, w, count, itemsize))
            else:
                bad, large = bad_and_large(strided_row(element, w, count, call.w_step))
            total[BAD] += bad
            total[LARGE] += large
        return 0

    return compile_function(check, BLOCK_SIGNATURE, weights)


def counting_function(dtype: np.dtype[Any], weighted: bool) -> Any:
    """Compile what counts the elements of a block, next to the total of the block.

    How many there are, how many of them are not 0, and the largest magnitude.
    """
    bits, size = bits_of(dtype), COMPUTE_DTYPES[dtype].itemsize
    element, itemsize, real = bits.type, bits.itemsize, COMPUTE_DTYPES[dtype].type

    def count_elements(address, number, there):  # type: ignore[no-untyped-def]
        call, counts = call_at(address), dense_row(np.float64, there + 8 * SUMS, BAD - SUMS, 8)
        first = number * call.pieces_per_block
        for piece in range(first, min(first + call.pieces_per_block, call.all_pieces)):
            x, _g, _w, count = _piece(call, piece)
            kept = count
            if weighted:
                xs = strided_row(element, x, count, call.x_step)
                w = call_block(call.gather, (address, piece, new_block()))
                ws = strided_row(real, w, count, size if call.w_step != 0 else 0)
                kept, nonzero, largest = weighted_counts_of(xs, ws)
            elif call.x_step == itemsize:
                nonzero, largest = counts_of(dense_row(element, x, count, itemsize))
            else:
                nonzero, largest = counts_of(strided_row(element, x, count, call.x_step))
            counts[0] += kept
            counts[1] += nonzero
            counts[2] = larger(counts[2], largest)
        return 0

    return compile_function(count_elements, BLOCK_SIGNATURE, dtype, weighted)


def gathering_function(weights: np.dtype[Any], compute: np.dtype[Any]) -> Any:
    """Compile what finds the weights of a piece as a dense row of T, which it gathers if it must.

    It is given the call, the number of the piece, and room for the row, and returns its address.
    Where all elements of the row have one weight, that is all there is at the address.
    """
    real: Any = compute.type
    size, in_place, is_mask = compute.itemsize, weights == compute, weights.kind == "b"
    element = np.uint8 if is_mask else bits_of(weights).type

    def gather(address, piece, room):  # type: ignore[no-untyped-def]
        call = call_at(address)
        _x, _g, w, count = _piece(call, piece)
        if in_place and call.w_step == size:
            return w
        count = count if call.w_step != 0 else 1
        spread = strided_row(element, w, count, call.w_step)
        gathered = dense_row(real, room, count, size)
        for j in range(count):
            gathered[j] = real(spread[j]) if is_mask else real(widen(spread[j]))
        return room

    return compile_function(gather, BLOCK_SIGNATURE, weights, compute)


def exact_function(terms: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Compile what adds ``terms`` over one block of a call to superaccumulators, exactly.

    It is given what a block function is; the words of the sums are one after the other. A block
    that is not one piece of memory is gathered first.
    """
    first, *others = [tile_of(degree, dtype) for degree in terms]
    second = others[0] if others else no_tile
    bits = bits_of(dtype)
    element, itemsize = bits.type, bits.itemsize

    def block(address, number, there):  # type: ignore[no-untyped-def]
        call = call_at(address)
        words = dense_row(np.int64, there, COUNTERS, 8)
        second_words = dense_row(np.int64, there + 8 * COUNTERS, COUNTERS, 8)
        piece = number * call.pieces_per_block
        last = min(piece + call.pieces_per_block, call.all_pieces)
        x, _g, _w, count = _piece(call, piece)
        if call.x_step != itemsize or last - piece > 1:
            room, gathered = new_block(), 0
            for number in range(piece, last):
                x, _g, _w, count = _piece(call, number)
                spread = strided_row(element, x, count, call.x_step)
                gathering = dense_row(element, room + gathered * itemsize, count, itemsize)
                for j in range(count):
                    gathering[j] = spread[j]
                gathered += count
            x, count = room, gathered
        row = dense_row(element, x, count, itemsize)
        sum_exactly(row, first, words, second, second_words)
        return 0

    return compile_function(block, BLOCK_SIGNATURE, terms, dtype)


def weighted_exact_function(terms: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Compile what :func:`exact_function` does for terms that have weights.

    Their products are split into numbers of binary64, which are summed as those without weights.
    """
    real: Any = COMPUTE_DTYPES[dtype].type
    element, size = bits_of(dtype).type, COMPUTE_DTYPES[dtype].itemsize
    tile, degree, two = tile_of(1, FLOAT64), terms[0], len(terms) == 2

    def block(address, number, there):  # type: ignore[no-untyped-def]
        call = call_at(address)
        words = dense_row(np.int64, there, COUNTERS, 8)
        second_words = dense_row(np.int64, there + 8 * COUNTERS, COUNTERS, 8)
        first = number * call.pieces_per_block
        for piece in range(first, min(first + call.pieces_per_block, call.all_pieces)):
            x, _g, _w, count = _piece(call, piece)
            xs = strided_row(element, x, count, call.x_step)
            w = call_block(call.gather, (address, piece, new_block()))
            ws = strided_row(real, w, count, size if call.w_step != 0 else 0)
            add_products(xs, ws, degree, tile, words)
            if two:
                add_products(xs, ws, 2, tile, second_words)
        return 0

    return compile_function(block, BLOCK_SIGNATURE, terms, dtype)
