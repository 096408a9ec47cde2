"""The arithmetic that every backend shares: exact transformations, partial sums, the last rounding.

A sum is carried as an unevaluated pair ``hi + lo`` of binary64 numbers (a *double-double*), which
keeps some 106 bits. Partial sums of any pieces of the data merge to the partial sum of the whole,
so threads, blocks of a GPU and chunks of a file are all summed the same way, and the order in
which they are does not show in the rounded result.

:func:`two_sum`, :func:`two_product` and :func:`merge_pairs` are plain Python on plain numbers.
The Numba backend compiles these same functions, so the arithmetic is written down once.

References
----------
.. [1] T. J. Dekker, "A floating-point technique for extending the available precision",
   Numerische Mathematik 18, 1971.
.. [2] D. E. Knuth, The Art of Computer Programming 2, section 4.2.2 (TwoSum).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np

from actreg_dispatch.norms import ActivityNorm

__all__ = [
    "COMPUTE_DTYPES",
    "DoubleDouble",
    "merge_pairs",
    "penalty_of",
    "round_to",
    "two_product",
    "two_sum",
]

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)

COMPUTE_DTYPES: dict[np.dtype[Any], np.dtype[Any]] = {
    stored: dtype for dtype in (FLOAT32, FLOAT64) for stored in (dtype, dtype.newbyteorder("S"))
}
"""Supported dtype of the activations -> dtype T that the gradient and the penalty have."""

Real = TypeVar("Real", float, np.ndarray[Any, np.dtype[np.float64]])

_SPLIT = 134217729.0  # 2**27 + 1 halves a 53-bit significand (Dekker)


def two_sum(a: Real, b: Real) -> tuple[Real, Real]:
    """Return ``s = fl(a + b)`` and ``e`` with ``s + e == a + b`` exactly (Knuth)."""
    s = a + b
    b_rounded = s - a
    return s, (a - (s - b_rounded)) + (b - b_rounded)


def two_product(a: Real, b: Real) -> tuple[Real, Real]:
    """Return ``p = fl(a * b)`` and ``e`` with ``p + e == a * b`` exactly (Dekker).

    Exact as long as no part overflows or is subnormal: ``|a|, |b| < 2**996`` and
    ``|a * b| >= 2**-968``.
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

    The relative error is below 2**-104 for sums of terms of one sign. A sum that is not finite
    is its ``hi``, with ``lo`` 0: the error terms of an infinite sum are NaN and mean nothing.
    """
    s, e = two_sum(a_hi, b_hi)
    e += a_lo + b_lo
    if not math.isfinite(s):
        return s, 0.0
    hi = s + e
    return hi, e - (hi - s)


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


def round_to(dtype: np.dtype[Any], value: float) -> np.floating[Any]:
    """Round a binary64 number to ``dtype``, once, to nearest-even; too large becomes infinite."""
    scalar = dtype.type
    if dtype == FLOAT32 and abs(value) > 3.4028234663852886e38:  # NumPy would warn of overflow
        with np.errstate(over="ignore"):
            return scalar(value)  # type: ignore[no-any-return]
    return scalar(value)  # type: ignore[no-any-return]


def penalty_of(
    norm: ActivityNorm, total: float, lam: float, dtype: np.dtype[Any]
) -> np.floating[Any]:
    """Return the penalty for the rounded sum ``total``: λ·total, or λ·√total for ``L2``.

    The expression is evaluated in binary64 and rounded to ``dtype`` once, at the end.
    """
    size = math.sqrt(total) if norm is ActivityNorm.L2 else total
    return round_to(dtype, lam * size)
