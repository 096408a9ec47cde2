"""Operators of PyTorch: what ``torch.compile`` and ``torch.export`` put in their graphs.

Only functions that are being traced call them. They do what the functions of the other modules do,
which take less time to call. A regularization is told by the values of its options, so that layers
with the same options share what is compiled. λ and the layer's scale are tensors, which graphs take
as inputs: a number would be compiled in, and every step of a warm-up would compile anew.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from actreg_dispatch.norms import named_norm
from actreg_dispatch.options import Options
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.torch.autograd import new_gradient, penalty_value, pull_back_of_gradient
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


def penalty(reg: ActivityRegularization, activations: torch.Tensor) -> torch.Tensor:
    """Return the penalty, differentiably."""
    found: torch.Tensor = _OPERATORS.penalty(activations, *_described(reg))
    return found


def update(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    gradients: torch.Tensor,
    scale: float,
    overwrite: bool = False,
) -> torch.Tensor:
    """Do :func:`actreg_dispatch.torch.memory.check_and_update`."""
    check_tensor("out" if overwrite else "gradients", gradients)
    tensors = activations.detach(), gradients.detach()
    found: torch.Tensor = _OPERATORS.update(*tensors, scale, overwrite, *_described(reg))
    return found


def penalty_and_new_gradient(
    reg: ActivityRegularization, activations: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the penalty and its gradient, without a graph of autograd."""
    gradient = torch.zeros_like(activations.detach())
    return update(reg, activations, gradient, scale), gradient


def pass_through(
    reg: ActivityRegularization, scale: torch.Tensor, activations: torch.Tensor
) -> torch.Tensor:
    """Return the activations; what comes back through them grows by the gradient."""
    found: torch.Tensor = _OPERATORS.pass_through(activations, scale.reshape(()), *_described(reg))
    return found


def _described(reg: ActivityRegularization) -> tuple[Any, ...]:
    """Return a regularization as the last arguments of operators."""
    lam, norm, epsilon, reduction, backend = reg.options
    array = as_input(lam, reg._dispatcher.lam_array)
    return array, norm.name, epsilon, reduction, backend


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
    return _regularization_of(tuple(lam.tolist()), *options)


@functools.lru_cache
def _regularization_of(
    lam: tuple[float, ...], norm: str, epsilon: float | None, reduction: str, backend: str | None
) -> ActivityRegularization:
    options = Options(lam, named_norm(norm), epsilon, reduction, backend)
    return ActivityRegularization.from_options(options)


# The operators, their results' shapes, and their derivatives. A result shares no memory with an
# argument, except that of pass_through, which is composed of others wherever it is called.

_LIBRARY = torch.library.Library("actreg_dispatch", "DEF")
_OPERATORS = torch.ops.actreg_dispatch
_DESCRIPTION = "Tensor lam, str norm, float? epsilon, str reduction, str? backend"

_LIBRARY.define(f"penalty(Tensor activations, {_DESCRIPTION}) -> Tensor")
_LIBRARY.define(
    f"gradient(Tensor activations, Tensor scale, Tensor? gradients, {_DESCRIPTION}) -> Tensor"
)
_LIBRARY.define(
    f"update(Tensor activations, Tensor(a!) gradients, float scale, bool overwrite, {_DESCRIPTION})"
    f" -> Tensor"
)
_LIBRARY.define(f"pass_through(Tensor(a) activations, Tensor scale, {_DESCRIPTION}) -> Tensor(a)")


def _penalty(activations: torch.Tensor, *described: Any) -> torch.Tensor:
    return penalty_value(_regularization(*described), activations)


def _gradient(
    activations: torch.Tensor,
    scale: torch.Tensor,
    gradients: torch.Tensor | None,
    *described: Any,
) -> torch.Tensor:
    return new_gradient(_regularization(*described), activations, scale, gradients)


def _update(
    activations: torch.Tensor,
    gradients: torch.Tensor,
    scale: float,
    overwrite: bool,
    *described: Any,
) -> torch.Tensor:
    reg = _regularization(*described)
    return check_and_update(reg, activations, gradients, scale, overwrite)


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
    activations, lam, *ctx.options = inputs
    ctx.save_for_backward(activations, lam)


def _backward(ctx: Any, incoming: torch.Tensor) -> Any:
    activations, lam = ctx.saved_tensors
    gradient = _OPERATORS.gradient(activations, incoming, None, lam, *ctx.options)
    return gradient, None, *(None for _ in ctx.options)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    activations, scale, gradients, lam, *ctx.options = inputs
    ctx.adds = gradients is not None
    ctx.save_for_backward(activations, scale, lam)


def _backward_of_gradient(ctx: Any, incoming: torch.Tensor) -> Any:
    *at, lam = ctx.saved_tensors
    found = pull_back_of_gradient(_regularization(lam, *ctx.options), at, incoming)
    return *found, incoming if ctx.adds else None, None, *(None for _ in ctx.options)


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
        ctx.options = options
        ctx.save_for_backward(activations, scale, lam)
        return activations.view_as(activations)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        activations, scale, lam = ctx.saved_tensors
        gradient = _OPERATORS.gradient(activations, scale, incoming, lam, *ctx.options)
        return gradient, None, None, *(None for _ in ctx.options)


_LIBRARY.impl("pass_through", _PassThrough.apply, "CompositeImplicitAutograd")
