"""The definition, in rational arithmetic: what every backend must return, bit for bit.

Slow and short on purpose. The self-test of ``actreg doctor`` and the test suite compare with this.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import compute_dtype

__all__ = ["binary64", "exact_result", "exact_sum", "root_of", "rounded"]


def exact_sum(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> Fraction:
    """Return Σ|x| for ``L1``, Σx² for ``L2`` and ``L2_SQUARED``, without rounding.

    ``activations`` must be finite.
    """
    values = (Fraction(float(value)) for value in activations.ravel())
    if norm is ActivityNorm.L1:
        return sum((abs(value) for value in values), Fraction(0))
    return sum((value * value for value in values), Fraction(0))


def exact_result(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: Any,
    epsilon: float | None = None,
    scale: float = 1.0,
) -> tuple[np.floating[Any], np.ndarray[Any, Any]]:
    """Return the penalty of finite ``activations`` and what becomes of ``gradients``.

    The exact sum is rounded to 53 bits once; the operations on it are binary64's, and the
    gradient's those of the compute dtype, one scalar at a time. ``scale`` multiplies the gradient.
    """
    compute = compute_dtype(activations.dtype)
    assert compute is not None
    real = compute.type
    if norm is ActivityNorm.L1_L2_SQUARED:
        pair = lam if isinstance(lam, tuple) else (lam, lam)
        terms = [(ActivityNorm.L1, pair[0]), (ActivityNorm.L2_SQUARED, pair[1])]
    else:
        terms = [(norm, lam)]
    limit = Fraction(float(np.finfo(compute).eps) if epsilon is None else epsilon)
    size, strengths, root = 0.0, [], 0.0
    with np.errstate(all="ignore"):
        for term, factor in terms:
            total = rounded(exact_sum(activations, term), 53)
            if term is ActivityNorm.L2:
                root = binary64(root_of(total))
                size += float(real(factor)) * root
                if total <= limit:
                    return real(size), gradients.copy()
            else:
                size += binary64(Fraction(float(real(factor))) * total)
            strengths.append((term, real(factor * scale)))
        updated = gradients.copy()
        for index, value in np.ndenumerate(activations):
            x = real(value)
            first, *rest = (_gradient(term, x, s, real(root)) for term, s in strengths)
            updated[index] = real(updated[index]) + sum(rest, first)
        return real(size), updated


def _gradient(norm: ActivityNorm, x: Any, strength: Any, root: Any) -> Any:
    real = type(x)
    if norm is ActivityNorm.L1:
        return strength if x > 0 else -strength if x < 0 else real(0.0)
    if norm is ActivityNorm.L2_SQUARED:
        return (strength * real(2.0)) * x
    return (strength * x) / root


def rounded(value: Fraction, bits: int) -> Fraction:
    """Round ``value`` >= 0 to ``bits`` significant bits, to nearest-even, exponent unbounded."""
    if not value:
        return value
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - bits
    while value >= Fraction(2) ** (exponent + bits):
        exponent += 1
    unit = Fraction(2) ** exponent
    return round(value / unit) * unit  # Python rounds halves to even


def root_of(value: Fraction) -> Fraction:
    """Return √value, exact or between two numbers of 200 bits, closer than any rounding needs."""
    scale = 4 ** max(0, 300 - value.numerator.bit_length() + value.denominator.bit_length())
    floor = math.isqrt(value.numerator * scale // value.denominator)
    exact = floor * floor * value.denominator == value.numerator * scale
    return Fraction(2 * floor + (not exact), 2 * math.isqrt(scale))


def binary64(value: Fraction) -> float:
    """Round to binary64, to nearest-even; too large becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
