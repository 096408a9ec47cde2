"""Moving data between array libraries, which happens only on an explicit choice of a backend.

A library is known here by the dotted name of its array type.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actreg_dispatch.registry import CUPY, NUMPY

__all__ = ["move", "write_back"]


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
