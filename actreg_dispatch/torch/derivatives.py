"""Derivatives as operations of PyTorch, which can differentiate them further.

That of the penalty by its weights, and those of the gradient. They are PyTorch's own arithmetic on
the functions of the norm, right to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from actreg_dispatch.derivatives import gradient_expression, weights_gradient_expression
from actreg_dispatch.norms import signed_by_type, sqrt
from actreg_dispatch.options import Options, constants_of, count_of, divided_axes
from actreg_dispatch.torch.memory import DTYPES, compute_dtype_of

__all__ = ["differentiable_gradient", "pull_back_of_gradient", "weights_gradient"]


sqrt.register(torch.Tensor, torch.sqrt)


@signed_by_type.register
def _(x: torch.Tensor, a: Any) -> Any:
    return torch.where(x > 0, a, torch.where(x < 0, -a, 0.0))


def weights_gradient(
    options: Options, activations: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Return ``scale`` times the derivative of the penalty by floating weights.

    In binary64. λ of the options may be tensors, as they are in a graph, and axes have any length.
    """
    if not activations.numel():
        return torch.zeros_like(weights)
    axes = divided_axes(options.reduction, activations.ndim)
    factor = scale.to(activations.device, torch.float64) / math.prod(
        activations.shape[axis] for axis in axes
    )
    epsilon = options.epsilon
    if epsilon is None:
        epsilon = torch.finfo(compute_dtype_of(activations)).eps
    w = weights.double()
    x, unit = _in_range(options, activations.double(), w)
    lam = tuple(each * factor for each in options.lam)
    each = weights_gradient_expression(options.norm, x, unit, lam, epsilon, torch.where, w)
    return each.sum_to_size(weights.shape).to(weights.dtype)


def pull_back_of_gradient(
    options: Options,
    incoming: torch.Tensor,
    activations: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Return ``incoming`` times the derivatives of the gradient by the three others.

    None by weights that are none, or a mask.
    """
    function, at = differentiable_gradient(options, activations, scale, weights)
    _, pull_back = torch.func.vjp(function, *at)
    found: tuple[torch.Tensor | None, ...] = pull_back(incoming)
    return (*found, None)[:3]


def differentiable_gradient(
    options: Options,
    activations: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor | None,
) -> tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return a function whose value is the gradient of the penalty, and what to call it with.

    These are activations, scale, and weights if they are floating.
    """
    floating = weights is not None and weights.is_floating_point()

    def gradient(x: torch.Tensor, scale: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return _gradient(options, x, scale, w[0] if floating else weights)

    return gradient, (activations, scale, weights) if floating else (activations, scale)


def _gradient(
    options: Options,
    activations: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    x = activations.to(compute_dtype_of(activations))
    factor = scale.to(x)
    if not x.numel():
        return (x * factor).to(activations.dtype)
    count = count_of(options.reduction, x.shape)
    lam, _, epsilon = constants_of(options, DTYPES[x.dtype], count)
    if weights is not None and weights.dtype == torch.bool:
        factor = factor * (count / _kept_of(options, weights.expand(x.shape))).to(x)
    w = None if weights is None else weights.to(x)
    x, unit = _in_range(options, x, w)
    lams = tuple(each * factor for each in lam)
    added = gradient_expression(options.norm, x, unit, lams, epsilon, torch.where, w)
    return added.to(activations.dtype)


def _in_range(
    options: Options, x: torch.Tensor, w: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x, and the unit for expressions, of which what is left out is a finite multiple."""
    size = x.detach().abs()
    if w is not None:
        size = torch.where(w != 0, size, 0.0)
    largest = size.amax(options.norm.axis or (), keepdim=True)
    usual = (largest >= torch.finfo(x.dtype).tiny) & largest.isfinite()
    unit = torch.where(usual, largest, 1.0)
    if w is not None:
        x = torch.where((w != 0) | (x / unit).isfinite(), x, 0.0)
    return x, unit


def _kept_of(options: Options, mask: torch.Tensor) -> torch.Tensor:
    """Return what λ is divided by for a mask of the shape of the activations."""
    axes = divided_axes(options.reduction, mask.ndim)
    for axis in range(mask.ndim):
        if axis not in axes:
            mask = mask.any(axis, keepdim=True)
    return mask.sum().clamp(min=1)
