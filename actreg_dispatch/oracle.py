"""The definition, in exact arithmetic: what every backend must return, bit for bit.

Short and independent on purpose: the sums are integers, the formulas are written here once more,
and nothing of the arithmetic that is judged is used. The self-test of ``actreg doctor`` and the
test suite compare with this.
"""

from __future__ import annotations

import math
from collections import defaultdict
from fractions import Fraction
from typing import Any

import numpy as np

from actreg_dispatch.dtypes import compute_dtype
from actreg_dispatch.norms import ActivityNorm

__all__ = ["binary64", "exact_result", "exact_row_result", "exact_sum", "root_of", "rounded"]


def exact_sum(
    activations: np.ndarray[Any, Any],
    norm: ActivityNorm,
    weights: np.ndarray[Any, Any] | None = None,
) -> Fraction:
    """Return Σw|x| for ``L1``, Σwx² for the others, without rounding; w is 1 by default.

    What is summed must be finite. An element of weight 0 is not.
    """
    values = np.asarray(activations).astype(np.float64)
    w = np.broadcast_to(1.0 if weights is None else np.asarray(weights, np.float64), values.shape)
    values, w = values[w != 0], w[w != 0]
    if not (np.isfinite(values).all() and np.isfinite(w).all()):
        raise ValueError("the exact sum is that of finite activations and weights")
    # |x| is an integer of 53 bits times a power of two. Terms of equal powers are added as the
    # integers they are, which takes a tenth of the time of a Fraction for each.
    power = 1 if norm is ActivityNorm.L1 else 2
    (xs, x_exponents), (ws, w_exponents) = _integers(values), _integers(w)
    sums: defaultdict[int, int] = defaultdict(int)
    for x, weight, exponent in zip(xs, ws, power * x_exponents + w_exponents, strict=True):
        sums[int(exponent)] += x**power * weight
    lowest = min(sums, default=0)
    total = sum(each << exponent - lowest for exponent, each in sums.items())
    return total * Fraction(2) ** (lowest - 53 * (power + 1))


