"""Moving data between array libraries, which happens only on an explicit choice of a backend.

Every move goes through the host. A library is known here by the dotted name of its array type.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

__all__ = ["move", "write_back"]

HOST = "numpy.ndarray"


def move(array: Any, source: str, target: str) -> Any:
    """Return the values of ``array``, of type ``source``, as an array of type ``target``.

    The result is a contiguous copy in native byte order; on a device it lies on the current one.
    Waits for the device when data leaves it.
    """
    host = array if source == HOST else _library(source).asnumpy(array)
    host = np.ascontiguousarray(host, dtype=host.dtype.newbyteorder("=")).reshape(host.shape)
    return host if target == HOST else _library(target).asarray(host)


def write_back(values: Any, source: str, destination: Any, target: str) -> None:
    """Overwrite ``destination``, of type ``target``, with ``values``, of type ``source``."""
    if target == HOST:
        destination[...] = move(values, source, target)
    else:
        with destination.device:
            destination[...] = move(values, source, target)


def _library(array_type: str) -> Any:
    name = array_type.rpartition(".")[0]
    module = importlib.import_module(name)
    if not (hasattr(module, "asnumpy") and hasattr(module, "asarray")):
        raise TypeError(
            f"arrays of type {array_type} cannot be moved to or from another library; "
            f"choose a backend that takes them, or convert them to NumPy or CuPy arrays"
        )
    return module
