"""Moving data between array libraries, on an explicit choice of a backend only; making arrays.

A library is known here by the dotted name of its array type.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Container
from typing import Any

import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.registry import CUPY, NUMPY
from actreg_dispatch.sums.exact import Total

__all__ = ["MovingBackend", "move", "new_like", "on_device_of"]


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


class MovingBackend(Backend):
    """A backend for arrays of type ``source``, which computes on moved copies of them.

    Parameters
    ----------
    backend : Backend
        What computes.
    source, target : str
        The array type of the caller, and that of ``backend``.
    """

    def __init__(self, backend: Backend, source: str, target: str) -> None:
        self._backend, self._source, self._target = backend, source, target
        self.name = backend.name
        self.dtypes: Container[np.dtype[Any]] = backend.dtypes

    def partial_sum(self, activations: Any, norm: Norm, weights: Any = None) -> Total:
        """Return the exact sum, or both."""
        return self._backend.partial_sum(self._moved(activations), norm, self._moved(weights))

    def penalty(
        self,
        activations: Any,
        norm: Norm,
        constants: Constants,
        weights: Any = None,
        statistics: Any = None,
    ) -> Any:
        """Return the penalty as a scalar of the caller's library."""
        x, w = (self._moved(array) for array in (activations, weights))
        result = self._backend.penalty(x, norm, constants, w, statistics)
        return self._returned(result, activations)

    def apply(
        self,
        activations: Any,
        gradients: Any,
        norm: Norm,
        constants: Constants,
        weights: Any = None,
        statistics: Any = None,
    ) -> Any:
        """Add the gradient to a copy, write it back, and return the penalty."""
        x, moved, w = (self._moved(array) for array in (activations, gradients, weights))
        result = self._backend.apply(x, moved, norm, constants, w, statistics)
        self._write_back(moved, gradients)
        return self._returned(result, activations)

    def add_gradient(
        self,
        activations: Any,
        gradients: Any,
        norm: Norm,
        constants: Constants,
        coefficients: tuple[float, ...],
        weights: Any = None,
    ) -> None:
        """Add the gradient to a copy and write it back."""
        x, moved, w = (self._moved(array) for array in (activations, gradients, weights))
        self._backend.add_gradient(x, moved, norm, constants, coefficients, w)
        self._write_back(moved, gradients)

    def overwrite(
        self,
        activations: Any,
        gradients: Any,
        norm: Norm,
        constants: Constants,
        weights: Any = None,
    ) -> Any:
        """Do :meth:`apply` as if ``gradients`` were 0; nothing is written if it fails."""
        zeros = new_like(gradients, self._source)
        result = self.apply(activations, zeros, norm, constants, weights)
        gradients[...] = zeros
        return result

    def _moved(self, array: Any) -> Any:
        return None if array is None else move(array, self._source, self._target)

    def _write_back(self, values: Any, destination: Any) -> None:
        with on_device_of(destination, self._source):
            destination[...] = move(values, self._target, self._source)

    def _returned(self, result: Any, activations: Any) -> Any:
        with on_device_of(activations, self._source):
            return move(result, self._target, self._source)[()]


def on_device_of(array: Any, array_type: str) -> Any:
    """Return a context in which new arrays of type ``array_type`` are where ``array`` is."""
    return array.device if array_type == CUPY else contextlib.nullcontext()


def new_like(array: Any, array_type: str, make: str = "zeros") -> Any:
    """Return an array of the shape, dtype, order and device of ``array``, which ``make`` makes.

    That is the name of a function of the array's library, ``"zeros"`` or ``"empty"``.
    """
    if array_type not in (NUMPY, CUPY):
        if not hasattr(array, "__array_namespace__"):  # of the array API standard
            raise TypeError(f"a gradient for a {array_type} cannot be made; pass an array as out")
        return getattr(array.__array_namespace__(), f"{make}_like")(array)
    order: Any = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    module = sys.modules[array_type.partition(".")[0]]
    with on_device_of(array, array_type):
        return getattr(module, make)(array.shape, array.dtype, order)
