"""Moving data between array libraries, on an explicit choice of a backend only; making arrays.

A library is known here by the dotted name of its array type.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from actreg_dispatch.registry import CUPY, NUMPY

__all__ = ["move", "write_back", "zeros_like"]


def move(array: Any, source: str, target: str) -> Any:
    """Return the values of ``array``, of type ``source``, as an array of type ``target``.

    The result is a contiguous copy in native byte order; on a device it lies on the current one.
    Waits for the device when data leaves it.

    Raises
    ------
    TypeError
        If the two are not NumPy's and CuPy's array types.
    """
    if {source, target} != {NUMPY, CUPY}:
        raise TypeError(
            f"activations of type {source} cannot be moved to a backend for {target}; "
            f"choose a backend that takes them, or convert them yourself"
        )
    import cupy  # the backend or the array is CuPy's, so it is loaded already

    if target == NUMPY:
        return cupy.asnumpy(array)
    return cupy.asarray(np.asarray(array, array.dtype.newbyteorder("="), order="C"))


def write_back(values: Any, source: str, destination: Any, target: str) -> None:
    """Overwrite ``destination``, of type ``target``, with ``values``, of type ``source``."""
    if target == NUMPY:
        destination[...] = move(values, source, target)
    else:
        with destination.device:
            destination[...] = move(values, source, target)


def zeros_like(array: Any, kind: str) -> Any:
    """Return zeros of the shape, dtype, order and device of ``array``."""
    if kind not in (NUMPY, CUPY):
        if not hasattr(array, "__array_namespace__"):  # of the array API standard
            raise TypeError(f"a gradient for a {kind} cannot be made; pass an array as out")
        return array.__array_namespace__().zeros_like(array)
    order: Any = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    if kind == NUMPY:
        return np.zeros(array.shape, array.dtype, order)
    with array.device:
        return sys.modules["cupy"].zeros(array.shape, array.dtype, order)
