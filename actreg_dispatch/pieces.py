"""Activations that come in pieces: from a file, from several devices or processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from actreg_dispatch import dispatch
from actreg_dispatch.options import Options
from actreg_dispatch.registry import library_of
from actreg_dispatch.sums.exact import Total

__all__ = ["Piecewise"]


class Piecewise(ABC):
    """The part of :class:`~actreg_dispatch.ActivityRegularization` that is about pieces.

    Add up the :meth:`partial_sum` of the pieces, in any order; :meth:`finish` makes the penalty of
    the whole of it, and :meth:`add_gradient` adds its gradient, piece by piece.
    """

    @property
    @abstractmethod
    def options(self) -> Options:
        """All options as they are now."""

    def partial_sum(self, activations: Any, *, weights: Any = None) -> Total:
        """Return what the norm sums over a piece of the activations, exactly.

        Parameters
        ----------
        activations : numpy.ndarray or cupy.ndarray
            As for :meth:`penalty`, also in what is raised. Waits for a device.
        weights : array, optional
            Those of the piece, as for :meth:`penalty`.

        Returns
        -------
        PartialSum or PairedSum
            Σ|xᵢ| or Σxᵢ², or both: numbers of unlimited precision, without λ.

        Examples
        --------
        >>> import numpy as np
        >>> from actreg_dispatch import ActivityRegularization
        >>> reg = ActivityRegularization.l1(0.5)
        >>> activations = np.arange(6.0)
        >>> total = sum(reg.partial_sum(piece) for piece in np.split(activations, 3))
        >>> float(reg.finish(total)), float(reg.penalty(activations))
        (7.5, 7.5)
        """
        library = library_of(type(activations))
        if library is not None:
            given = dispatch.given(weights)
            return library.partial_sum(self, activations, **given)  # type: ignore[no-any-return]
        return dispatch.partial_sum(self.options, activations, weights)

    def finish(self, total: Total, *, count: int | None = None) -> Any:
        """Return the penalty of activations whose sum is ``total``.

        Parameters
        ----------
        total : PartialSum or PairedSum
            The sum of what :meth:`partial_sum` returned for all pieces.
        count : int, optional
            What λ is divided by: how many elements (``reduction="mean"``) or samples (``"batch"``)
            all pieces together have, or the product of the lengths of the axes. Not for ``"sum"``.

        Returns
        -------
        numpy.floating
            In the compute dtype T: bit for bit what :meth:`penalty` returns for the whole array.

        Raises
        ------
        TypeError, ValueError
            If ``total`` is not a sum of this norm, ``lam`` is too large for its dtype, or ``count``
            is missing or < 0.
        """
        return dispatch.finish(self.options, total, count)

    def add_gradient(
        self,
        activations: Any,
        gradients: Any,
        total: Total | None = None,
        *,
        count: int | None = None,
        scale: float = 1.0,
        weights: Any = None,
    ) -> None:
        """Add to ``gradients`` in place what :meth:`apply` would add if it were given all pieces.

        Parameters
        ----------
        activations, gradients : numpy.ndarray, cupy.ndarray
            One piece of the whole, as for :meth:`apply`, which says what ``scale`` is.
        total : PartialSum or PairedSum, optional
            The sum of what :meth:`partial_sum` returned for all pieces; needed by norms whose
            gradient depends on it, such as ``"l2"``.
        count : int, optional
            As for :meth:`finish`.
        weights : array, optional
            Those of the piece, as for :meth:`apply`.

        Raises
        ------
        TypeError, ValueError, BackendError
            As for :meth:`apply` and :meth:`finish`, or if ``total`` is missing or of another dtype.

        Examples
        --------
        >>> import numpy as np
        >>> from actreg_dispatch import ActivityRegularization
        >>> reg = ActivityRegularization.l2(1.0)
        >>> activations, gradients = np.array([3.0, 4.0]), np.zeros(2)
        >>> pieces = activations[:1], activations[1:]
        >>> total = sum(reg.partial_sum(piece) for piece in pieces)
        >>> for piece, gradient in zip(pieces, (gradients[:1], gradients[1:])):
        ...     reg.add_gradient(piece, gradient, total)
        >>> gradients
        array([0.6, 0.8])
        """
        library = library_of(type(activations))
        if library is not None:
            given = {"count": count, "scale": scale} | dispatch.given(weights)
            library.add_gradient(self, activations, gradients, total, **given)
            return
        dispatch.add_gradient(self.options, activations, gradients, total, count, scale, weights)
