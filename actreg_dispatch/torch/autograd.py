"""The functions that autograd differentiates: the penalty, its gradient, and what the layer does.

Forward and the first derivative are the backends'. Second and higher derivatives are PyTorch's own
arithmetic on the functions of the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from actreg_dispatch.derivatives import gradient_expression
from actreg_dispatch.norms import signed_by_type, sqrt
from actreg_dispatch.options import constants_of, count_of
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.runtime.huge_pages import FROM_BYTES
from actreg_dispatch.statistics import ActivationStatistics
from actreg_dispatch.torch.internals import forward_modes, transformed
from actreg_dispatch.torch.memory import (
    DTYPES,
    as_tensor,
    check_and_update,
    check_tensor,
    compute_dtype_of,
    given_for,
    new_like,
    plain,
    stream_of,
    update,
    view,
)

__all__ = [
    "differentiable_penalty",
    "new_gradient",
    "pass_through",
    "penalty_value",
    "pull_back_of_gradient",
    "transformed_penalty",
    "weighted_penalty",
]


def penalty_value(reg: ActivityRegularization, activations: torch.Tensor) -> torch.Tensor:
    """Return the penalty without a graph."""
    x = plain("activations", activations)
    with stream_of(x):
        return as_tensor(reg.penalty(view(x)), x)


def _weighted_value(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    weights: torch.Tensor | None,
    statistics: ActivationStatistics | None,
) -> torch.Tensor:
    """Do :func:`penalty_value` with weights and statistics, if there are any."""
    x = plain("activations", activations)
    given = given_for(x, weights, statistics)
    with stream_of(x):
        return as_tensor(reg.penalty(view(x), **given), x)


def new_gradient(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    scale: torch.Tensor,
    gradients: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``gradients``, or zeros, plus ``scale`` times the gradient, without a graph."""
    x = plain("activations", activations)
    if gradients is None:
        gradient = new_like(x)
        # With the zeros in the cache, adding takes a fifth of the time of overwriting.
        few = x.nbytes < FROM_BYTES
        update(reg, x, gradient.zero_() if few else gradient, float(scale), not few)
        return gradient
    updated = new_like(gradients).copy_(gradients)
    update(reg, x, plain("gradients", updated), float(scale))
    return updated


def differentiable_penalty(reg: ActivityRegularization, activations: torch.Tensor) -> torch.Tensor:
    """Return the penalty, which requires grad if the activations do, outside transforms."""
    if not (activations.requires_grad and torch.is_grad_enabled()):
        function = penalty_value
    elif activations.is_cpu and activations.nbytes < FROM_BYTES:
        function = _penalty_of_few
    else:
        function = _without_signature(_Penalty)
    found: torch.Tensor = function(reg, activations)
    return found


def weighted_penalty(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    weights: torch.Tensor | None,
    statistics: ActivationStatistics | None,
) -> torch.Tensor:
    """Return the penalty, which requires grad if the activations or the weights do."""
    if transformed():
        raise NotImplementedError(
            "weights and statistics cannot be used inside transforms of torch.func; "
            "call penalty outside of them, or without"
        )
    if weights is not None:
        check_tensor("weights", weights)
    if _recorded(activations, weights):
        found: torch.Tensor = _WeightedPenalty.apply(reg, activations, weights, statistics)
        return found
    return _weighted_value(reg, activations, weights, statistics)


def transformed_penalty(reg: ActivityRegularization, activations: torch.Tensor) -> torch.Tensor:
    """Return the penalty inside transforms."""
    found: torch.Tensor = _Penalty.apply(reg, activations)
    return found


def pass_through(
    reg: ActivityRegularization, scale: float, activations: torch.Tensor
) -> torch.Tensor:
    """Return the activations; what comes back through them grows by the gradient."""
    return _AddsOnBackward.apply(reg, scale, activations) if _recorded(activations) else activations


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
    def keep(ctx: Any, reg: ActivityRegularization, *tensors: torch.Tensor) -> None:
        ctx.reg, ctx.options = reg, reg.options
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def kept(ctx: Any) -> ActivityRegularization:
        if ctx.reg.options is ctx.options:
            return ctx.reg  # type: ignore[no-any-return]
        return ActivityRegularization.from_options(ctx.options)


class _Penalty(_Regularizing):
    """The penalty of the activations."""

    forward = staticmethod(penalty_value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _Penalty.keep(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        (activations,) = ctx.saved_tensors
        reg = _Penalty.kept(ctx)
        return None, _differentiable(_Gradient, reg, activations, incoming, None)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: torch.Tensor) -> torch.Tensor:
        _check_nesting()
        (activations,) = ctx.saved_tensors
        one = torch.ones((), dtype=compute_dtype_of(activations), device=activations.device)
        gradient = _differentiable(_Gradient, _Penalty.kept(ctx), activations, one, None)
        return (gradient * tangent).sum(dtype=one.dtype)

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
        ctx.save_for_backward(activations)
        return as_tensor(reg.apply(view(x), view(ctx.gradient)), x)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        _ = ctx.saved_tensors  # complains if the activations have changed
        gradient, ctx.gradient = ctx.gradient, None  # which now belongs to whom it is given
        if gradient is None or torch.is_grad_enabled() or incoming.item() != 1.0:
            return _Penalty.backward(ctx, incoming)
        return None, gradient


_penalty_of_few = _without_signature(_PenaltyOfFew)


class _WeightedPenalty(_Regularizing):
    """The penalty of activations that have weights, or are counted; not for transforms."""

    @staticmethod
    def forward(ctx: Any, reg: ActivityRegularization, *given: Any) -> torch.Tensor:
        activations, weights, _ = given
        ctx.reg, ctx.options = reg, reg.options
        ctx.save_for_backward(activations, weights)
        return _weighted_value(reg, *given)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "a penalty with weights or statistics has no second derivatives; differentiate it "
                "without create_graph, or multiply the penalty of parts by their weights"
            )
        activations, weights = ctx.saved_tensors
        reg, scale, gradient, along_weights = _Regularizing.kept(ctx), float(incoming), None, None
        if ctx.needs_input_grad[1]:
            gradient = torch.zeros_like(activations)
            check_and_update(reg, activations, gradient, scale, weights=weights)
        if ctx.needs_input_grad[2]:
            along_weights = _gradient_along_weights(reg, activations, weights) * scale
        return None, gradient, along_weights, None


