"""Norms of rows: the sum of what a norm makes of each row, such as λ·Σ‖row‖, the group lasso.

A :class:`RowNorm` is a norm like others to whoever calls a backend: its sum is over rows, and its
gradient needs no other sum. What a backend is given in the end, by :class:`RowsBackend`, are rows,
and the norm of a row. A backend that does not take many rows at once does one after the other.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.dtypes import COMPUTE_DTYPES, FLOAT64, round_to
from actreg_dispatch.norms import L1, NORMS, Norm
from actreg_dispatch.options import Constants, axes_of
from actreg_dispatch.registry import NUMPY
from actreg_dispatch.sums.certified import Outcome
from actreg_dispatch.sums.exact import UNIT, PartialSum, Total, outcome_of
from actreg_dispatch.transfer import move, on_device_of
from actreg_dispatch.weights import check_weight_values, given

__all__ = ["RowNorm", "RowsBackend", "outcome_of_row", "row_axes", "row_norm", "rows_of"]

_NOTHING = Constants((0.0,), (0.0,), 0.0)


class RowNorm(Norm):
    """The sum of a norm over rows, which reach along ``axis``.

    Parameters
    ----------
    of_row : Norm
        The norm of a row, P(x) = λ·size(x). The size, of λ = 1, is rounded to binary64; the sum of
        the sizes is exact, and rounded to 53 bits once. Coefficients, and whether there is a
        gradient, are each row's.
    axis : tuple of int
        The axes of a row, counted from the last if they are negative.
    """

    def __init__(self, of_row: Norm, axis: tuple[int, ...]) -> None:
        vars(self).update(vars(of_row))
        self.of_row = of_row
        self.axis: tuple[int, ...] = axis
        self.terms, self.two_pass, self.evaluate = L1.terms, False, L1.evaluate

    def __repr__(self) -> str:
        return f"<RowNorm {self.name!r} along {self.axis}>"

    def __reduce__(self) -> Any:
        return row_norm, (self.of_row, self.axis)


_KNOWN: dict[tuple[Norm, tuple[int, ...]], RowNorm] = {}


def row_norm(norm: Norm, axis: tuple[int, ...]) -> RowNorm:
    """Return the norm of rows along ``axis``, the same one each time.

    Raises
    ------
    ValueError
        If the norm has no such sum: without a guard, rows of it add up to the whole.
    """
    known = _KNOWN.get((norm, axis))
    if known is not None:
        return known
    if not _takes_axis(norm):
        fitting = ", ".join(repr(each.name) for each in NORMS.copy().values() if _takes_axis(each))
        raise ValueError(
            f"axis={axis!r} has no meaning for norm {norm.name!r}; "
            f"leave it out, it belongs to {fitting}"
        )
    return _KNOWN.setdefault((norm, axis), RowNorm(norm, axis))  # of threads, the first one's


def _takes_axis(norm: Norm) -> bool:
    return norm.has_guard and norm.takes_weights and norm.n_lams == len(norm.terms) == 1


def row_axes(norm: Norm, ndim: int, name: str = "activations") -> tuple[int, ...]:
    """Return the axes of a row of activations of ``ndim`` axes; none if the norm is not of rows.

    Raises
    ------
    ValueError
        If activations, which are called ``name``, do not have them.
    """
    if norm.axis is None:
        return ()
    return axes_of(norm.axis, ndim, f"axis={norm.axis!r}", "reaches along", name)


def rows_of(array: Any, norm: RowNorm) -> Any:
    """Return a view of ``array`` whose last axes are those of a row.

    Raises
    ------
    ValueError
        If there are no such axes.
    """
    axes = row_axes(norm, array.ndim)
    others = [axis for axis in range(array.ndim) if axis not in axes]
    return array.transpose(*others, *sorted(axes))


def outcome_of_row(total: Total, norm: Norm, epsilon: float) -> Outcome:
    """Return what ``norm`` makes of the sum of a row: its size in binary64, the others in T."""
    (part,) = total.parts
    found = outcome_of(replace(part, dtype=FLOAT64), norm, Constants((1.0,), (1.0,), epsilon))
    coefficients = tuple(float(round_to(total.dtype, each)) for each in found.coefficients)
    return found._replace(coefficients=coefficients)


class RowsBackend(Backend):
    """What a backend makes of norms of rows.

    Parameters
    ----------
    backend : Backend
        What computes, on arrays of the type ``array_type``.
    """

    def __init__(self, backend: Backend, array_type: str) -> None:
        self._backend, self._array_type = backend, array_type
        self.name, self.dtypes = backend.name, backend.dtypes

    def partial_sum(self, activations: Any, norm: Any, weights: Any = None) -> Total:
        """Return the sum of the sizes of all rows, exactly."""
        x: Any = rows_of(activations, norm)
        w = None if weights is None else rows_of(weights, norm)
        single = len(norm.axis) == x.ndim
        found = None if single else self._backend.sum_of_rows(x, norm, w)
        if found is None:
            check_weight_values(weights)
            return self._one_by_one(x, None, norm, _NOTHING, w)
        return found

    def penalty(
        self,
        activations: Any,
        norm: Any,
        constants: Constants,
        weights: Any = None,
        statistics: Any = None,
    ) -> Any:
        """Return the penalty."""
        return self._whole(activations, None, norm, constants, weights, statistics)

    def apply(
        self,
        activations: Any,
        gradients: Any,
        norm: Any,
        constants: Constants,
        weights: Any = None,
        statistics: Any = None,
    ) -> Any:
        """Add the gradient to ``gradients`` in place and return the penalty."""
        return self._whole(activations, gradients, norm, constants, weights, statistics)

    def add_gradient(
        self,
        activations: Any,
        gradients: Any,
        norm: Any,
        constants: Constants,
        coefficients: tuple[float, ...],
        weights: Any = None,
    ) -> None:
        """Add the gradient to ``gradients`` in place; the whole has no ``coefficients``."""
        self._whole(activations, gradients, norm, constants, weights, None)

    def _whole(
        self,
        activations: Any,
        gradients: Any,
        norm: RowNorm,
        constants: Constants,
        weights: Any,
        statistics: Any,
    ) -> Any:
        x: Any = rows_of(activations, norm)
        g, w = (None if each is None else rows_of(each, norm) for each in (gradients, weights))
        if len(norm.axis) == x.ndim:  # a single row
            of_row, one = norm.of_row, self._backend
            if g is None:
                return one.penalty(x, of_row, constants, **given(w, statistics))
            return one.apply(x, g, of_row, constants, **given(w, statistics))
        if statistics is not None:  # first, since it may refuse
            self._backend.penalty(activations, L1, _NOTHING, **given(weights, statistics))
        found = self._backend.apply_to_rows(x, g, norm, constants, w)
        if found is None:
            check_weight_values(weights)
            total = self._one_by_one(x, g, norm, constants, w)
            real = COMPUTE_DTYPES[x.dtype].type
            found = real(outcome_of(total, norm, constants).penalty)
            if self._array_type != NUMPY:
                with on_device_of(activations, self._array_type):
                    found = move(found, NUMPY, self._array_type)[()]
        return found

    def _one_by_one(self, x: Any, g: Any, norm: RowNorm, constants: Constants, w: Any) -> Total:
        """Do one row after the other, and return the sum of their sizes."""
        of_row, units, special = norm.of_row, 0, 0.0
        for row in np.ndindex(x.shape[: x.ndim - len(norm.axis)]):
            weights = None if w is None else w[row]
            total = self._backend.partial_sum(x[row], of_row, **given(weights))
            found = outcome_of_row(total, of_row, constants.epsilon)
            if math.isfinite(found.penalty):
                units += int(Fraction(found.penalty) / Fraction(2) ** UNIT)
            else:
                special += found.penalty
            if g is not None and found.has_gradient:
                self._backend.add_gradient(
                    x[row], g[row], of_row, constants, found.coefficients, **given(weights)
                )
        return PartialSum(1, COMPUTE_DTYPES[x.dtype], units, special)
