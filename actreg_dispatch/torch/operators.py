"""Operators of PyTorch: what ``torch.compile`` and ``torch.export`` put in their graphs.

Only functions that are being traced call them. They do what the functions of the other modules do,
which take less time to call. A regularization is told by the values of its options, so that layers
with the same options share what is compiled. λ and the layer's scale are tensors, which graphs take
as inputs: a number would be compiled in, and every step of a warm-up would compile anew.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actreg_dispatch.norms import named_norm
from actreg_dispatch.options import REDUCTIONS, Options, Reduction
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.row_norms import row_norm
from actreg_dispatch.torch.autograd import new_gradient, penalty_value
from actreg_dispatch.torch.derivatives import pull_back_of_gradient, weights_gradient
from actreg_dispatch.torch.memory import check_and_update, check_tensor, compute_dtype_of

__all__ = [
    "as_input",
    "is_exporting",
    "pass_through",
    "penalty",
    "penalty_and_new_gradient",
    "update",
]


# What is called in their place.


def penalty(
    reg: ActivityRegularization, activations: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the penalty, differentiably."""
    found: torch.Tensor = _OPERATORS.penalty(activations, *_others(reg, weights))
    return found


def update(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    gradients: torch.Tensor,
    scale: float,
    overwrite: bool = False,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do :func:`actreg_dispatch.torch.memory.check_and_update`."""
    check_tensor("out" if overwrite else "gradients", gradients)
    if weights is not None:
        check_tensor("weights", weights)
        weights = weights.detach()
    tensors = activations.detach(), gradients.detach()
    found: torch.Tensor = _OPERATORS.update(*tensors, scale, overwrite, *_others(reg, weights))
    return found


def penalty_and_new_gradient(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    scale: float,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the penalty and its gradient, without a graph of autograd."""
    gradient = torch.zeros_like(activations.detach())
    return update(reg, activations, gradient, scale, weights=weights), gradient


def pass_through(
    reg: ActivityRegularization,
    scale: torch.Tensor,
    activations: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """Return the activations; what comes back through them grows by the gradient."""
    found: torch.Tensor = _OPERATORS.pass_through(
        activations, scale.reshape(()), *_others(reg, weights)
    )
    return found


def _others(reg: ActivityRegularization, weights: torch.Tensor | None) -> tuple[Any, ...]:
    """Return a regularization and weights as the last arguments of operators."""
    lam, norm, epsilon, reduction, backend = reg.options
    array = as_input(lam, reg._dispatcher.assigned.lam_array)
    if not isinstance(reduction, str):
        reduction = " ".join(map(str, reduction))
    return array, norm.name, norm.axis, epsilon, reduction, backend, weights


def as_input(value: tuple[float, ...], array: np.ndarray) -> torch.Tensor:
    """Return ``value``, which is also that of ``array``, as a tensor that is read at each call.

    What is exported holds the value as it is at the time.
    """
    if is_exporting():
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    return torch.from_numpy(array)


is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since PyTorch 2.7


def _regularization(lam: torch.Tensor, *options: Any) -> ActivityRegularization:
    """Return the regularization that was described, at the time of the call."""
    return _regularization_of(_options(tuple(lam.tolist()), *options))


_regularization_of = functools.lru_cache(ActivityRegularization.from_options)


def _options(
    lam: tuple[Any, ...],
    name: str,
    axis: Sequence[int] | None,
    epsilon: float | None,
    reduction: str,
    backend: str | None,
) -> Options:
    """Return the options that were described; λ may be tensors, which in a graph have no values."""
    norm = named_norm(name)
    if axis is not None:
        norm = row_norm(norm, tuple(axis))
    divided: Reduction = reduction
    if reduction not in REDUCTIONS:
        divided = tuple(map(int, reduction.split()))
    return Options(lam, norm, epsilon, divided, backend)


# The operators, their results' shapes, and their derivatives. A result shares no memory with an
# argument, except that of pass_through, which is composed of others wherever it is called.

_LIBRARY = torch.library.Library("actreg_dispatch", "DEF")
_OPERATORS = torch.ops.actreg_dispatch
_OTHERS = (
    "Tensor lam, str norm, int[]? axis, float? epsilon, str reduction, str? backend, "
    "Tensor? weights"
)

_LIBRARY.define(f"penalty(Tensor activations, {_OTHERS}) -> Tensor")
_LIBRARY.define(
    f"gradient(Tensor activations, Tensor scale, Tensor? gradients, {_OTHERS}) -> Tensor"
)
_LIBRARY.define(
    f"update(Tensor activations, Tensor(a!) gradients, float scale, bool overwrite, {_OTHERS})"
    f" -> Tensor"
)
_LIBRARY.define(f"pass_through(Tensor(a) activations, Tensor scale, {_OTHERS}) -> Tensor(a)")


def _penalty(activations: torch.Tensor, *others: Any) -> torch.Tensor:
    *options, weights = others
    return penalty_value(_regularization(*options), activations, weights)


def _gradient(
    activations: torch.Tensor,
    scale: torch.Tensor,
    gradients: torch.Tensor | None,
    *others: Any,
) -> torch.Tensor:
    *options, weights = others
    return new_gradient(_regularization(*options), activations, scale, gradients, weights)


def _update(
    activations: torch.Tensor,
    gradients: torch.Tensor,
    scale: float,
    overwrite: bool,
    *others: Any,
) -> torch.Tensor:
    *options, weights = others
    reg = _regularization(*options)
    return check_and_update(reg, activations, gradients, scale, overwrite, weights)


def _number_like(activations: torch.Tensor, *_: Any) -> torch.Tensor:
    return activations.new_empty((), dtype=compute_dtype_of(activations))


def _array_like(
    activations: torch.Tensor, scale: Any, gradients: torch.Tensor | None, *_: Any
) -> torch.Tensor:
    return torch.empty_like(activations if gradients is None else gradients)


for _name, _function, _result in (
    ("penalty", _penalty, _number_like),
    ("gradient", _gradient, _array_like),
    ("update", _update, _number_like),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # which is any device
    torch.library.register_fake(f"actreg_dispatch::{_name}", _result, lib=_LIBRARY)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    activations, lam, *ctx.options, weights = inputs
    ctx.save_for_backward(activations, lam, weights)


def _backward(ctx: Any, incoming: torch.Tensor) -> Any:
    activations, lam, weights = ctx.saved_tensors
    gradient = along_weights = None
    if ctx.needs_input_grad[0]:
        gradient = _OPERATORS.gradient(activations, incoming, None, lam, *ctx.options, weights)
    if ctx.needs_input_grad[-1]:
        options = _options(lam.unbind(), *ctx.options)
        along_weights = weights_gradient(options, activations, weights, incoming)
    return gradient, None, *(None for _ in ctx.options), along_weights


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    activations, scale, gradients, lam, *ctx.options, weights = inputs
    ctx.adds = gradients is not None
    ctx.save_for_backward(activations, scale, weights, lam)


def _backward_of_gradient(ctx: Any, incoming: torch.Tensor) -> Any:
    *at, lam = ctx.saved_tensors
    options = _regularization(lam, *ctx.options).options
    *found, by_weights = pull_back_of_gradient(options, incoming, *at)
    added = incoming if ctx.adds else None
    return *found, added, None, *(None for _ in ctx.options), by_weights


torch.library.register_autograd(
    "actreg_dispatch::penalty", _backward, setup_context=_keep, lib=_LIBRARY
)
torch.library.register_autograd(
    "actreg_dispatch::gradient",
    _backward_of_gradient,
    setup_context=_keep_for_gradient,
    lib=_LIBRARY,
)


class _PassThrough(torch.autograd.Function):
    """The activations, whose gradient grows by that of the penalty on its way back."""

    @staticmethod
    def forward(
        ctx: Any, activations: torch.Tensor, scale: torch.Tensor, lam: torch.Tensor, *options: Any
    ) -> torch.Tensor:
        *ctx.options, weights = options
        ctx.save_for_backward(activations, scale, lam, weights)
        return activations.view_as(activations)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        activations, scale, lam, weights = ctx.saved_tensors
        along_weights = None
        if ctx.needs_input_grad[-1]:
            options = _options(lam.unbind(), *ctx.options)
            along_weights = weights_gradient(options, activations, weights, scale)
        gradient = _OPERATORS.gradient(activations, scale, incoming, lam, *ctx.options, weights)
        return gradient, None, None, *(None for _ in ctx.options), along_weights


_LIBRARY.impl("pass_through", _PassThrough.apply, "CompositeImplicitAutograd")
