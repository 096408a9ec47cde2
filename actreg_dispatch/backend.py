"""What a backend is; the ones that come with the package are in :mod:`actreg_dispatch.backends`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np

from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants, Options, Reduction
from actreg_dispatch.sums.exact import Total
from actreg_dispatch.weights import check_weight_values

__all__ = ["Backend"]


class Backend(ABC):
    """What a backend is: operations on the arrays it takes, and whether it can run here.

    Derive a backend from this class, which has defaults for what is optional.

    Arguments are checked before a backend sees them: ``activations`` is an array of the registered
    type whose dtype is in ``dtypes``, and a NumPy array is a plain ndarray, aligned unless the
    backend is the reference. ``gradients`` is a writable one of the same shape and dtype that
    shares no memory with it, on the same device. ``norm`` is a
    :class:`~actreg_dispatch.norms.Norm`. ``constants`` are
    :class:`~actreg_dispatch.options.Constants`: ``lam``, λ of the penalty, and ``gradient_lam``, λ
    of the gradient, are tuples of floats that the compute dtype T holds exactly; those of the
    gradient may be negative, infinite or NaN. ``epsilon`` is what the norm's guard, if it has one,
    compares with. ``weights``, if there are any, are an array of the same type whose dtype is that
    of the activations, T or bool, a view of their shape that was broadcast. The terms of the sums
    are multiplied by them, and so is λ of the gradient, rounded to T once; an element whose weight
    is 0 is left out. A backend on the host refuses those that are negative or not finite, by
    :func:`~actreg_dispatch.weights.check_weight_values`, before it writes anything; on a device
    they make the penalty NaN. ``statistics``, if there are any, are an
    :class:`~actreg_dispatch.ActivationStatistics`, which a backend tells by
    :meth:`~actreg_dispatch.ActivationStatistics.add` what it counted, once nothing can fail; one on
    a device, which should not wait, keeps a
    :meth:`~actreg_dispatch.ActivationStatistics.counter` there.
    """

    name: str
    """The name that the backend is registered under."""
    dtypes: Container[np.dtype[Any]]
    """The dtypes, byte order included, that the backend takes natively."""
    unavailable_because: str = ""
    """Why the backend cannot run here; empty when it can."""

    def is_available(self) -> bool:
        """Whether the backend can run here. Never raises, never slow twice."""
        return not self.unavailable_because

    @abstractmethod
    def partial_sum(self, activations: Any, norm: Norm, weights: Any = None) -> Total:
        """Return the sum, or both, that the norm takes, exactly, on the host."""

    @abstractmethod
    def penalty(
        self,
        activations: Any,
        norm: Norm,
        constants: Constants,
        weights: Any = None,
        statistics: Any = None,
    ) -> Any:
        """Return the penalty in T: a NumPy scalar, or a 0-d array of the device's library."""

    @abstractmethod
    def apply(
        self,
        activations: Any,
        gradients: Any,
        norm: Norm,
        constants: Constants,
        weights: Any = None,
        statistics: Any = None,
    ) -> Any:
        """Add the gradient to ``gradients`` in place and return the penalty."""

    @abstractmethod
    def add_gradient(
        self,
        activations: Any,
        gradients: Any,
        norm: Norm,
        constants: Constants,
        coefficients: tuple[float, ...],
        weights: Any = None,
    ) -> None:
        """Add the gradient to ``gradients`` in place; ``coefficients`` are values of T."""

    # Optional, for speed.

    def overwrite(
        self,
        activations: Any,
        gradients: Any,
        norm: Norm,
        constants: Constants,
        weights: Any = None,
    ) -> Any:
        """Do :meth:`apply` as if ``gradients`` were 0, whatever they hold."""
        check_weight_values(weights)
        gradients[...] = 0
        return self.apply(activations, gradients, norm, constants, weights)

    def set_gradient(
        self,
        activations: Any,
        gradients: Any,
        norm: Norm,
        constants: Constants,
        coefficients: tuple[float, ...],
        weights: Any = None,
    ) -> None:
        """Do :meth:`add_gradient` as if ``gradients`` were 0, whatever they hold."""
        check_weight_values(weights)
        gradients[...] = 0
        self.add_gradient(activations, gradients, norm, constants, coefficients, weights)

    def fused_kernel(
        self, norm: Norm, reduction: Reduction, activations: np.ndarray[Any, Any], *, writes: bool
    ) -> Callable[..., float] | None:
        """Return a function that does a whole call on contiguous arrays like that, or None.

        It is given unchecked NumPy arrays of the dtype, the number of axes (at least one) and about
        the size of ``activations``: ``(activations, gradients, lam, scale, epsilon)``, or, where
        ``writes`` is false, ``(activations, lam, epsilon)``. λ, a plain float where the norm takes
        one, is still to be divided as ``reduction`` says, multiplied by ``scale`` for the gradient,
        and rounded to T; epsilon is NaN for the default. It returns the
        penalty, or :data:`~actreg_dispatch.sums.certified.NOT_HANDLED`, or
        :data:`~actreg_dispatch.sums.certified.NEEDS_EXACT_SUM`; arrays of another type are a
        TypeError.
        """
        return None

    def fused_batch(
        self,
        activations: tuple[Any, ...],
        gradients: tuple[Any, ...],
        options: Options,
        scale: float,
    ) -> np.ndarray[Any, Any] | None:
        """Do the same for many layers of NumPy arrays, in one call, or None.

        The first activations are an array of NumPy; nothing else is checked. Returns the penalties
        as float64, where one may be ``NEEDS_EXACT_SUM``, or ``NOT_HANDLED`` if the gradients of
        that layer are still to be updated; None where nothing was written.
        """
        return None

    def fused_rows(
        self,
        activations: np.ndarray[Any, Any],
        gradients: np.ndarray[Any, Any] | None,
        options: Options,
        scale: float,
    ) -> np.ndarray[Any, Any] | None:
        """Do a whole call for each part along the first axis of contiguous arrays, or None.

        Gradients, if there are any, are overwritten as if they were 0. What is returned is that of
        :meth:`fused_batch`.
        """
        return None

    def apply_batch(
        self,
        activations: Sequence[Any],
        gradients: Sequence[Any],
        norm: Norm,
        constants: Sequence[Constants],
    ) -> list[Any] | None:
        """Do :meth:`apply` for many layers, which have been checked, in a few launches, or None."""
        return None

    def apply_to_rows(
        self,
        activations: Any,
        gradients: Any,
        norm: Any,
        constants: Constants,
        weights: Any = None,
    ) -> Any:
        """Return the penalty of many rows, and add their gradient to any gradients, or None.

        The axes of a row, as many as ``norm.axis`` names, are the last ones; ``norm`` is a
        :class:`~actreg_dispatch.row_norms.RowNorm`. Where None is returned, nothing is written; the
        weights are checked then, and one row is done after the other.
        """
        return None

    def sum_of_rows(self, activations: Any, norm: Any, weights: Any = None) -> Total | None:
        """Return the exact sum of the sizes of many rows, or None."""
        return None

    def quick_sum(
        self,
        activations: Any,
        norm: Norm,
        gradients: Any = None,
        constants: Constants | None = None,
        weights: Any = None,
    ) -> tuple[float, ...] | None:
        """Return the sums as pairs for :func:`~actreg_dispatch.sums.certified.round_if_certain`.

        The same pass adds the gradient of a norm of one pass, if gradients are given. None, and
        nothing is written, where the backend has no such sum.
        """
        return None
