"""The definition, in rational arithmetic: what every backend must return, bit for bit.

Slow and short on purpose. The self-test of ``actreg doctor`` and the test suite compare with this.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import COMPUTE_DTYPES

__all__ = ["exact_result", "exact_sum"]


def exact_sum(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> Fraction:
    """Return Σ|x| for ``L1``, Σx² for the others, of finite ``activations``, without rounding."""
    values = (Fraction(float(value)) for value in activations.ravel())
    if norm is ActivityNorm.L1:
        return sum((abs(value) for value in values), Fraction(0))
    return sum((value * value for value in values), Fraction(0))


def exact_result(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: float,
    epsilon: float | None = None,
) -> tuple[np.floating[Any], np.ndarray[Any, Any]]:
    """Return the penalty of finite ``activations`` and what becomes of ``gradients``.

    The exact sum is rounded to binary64 once; the operations on it are binary64's, and the
    gradient's those of the compute dtype, one scalar at a time.
    """
    compute = COMPUTE_DTYPES[activations.dtype]
    real = compute.type
    strength, total = real(lam), float(exact_sum(activations, norm))
    limit = float(np.finfo(compute).eps) if epsilon is None else epsilon
    size = math.sqrt(total) if norm is ActivityNorm.L2 else total

    def gradient(x: Any) -> Any:
        if norm is ActivityNorm.L1:
            return strength if x > 0 else -strength if x < 0 else real(0.0)
        if norm is ActivityNorm.L2_SQUARED:
            return (strength * real(2.0)) * x
        return (strength * x) / real(size)

    updated = gradients.astype(compute)
    if norm is not ActivityNorm.L2 or total > limit:
        for index, x in np.ndenumerate(activations):
            updated[index] += gradient(real(x))
    return real(float(strength) * size), updated
