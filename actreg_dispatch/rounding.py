"""The numerical promise: sums of any order, rounded as if they were exact.

Let S be Σ|x| or Σx² over the reals. The penalty is ``RN_T(λ · RN64(S))``, or ``RN_T(λ · √RN64(S))``
for L2, and L2's gradient divides by ``RN_T(√RN64(S))`` where ``RN64(S)`` is above ``epsilon``: all
of it is a function of ``RN64(S)``, S rounded to 53 bits with unbounded exponent. A backend sums
fast, in any order; here it is decided whether that was accurate enough, and if not, the sum is
done again in integers. This is Ziv's rounding test [3]_, applied to sums.

**The test.** A computed pair (hi, lo) with ``|hi + lo − S| ≤ β·S`` brackets S. Every step from S to
the results is monotone: rounding, multiplication by λ ≥ 0, the square root, the comparison. So if
both ends of the bracket give the same results, S gives them too, and so does any other order of
summation. :func:`certified` evaluates both ends.

**The bounds β**, for N terms ≥ 0 and u = 2⁻⁵³. A backend adds at most ``LANE_TERMS`` = 2¹³ terms
to one lane, in whatever order, and merges lanes, blocks and views by :func:`merge_pairs`. That
has a relative error below 4u² (its proof is there), and none if one side is empty, so fewer than 3N
merges cost anything: together less than N·2⁻¹⁰².

* *Plain lanes*: each addition has a relative error of at most u and what it adds to is a sum of at
  most 2¹³ of the terms, so a lane is off by at most 2¹³·u·(1 + 2¹⁴·u) < 2⁻³⁹ of itself. Squares of
  16- and 32-bit floats are exact in binary64. :data:`PLAIN_BOUND` is 2⁻³⁸, which leaves 2⁻³⁹ for
  the merges, enough for N < 2⁶³.
* *Compensated lanes*: hi takes every term by TwoSum, whose error is exact and at most u times a
  sum ≤ S, as is the error of TwoProduct; lo adds up these two. So lo stays below 2·2¹³·u of the
  lane, and its 2·2¹³ additions lose at most u times that each: 2²⁸·u² = 2⁻⁷⁸ of the lane. The first
  merge of a lane has an unnormalized lo, which costs 2u·2¹⁴·u more, below 2⁻⁹⁰. Hence
  :func:`compensated_bound`, 2⁻⁷⁷ + N·2⁻¹⁰².

Both hold unless a term or a sum leaves binary64's range, which :func:`certified` watches:
TwoProduct is exact for a square ≥ 2⁻⁹⁶⁸, smaller ones lose less than 2⁻¹⁰⁷⁰ each, nothing beside an
S ≥ 2⁻⁹⁰⁰, and an overflow shows as an infinite hi.

Which of several NaN survives, its sign and its payload, is left open, as IEEE 754 leaves it.

:func:`two_sum`, :func:`two_product` and :func:`merge_pairs` are plain Python on plain numbers.
The Numba backend compiles these same functions, so the arithmetic is written down once.

References
----------
.. [1] T. J. Dekker, "A floating-point technique for extending the available precision",
   Numerische Mathematik 18, 1971.
.. [2] D. E. Knuth, The Art of Computer Programming 2, section 4.2.2 (TwoSum).
.. [3] A. Ziv, "Fast evaluation of elementary mathematical functions with correctly rounded last
   bit", ACM Transactions on Mathematical Software 17, 1991.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import numpy as np

from actreg_dispatch.norms import ActivityNorm

__all__ = [
    "COMPUTE_DTYPES",
    "LANE_TERMS",
    "NATIVE_DTYPES",
    "PLAIN_BOUND",
    "DoubleDouble",
    "ExactSum",
    "Outcome",
    "certified",
    "compensated_bound",
    "compute_dtype",
    "exact_outcome",
    "exact_sum",
    "merge_pairs",
    "outcome_of",
    "round_to",
    "two_product",
    "two_sum",
]

FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)

NATIVE_DTYPES: set[np.dtype[Any]] = {FLOAT16, FLOAT32, FLOAT64}
"""Supported dtypes in native byte order; bfloat16 joins them when it is first met."""

COMPUTE_DTYPES: dict[np.dtype[Any], np.dtype[Any]] = {
    stored: FLOAT64 if dtype is FLOAT64 else FLOAT32
    for dtype in NATIVE_DTYPES
    for stored in (dtype, dtype.newbyteorder("S"))
}
"""Supported dtype of the activations -> dtype T that gradient and penalty are computed in."""

LANE_TERMS = 8192
PLAIN_BOUND = 2.0**-38

Real = TypeVar("Real", float, np.ndarray[Any, np.dtype[np.float64]])

_SPLIT = 134217729.0  # 2**27 + 1 halves a 53-bit significand (Dekker)
_SMALLEST = 2.0**-900  # smaller sums of squares may have lost terms to underflow


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """Return the compute dtype T of activations of ``dtype``, or None if it is not supported."""
    known = COMPUTE_DTYPES.get(dtype)
    if known is None and "ml_dtypes" in sys.modules:  # bfloat16 is not NumPy's own
        bfloat16 = np.dtype(sys.modules["ml_dtypes"].bfloat16)
        if dtype == bfloat16:
            NATIVE_DTYPES.add(bfloat16)
            known = COMPUTE_DTYPES[bfloat16] = FLOAT32
    return known


def two_sum(a: Real, b: Real) -> tuple[Real, Real]:
    """Return ``s = fl(a + b)`` and ``e`` with ``s + e == a + b`` exactly (Knuth)."""
    s = a + b
    b_rounded = s - a
    return s, (a - (s - b_rounded)) + (b - b_rounded)


def two_product(a: Real, b: Real) -> tuple[Real, Real]:
    """Return ``p = fl(a * b)`` and ``e`` with ``p + e == a * b`` exactly (Dekker).

    Exact as long as no part overflows or is subnormal: ``|a|, |b| < 2**996`` and
    ``2**-968 <= |a * b| < 2**1023``.
    """
    p = a * b
    t = _SPLIT * a
    a_high = t - (t - a)
    a_low = a - a_high
    t = _SPLIT * b
    b_high = t - (t - b)
    b_low = b - b_high
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


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


class DoubleDouble(NamedTuple):
    """The partial sum ``hi + lo`` of |x| or x² over a piece of the activations.

    ``hi`` is the sum rounded to binary64, ``lo`` what that rounding left over.

    Examples
    --------
    >>> DoubleDouble(2.0**53).merge(DoubleDouble(1.0))
    DoubleDouble(hi=9007199254740992.0, lo=1.0)
    """

    hi: float = 0.0
    lo: float = 0.0

    def merge(self, other: DoubleDouble) -> DoubleDouble:
        """Return the partial sum of both pieces together."""
        return DoubleDouble(*merge_pairs(self.hi, self.lo, other.hi, other.lo))


class Outcome(NamedTuple):
    """All that depends on the sum: rounded once it is known, or known to be rounded right."""

    penalty: float  # a value of T
    divisor: float  # ‖x‖, a value of T; 0 for other norms than L2
    has_gradient: bool  # False where L2 is at most epsilon


def compensated_bound(size: int) -> float:
    """Return the relative error bound of a sum of ``size`` terms in compensated lanes."""
    return 2.0**-77 + size * 2.0**-102


def certified(
    total: DoubleDouble,
    bound: float,
    norm: ActivityNorm,
    lam: float,
    compute: np.dtype[Any],
    epsilon: float,
) -> Outcome | None:
    """Return what the sum leads to if ``total``, off by ``bound`` times itself, decides it.

    None means that the exact sum is needed: the bracket straddles a rounding boundary, or
    binary64's range was left. A sum that is NaN, or infinite in float32, is what it is.
    """
    hi, lo = total
    if hi != hi or (hi == math.inf and compute == FLOAT32):
        return outcome_of(hi, norm, lam, compute, epsilon)
    if hi == math.inf or (hi < _SMALLEST and norm is not ActivityNorm.L1 and compute == FLOAT64):
        return None
    margin = 2.0 * bound * hi  # twice, to cover the rounding of what follows and of hi + lo
    low, high = hi + (lo - margin), hi + (lo + margin)
    outcome = outcome_of(low, norm, lam, compute, epsilon)
    if low != high and outcome != outcome_of(high, norm, lam, compute, epsilon):
        return None
    return outcome


def outcome_of(
    total: float | Fraction,
    norm: ActivityNorm,
    lam: float,
    compute: np.dtype[Any],
    epsilon: float,
) -> Outcome:
    """Return what the rounded sum ``RN64(S)`` leads to.

    The expressions are evaluated in binary64 and rounded to T once, at the end. ``total`` is a
    Fraction where it lies outside binary64's normal range.
    """
    if norm is ActivityNorm.L2:
        root = _root(total) if isinstance(total, Fraction) else math.sqrt(total)
        penalty, divisor = lam * root, _rounded(compute, root)
    elif isinstance(total, Fraction):
        penalty, divisor = _binary64(Fraction(lam) * total), 0.0
    else:
        penalty, divisor = lam * total, 0.0
    has_gradient = norm is not ActivityNorm.L2 or not total <= epsilon
    return Outcome(_rounded(compute, penalty), divisor, has_gradient)


def round_to(dtype: np.dtype[Any], value: float) -> np.floating[Any]:
    """Round a binary64 number to ``dtype``, once, to nearest-even; too large becomes infinite."""
    scalar = dtype.type
    if dtype == FLOAT32 and abs(value) > 3.4028234663852886e38:  # NumPy would warn of overflow
        with np.errstate(over="ignore"):
            return scalar(value)  # type: ignore[no-any-return]
    return scalar(value)  # type: ignore[no-any-return]


def _rounded(compute: np.dtype[Any], value: float) -> float:
    return value if compute == FLOAT64 else float(round_to(compute, value))


# Exactly, in integers.


class ExactSum:
    """The exact partial sum of |x| or x² over pieces of the activations, an integer and a scale.

    Parameters
    ----------
    norm : ActivityNorm
        ``L1`` for Σ|x|, another for Σx².

    Notes
    -----
    A binary64 magnitude is ``m · 2**(e - 1075)`` with ``m < 2**53`` and ``1 <= e < 2047``. The
    significands, or their squares, are cut into limbs of 27 bits, and the limbs of one exponent
    are summed: a sum of 2¹⁶ numbers below 2²⁸ is exact in binary64, in any order.
    """

    _CHUNK = 1 << 16

    def __init__(self, norm: ActivityNorm) -> None:
        self._degree = 1 if norm is ActivityNorm.L1 else 2
        self._total = 0  # in units of 2**-1074, or of its square
        self._special = 0.0  # infinity or NaN, once met

    def add(self, array: np.ndarray[Any, Any]) -> None:
        """Add the terms of all elements of ``array``, of any supported dtype and strides."""
        with np.errstate(invalid="ignore"):  # a signaling NaN is a NaN
            if array.dtype.kind == "V":  # ml_dtypes' bfloat16, which nditer does not cast
                array = array.astype(FLOAT32)
            chunks: Iterable[Any] = np.nditer(
                array,
                flags=["buffered", "external_loop", "zerosize_ok"],
                op_dtypes=[FLOAT64],
                buffersize=self._CHUNK,
            )
            for chunk in chunks:
                for start in range(0, chunk.size, self._CHUNK):  # unbuffered if contiguous
                    self._add_chunk(np.abs(chunk[start : start + self._CHUNK]))

    def _add_chunk(self, magnitudes: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        largest = float(magnitudes.max(initial=0.0))
        if not math.isfinite(largest):
            self._special += largest  # NaN stays NaN, and infinity plus NaN is NaN
            return
        if largest == 0.0:
            return
        bits, stored = magnitudes.view(np.uint64), np.uint64(52)
        exponents = (bits >> stored).astype(np.intp)
        leading = (exponents > 0).astype(np.uint64) << stored  # implied, but in subnormal numbers
        significands = leading | (bits & np.uint64(2**52 - 1))
        shifts = np.maximum(exponents, 1) - 1
        half, mask = np.uint64(27), np.uint64(2**27 - 1)
        low, high = significands & mask, significands >> half
        limbs = [low, high]
        if self._degree == 2:
            ends, middle, top = low * low, np.uint64(2) * low * high, high * high
            limbs = [
                ends & mask,
                (ends >> half) + (middle & mask),
                (middle >> half) + (top & mask),
                top >> half,
            ]
        for place, limb in enumerate(limbs):
            sums = np.bincount(shifts, limb.astype(np.float64))
            for shift in np.flatnonzero(sums).tolist():
                self._total += int(sums[shift]) << (self._degree * shift + 27 * place)

    def rounded(self) -> float | Fraction:
        """Return the sum rounded to 53 bits: ``RN64(S)``, a Fraction outside the normal range."""
        if self._special:
            return self._special
        value = self._value()
        if not value:
            return 0.0
        exponent = self._total.bit_length() - 1074 * self._degree
        if -1021 < exponent < 1024:
            return float(value)
        scale = Fraction(2) ** exponent
        return Fraction(float(value / scale)) * scale

    def pair(self) -> DoubleDouble:
        """Return the sum as a double-double: ``hi`` rounded from it, ``lo`` from the rest."""
        if self._special:
            return DoubleDouble(self._special)
        value = self._value()
        hi = _binary64(value)
        return DoubleDouble(hi, _binary64(value - Fraction(hi)) if hi < math.inf else 0.0)

    def _value(self) -> Fraction:
        return Fraction(self._total, 1 << 1074 * self._degree)


def exact_sum(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> ExactSum:
    """Return Σ|x| for ``L1``, Σx² for the others, of one array."""
    total = ExactSum(norm)
    total.add(activations)
    return total


def exact_outcome(
    activations: np.ndarray[Any, Any], norm: ActivityNorm, lam: float, epsilon: float
) -> Outcome:
    """Return what the exact sum of ``activations`` leads to."""
    total = exact_sum(activations, norm).rounded()
    return outcome_of(total, norm, lam, COMPUTE_DTYPES[activations.dtype], epsilon)


def _binary64(value: Fraction) -> float:
    """Round to binary64, subnormal numbers and infinity included."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _root(value: Fraction) -> float:
    """Return √value rounded to binary64 once."""
    shift = max(0, 140 - value.numerator.bit_length() + value.denominator.bit_length())
    shift += shift % 2
    scaled = (value.numerator << shift) // value.denominator
    floor = math.isqrt(scaled)  # of at least 69 bits; an odd last bit stands for what is cut off
    inexact = floor * floor * value.denominator != value.numerator << shift
    return _binary64(Fraction(2 * floor + inexact, 2 << shift // 2))
