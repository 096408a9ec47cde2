"""λ as a backend takes it: divided by a count, multiplied by a scale, rounded to T, and checked."""

from __future__ import annotations

import math
import numbers
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import COMPUTE_DTYPES, largest_lam, round_to
from actreg_dispatch.validation import check_real

if TYPE_CHECKING:
    from actreg_dispatch.regularization import ActivityRegularization

__all__ = [
    "REDUCTIONS",
    "UNSCALED",
    "Constants",
    "check_count",
    "check_scale",
    "constants_of",
    "count_of",
    "strengths_of",
]

REDUCTIONS = ("sum", "mean", "batch")
UNSCALED = 1.0
"""The scale of a call that is given none, which is told by this very object."""


class Constants(NamedTuple):
    """What a backend is told besides the arrays and the norm."""

    lam: Any  # λ of the penalty, in T, or both
    strength: Any  # λ of the gradient, in T, or both
    epsilon: float


def count_of(reduction: str, shape: tuple[int, ...], name: str = "activations") -> int:
    """Return what λ is divided by for activations of ``shape``, which errors call ``name``.

    Raises
    ------
    ValueError
        If that is the length of an axis that they do not have.
    """
    if reduction == "sum":
        return 1
    if reduction == "mean":
        return max(1, math.prod(map(int, shape)))
    if not shape:
        raise ValueError(f"{name} have no axes, so no batch to divide by; use reduction='sum'")
    return max(1, int(shape[0]))


def check_count(reduction: str, count: int | None) -> int:
    """Return what λ is divided by for activations of which only ``count`` is known.

    Raises
    ------
    ValueError
        If it is needed and no whole number >= 0.
    """
    if reduction == "sum":
        return 1
    if not isinstance(count, numbers.Integral) or not 0 <= count < 1 << 63:
        raise ValueError(
            f"count={count!r}, but reduction={reduction!r} divides by a number of all pieces "
            f"together; pass how many elements ('mean') or samples ('batch') they have"
        )
    return max(1, int(count))


def check_scale(scale: Any) -> float:
    """Return ``scale`` as a Python float.

    Raises
    ------
    TypeError
        If it is no real number.
    """
    return check_real("scale", scale, "pass a real number, such as the loss scale")


def strengths_of(lam: Any, count: int, scale: float) -> tuple[Any, Any]:
    """Return λ of the penalty and of the gradient, or both of each, as yet unrounded."""
    if scale is not UNSCALED:
        scale = check_scale(scale)
    if isinstance(lam, tuple):
        lam = lam[0] / count, lam[1] / count
        return lam, (lam[0] * scale, lam[1] * scale)
    return lam / count, lam / count * scale


def constants_of(
    reg: ActivityRegularization,
    dtype: np.dtype[Any],
    count: int,
    scale: float = UNSCALED,
    name: str = "activations",
) -> Constants:
    """Return what a backend is told for activations of ``dtype``, of which there are ``count``.

    Raises
    ------
    TypeError
        If ``scale`` is no real number.
    ValueError
        If λ is too large for the dtype.
    """
    compute = COMPUTE_DTYPES[dtype]
    largest, epsilon = _limits(reg.norm, compute)
    wide, wide_strength = strengths_of(reg.lam, count, scale)
    lam = _rounded(wide, compute)
    if (max(lam[0] / 2, lam[1]) if isinstance(lam, tuple) else lam) > largest:
        raise ValueError(f"lam={reg.lam!r} is too large for {dtype} {name}; lower it")
    strength = lam if scale is UNSCALED else _rounded(wide_strength, compute)
    return Constants(lam, strength, epsilon if reg.epsilon is None else reg.epsilon)


@lru_cache
def _limits(norm: ActivityNorm, dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the largest λ and the machine epsilon of a compute dtype."""
    return largest_lam(norm, dtype), float(np.finfo(dtype).eps)


def _rounded(lam: Any, dtype: np.dtype[Any]) -> Any:
    """Return λ, or both, rounded to the compute dtype."""
    if isinstance(lam, tuple):
        return _rounded(lam[0], dtype), _rounded(lam[1], dtype)
    return float(round_to(dtype, lam))