def _integers(values: np.ndarray[Any, Any]) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Return integers and exponents: a magnitude is ``integer * 2**(exponent - 53)``."""
    fractions, exponents = np.frexp(np.abs(values))
    return np.ldexp(fractions, 53).astype(np.int64).tolist(), exponents.astype(np.int64)


def exact_result(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: Any,
    epsilon: float | None = None,
    scale: float = 1.0,
    weights: np.ndarray[Any, Any] | None = None,
) -> tuple[np.floating[Any], np.ndarray[Any, Any]]:
    """Return the penalty of finite ``activations`` and what becomes of ``gradients``.

    The exact sum is rounded to 53 bits once; the operations on it are binary64's, and the
    gradient's those of the compute dtype, each rounded. ``scale`` multiplies the gradient, and so
    do ``weights``, an array that broadcasts; where one is 0, the gradient stays as it is.
    """
    compute = compute_dtype(activations.dtype)
    assert compute is not None
    real = compute.type
    w = None if weights is None else np.broadcast_to(weights, activations.shape).astype(compute)
    penalty, updated = _result(activations, gradients, norm, lam, epsilon, scale, w, real)
    if w is not None:
        updated[w == 0] = gradients[w == 0]
    return penalty, updated


def exact_row_result(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    lam: float,
    axis: tuple[int, ...],
    epsilon: float | None = None,
    scale: float = 1.0,
    weights: np.ndarray[Any, Any] | None = None,
) -> tuple[np.floating[Any], np.ndarray[Any, Any]]:
    """Do :func:`exact_result` for the sum of the L2 norms of all rows, which reach along ``axis``.

    Each norm is rounded to binary64, their exact sum to 53 bits.
    """
    compute = compute_dtype(activations.dtype)
    assert compute is not None
    real = compute.type
    w = None if weights is None else np.broadcast_to(weights, activations.shape).astype(compute)
    last = tuple(range(-len(axis), 0))
    updated, total = gradients.copy(), Fraction(0)
    x, g, rows = (np.moveaxis(each, axis, last) for each in (activations, gradients, updated))
    for row in np.ndindex(x.shape[: x.ndim - len(axis)]):
        of_row = None if w is None else np.moveaxis(w, axis, last)[row]
        given = x[row], g[row], ActivityNorm.L2, lam, epsilon, scale, of_row
        rows[row] = exact_result(*given)[1]
        squares = rounded(exact_sum(x[row], ActivityNorm.L2, of_row), 53)
        total += Fraction(binary64(_operation(root_of(squares))))
    with np.errstate(all="ignore"):
        size = binary64(Fraction(float(real(lam))) * rounded(total, 53))
        return real(size), updated


def _result(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: Any,
    epsilon: float | None,
    scale: float,
    w: np.ndarray[Any, Any] | None,
    real: Any,
) -> tuple[np.floating[Any], np.ndarray[Any, Any]]:
    """Do :func:`exact_result` for weights of the compute dtype, whose type is ``real``."""
    compute = np.dtype(real)
    if norm is ActivityNorm.HOYER:
        return _hoyer(np.asarray(activations).astype(compute), gradients, lam, lam * scale, w)
    if norm is ActivityNorm.L1_L2_SQUARED:
        pair = lam if isinstance(lam, tuple) else (lam, lam)
        terms = [(ActivityNorm.L1, pair[0]), (ActivityNorm.L2_SQUARED, pair[1])]
    else:
        terms = [(norm, lam)]
    limit = Fraction(float(np.finfo(compute).eps) if epsilon is None else epsilon)
    x = np.asarray(activations).astype(compute)
    size, steps = 0.0, []
    with np.errstate(all="ignore"):
        for term, factor in terms:
            total = rounded(exact_sum(activations, term, w), 53)
            strength = np.array(factor * scale).astype(compute)
            strength = strength if w is None else strength * w
            if term is ActivityNorm.L1:
                size += binary64(Fraction(float(real(factor))) * total)
                steps.append(np.where(x > 0, strength, np.where(x < 0, -strength, real(0.0))))
            elif term is ActivityNorm.L2_SQUARED:
                size += binary64(Fraction(float(real(factor))) * total)
                steps.append((strength * real(2.0)) * x)
            else:
                root = _operation(root_of(total))  # which may be beyond binary64, λ times it not
                size += binary64(Fraction(float(real(factor))) * root)
                if total <= limit:
                    return real(size), gradients.copy()
                steps.append((strength * x) / real(binary64(root)))
        updated = gradients.copy()
        updated[...] = updated.astype(compute) + sum(steps[1:], start=steps[0])
        return real(size), updated


def _hoyer(
    x: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    lam: float,
    gradient_lam: float,
    w: np.ndarray[Any, Any] | None,
) -> tuple[np.floating[Any], np.ndarray[Any, Any]]:
    """Do :func:`exact_result` for λ·(Σ|x|)²/Σx²."""
    real = x.dtype.type
    total, squares = (
        rounded(exact_sum(x, norm, w), 53) for norm in (ActivityNorm.L1, ActivityNorm.L2_SQUARED)
    )
    if not total:
        return real(0.0), gradients.copy()
    with np.errstate(all="ignore"):
        factor = Fraction(float(real(lam)))
        ratio = _operation(total / squares)
        size = _operation(factor * _operation(total * ratio))
        r, twice, strength = real(binary64(ratio)), real(binary64(2 * ratio)), real(gradient_lam)
        strength = strength if w is None else strength * w
        sign = np.where(x > 0, real(1.0), np.where(x < 0, real(-1.0), real(0.0)))
        updated = gradients.copy()
        updated[...] = updated.astype(x.dtype) + (strength * twice) * (sign - r * x)
        return real(binary64(size)), updated


def _operation(value: Fraction) -> Fraction:
    """Round the result of an operation: to binary64, or to 53 bits where that has 0 or infinity."""
    nearest = binary64(value)
    if math.isfinite(nearest) and (nearest or not value):
        return Fraction(nearest)
    return rounded(value, 53) if value > 0 else -rounded(-value, 53)


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
        return math.inf if value > 0 else -math.inf
