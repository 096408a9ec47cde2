"""What the elements of weights may be, and what a mask keeps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from actreg_dispatch.layout import each_once
from actreg_dispatch.options import Reduction, divided_axes

__all__ = ["check_weight_values", "first_bad", "given", "kept_of"]


def check_weight_values(weights: Any, name: str = "weights") -> None:
    """Refuse weights that are negative or not finite, if they are an array of NumPy.

    Others are not looked at, for that would wait for a device.

    Raises
    ------
    ValueError
        If there is one.
    """
    place = first_bad(weights)
    if place is not None:
        raise ValueError(
            f"{name} have {weights[place]} at {place}, but must be finite and >= 0; "
            f"use 0 to leave an element out"
        )


def first_bad(weights: Any) -> tuple[int, ...] | None:
    """Return where weights are negative or not finite, if they are an array of NumPy."""
    if not isinstance(weights, np.ndarray) or weights.dtype.kind == "b" or not weights.size:
        return None
    each = each_once(weights)
    with np.errstate(invalid="ignore"):
        bad = ~((each >= 0) & (each < math.inf))
    return tuple(np.argwhere(bad)[0].tolist()) if bad.any() else None


def kept_of(reduction: Reduction, mask: Any, name: str = "activations") -> int:
    """Return what λ is divided by for activations that a mask of their shape has been taken of.

    That is how many positions along the axes keep any element; for ``"mean"``, how many elements.
    Waits for a device.
    """
    axes = divided_axes(reduction, mask.ndim, name)
    each = each_once(mask)
    others = tuple(axis for axis in range(mask.ndim) if axis not in axes)
    repeats = math.prod(mask.shape[axis] for axis in axes if each.shape[axis] < mask.shape[axis])
    return max(1, int(each.any(axis=others).sum()) * repeats) if axes else 1


def given(weights: Any, statistics: Any = None) -> dict[str, Any]:
    """Return what there is of them as arguments, for backends that may not know of them."""
    options = {"weights": weights, "statistics": statistics}
    return {name: value for name, value in options.items() if value is not None}
