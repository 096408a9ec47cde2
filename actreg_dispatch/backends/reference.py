"""The reference backend: plain NumPy, written to be obviously right.

The sum is made of integers, hence exact; the gradient is the formula. It takes any byte order and
alignment. It makes temporaries of the array's size and takes 10 to 50 ns per element.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import COMPUTE_DTYPES, PartialSum, exact_sum

name = "numpy"
dtypes = COMPUTE_DTYPES.keys()
unavailable_because = ""


def is_available() -> bool:
    """Return True: NumPy is a dependency."""
    return True


def partial_sum(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> PartialSum:
    """Return Σ|x| for ``L1``, Σx² for the others, exactly."""
    return exact_sum(activations, norm)


def penalty(activations: np.ndarray[Any, Any], norm: ActivityNorm, lam: float) -> Any:
    """Return the penalty, a NumPy scalar."""
    compute = COMPUTE_DTYPES[activations.dtype]
    return compute.type(exact_sum(activations, norm).outcome(norm, lam, 0.0).penalty)


def apply(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: float,
    strength: float,
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
    strength: float,
    divisor: float,
) -> None:
    """Add the gradient to ``gradients`` in place, dividing by ``divisor`` for L2."""
    real = COMPUTE_DTYPES[activations.dtype].type
    with np.errstate(all="ignore"):  # NaN, infinity and overflow propagate without a word
        x: Any = activations.astype(real)
        if norm is ActivityNorm.L1:
            added = np.where(np.abs(x) > 0, real(strength) * np.copysign(real(1.0), x), real(0.0))
        elif norm is ActivityNorm.L2_SQUARED:
            added = (real(strength) * real(2.0)) * x
        else:
            added = (real(strength) * x) / real(divisor)
        gradients[...] = gradients.astype(real) + added
