"""The numerical promise: sums of any order, rounded as if they were exact.

Let S be Σ|x| or Σx² over the reals. The penalty is ``RN_T(λ · RN64(S))``, or ``RN_T(λ · √RN64(S))``
for L2, and L2's gradient divides by ``RN_T(√RN64(S))`` where ``RN64(S)`` is above ``epsilon``: all
of it is a function of ``RN64(S)``, S rounded to 53 bits with unbounded exponent. ``L1_L2_SQUARED``
has two sums, and its penalty is ``RN_T(RN64(λ₁ · RN64(S₁)) + RN64(λ₂ · RN64(S₂)))``. A backend sums
fast, in any order; here it is decided whether that was accurate enough, and if not, the sum is
done again in integers. This is Ziv's rounding test [3]_, applied to sums.

**The test.** A computed pair (hi, lo) with ``|hi + lo − S| ≤ β·S`` brackets S. Every step from S to
the results is monotone: rounding, multiplication by λ ≥ 0, the square root, the comparison. So if
both ends of the bracket give the same results, S gives them too, and so does any other order of
summation. :func:`certified` evaluates both ends.

**The bounds β**, for N terms ≥ 0 and u = 2⁻⁵³. A backend adds up tiles of the array in one of the
two ways below and merges tiles, blocks and views by :func:`merge_pairs`. That has a relative error
below 4u² (its proof is there), and none if one side is empty, so fewer than 2N merges cost
anything: together less than N·2⁻¹⁰³.

* *Plain tiles*, for 16- and 32-bit floats, whose squares are exact in binary64, hold at most
  ``PLAIN_TERMS`` = 2¹³ terms. The compiler adds them up in whatever tree suits its vectors. A term
  passes through fewer than 2¹³ additions, each off by at most u of a sum that is at most the
  tile's, so the tile is off by less than 2¹³·u·(1 + 2¹⁴·u) < 2⁻³⁹·⁹ of itself.
* *Anchored tiles*, for float64, hold at most ``ANCHORED_TERMS`` = 2¹⁰ terms. Let the largest of
  the rounded terms p lie in [2ᵉ, 2ᵉ⁺¹) and the anchor be M = 2ᵉ⁺¹⁰. Then ``h = (p + M) − M`` is p
  rounded to a multiple of ulp(M) = 2ᵉ⁻⁴², and ``p − h`` is exact (Dekker's FastTwoSum, as M > p).
  The sum of the h is a multiple of 2ᵉ⁻⁴² that never exceeds 2ᵉ⁺¹¹, so it needs at most 53 bits and
  is exact in any tree. What a fused multiply-add tells of the rounding of a square is added to
  p − h, which leaves remainders of at most 2ᵉ⁻⁴³·(1 + 2⁻⁸). Their own rounding costs less than
  2ᵉ⁻⁸⁵ in all, and adding up 2¹⁰ of them in any tree less than 2¹⁰·u·2¹⁰·2ᵉ⁻⁴³·(1 + 2⁻⁷), together
  less than 2ᵉ⁻⁷⁵·⁹. As the tile's sum is at least 2ᵉ·(1 − u), that is below 2⁻⁷⁵·⁸ of it. This is
  the error-free extraction of Rump, Ogita and Oishi [4]_. It takes 2⁻⁹⁰⁰ ≤ p < 2¹⁰¹⁴: the anchor
  must not overflow, and the remainder of a square is exact only if the square is ≥ 2⁻⁹⁶⁸ (smaller
  ones lose less than 2⁻¹⁰⁷⁰ each, nothing beside 2⁻⁹⁰⁰). The sum of a tile whose largest term lies
  outside is made infinite, unless it is 0.

:data:`PLAIN_BOUND` = 2⁻³⁸ leaves room for the merges of N < 2⁶³ terms; :func:`anchored_bound`
is 2⁻⁷⁵ + N·2⁻¹⁰². An infinite sum decides nothing, and is done again in integers.

Which of several NaN survives, its sign and its payload, is left open, as IEEE 754 leaves it.

:func:`two_sum`, :func:`merge_pairs`, :func:`results_of`, :func:`certified` and
:func:`certified_both` are plain Python on plain numbers. The Numba backend compiles these same
functions, so the arithmetic is written down once.

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
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import numpy as np

from actreg_dispatch.norms import ActivityNorm

__all__ = [
    "ANCHORED_TERMS",
    "COMPUTE_DTYPES",
    "FLOAT16",
    "FLOAT32",
    "FLOAT64",
    "LIMB",
    "NATIVE_DTYPES",
    "PLAIN_BOUND",
    "PLAIN_TERMS",
    "REFUSED",
    "UNDECIDED",
    "Outcome",
    "PairedSum",
    "PartialSum",
    "anchored_bound",
    "certified",
    "certified_both",
    "compute_dtype",
    "decided",
    "degree_of",
    "exact_sum",
    "largest_lam",
    "limbs_of",
    "merge_pairs",
    "merge_totals",
    "results_of",
    "round_to",
    "two_sum",
    "units_of",
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

PLAIN_TERMS = 1 << 13
PLAIN_BOUND = 2.0**-38
ANCHORED_TERMS = 1 << 10

Real = TypeVar("Real", float, np.ndarray[Any, np.dtype[np.float64]])


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """Return the compute dtype T of activations of ``dtype``, or None if it is not supported."""
    known = COMPUTE_DTYPES.get(dtype)
    if known is None and "ml_dtypes" in sys.modules:  # bfloat16 is not NumPy's own
        bfloat16 = np.dtype(sys.modules["ml_dtypes"].bfloat16)
        if dtype == bfloat16:
            NATIVE_DTYPES.add(bfloat16)
            known = COMPUTE_DTYPES[bfloat16] = FLOAT32
    return known


def largest_lam(norm: ActivityNorm, dtype: np.dtype[Any]) -> float:
    """Return the largest λ, a value of T, whose gradient does not overflow before x is known."""
    doubled = norm in (ActivityNorm.L2_SQUARED, ActivityNorm.L1_L2_SQUARED)
    return float(np.finfo(dtype).max) / (2 if doubled else 1)


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


def results_of(
    total: float, lam: float, epsilon: float, root: bool, real: Callable[[float], Any]
) -> tuple[Any, Any, bool]:
    """Return what a rounded sum leads to: penalty, divisor, and whether there is a gradient.

    Parameters
    ----------
    total : float
        ``RN64(S)``.
    lam, epsilon : float
        λ, a value of T, and the sum of squares up to which L2 has no gradient.
    root : bool
        Whether the norm is L2. For the others the divisor is 0 and there always is a gradient.
    real : callable
        Rounds a binary64 number to T: the type itself, or a function.
    """
    if root:
        size = math.sqrt(total)
        return real(lam * size), real(size), not total <= epsilon
    return real(lam * total), real(0.0), True


def certified(
    hi: float,
    lo: float,
    bound: float,
    lam: float,
    epsilon: float,
    root: bool,
    real: Callable[[float], Any],
) -> tuple[Any, Any, bool, bool]:
    """Return :func:`results_of` the sum ``hi + lo``, and whether they are certain.

    They are if the sum is finite and ``bound``, its relative error, leaves no other results
    possible.
    """
    margin = 2.0 * bound * hi  # twice, to cover the rounding of what follows and of hi + lo
    penalty, divisor, gradient = results_of(hi + (lo - margin), lam, epsilon, root, real)
    penalty_above, divisor_above, gradient_above = results_of(
        hi + (lo + margin), lam, epsilon, root, real
    )
    certain = penalty == penalty_above and divisor == divisor_above and gradient == gradient_above
    return penalty, divisor, gradient, certain and math.isfinite(hi)


def certified_both(
    totals: tuple[float, ...],
    bound: float,
    lam: tuple[float, float],
    real: Callable[[float], Any],
) -> tuple[Any, bool]:
    """Return the penalty ``λ₁·Σ|x| + λ₂·Σx²``, and whether it is certain.

    ``totals`` are hi and lo of both sums, which are as for :func:`certified`. The penalty increases
    with either, so both are put at their lower ends, then at their upper ends.
    """
    first, second = totals[0], totals[2]
    first_margin, second_margin = 2.0 * bound * first, 2.0 * bound * second
    first_below = first + (totals[1] - first_margin)
    second_below = second + (totals[3] - second_margin)
    first_above = first + (totals[1] + first_margin)
    second_above = second + (totals[3] + second_margin)
    penalty = real(lam[0] * first_below + lam[1] * second_below)
    certain = penalty == real(lam[0] * first_above + lam[1] * second_above)
    return penalty, certain and math.isfinite(first) and math.isfinite(second)


REFUSED = -1.0
"""In place of a penalty: nothing has been done."""
UNDECIDED = -2.0
"""In place of a penalty: all is written, but the penalty takes an exact sum."""


class Outcome(NamedTuple):
    """All that depends on the sum, in values of T."""

    penalty: float
    divisor: float  # ‖x‖; 0 for other norms than L2
    has_gradient: bool  # False where L2 is at most epsilon


def round_to(dtype: np.dtype[Any], value: float) -> np.floating[Any]:
    """Round a binary64 number to ``dtype``, once, to nearest-even; too large becomes infinite."""
    scalar = dtype.type
    if dtype == FLOAT32 and abs(value) > 3.4028234663852886e38:  # NumPy would warn of overflow
        with np.errstate(over="ignore"):
            return scalar(value)  # type: ignore[no-any-return]
    return scalar(value)  # type: ignore[no-any-return]


def decided(
    total: tuple[float, ...],
    size: int,
    dtype: np.dtype[Any],
    norm: ActivityNorm,
    lam: Any,
    epsilon: float,
) -> Outcome | None:
    """Return what a quick sum of ``size`` terms leads to, or None if that takes the exact one.

    The terms are those of the tiles above, merged in any order; ``dtype`` is T. ``total`` is a
    pair, or two for ``L1_L2_SQUARED``.
    """
    bound = anchored_bound(size) if dtype == FLOAT64 else PLAIN_BOUND

    def real(value: float) -> np.floating[Any]:
        return round_to(dtype, value)

    if norm is ActivityNorm.L1_L2_SQUARED:
        penalty, certain = certified_both(total, bound, lam, real)
        return Outcome(float(penalty), 0.0, True) if certain else None
    penalty, divisor, has_gradient, certain = certified(
        total[0], total[1], bound, lam, epsilon, norm is ActivityNorm.L2, real
    )
    return Outcome(float(penalty), float(divisor), has_gradient) if certain else None


def merge_totals(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
    """Return the quick sum of two pieces, pair by pair, by :func:`merge_pairs`."""
    merged: tuple[float, ...] = ()
    for k in range(0, len(a), 2):
        merged += merge_pairs(a[k], a[k + 1], b[k], b[k + 1])
    return merged


# Exactly, in integers.

LIMB = 27
"""Bits of a limb: half of a significand, so that a product of two fits an integer of 64 bits."""


@dataclass(frozen=True)
class PartialSum:
    """The exact sum of |x| or x² over a piece of the activations.

    Partial sums add up with ``+`` or :func:`sum`, without rounding: whatever the pieces and
    whatever the order, the total is that of the whole. They can be compared, pickled and sent to
    other processes. ``float(total)`` is the sum rounded to binary64.

    Attributes
    ----------
    degree : int
        1 for a sum of |x|, 2 for a sum of x².
    dtype : numpy.dtype
        The compute dtype T of the activations.
    units : int
        The sum in units of ``2**(-1074 * degree)``.
    special : float
        Infinity or NaN, once met, else 0; then ``units`` are 0.

    Examples
    --------
    >>> from actreg_dispatch import ActivityRegularization
    >>> reg = ActivityRegularization.l2(1.0)
    >>> total = reg.partial_sum(np.array([3.0])) + reg.partial_sum(np.array([4.0]))
    >>> float(total), float(reg.finish(total))
    (25.0, 5.0)
    """

    degree: int
    dtype: np.dtype[Any]
    units: int = 0
    special: float = 0.0

    def __post_init__(self) -> None:
        if self.special:
            object.__setattr__(self, "units", 0)

    def __add__(self, other: PartialSum) -> PartialSum:
        """Return the sum over both pieces.

        Raises
        ------
        ValueError
            If the two are not of one norm and dtype.
        """
        if not isinstance(other, PartialSum):
            return NotImplemented
        if (self.degree, self.dtype) != (other.degree, other.dtype):
            raise ValueError(
                f"other sums |x|**{other.degree} for {other.dtype} penalties, this one "
                f"|x|**{self.degree} for {self.dtype}; add sums of one norm and one compute dtype"
            )
        units, special = self.units + other.units, self.special + other.special
        return PartialSum(self.degree, self.dtype, units, special)

    def __radd__(self, other: object) -> PartialSum:
        return self if other == 0 else NotImplemented  # where the built-in sum starts

    def __float__(self) -> float:
        return self.special or _binary64(self._value())

    def __repr__(self) -> str:
        power = "" if self.degree == 1 else f"**{self.degree}"
        return f"<PartialSum of |x|{power} for {self.dtype} penalties, about {float(self)!r}>"

    def rounded(self) -> float | Fraction:
        """Return the sum rounded to 53 bits: ``RN64(S)``, a Fraction outside the normal range."""
        value = self._value()
        exponent = self.units.bit_length() - 1074 * self.degree
        if self.special or not value or -1021 < exponent < 1024:
            return float(self)
        scale = Fraction(2) ** exponent
        return Fraction(float(value / scale)) * scale

    def outcome(self, norm: ActivityNorm, lam: Any, epsilon: float) -> Outcome:
        """Return what the sum leads to; ``lam`` is a value of T."""
        total, root = self.rounded(), norm is ActivityNorm.L2
        if isinstance(total, Fraction):
            size = _root(total) if root else 0.0
            penalty = lam * size if root else self.times(lam)
            results = self._real(penalty), self._real(size), not (root and total <= epsilon)
        else:
            results = results_of(total, lam, epsilon, root, self._real)
        penalty, divisor, has_gradient = results
        return Outcome(float(penalty), float(divisor), has_gradient)

    def times(self, lam: float) -> float:
        """Return λ times the rounded sum, rounded to binary64."""
        total = self.rounded()
        return _binary64(Fraction(lam) * total) if isinstance(total, Fraction) else lam * total

    def _real(self, value: float) -> Any:
        return round_to(self.dtype, value)

    def _value(self) -> Fraction:
        return Fraction(self.units, 1 << 1074 * self.degree)


@dataclass(frozen=True)
class PairedSum:
    """The exact sums of |x| and of x² over a piece of the activations.

    What :class:`PartialSum` is for the other norms, this is for ``L1_L2_SQUARED``: it adds up with
    ``+`` or :func:`sum`, without rounding.

    Attributes
    ----------
    absolute, squares : PartialSum
        The sums, of degree 1 and 2.
    """

    absolute: PartialSum
    squares: PartialSum

    def __post_init__(self) -> None:
        pair = self.absolute, self.squares
        if not all(isinstance(part, PartialSum) for part in pair):
            raise TypeError(
                f"absolute={self.absolute!r} and squares={self.squares!r} are not both a "
                f"PartialSum; pass sums such as partial_sum returns"
            )
        if [part.degree for part in pair] != [1, 2] or len({part.dtype for part in pair}) > 1:
            raise ValueError(
                f"absolute={self.absolute!r} and squares={self.squares!r} are no pair; "
                f"pass sums of |x| and of x², both of one compute dtype"
            )

    @classmethod
    def of(
        cls, activations: Any, partial_sum: Callable[[Any, ActivityNorm], PartialSum | PairedSum]
    ) -> PairedSum:
        """Return the two sums that ``partial_sum`` finds."""
        absolute = partial_sum(activations, ActivityNorm.L1)
        squares = partial_sum(activations, ActivityNorm.L2_SQUARED)
        assert isinstance(absolute, PartialSum)
        assert isinstance(squares, PartialSum)
        return cls(absolute, squares)

    def __add__(self, other: PairedSum) -> PairedSum:
        """Return the sums over both pieces."""
        if not isinstance(other, PairedSum):
            return NotImplemented
        return PairedSum(self.absolute + other.absolute, self.squares + other.squares)

    def __radd__(self, other: object) -> PairedSum:
        return self if other == 0 else NotImplemented

    def __repr__(self) -> str:
        about = f"about {float(self.absolute)!r} and {float(self.squares)!r}"
        return f"<PairedSum of |x| and |x|**2 for {self.dtype} penalties, {about}>"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The compute dtype T of the activations."""
        return self.absolute.dtype

    def outcome(self, norm: ActivityNorm, lam: Any, epsilon: float) -> Outcome:
        """Return what the sums lead to; ``lam`` is a pair of values of T."""
        penalty = self.absolute.times(lam[0]) + self.squares.times(lam[1])
        return Outcome(float(round_to(self.dtype, penalty)), 0.0, True)


