"""Frozen options, and λ as a backend takes it: divided, scaled, rounded to T, and checked."""

from __future__ import annotations

import math
import numbers
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from actreg_dispatch.dtypes import COMPUTE_DTYPES
from actreg_dispatch.norms import MOST_LAMS, NORMS, Norm

__all__ = [
    "REDUCTIONS",
    "UNSCALED",
    "Constants",
    "Options",
    "Reduction",
    "axes_of",
    "check_axes",
    "check_count",
    "check_lam",
    "check_number",
    "check_real",
    "check_reduction",
    "check_scale",
    "constants_of",
    "count_of",
    "divided_axes",
]

REDUCTIONS = ("sum", "mean", "batch")
Reduction = str | tuple[int, ...]
"""One of :data:`REDUCTIONS`, or the axes whose lengths divide λ."""
UNSCALED = 1.0
"""The scale of a call that is given none, which is told by this very object."""


class Options(NamedTuple):
    """A regularization as it is at one time: what a traced, lazy or pickled computation keeps."""

    lam: tuple[float, ...]
    norm: Norm
    epsilon: float | None
    reduction: Reduction
    backend: str | None


class Constants(NamedTuple):
    """What a backend is told besides the arrays and the norm."""

    lam: tuple[float, ...]  # λ of the penalty, values of T
    gradient_lam: tuple[float, ...]  # λ of the gradient, values of T
    epsilon: float


def divided_axes(reduction: Reduction, ndim: int, name: str = "activations") -> tuple[int, ...]:
    """Return the axes whose lengths divide λ, for activations of ``ndim`` axes.

    Raises
    ------
    ValueError
        If activations, which are called ``name``, do not have them, or one is named twice.
    """
    if reduction == "sum":
        return ()
    if reduction == "mean":
        return tuple(range(ndim))
    asked = reduction if isinstance(reduction, tuple) else (0,)
    return axes_of(asked, ndim, f"reduction={reduction!r}", "divides by the length of", name)


def axes_of(
    asked: tuple[int, ...], ndim: int, option: str, verb: str, name: str
) -> tuple[int, ...]:
    """Return axes of activations of ``ndim`` axes, none of them negative.

    Raises
    ------
    ValueError
        If activations, which are called ``name``, do not have them, or one is named twice by the
        ``option``, of which the ``verb`` says what it does with an axis.
    """
    for axis in asked:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{name} have {ndim or 'no'} axes, but {option} {verb} axis {axis}; "
                f"name axes that they have"
            )
    axes = tuple([axis % ndim for axis in asked])
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"{option} names an axis of {name} twice, as they have {ndim} axes; name each once"
        )
    return axes


def count_of(reduction: Reduction, shape: tuple[int, ...], name: str = "activations") -> int:
    """Return what λ is divided by for activations of ``shape``, which errors call ``name``.

    Raises
    ------
    ValueError
        If that is the length of an axis that they do not have.
    """
    return max(1, math.prod(int(shape[k]) for k in divided_axes(reduction, len(shape), name)))


def check_reduction(value: Any) -> Reduction:
    """Return ``value`` as one of :data:`REDUCTIONS`, or as a tuple of axes.

    Raises
    ------
    ValueError
        If it is neither, or names no axis, or one twice.
    """
    if isinstance(value, str) and value in REDUCTIONS:
        return value
    known = ", ".join(map(repr, REDUCTIONS))
    advice = f"use one of: {known}, or an axis or a tuple of axes whose lengths divide λ"
    return check_axes(value, f"reduction={value!r}", f"{advice}, such as (0, 1)")


def check_axes(value: Any, option: str, advice: str) -> tuple[int, ...]:
    """Return an axis, or several, as a tuple of them.

    Raises
    ------
    ValueError
        If ``value`` names no axis, or one twice, naming the ``option`` and giving ``advice``.
    """
    axes = value if isinstance(value, tuple) else (value,)
    if not axes or not all(
        isinstance(axis, numbers.Integral) and not isinstance(axis, bool) for axis in axes
    ):
        raise ValueError(f"{option} is unknown; {advice}")
    if len(set(axes)) < len(axes):
        raise ValueError(f"{option} names an axis twice; name each once")
    return tuple(map(int, axes))


