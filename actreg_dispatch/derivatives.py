"""The gradient of a norm as an expression that other libraries differentiate further.

Penalty and gradient come from the backends, to the bit. What lies beyond, such as Hessians, is the
arithmetic of PyTorch or JAX on the functions of the :class:`~actreg_dispatch.norms.Norm`, here for
both. Its last bits are not promised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actreg_dispatch.norms import Norm, signed, signed_by_type, sqrt
from actreg_dispatch.row_norms import RowNorm

__all__ = ["gradient_expression", "weights_gradient_expression"]


def gradient_expression(
    norm: Norm,
    x: Any,
    unit: Any,
    lam: tuple[Any, ...],
    epsilon: float,
    where: Callable[[Any, Any, Any], Any],
    weights: Any = None,
) -> Any:
    """Return the gradient of the penalty of ``x``, differentiably, by the weights, too.

    Parameters
    ----------
    norm : Norm
    x : array
        Of the compute dtype, with at least one element.
    unit : array
        Its largest magnitude, or that of each row, with axes of length 1 for those that it reaches
        along; a constant for whoever differentiates, or 1 where that is 0 or not finite. Sums are
        taken of ``x / unit``, so that their squares stay in range.
    lam : tuple of arrays
        λ of the gradient, 0-d.
    epsilon : float
        What the norm's guard compares with.
    where : callable
        The library's ``where(condition, a, b)``.
    weights : array, optional
        Of the compute dtype, broadcasting to ``x``; where they are 0, ``x / unit`` is finite.
    """
    if weights is not None:
        lam = tuple(each * weights for each in lam)
    return _gradient_at(x, norm, x, unit, lam, epsilon, where, weights)


def weights_gradient_expression(
    norm: Norm,
    x: Any,
    unit: Any,
    lam: tuple[Any, ...],
    epsilon: float,
    where: Callable[[Any, Any, Any], Any],
    weights: Any,
) -> Any:
    """Return the derivative of the penalty by the weight of each element, differentiably.

    The arguments are those of :func:`gradient_expression`. With p₁ and p₂ for the derivatives of
    the penalty by its sums, this is p₁|x| + p₂x², and the gradient of weight 1 is p₁sign(x) + 2p₂x:
    x times the gradient at x/2.
    """
    return x * _gradient_at(x / 2, norm, x, unit, lam, epsilon, where, weights)


def _gradient_at(
    place: Any,
    norm: Norm,
    x: Any,
    unit: Any,
    lam: tuple[Any, ...],
    epsilon: float,
    where: Callable[[Any, Any, Any], Any],
    weights: Any,
) -> Any:
    """Return what the gradient of ``x`` would be at elements of the values ``place``."""
    axis = norm.axis
    if isinstance(norm, RowNorm):
        norm = norm.of_row
    if not norm.two_pass:
        return norm.gradient(place, lam, ())
    one, scaled = unit / unit, x / unit
    powers = {1: scaled * signed(one, scaled), 2: scaled * scaled}  # |x| with derivative 0 at 0
    if weights is not None:
        for degree, power in powers.items():  # what is left out may be beyond the range
            summed = where((weights != 0) | (power - power == 0), power, one)
            powers[degree] = weights * summed
    sums = [(powers[degree].sum(axis=axis, keepdims=True), degree) for degree in norm.terms]
    lams = tuple(_Scaled(each, 0, unit) for each in lam)

    exists = norm.guard(
        tuple(_Scaled(total, degree, unit) for total, degree in sums),
        _Scaled(epsilon * one, 0, unit),
    )
    for total, _ in sums:
        exists = exists | (total != total)
    all_zero = True
    for total, _ in sums:
        all_zero = all_zero & (total == 0)
    exists = exists & ~all_zero
    # The derivative of the branch that is not taken must be finite, or NaN would come of it.
    s = tuple(_Scaled(where(exists, total, one), degree, unit) for total, degree in sums)
    at = scaled if place is x else place / unit
    found = norm.gradient(_Scaled(at, 1, unit), lams, norm.coefficients(lams, s)).plain()
    return where(exists, where(x == x, found, found), 0.0)  # of the shape of x, even if without x


class _Scaled:
    """The number, or array, ``value * unit**power``."""

    def __init__(self, value: Any, power: float, unit: Any) -> None:
        self.value, self.power, self.unit = value, power, unit

    def __add__(self, other: _Scaled) -> _Scaled:
        if self.power == other.power:
            return _Scaled(self.value + other.value, self.power, self.unit)
        return _Scaled(self.plain() + other.plain(), 0, self.unit)

    def __sub__(self, other: _Scaled) -> _Scaled:
        return self + -other

    def __mul__(self, other: _Scaled) -> _Scaled:
        return _Scaled(self.value * other.value, self.power + other.power, self.unit)

    def __truediv__(self, other: _Scaled) -> _Scaled:
        return _Scaled(self.value / other.value, self.power - other.power, self.unit)

    def __neg__(self) -> _Scaled:
        return _Scaled(-self.value, self.power, self.unit)

    def __gt__(self, other: _Scaled) -> Any:
        half = (self.power - other.power) / 2  # on each side, as the whole might be out of range
        return _times(self.value, self.unit, half) > _times(other.value, self.unit, -half)

    def plain(self) -> Any:
        """Return the number itself."""
        return _times(self.value, self.unit, self.power)


@signed_by_type.register
def _(x: _Scaled, a: _Scaled) -> _Scaled:
    return _Scaled(signed(a.value, x.value), a.power, a.unit)


@sqrt.register
def _(number: _Scaled) -> _Scaled:
    return _Scaled(sqrt(number.value), number.power / 2, number.unit)


def _times(value: Any, unit: Any, power: float) -> Any:
    """Return ``value * unit**power``, step by step, as 0 times an infinite power would be NaN."""
    while power >= 1:
        value, power = value * unit, power - 1
    while power <= -1:
        value, power = value / unit, power + 1
    return value * unit**power if power else value