def degree_of(norm: ActivityNorm) -> int:
    """Return the power of |x| that is summed for ``norm``, one of the first three."""
    return 1 if norm is ActivityNorm.L1 else 2


def limbs_of(degree: int) -> int:
    """Return how many limbs hold a significand of 53 bits to the power ``degree``."""
    return 2 * degree


def units_of(bins: np.ndarray[Any, Any], degree: int) -> int:
    """Return the sum that is spread over ``bins``, as :class:`PartialSum` counts it.

    ``bins[shift, place]`` holds the limbs of weight ``2**(degree * shift + LIMB * place)``.
    """
    return sum(
        int(bins[shift, place]) << (degree * shift + LIMB * place)
        for shift, place in np.argwhere(bins).tolist()
    )


def exact_sum(array: np.ndarray[Any, Any], norm: ActivityNorm) -> PartialSum | PairedSum:
    """Return Σ|x| for ``L1``, Σx² for ``L2`` and ``L2_SQUARED``, both for ``L1_L2_SQUARED``.

    The array may be of any supported dtype and strides.

    A binary64 magnitude is ``m * 2**(shift - 1074)`` with ``m < 2**53`` and ``0 <= shift < 2046``.
    The significands, or their squares, are cut into limbs, and the limbs of one shift are summed:
    a sum of 2¹⁶ numbers below 2²⁸ is exact in binary64, in any order.
    """
    if norm is ActivityNorm.L1_L2_SQUARED:
        return PairedSum.of(array, exact_sum)
    chunk_size = 1 << 16
    degree, compute = degree_of(norm), COMPUTE_DTYPES[array.dtype]
    bins = np.zeros((2046, limbs_of(degree)), np.int64)
    special = 0.0
    with np.errstate(invalid="ignore"):  # a signaling NaN is a NaN
        if array.dtype.kind == "V":  # ml_dtypes' bfloat16, which nditer does not cast
            array = array.astype(FLOAT32)
        chunks: Iterable[Any] = np.nditer(
            array,
            flags=["buffered", "external_loop", "zerosize_ok"],
            op_dtypes=[FLOAT64],
            buffersize=chunk_size,
        )
        for chunk in chunks:
            for start in range(0, chunk.size, chunk_size):  # unbuffered if contiguous
                special += _spread(np.abs(chunk[start : start + chunk_size]), bins)
    return PartialSum(degree, compute, units_of(bins, degree), special)


