"""The numerical promise: sums of any order, rounded as if they were exact.

Let S be Σ|x| or Σx² over the reals, and ``RN64(S)`` S rounded to 53 bits with unbounded exponent.
All that a :class:`~actreg_dispatch.norms.Norm` makes of its sums, the penalty, the coefficients of
the gradient and whether there is one, is a function of ``RN64(S)``, or of ``RN64(S₁)`` and
``RN64(S₂)``, evaluated in binary64 and rounded to T once. A backend sums fast, in any order; here
it is decided whether that was accurate enough, and if not, the sum is done again exactly. This
is Ziv's rounding test [3]_, applied to sums.

**The test.** A computed pair (hi, lo) with ``|hi + lo − S| ≤ β·S`` brackets S. Rounding is
monotone, and what a norm computes is monotone in each sum, in either direction. So the extremes of
each result over the brackets are at their corners, two for one sum and four for two; if all corners
give the same results, the exact sums give them too, and so does any other order of summation.
:func:`certified_one` and :func:`certified_two` evaluate the corners.

**The bounds β**, for N terms ≥ 0 and u = 2⁻⁵³. A backend adds up tiles of the array in one of the
two ways below and merges tiles, blocks and views by :func:`merge_pairs`. That has a relative error
below 4u² (its proof is there), and none if one side is empty, so fewer than 2N merges cost
anything: together less than N·2⁻¹⁰³.

* *Plain tiles*, for 16- and 32-bit floats, whose squares are exact in binary64, hold at most
  ``PLAIN_TERMS`` = 2¹³ terms. The compiler adds them up in whatever tree suits its vectors. A term
  passes through fewer than 2¹³ additions, each off by at most u of a sum that is at most the
  tile's, so the tile is off by less than 2¹³·u·(1 + 2¹⁴·u) < 2⁻³⁹·⁹ of itself. A weight in
  binary32 times |x| is exact, too; times x² it is off by at most u, as by one more addition.
* *Anchored tiles*, for float64, hold at most ``ANCHORED_TERMS`` = 2¹⁰ terms. Let the largest of
  the rounded terms p lie in [2ᵉ, 2ᵉ⁺¹) and the anchor be M = 2ᵉ⁺¹⁰. Then ``h = (p + M) − M`` is p
  rounded to a multiple of ulp(M) = 2ᵉ⁻⁴², and ``p − h`` is exact (FastTwoSum [1]_, as M > p).
  The sum of the h is a multiple of 2ᵉ⁻⁴² that never exceeds 2ᵉ⁺¹¹, so it needs at most 53 bits and
  is exact in any tree. What a fused multiply-add tells of the rounding of a square is added to
  p − h, which leaves remainders of at most 2ᵉ⁻⁴³·(1 + 2⁻⁸). Their own rounding costs less than
  2ᵉ⁻⁸⁵ in all, and adding up 2¹⁰ of them in any tree less than 2¹⁰·u·2¹⁰·2ᵉ⁻⁴³·(1 + 2⁻⁷), together
  less than 2ᵉ⁻⁷⁵·⁹. As the tile's sum is at least 2ᵉ·(1 − u), that is below 2⁻⁷⁵·⁸ of it. This is
  the error-free extraction of Rump, Ogita and Oishi [4]_. It takes 2⁻⁹⁰⁰ ≤ p < 2¹⁰¹⁴: the anchor
  must not overflow, and the remainder of a square is exact only if the square is ≥ 2⁻⁹⁶⁸ (smaller
  ones lose less than 2⁻¹⁰⁷⁰ each, nothing compared with 2⁻⁹⁰⁰). The sum of a tile whose largest
  term lies outside is made infinite, unless it is 0.
* *Weights in anchored tiles.* w·|x| is a product as x² is, and what is said of that holds. Of w·x²,
  the term is p = RN(w·q) with q = RN(x²). Fused multiply-adds tell w·q − p and x² − q; this is
  multiplied by w. Both are at most u·p, so that remainders stay below 2ᵉ⁻⁴³·(1 + 2⁻⁸). To multiply
  and to add both is off by less than 3u²·p, for a tile less than 2ᵉ⁻⁹³. Where q is so small that
  x² − q is not exact, that is off by less than 2⁻¹⁰⁷², times w < ``MOST_WEIGHT``: for a tile less
  than 2⁻⁹⁹⁸.

:data:`PLAIN_BOUND` = 2⁻³⁸ leaves room for the merges of N < 2⁶³ terms; :func:`anchored_bound`
is 2⁻⁷⁵ + N·2⁻¹⁰². An infinite sum decides nothing, and is done again exactly.

Which of several NaN survives, its sign and its payload, is left open, as IEEE 754 leaves it.

:func:`two_sum` [2]_, :func:`merge_pairs`, :func:`certified_one` and :func:`certified_two` are plain
Python on plain numbers. The Numba backend compiles these same functions, so the arithmetic is
written down once.

References
----------
.. [1] T. J. Dekker, "A floating-point technique for extending the available precision",
   Numerische Mathematik 18, 1971.
.. [2] D. E. Knuth, The Art of Computer Programming 2, section 4.2.2 (TwoSum).
.. [3] A. Ziv, "Fast evaluation of elementary mathematical functions with correctly rounded last
   bit", ACM Transactions on Mathematical Software 17, 1991.
.. [4] S. M. Rump, T. Ogita and S. Oishi, "Accurate floating-point summation part I: faithful
   rounding", SIAM Journal on Scientific Computing 31, 2008.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from actreg_dispatch.dtypes import FLOAT64, round_to
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants

__all__ = [
    "ANCHORED_TERMS",
    "HIGHEST_EXPONENT",
    "LOWEST_EXPONENT",
    "MOST_WEIGHT",
    "NEEDS_EXACT_SUM",
    "NOT_HANDLED",
    "PLAIN_BOUND",
    "PLAIN_TERMS",
    "Outcome",
    "anchored_bound",
    "certified_one",
    "certified_two",
    "merge_pairs",
    "merge_totals",
    "round_if_certain",
    "two_sum",
]

PLAIN_TERMS = 1 << 13
PLAIN_BOUND = 2.0**-38
ANCHORED_TERMS = 1 << 10
LOWEST_EXPONENT, HIGHEST_EXPONENT = -900, 1013
"""Of the largest term of an anchored tile."""
MOST_WEIGHT = 2.0**64
"""Weights of squares in anchored tiles are less than this; the rest is summed exactly."""

NOT_HANDLED = -1.0
"""In place of a penalty: nothing has been done."""
NEEDS_EXACT_SUM = -2.0
"""In place of a penalty: all is written, but the penalty takes an exact sum."""

Real = TypeVar("Real", float, np.ndarray[Any, np.dtype[np.float64]])


class Outcome(NamedTuple):
    """All that depends on the sums, in values of T."""

    penalty: float
    coefficients: tuple[float, ...]
    has_gradient: bool


def anchored_bound(size: int) -> float:
    """Return the relative error bound of a sum of ``size`` terms in anchored tiles."""
    return 2.0**-75 + size * 2.0**-102


def two_sum(a: Real, b: Real) -> tuple[Real, Real]:
    """Return ``s = fl(a + b)`` and ``e`` with ``s + e == a + b`` exactly (Knuth)."""
    s = a + b
    b_rounded = s - a
    return s, (a - (s - b_rounded)) + (b - b_rounded)


def merge_pairs(a_hi: float, a_lo: float, b_hi: float, b_lo: float) -> tuple[float, float]:
    """Return the pair for ``(a_hi + a_lo) + (b_hi + b_lo)``, normalized: ``hi = fl(hi + lo)``.

    For sums a, b ≥ 0 in normalized pairs the relative error is below 4u², u = 2⁻⁵³: TwoSum is
    exact, ``a_lo + b_lo`` is at most u(a + b) and so is off by u²(a + b), adding ``e`` to it is
    off by 2u²(a + b), and the normalization is exact. A sum that is not finite is its ``hi``, with
    ``lo`` 0: the error terms of an infinite sum are NaN and mean nothing.
    """
    s, e = two_sum(a_hi, b_hi)
    e += a_lo + b_lo
    hi = s + e if math.isfinite(s) else s
    return hi, e - (hi - s) if math.isfinite(hi) else 0.0


def certified_one(
    total: tuple[float, ...],
    bound: float,
    evaluate: Callable[..., Any],
    agree: Callable[[Any, Any], bool],
    lam: Any,
    gradient_lam: Any,
    epsilon: float,
    real: Callable[[float], Any],
) -> tuple[Any, bool]:
    """Return what ``evaluate`` makes of the sum ``total``, a pair, and whether that is certain.

    It is if the sum cannot be infinite and ``bound``, its relative error, leaves no other results
    possible.

    Parameters
    ----------
    total : tuple
        hi and lo.
    bound : float
        β.
    evaluate : callable
        :attr:`Norm.evaluate <actreg_dispatch.norms.Norm.evaluate>`; its further arguments follow.
    agree : callable
        Whether two results are the same: ``Norm.agree``.
    """
    hi, lo = total
    margin = 2.0 * bound * hi  # twice, to cover the rounding of what follows and of hi + lo
    below, above = hi + (lo - margin), hi + (lo + margin)
    found = evaluate((below,), lam, gradient_lam, epsilon, real)
    certain = agree(found, evaluate((above,), lam, gradient_lam, epsilon, real))
    return found, certain and math.isfinite(above)


def certified_two(
    total: tuple[float, ...],
    bound: float,
    evaluate: Callable[..., Any],
    agree: Callable[[Any, Any], bool],
    lam: Any,
    gradient_lam: Any,
    epsilon: float,
    real: Callable[[float], Any],
) -> tuple[Any, bool]:
    """Do :func:`certified_one` for a norm of two sums, whose ``total`` are two pairs."""
    hi, lo, second_hi, second_lo = total
    margin, second_margin = 2.0 * bound * hi, 2.0 * bound * second_hi
    below, above = hi + (lo - margin), hi + (lo + margin)
    second_below = second_hi + (second_lo - second_margin)
    second_above = second_hi + (second_lo + second_margin)
    found = evaluate((below, second_below), lam, gradient_lam, epsilon, real)
    certain = (
        agree(found, evaluate((above, second_above), lam, gradient_lam, epsilon, real))
        and agree(found, evaluate((below, second_above), lam, gradient_lam, epsilon, real))
        and agree(found, evaluate((above, second_below), lam, gradient_lam, epsilon, real))
    )
    return found, certain and math.isfinite(above) and math.isfinite(second_above)


def round_if_certain(
    total: tuple[float, ...],
    size: int,
    dtype: np.dtype[Any],
    norm: Norm,
    constants: Constants,
) -> Outcome | None:
    """Return what the norm makes of a quick sum of ``size`` terms, or None if that is uncertain.

    The terms are those of the tiles above, merged in any order; ``dtype`` is T. ``total`` is a
    pair for each sum of the norm.
    """
    bound = anchored_bound(size) if dtype == FLOAT64 else PLAIN_BOUND
    certified = certified_one if len(norm.terms) == 1 else certified_two

    def real(value: float) -> float:
        return float(round_to(dtype, value))

    options = bound, norm.evaluate, norm.agree, *constants, real
    try:
        with np.errstate(invalid="ignore"):  # of a square root
            found, certain = certified(total, *options)
    except ZeroDivisionError:  # of Python's floats, which otherwise go on as NumPy's
        return None
    return Outcome(*found) if certain else None


def merge_totals(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
    """Return the quick sum of two pieces, pair by pair, by :func:`merge_pairs`."""
    merged: tuple[float, ...] = ()
    for k in range(0, len(a), 2):
        merged += merge_pairs(a[k], a[k + 1], b[k], b[k + 1])
    return merged
