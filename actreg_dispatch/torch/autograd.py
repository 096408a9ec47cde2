"""The functions that autograd differentiates: the penalty, its gradient, and what the layer does.

Forward and the first derivative by activations are the backends'. All others are those of
:mod:`actreg_dispatch.torch.derivatives`.
"""

from __future__ import annotations

from typing import Any

import torch

from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.runtime.huge_pages import FROM_BYTES
from actreg_dispatch.statistics import ActivationStatistics
from actreg_dispatch.torch.derivatives import (
    differentiable_gradient,
    pull_back_of_gradient,
    weights_gradient,
)
from actreg_dispatch.torch.internals import forward_modes, transformed
from actreg_dispatch.torch.memory import (
    as_tensor,
    compute_dtype_of,
    new_like,
    plain,
    stream_of,
    update,
    view,
    weights_for,
)

__all__ = [
    "differentiable_penalty",
    "new_gradient",
    "pass_through",
    "penalty_value",
    "transformed_penalty",
    "weighted_penalty",
]


def penalty_value(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    weights: torch.Tensor | None = None,
    statistics: ActivationStatistics | None = None,
) -> torch.Tensor:
    """Return the penalty without a graph."""
    x = plain("activations", activations)
    w = weights_for(x, weights)
    with stream_of(x):
        return as_tensor(reg.penalty(view(x), weights=w, statistics=statistics), x)


