"""The reference backend: plain NumPy, written to be obviously right.

The sum is :func:`math.fsum` over the exact terms, hence correctly rounded; the gradient is the
formula. It takes any byte order and alignment, and it is what the other backends are tested
against. It makes temporaries of the array's size and takes some 50 ns per element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import COMPUTE_DTYPES, DoubleDouble, penalty_of, round_to, two_product

name = "numpy"
dtypes = frozenset(COMPUTE_DTYPES)
unavailable_because = ""

_CHUNK = 1 << 16  # elements that are turned into Python floats at a time


def is_available() -> bool:
    """Return True: NumPy is a dependency."""
    return True


def partial_sum(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> DoubleDouble:
    """Return Σ|x| for ``L1``, Σx² for the others."""
    hi = _total(activations, norm)
    if not math.isfinite(hi):
        return DoubleDouble(hi, 0.0)
    return DoubleDouble(hi, _fsum(activations, norm, -hi))


def penalty(activations: np.ndarray[Any, Any], norm: ActivityNorm, lam: float) -> Any:
    """Return the penalty, a NumPy scalar."""
    compute = COMPUTE_DTYPES[activations.dtype]
    return penalty_of(norm, _total(activations, norm), lam, compute)


def apply(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: float,
    epsilon: float,
) -> Any:
    """Add the gradient to ``gradients`` in place and return the penalty."""
    compute = COMPUTE_DTYPES[activations.dtype]
    total = _total(activations, norm)
    x = np.asarray(activations).astype(compute)
    strength = compute.type(lam)
    with np.errstate(all="ignore"):  # NaN, infinity and overflow propagate without a word
        if norm is ActivityNorm.L1:
            gradients += strength * ((x > 0).astype(compute) - (x < 0).astype(compute))
        elif norm is ActivityNorm.L2_SQUARED:
            gradients += (strength * compute.type(2.0)) * x
        elif not total <= epsilon:
            gradients += (strength * x) / round_to(compute, math.sqrt(total))
    return penalty_of(norm, total, lam, compute)


def _total(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> float:
    """Return the sum, rounded to binary64 once."""
    with np.errstate(all="ignore"):
        largest = float(np.max(np.abs(activations), initial=0.0))
        if norm is not ActivityNorm.L1:
            largest *= largest
    return _fsum(activations, norm) if math.isfinite(largest) else largest


def _fsum(activations: np.ndarray[Any, Any], norm: ActivityNorm, start: float = 0.0) -> float:
    try:
        return math.fsum(_terms(activations, norm, start))
    except OverflowError:  # all terms are >= 0, but for the rounding errors of squares
        return math.inf


def _terms(activations: np.ndarray[Any, Any], norm: ActivityNorm, start: float) -> Iterator[float]:
    """Yield ``start`` and binary64 numbers that sum to Σ|x| or Σx² exactly."""
    yield start
    chunks = np.nditer(
        activations,
        flags=["buffered", "external_loop", "zerosize_ok"],
        op_dtypes=[np.dtype(np.float64)],
        buffersize=_CHUNK,
    )
    chunk: Any
    for chunk in chunks:
        if norm is ActivityNorm.L1:
            yield from np.abs(chunk).tolist()
        else:
            squares, errors = two_product(chunk, chunk)
            yield from squares.tolist()
            yield from errors.tolist()