def _gradient_along_weights(
    reg: ActivityRegularization, activations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the derivative of the penalty by the weights, in PyTorch's arithmetic in binary64."""
    options, counted = reg.options, count_of(reg.reduction, activations.shape)
    with torch.enable_grad():
        w = weights.detach().double().requires_grad_()
        magnitudes = torch.where(w != 0, activations.detach().double().abs(), 0.0)
        sums = tuple((w * magnitudes**degree).sum() for degree in options.norm.terms)
        lam = tuple(each / counted for each in options.lam)
        penalty, *_ = options.norm.evaluate(sums, lam, lam, 0.0, lambda value: value)
        if not isinstance(penalty, torch.Tensor):  # of activations that are all 0
            return torch.zeros_like(weights)
        (found,) = torch.autograd.grad(penalty, w)
    return found.to(weights.dtype)


class _Gradient(_Regularizing):
    """``gradients``, or zeros, plus ``scale`` times the gradient of the penalty."""

    forward = staticmethod(new_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        reg, activations, scale, gradients = inputs
        ctx.adds = gradients is not None
        _Gradient.keep(ctx, reg, activations, scale)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        found = pull_back_of_gradient(_Gradient.kept(ctx), ctx.saved_tensors, incoming)
        return None, *found, incoming if ctx.adds else None

    @staticmethod
    def jvp(ctx: Any, _: None, *given: Any) -> torch.Tensor:
        _check_nesting()
        *along_inputs, along_gradients = given
        at = ctx.saved_tensors
        tangents = tuple(
            torch.zeros_like(value) if along is None else along
            for value, along in zip(at, along_inputs, strict=True)
        )
        # torch.func.jvp does not nest in forward-mode AD: two pull-backs make a push-forward
        value, pull_back = torch.func.vjp(_expression(_Gradient.kept(ctx)), *at)
        _, push_forward = torch.func.vjp(pull_back, torch.zeros_like(value))
        (along,) = push_forward(tangents)
        return along if along_gradients is None else along + along_gradients

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _sample_by_sample(_Gradient, info, in_dims, *arguments)


class _AddsOnBackward(_Regularizing):
    """The activations, whose gradient grows by that of the penalty on its way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        reg: ActivityRegularization, scale: float, activations: torch.Tensor
    ) -> torch.Tensor:
        return activations.view_as(activations)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        reg, ctx.scale, activations = inputs
        _AddsOnBackward.keep(ctx, reg, activations)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        (activations,) = ctx.saved_tensors
        scale = torch.tensor(ctx.scale, dtype=torch.float64)
        reg = _AddsOnBackward.kept(ctx)
        return None, None, _differentiable(_Gradient, reg, activations, scale, incoming)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        raise NotImplementedError(
            "ActivityRegularizer adds to the gradients of a backward pass, which forward-mode AD "
            "has not; add actreg_dispatch.torch.penalty(reg, activations) to the loss"
        )


# The gradient as operations of PyTorch, which can differentiate it.


def pull_back_of_gradient(
    reg: ActivityRegularization, at: Sequence[torch.Tensor], incoming: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the derivatives by activations and scale of the gradient, times ``incoming``."""
    _, pull_back = torch.func.vjp(_expression(reg), *at)
    found: tuple[torch.Tensor, ...] = pull_back(incoming)
    return found


sqrt.register(torch.Tensor, torch.sqrt)


@signed_by_type.register
def _(x: torch.Tensor, a: Any) -> Any:
    return torch.where(x > 0, a, torch.where(x < 0, -a, 0.0))


def _expression(
    reg: ActivityRegularization,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the gradient of the penalty as a function of activations and scale."""
    options = reg.options

    def gradient(activations: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x = activations.to(compute_dtype_of(activations))
        factor = scale.to(x)
        if not x.numel():
            return (x * factor).to(activations.dtype)
        count = count_of(options.reduction, x.shape)
        lam, _, epsilon = constants_of(options, DTYPES[x.dtype], count)
        largest = x.detach().abs().max()
        usual = (largest >= torch.finfo(x.dtype).tiny) & largest.isfinite()
        added = gradient_expression(
            options.norm,
            x,
            torch.where(usual, largest, 1.0),
            tuple(each * factor for each in lam),
            epsilon,
            torch.where,
        )
        return added.to(activations.dtype)

    return gradient
