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
    epsilon: float,
) -> Any:
    """Add the gradient to ``gradients`` in place and return the penalty."""
    compute = COMPUTE_DTYPES[activations.dtype]
    found = exact_sum(activations, norm).outcome(norm, lam, epsilon)
    strength = compute.type(lam)
    with np.errstate(all="ignore"):  # NaN, infinity and overflow propagate without a word
        x: Any = activations.astype(compute)
        if norm is ActivityNorm.L1:
            added = strength * ((x > 0).astype(compute) - (x < 0).astype(compute))
        elif norm is ActivityNorm.L2_SQUARED:
            added = (strength * compute.type(2.0)) * x
        else:
            added = (strength * x) / compute.type(found.divisor)
        if found.has_gradient:
            gradients[...] = gradients.astype(compute) + added
    return compute.type(found.penalty)
