"""Reading strided arrays in the order in which they lie in memory, without copying them.

All operations here act on views: the same elements, other axes. A sum and an elementwise update
do not care in which order they meet the elements, memory does.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

__all__ = ["as_matrix", "collapse", "each_once"]


def collapse(*arrays: Any) -> list[Any]:
    """Return views of ``arrays`` with as few axes as possible, the last one the densest.

    Axes are put in the order of the strides of the last array (the one that is written),
    reversed where that array runs backwards, and neighbours that every array steps through
    evenly are merged. Contiguous arrays of one order become one-dimensional. Nothing is copied.

    Parameters
    ----------
    *arrays
        NumPy or CuPy arrays of one shape, with at least one element.

    Returns
    -------
    list
        One view for each array, all of one shape with at least one axis.
    """
    lead = arrays[-1]
    if lead.ndim == 1 and lead.strides[0] > 0:
        return list(arrays)
    if all(array.flags.c_contiguous for array in arrays):
        return [array.reshape(-1) for array in arrays]

    axes = [axis for axis in range(lead.ndim) if lead.shape[axis] > 1]
    axes.sort(key=lambda axis: abs(lead.strides[axis]), reverse=True)
    kept = axes + [axis for axis in range(lead.ndim) if lead.shape[axis] == 1]
    flips = tuple(slice(None, None, -1 if lead.strides[axis] < 0 else 1) for axis in axes)
    drop = (0,) * (lead.ndim - len(axes))
    views = [array.transpose(kept)[flips + drop] for array in arrays]

    shape = [views[0].shape[0]]
    for axis in range(1, len(axes)):
        length = views[0].shape[axis]
        if all(view.strides[axis - 1] == view.strides[axis] * length for view in views):
            shape[-1] *= length
        else:
            shape.append(length)
    return [view.reshape(shape) for view in views]


def each_once(array: Any) -> Any:
    """Return a view of a broadcast ``array`` in which each element stands once."""
    return array[tuple(slice(0, 1) if step == 0 else slice(None) for step in array.strides)]


def as_matrix(array: Any, row_axes: int) -> Any:
    """Return a view with the last ``row_axes`` axes as one, and the others as one, or None.

    There is one if both are evenly spaced. The array has at least one element.

    Examples
    --------
    >>> import numpy as np
    >>> as_matrix(np.ones((2, 3, 4, 5)), 2).shape
    (6, 20)
    >>> as_matrix(np.ones((2, 3, 4, 6))[..., :5], 2) is None
    True
    """
    outer = array.ndim - row_axes
    for axes in range(outer), range(outer, array.ndim):
        long = [axis for axis in axes if array.shape[axis] > 1]
        for axis, inner in pairwise(long):
            if array.strides[axis] != array.strides[inner] * array.shape[inner]:
                return None
    return array.reshape(math.prod(array.shape[:outer]), math.prod(array.shape[outer:]))
