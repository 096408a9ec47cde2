"""The reference backend: plain NumPy, written to be obviously right.

The sum is made of integers, hence exact; the gradient is the formula. It takes any byte order and
alignment. It makes temporaries of the array's size and takes 10 to 50 ns per element.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import COMPUTE_DTYPES, PairedSum, PartialSum, exact_sum

name = "numpy"
dtypes = COMPUTE_DTYPES.keys()
unavailable_because = ""


def is_available() -> bool:
    """Return True: NumPy is a dependency."""
    return True


def partial_sum(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> PartialSum | PairedSum:
    """Return the sum, or the two sums, that ``norm`` takes, exactly."""
    return exact_sum(activations, norm)


def penalty(activations: np.ndarray[Any, Any], norm: ActivityNorm, lam: Any) -> Any:
    """Return the penalty, a NumPy scalar."""
    compute = COMPUTE_DTYPES[activations.dtype]
    return compute.type(exact_sum(activations, norm).outcome(norm, lam, 0.0).penalty)


def apply(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: Any,
    strength: Any,
    epsilon: float,
) -> Any:
    """Add the gradient to ``gradients`` in place and return the penalty."""
    found = exact_sum(activations, norm).outcome(norm, lam, epsilon)
    if found.has_gradient:
        add_gradient(activations, gradients, norm, strength, found.divisor)
    return COMPUTE_DTYPES[activations.dtype].type(found.penalty)


def add_gradient(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    strength: Any,
    divisor: float,
) -> None:
    """Add the gradient to ``gradients`` in place, dividing by ``divisor`` for L2."""
    real = COMPUTE_DTYPES[activations.dtype].type
    with np.errstate(all="ignore"):  # NaN, infinity and overflow propagate without a word
        x: Any = activations.astype(real)
        if norm is ActivityNorm.L1:
            added = _signed(real(strength), x)
        elif norm is ActivityNorm.L2_SQUARED:
            added = (real(strength) * real(2.0)) * x
        elif norm is ActivityNorm.L1_L2_SQUARED:
            added = _signed(real(strength[0]), x) + (real(strength[1]) * real(2.0)) * x
        else:
            added = (real(strength) * x) / real(divisor)
        gradients[...] = gradients.astype(real) + added


def _signed(strength: Any, x: Any) -> Any:
    """Return ``strength`` with the sign of x, and 0 where x is 0 or NaN."""
    return np.where(
        np.abs(x) > 0, strength * np.copysign(type(strength)(1.0), x), type(strength)(0.0)
    )