def new_gradient(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    scale: torch.Tensor,
    gradients: torch.Tensor | None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``gradients``, or zeros, plus ``scale`` times the gradient, without a graph."""
    x = plain("activations", activations)
    w = weights_for(x, weights)
    if gradients is None:
        gradient = new_like(x)
        # With the zeros in the cache, adding takes a fifth of the time of overwriting.
        few = x.nbytes < FROM_BYTES
        update(reg, x, gradient.zero_() if few else gradient, float(scale), not few, weights=w)
        return gradient
    updated = new_like(gradients).copy_(gradients)
    update(reg, x, plain("gradients", updated), float(scale), weights=w)
    return updated


def differentiable_penalty(reg: ActivityRegularization, activations: torch.Tensor) -> torch.Tensor:
    """Return the penalty, which requires grad if the activations do, outside transforms."""
    if not (activations.requires_grad and torch.is_grad_enabled()):
        return penalty_value(reg, activations)
    if activations.is_cpu and activations.nbytes < FROM_BYTES:
        return _penalty_of_few(reg, activations)
    return _without_signature(_Penalty)(reg, activations, None, None)


def weighted_penalty(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    weights: torch.Tensor | None,
    statistics: ActivationStatistics | None = None,
) -> torch.Tensor:
    """Return the penalty, which requires grad if activations or weights do, outside transforms."""
    return _differentiable(_Penalty, reg, activations, weights, statistics)


def transformed_penalty(
    reg: ActivityRegularization, activations: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the penalty inside transforms."""
    return _Penalty.apply(reg, activations, weights, None)


def pass_through(
    reg: ActivityRegularization,
    scale: float,
    activations: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the activations; what comes back through them grows by the gradient."""
    if not _recorded(activations, weights):
        return activations
    return _AddsOnBackward.apply(reg, scale, activations, weights)


def _recorded(*arguments: Any) -> bool:
    """Return whether something will want to differentiate what is computed of ``arguments``."""
    return transformed() or (
        torch.is_grad_enabled()
        and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
    )


def _differentiable(function: Any, *arguments: Any) -> Any:
    """Apply an autograd function, or do its forward alone where that will do."""
    return (function.apply if _recorded(*arguments) else function.forward)(*arguments)


def _check_nesting() -> None:
    """Refuse forward-mode AD inside itself, where PyTorch takes the result for a constant."""
    if forward_modes() > 1:
        raise NotImplementedError(
            "PyTorch cannot nest forward-mode AD through functions of other libraries; "
            "take the inner derivative in reverse mode, as torch.func.hessian does"
        )


def _sample_by_sample(function: Any, info: Any, in_dims: Any, *arguments: Any) -> Any:
    """Do ``vmap`` of an autograd function, each sample on its own."""
    size, batches = info.batch_size, []
    for argument, axis in zip(arguments, in_dims, strict=True):
        if axis is None:
            batches.append([argument] * max(1, size))
        else:
            batch = argument.movedim(axis, 0)
            batches.append(batch if size else batch.new_zeros(1, *batch.shape[1:]))
    results = [_differentiable(function, *sample) for sample in zip(*batches, strict=True)]
    return torch.stack(results)[:size], 0


def _without_signature(function: Any) -> Any:
    """Return what ``function.apply`` calls in the end, outside transforms."""
    return super(torch.autograd.Function, function).apply


class _Regularizing(torch.autograd.Function):
    """What the functions have in common: activations that are saved, and λ as it was."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """Do what PyTorch would, but not look at signatures, which takes it 15 µs."""
        if transformed():
            return super().apply(*arguments)
        return _without_signature(cls)(*arguments)

    @staticmethod
    def keep(ctx: Any, reg: ActivityRegularization, *tensors: torch.Tensor | None) -> None:
        ctx.reg, ctx.options = reg, reg.options
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def kept(ctx: Any) -> ActivityRegularization:
        if ctx.reg.options is ctx.options:
            return ctx.reg  # type: ignore[no-any-return]
        return ActivityRegularization.from_options(ctx.options)


class _Penalty(_Regularizing):
    """The penalty of the activations, with weights and statistics or None."""

    forward = staticmethod(penalty_value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        reg, activations, weights, _ = inputs
        _Penalty.keep(ctx, reg, activations, weights)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        activations, weights = ctx.saved_tensors
        reg, gradient, along_weights = _Penalty.kept(ctx), None, None
        if ctx.needs_input_grad[1]:
            gradient = _differentiable(_Gradient, reg, activations, incoming, None, weights)
        if weights is not None and ctx.needs_input_grad[2]:
            along_weights = weights_gradient(reg.options, activations, weights, incoming)
        return None, gradient, along_weights, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        _check_nesting()
        _, tangent, along_weights, _ = tangents
        activations, weights = ctx.saved_tensors
        reg, dtype = _Penalty.kept(ctx), compute_dtype_of(activations)
        one = torch.ones((), dtype=dtype, device=activations.device)
        slope = torch.zeros_like(one)
        if tangent is not None:
            gradient = _differentiable(_Gradient, reg, activations, one, None, weights)
            slope = (gradient * tangent).sum(dtype=dtype)
        if along_weights is not None:
            by_weights = weights_gradient(reg.options, activations, weights, one)
            slope = slope + (by_weights * along_weights).sum(dtype=dtype)
        return slope

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _sample_by_sample(_Penalty, info, in_dims, *arguments)


class _PenaltyOfFew(torch.autograd.Function):
    """The penalty of so few activations that the time goes to Python: the gradient is found, too.

    It is that of an incoming gradient of 1, the usual one. Not for transforms.
    """

    @staticmethod
    def forward(ctx: Any, reg: ActivityRegularization, activations: torch.Tensor) -> torch.Tensor:
        x = plain("activations", activations)
        ctx.gradient = torch.zeros_like(x)
        ctx.reg, ctx.options = reg, reg.options
        ctx.save_for_backward(activations, None)
        return as_tensor(reg.apply(view(x), view(ctx.gradient)), x)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        _ = ctx.saved_tensors  # complains if the activations have changed
        gradient, ctx.gradient = ctx.gradient, None  # which now belongs to whom it is given
        if gradient is None or torch.is_grad_enabled() or incoming.item() != 1.0:
            return _Penalty.backward(ctx, incoming)[:2]
        return None, gradient


_penalty_of_few = _without_signature(_PenaltyOfFew)


class _Gradient(_Regularizing):
    """``gradients``, or zeros, plus ``scale`` times the gradient of the penalty."""

    forward = staticmethod(new_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        reg, activations, scale, gradients, weights = inputs
        ctx.adds = gradients is not None
        _Gradient.keep(ctx, reg, activations, scale, weights)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        options = _Gradient.kept(ctx).options
        *found, by_weights = pull_back_of_gradient(options, incoming, *ctx.saved_tensors)
        return None, *found, incoming if ctx.adds else None, by_weights

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        _check_nesting()
        _, along_activations, along_scale, along_gradients, along_weights = tangents
        function, at = differentiable_gradient(_Gradient.kept(ctx).options, *ctx.saved_tensors)
        given = along_activations, along_scale, along_weights
        along_inputs = tuple(
            torch.zeros_like(value) if along is None else along
            for value, along in zip(at, given, strict=False)  # which a mask has not
        )
        # torch.func.jvp does not nest in forward-mode AD: two pull-backs make a push-forward
        value, pull_back = torch.func.vjp(function, *at)
        _, push_forward = torch.func.vjp(pull_back, torch.zeros_like(value))
        (along,) = push_forward(along_inputs)
        return along if along_gradients is None else along + along_gradients

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _sample_by_sample(_Gradient, info, in_dims, *arguments)


class _AddsOnBackward(_Regularizing):
    """The activations, whose gradient grows by that of the penalty on its way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        reg: ActivityRegularization,
        scale: float,
        activations: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        return activations.view_as(activations)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        reg, ctx.scale, activations, weights = inputs
        _AddsOnBackward.keep(ctx, reg, activations, weights)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        activations, weights = ctx.saved_tensors
        scale = torch.tensor(ctx.scale, dtype=torch.float64)
        reg, by_weights = _AddsOnBackward.kept(ctx), None
        if weights is not None and ctx.needs_input_grad[3]:
            by_weights = weights_gradient(reg.options, activations, weights, scale)
        gradient = _differentiable(_Gradient, reg, activations, scale, incoming, weights)
        return None, None, gradient, by_weights

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        raise NotImplementedError(
            "ActivityRegularizer adds to the gradients of a backward pass, which forward-mode AD "
            "has not; add actreg_dispatch.torch.penalty(reg, activations) to the loss"
        )