def check_count(reduction: Reduction, count: int | None) -> int:
    """Return what λ is divided by for activations of which only ``count`` is known.

    Raises
    ------
    ValueError
        If it is needed and no whole number >= 0.
    """
    if reduction == "sum":
        return 1
    if not isinstance(count, numbers.Integral) or not 0 <= count < 1 << 63:
        raise ValueError(
            f"count={count!r}, but reduction={reduction!r} divides by a number of all pieces "
            f"together; pass how many elements ('mean') or samples ('batch') they have, or the "
            f"product of the lengths of the axes"
        )
    return max(1, int(count))


def check_number(name: str, value: Any) -> float:
    """Return ``value`` as a Python float if it is a finite real number >= 0.

    Raises
    ------
    TypeError
        If it is not a real number, naming the argument ``name``.
    ValueError
        If it is negative, infinite or NaN.
    """
    if type(value) is float and 0.0 <= value < math.inf:  # at once, for a λ that changes often
        return value + 0.0  # -0.0 becomes 0.0
    advice = f"pass a real number >= 0 and finite for {name}"
    number = check_real(name, value, advice)
    if not (number >= 0.0 and math.isfinite(number)):
        raise ValueError(f"{name}={number!r} is out of range; {advice}")
    return number + 0.0


def check_real(name: str, value: Any, advice: str) -> float:
    """Return ``value`` as a Python float if it is a real number, be it infinite or NaN.

    Raises
    ------
    TypeError
        If it is not a real number, naming the argument ``name`` and giving ``advice``.
    """
    if type(value) is np.ndarray and value.ndim == 0:
        value = value[()]
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; {advice}")
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def check_lam(value: Any, norm: Norm) -> tuple[float, ...]:
    """Return λ as the tuple that a norm takes; one number stands for all of several."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and 1 < value.size <= MOST_LAMS:
        value = tuple(value.tolist())
    several = isinstance(value, (tuple, list))
    if norm.n_lams == 1:
        if several and len(value) > 1:
            known = NORMS.copy().items()
            fitting = [repr(name) for name, each in known if each.n_lams == len(value)]
            use = f", or use norm {' or '.join(fitting)}" if fitting else ""
            raise TypeError(
                f"lam={value!r} are several numbers, but norm {norm.name!r} takes one; "
                f"pass one{use}"
            )
        return (check_number("lam", value),)
    each_lam = value if several else (value,) * norm.n_lams
    if len(each_lam) != norm.n_lams:
        raise ValueError(
            f"lam={value!r} are not {norm.n_lams} numbers, which norm {norm.name!r} takes; "
            f"pass as many, or one number for all"
        )
    return tuple(check_number(f"lam[{k}]", each) for k, each in enumerate(each_lam))


def check_scale(scale: Any) -> float:
    """Return ``scale`` as a Python float.

    Raises
    ------
    TypeError
        If it is not a real number.
    """
    if type(scale) is float:
        return scale
    return check_real("scale", scale, "pass a real number, such as the loss scale")


def constants_of(
    options: Options,
    dtype: np.dtype[Any],
    count: int,
    scale: float = UNSCALED,
    name: str = "activations",
) -> Constants:
    """Return what a backend is told for activations of ``dtype``, of which there are ``count``.

    Raises
    ------
    TypeError
        If ``scale`` is not a real number.
    ValueError
        If λ is too large for the dtype.
    """
    if scale is UNSCALED:
        found = _constants(options, dtype, count, scale)
    else:  # not by the cache, for which 0.0 and -0.0 are one
        found = _constants.__wrapped__(options, dtype, count, check_scale(scale))
    if found is None:
        given = options.lam if options.norm.n_lams > 1 else options.lam[0]
        raise ValueError(f"lam={given!r} is too large for {dtype} {name}; lower it")
    return found


@lru_cache
def _constants(
    options: Options, dtype: np.dtype[Any], count: int, scale: float
) -> Constants | None:
    """Return what a backend is told, or None if λ is too large."""
    norm, compute = options.norm, COMPUTE_DTYPES[dtype]
    real = compute.type
    with np.errstate(all="ignore"):
        lam, gradient_lam = norm.rounded_lams(options.lam, count, scale, real)
        if not norm.lam_fits(lam, real(1)):
            return None
    return Constants(
        tuple(map(float, lam)),
        tuple(map(float, gradient_lam)),
        _machine_epsilon(compute) if options.epsilon is None else options.epsilon,
    )


@lru_cache
def _machine_epsilon(dtype: np.dtype[Any]) -> float:
    return float(np.finfo(dtype).eps)
