"""Exact sums, compiled: tiles by error-free extraction, and what does not fit in integers.

**The tile.** Let the terms p ≥ 0 of a tile, |x| or x² rounded to binary64, be at most
``EXACT_TERMS`` = 2¹¹, the largest of them in [2ᵉ, 2ᵉ⁺¹) and the smallest but 0 in [2ˢ, 2ˢ⁺¹). The
anchor is M = 2ᵉ⁺². Binary64 holds the multiples of 2ᵉ⁻⁵⁰ in [M, 2M], where all of M + p lie, so
that M + p is rounded to M + h, h a multiple of 2ᵉ⁻⁵⁰ of at most 2ᵉ⁺¹.

* *Σh in integers.* The bits of M + h, read as an integer, are those of M and h / 2ᵉ⁻⁵⁰, at most
  2⁵¹. Sums of bits wrap modulo 2⁶⁴; less as many times the bits of M, they are Σh / 2ᵉ⁻⁵⁰, at most
  2¹¹·2⁵¹ = 2⁶².
* *Σ(p − h) in binary64.* p − h is exact (Dekker's FastTwoSum [1]_, as M > p) and at most 2ᵉ⁻⁵¹ in
  magnitude. A term of w bits is a multiple of 2ˢ⁻ʷ⁺¹; so are all sums of the p − h, and below
  2¹¹·2ᵉ⁻⁵¹ = 2ᵉ⁻⁴⁰. They need 53 bits at most, and none is rounded, whatever the order, if
  e − s ≤ 94 − w. The terms have w = 24 bits (|x| in binary32), 48 (its squares, which are exact in
  binary64) or 53 (binary64).
* *Few bits.* If e − s ≤ 51 − w, p is a multiple of 2ᵉ⁻⁵⁰ itself, and p − h is 0.
* *What squares of binary64 lost.* q = p − x² is exact (fused multiply-add), at most 2ᵉ⁻⁵³ in
  magnitude, and a multiple of 2ˢ⁻¹⁰⁵, since x² ≥ 2ˢ⁻¹ and x has 53 bits. Its anchor is 1.5·2ᵉ⁻⁵¹,
  around which binary64 holds the multiples of 2ᵉ⁻¹⁰³: Σh is at most 2¹¹·2⁵⁰ of these in magnitude.
  What is left of q is at most 2ᵉ⁻¹⁰⁴, and of 2¹¹ of them no sum needs more than 53 bits if
  e − s ≤ 41, which is 94 − w.

So what spoils a tile are terms that are too small, below 2ᵉ⁻⁹⁴⁺ʷ. They are left out, and make
the tile of another round, and so on down to 2⁻²⁴⁰ of the largest. What is left then is added to
the superaccumulator element by element, as integers.

The exponents must not be so low that q, or so high that an anchor, leaves the range of binary64:
they are those of anchored tiles (:mod:`actreg_dispatch.sums.certified`). All elements of other
tiles are added as integers. NaN and infinity have the largest exponent of all.

**The superaccumulator** (Kulisch) is an integer in units of 2⁻³²²², far below the square of the
smallest number, in words of :data:`~actreg_dispatch.sums.exact.WORD_BITS` = 26 bits that are
carried at the very end (:func:`~actreg_dispatch.sums.exact.sum_of_words`). An integer of at most 54
bits, moved by at most 25, adds less than 2²⁷ to three words. Of one element there are at most 27 of
them, or four sums of 63 bits for a tile, which add less, so that a word, of 63 bits and a sign,
holds those of ``MOST_TERMS`` = 2³⁰ elements, however short their tiles are.

**Weights.** A product of two numbers a and b of binary64 is h + l: h is a·b rounded towards 0, and
l = a·b − h is exact (fused multiply-add) and at least 0. So w·|x| is a sum of two such numbers. And
x² = h + l gives w·h and w·l, two each. They are the terms of tiles of their own, as |x| in binary64
is. If a·b ≥ 2⁻⁹⁰⁰, l is a multiple of 2⁻¹⁰⁰⁵, which binary64 holds. An element of which a product
is smaller, or 2¹⁰⁰⁰ or more, is added as integers.

References
----------
.. [1] T. J. Dekker, "A floating-point technique for extending the available precision",
   Numerische Mathematik 18, 1971.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba.extending import register_jitable

from actreg_dispatch.backends.numba.addresses import dense_row, new_block
from actreg_dispatch.backends.numba.bits import (
    as_float,
    as_int,
    exponent_of,
    extremes,
    multiply_add,
    power_of_two,
    value_of,
)
from actreg_dispatch.backends.numba.rows import absolute, named, plus, square
from actreg_dispatch.dtypes import FLOAT64
from actreg_dispatch.sums.certified import HIGHEST_EXPONENT, LOWEST_EXPONENT
from actreg_dispatch.sums.exact import INFINITIES, NANS, UNIT, WORD_BITS

__all__ = [
    "EXACT_TERMS",
    "MOST_TERMS",
    "add_products",
    "no_tile",
    "sum_exactly",
    "tile_of",
]

EXACT_TERMS = 1 << 11
_REACH = 240
MOST_TERMS = 1 << 30
_WORD, _LIMB = (1 << WORD_BITS) - 1, (1 << 18) - 1
_LEAST, _MOST = 2.0**-900, 2.0**1000  # of a product that is split
_REAL = np.float64


@cache
def tile_of(degree: int, dtype: np.dtype[Any]) -> Any:
    """Return the compiled function that adds Σ|x| or Σx² over a tile to words, exactly.

    It takes the tile, its largest and smallest magnitude, and the words.
    """
    magnitude: Any = square if degree == 2 else absolute
    digits = 53 if dtype == FLOAT64 else 24 * degree
    has_excess, may_be_short = dtype == FLOAT64 and degree == 2, digits == 24
    extract_all, extract_some = (_extraction(magnitude, has_excess, some) for some in (False, True))

    def add_tile(xs, largest, smallest, words):  # type: ignore[no-untyped-def]
        if largest == 0.0:
            return
        smallest_exponent = exponent_of(magnitude(smallest, 1.0)[0])
        above = math.nan  # of what is left, terms are not at least this; NaN: everything is left
        end = max(LOWEST_EXPONENT, exponent_of(magnitude(largest, 1.0)[0]) - _REACH)
        while largest != 0.0:
            exponent = exponent_of(magnitude(largest, 1.0)[0])
            if not end <= exponent <= HIGHEST_EXPONENT:
                break
            span = exponent - smallest_exponent
            anchor, excess_anchor = power_of_two(exponent + 2), 1.5 * power_of_two(exponent - 51)
            least = power_of_two(exponent - (94 - digits))
            if may_be_short and span <= 51 - digits and above != above:
                high, low, excess_high, excess_low = 0, 0.0, 0, 0.0
                for j in range(xs.size):
                    high += as_int(magnitude(value_of(xs[j]), 1.0)[0] + anchor)
                high -= xs.size * as_int(anchor)
            elif span <= 94 - digits and above != above:
                high, low, excess_high, excess_low = extract_all(
                    xs, anchor, excess_anchor, least, above
                )
            else:
                high, low, excess_high, excess_low = extract_some(
                    xs, anchor, excess_anchor, least, above
                )
            _add_integer(words, high, exponent - 50 - UNIT)
            _add_number(words, low)
            if has_excess:
                _add_integer(words, -excess_high, exponent - 103 - UNIT)
                _add_number(words, -excess_low)
            if span <= 94 - digits:
                return
            above = least
            largest = _largest_left(xs, magnitude, above)
        for j in range(xs.size):
            if not magnitude(value_of(xs[j]), 1.0)[0] >= above:
                _add_element(words, xs[j], degree)

    return register_jitable(named(add_tile, degree, dtype))


def _extraction(magnitude: Any, has_excess: bool, some: bool) -> Any:
    """Return the compiled extraction of all terms, or of ``some``, from least on but not above."""

    def extract(xs, anchor, excess_anchor, least, above):  # type: ignore[no-untyped-def]
        high, low, excess_high, excess_low = 0, 0.0, 0, 0.0
        for j in range(xs.size):
            term, excess = magnitude(value_of(xs[j]), 1.0)
            if some and (term < least or term >= above):
                term, excess = 0.0, 0.0
            anchored = term + anchor
            high += as_int(anchored)
            low = plus(low, term - (anchored - anchor))
            if has_excess:
                anchored = excess + excess_anchor
                excess_high += as_int(anchored)
                excess_low = plus(excess_low, excess - (anchored - excess_anchor))
        high -= xs.size * as_int(anchor)
        excess_high -= xs.size * as_int(excess_anchor)
        return high, low, excess_high, excess_low

    return register_jitable(named(extract, magnitude.__name__, has_excess, some))


@register_jitable
def _largest_left(xs, magnitude, above):  # type: ignore[no-untyped-def]
    """Return the largest magnitude whose term is less than ``above``."""
    largest = 0
    for j in range(xs.size):
        value = value_of(xs[j])
        bits = as_int(abs(value)) if magnitude(value, 1.0)[0] < above else 0
        largest = max(largest, bits)
    return as_float(largest)


@register_jitable
def no_tile(xs, largest, smallest, words):  # type: ignore[no-untyped-def]
    """Stand in for a second sum where there is none."""


@register_jitable
def sum_exactly(x, first, first_words, second, second_words):  # type: ignore[no-untyped-def]
    """Add the terms along a row to words, of one sum or of two."""
    for start in range(0, x.size, EXACT_TERMS):
        xs = x[start : start + EXACT_TERMS]
        largest, smallest = extremes(xs)
        first(xs, largest, smallest, first_words)
        second(xs, largest, smallest, second_words)


@register_jitable
def _add_element(words, x, degree):  # type: ignore[no-untyped-def]
    magnitude = abs(value_of(x))
    if not math.isfinite(magnitude):
        words[INFINITIES if magnitude == math.inf else NANS] += 1
        return
    m, shift = _decoded(magnitude)
    shift = degree * (shift - 1074) - UNIT
    if degree == 1:
        _add_integer(words, m, shift)
    else:
        low, high = m & _WORD, m >> WORD_BITS
        _add_integer(words, low * low, shift)
        _add_integer(words, 2 * low * high, shift + WORD_BITS)
        _add_integer(words, high * high, shift + 2 * WORD_BITS)


@register_jitable
def _add_number(words, number):  # type: ignore[no-untyped-def]
    """Add a finite number of binary64."""
    m, shift = _decoded(number)
    _add_integer(words, -m if number < 0.0 else m, shift - 1074 - UNIT)


@register_jitable
def _decoded(number):  # type: ignore[no-untyped-def]
    """Return integers m and shift of a magnitude ``m * 2**(shift - 1074)``, ``m < 2**53``."""
    bits = as_int(number)
    exponent, m = (bits >> 52) & 2047, bits & ((1 << 52) - 1)
    return (m, exponent) if exponent == 0 else (m | 1 << 52, exponent - 1)


@register_jitable
def _add_integer(words, m, shift):  # type: ignore[no-untyped-def]
    """Add ``m * 2**shift`` units; only the last of three pieces has a sign, if ``m`` has."""
    k, left = divmod(shift, WORD_BITS)
    words[k] += (m << left) & _WORD
    words[k + 1] += (m >> (WORD_BITS - left)) & _WORD
    words[k + 2] += m >> (2 * WORD_BITS - left)


# Weights.


@register_jitable
def add_products(xs, ws, degree, tile, words):  # type: ignore[no-untyped-def]
    """Add w·|x| or w·x² along a row to words, by tiles of binary64."""
    room = new_block()
    for start in range(0, xs.size, EXACT_TERMS):
        count = min(EXACT_TERMS, xs.size - start)
        size = 8 * count
        high, low = dense_row(_REAL, room, count, 8), dense_row(_REAL, room + size, count, 8)
        more = dense_row(_REAL, room + 2 * size, count, 8)
        least = dense_row(_REAL, room + 3 * size, count, 8)
        for j in range(count):
            value, w = abs(value_of(xs[start + j])), _REAL(ws[start + j])
            if degree == 1:
                high[j], low[j] = _product(w, value)
                more[j] = least[j] = 0.0
                exact = _in_range(high[j])
            else:
                square, rest = _product(value, value)
                high[j], low[j] = _product(w, square)
                more[j], least[j] = _product(w, rest)
                exact = _in_range(square) and _in_range(high[j])
                exact = exact and (rest == 0.0 or _in_range(more[j]))
            if not exact:
                high[j] = low[j] = more[j] = least[j] = 0.0
                if not (w == 0.0 or (value == 0.0 and 0.0 < w < math.inf)):
                    _add_product(words, value, w, degree)
        for row in (high, low, more, least):
            largest, smallest = extremes(row)
            tile(row, largest, smallest, words)


@register_jitable
def _product(a, b):  # type: ignore[no-untyped-def]
    """Return a·b rounded towards 0, and what is left; both >= 0."""
    high = a * b
    if multiply_add(a, b, -high) < 0.0:
        high = as_float(as_int(high) - 1)
    return high, multiply_add(a, b, -high)


@register_jitable
def _in_range(product):  # type: ignore[no-untyped-def]
    return _LEAST <= product < _MOST


@register_jitable
def _add_product(words, value, w, degree):  # type: ignore[no-untyped-def]
    """Add w·value or w·value², w not 0, in limbs of 18 bits; a bad weight is NaN."""
    if not (0.0 < w < math.inf) or value != value:
        words[NANS] += 1
    elif value == math.inf:
        words[INFINITIES] += 1
    else:
        m, shift = _decoded(value)
        n, w_shift = _decoded(w)
        shift = degree * (shift - 1074) + w_shift - 1074 - UNIT
        for i in range(0, 54, 18):
            for j in range(0, 54, 18):
                product = (n >> i & _LIMB) * (m >> j & _LIMB)
                if degree == 1:
                    _add_integer(words, product, shift + i + j)
                else:
                    for k in range(0, 54, 18):
                        _add_integer(words, product * (m >> k & _LIMB), shift + i + j + k)