def _spread(
    magnitudes: np.ndarray[Any, np.dtype[np.float64]], bins: np.ndarray[Any, np.dtype[np.int64]]
) -> float:
    """Add the limbs of ``magnitudes`` to ``bins`` unless one is not finite; return that one, or 0.

    NaN outweighs infinity.
    """
    largest = float(magnitudes.max(initial=0.0))
    if not math.isfinite(largest):
        return largest
    bits, stored = magnitudes.view(np.uint64), np.uint64(52)
    exponents = (bits >> stored).astype(np.intp)
    leading = (exponents > 0).astype(np.uint64) << stored  # implied, but in subnormal numbers
    significands = leading | (bits & np.uint64(2**52 - 1))
    shifts = np.maximum(exponents, 1) - 1
    half, mask = np.uint64(LIMB), np.uint64(2**LIMB - 1)
    low, high = significands & mask, significands >> half
    limbs = [low, high]
    if bins.shape[1] == limbs_of(2):
        ends, middle, top = low * low, np.uint64(2) * low * high, high * high
        limbs = [
            ends & mask,
            (ends >> half) + (middle & mask),
            (middle >> half) + (top & mask),
            top >> half,
        ]
    for place, limb in enumerate(limbs):
        sums = np.bincount(shifts, limb.astype(np.float64))
        bins[: sums.size, place] += sums.astype(np.int64)
    return 0.0


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
