"""PyTorch: tensors computed on where they lie, and penalties that autograd knows.

The methods of :class:`~actreg_dispatch.ActivityRegularization` take dense tensors of float16,
bfloat16, float32 and float64, of any shape and strides. Nothing is copied: on the CPU the backends
work on the tensor's memory as a NumPy array, on a CUDA device as a CuPy array, on PyTorch's current
stream there. They look at tensors as an optimizer does: graphs are neither followed nor recorded,
so ``reg.apply(activations, activations.grad)`` works on a leaf, and autograd is told of what was
written. The one method that autograd can differentiate is ``reg.penalty``, which is
:func:`penalty`; :class:`ActivityRegularizer` is a layer. These two, ``reg.apply`` and
``reg.penalty_and_gradient`` can be compiled by ``torch.compile(fullgraph=True)``, with weights or
without; the other methods, and statistics, break a graph.

The penalty is a 0-d tensor of the compute dtype on the device of the activations. Gradients are
tensors of the dtype, shape and device of the activations. bfloat16 takes ``ml_dtypes``, which gives
NumPy and CuPy that dtype; a CUDA device takes CuPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Proxy

from actreg_dispatch.layers import Penalties
from actreg_dispatch.options import check_scale
from actreg_dispatch.regularization import ActivityRegularization, check_regularization
from actreg_dispatch.statistics import ActivationStatistics
from actreg_dispatch.sums.exact import Total
from actreg_dispatch.torch import operators
from actreg_dispatch.torch.autograd import (
    differentiable_penalty,
    pass_through,
    penalty_value,
    transformed_penalty,
    weighted_penalty,
)
from actreg_dispatch.torch.internals import transformed
from actreg_dispatch.torch.memory import (
    as_tensor,
    check_and_update,
    check_tensor,
    pair,
    penalty_and_new_gradient,
    plain,
    stream_of,
    view,
    weights_for,
)

__all__ = [
    "ActivityRegularizer",
    "add_gradient",
    "apply",
    "apply_all",
    "partial_sum",
    "penalty",
    "penalty_and_gradient",
]


_untraced = torch.compiler.disable


def _called(function: Any, operation: Any, *arguments: Any) -> Any:
    """Call ``function``, or, where that would be traced, what the graph is to hold instead."""
    if transformed():  # by torch.func, which the operators do not know: graphs break here
        return _untraced(function)(*arguments)
    return (operation if torch.compiler.is_compiling() else function)(*arguments)


def _counting(function: Any) -> Any:
    """Return ``function``, which counts, so that graphs break at it; whole ones refuse it."""
    reason = "statistics are counted outside of graphs: leave them out, or compile without them"
    try:
        return _untraced(function, reason=reason)
    except TypeError:  # an older PyTorch, which is told no reason
        return _untraced(function)


_counted_penalty, _counted_update = _counting(weighted_penalty), _counting(check_and_update)


def _refuse_to_count_in_exports() -> None:
    if operators.is_exporting():
        raise NotImplementedError(
            "statistics cannot be counted in an exported program; leave them out, or count in a "
            "call of the module itself"
        )


# What the methods of ActivityRegularization call.


def penalty(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    statistics: ActivationStatistics | None = None,
) -> torch.Tensor:
    r"""Return the penalty of ``activations``, differentiably.

    ``reg.penalty(activations)`` is the same function; see
    :meth:`ActivityRegularization.penalty` for what it computes.

    Parameters
    ----------
    reg : ActivityRegularization
        Norm and strength. λ is that of this call, even if it is assigned before ``backward``.
    activations : torch.Tensor
        Of a supported dtype (see the module), any shape and strides; may be empty.
    weights : torch.Tensor, optional
        As for :meth:`ActivityRegularization.penalty`, on the device of the activations. Floating
        weights may require grad. Their gradient is PyTorch's arithmetic in float64, that of the
        formula where a weight is 0, too, except that an element which is left out gives 0 if it is
        not finite, or is not when divided by the largest of the others.
    statistics : ActivationStatistics, optional
        As for :meth:`ActivityRegularization.penalty`; not inside the transforms of ``torch.func``.

    Returns
    -------
    torch.Tensor
        0-d, of the compute dtype, on the device of ``activations``, bit for bit what their values
        give as a NumPy array. It requires grad if they do.

    Raises
    ------
    TypeError, ValueError, BackendError
        As for :meth:`ActivityRegularization.penalty`; a TypeError for a tensor that is not dense
        floating-point memory on a CPU or a CUDA device.

    Notes
    -----
    The gradient is that of ``reg.penalty_and_gradient(activations, scale=g)`` to the bit, where g
    is the gradient that comes in. So a scaled loss is honoured, and infinity and NaN propagate.
    Backward waits for a g that lies on a device; :class:`ActivityRegularizer` needs not.
    On the CPU, the gradient of activations below 4 MiB is found with the penalty, for g = 1, and
    kept for backward.

    Second and higher derivatives, forward-mode AD (not inside itself) and the transforms of
    ``torch.func`` work. Derivatives beyond the gradient are PyTorch's arithmetic, so that their
    last bits are not promised, and ``vmap`` goes sample by sample.

    ``torch.compile`` and ``torch.export`` put the penalty into their graphs as one operator, with
    weights or without. λ is an input of compiled code, so that assigning it compiles nothing anew;
    an exported program keeps that of its time. Such graphs hold the gradient, and no transforms of
    ``torch.func``, for which ``torch.compile`` breaks them. It also breaks them where there are
    statistics, which a graph cannot count: with ``fullgraph=True``, or in ``torch.export``, they
    are refused. Leave them out there, or count in a call that is not compiled.

    Examples
    --------
    >>> reg = ActivityRegularization.l1(0.5)
    >>> activations = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
    >>> loss = penalty(reg, activations)
    >>> loss.backward()
    >>> loss.item(), activations.grad
    (1.5, tensor([ 0.5000, -0.5000,  0.0000]))
    """
    check_regularization(reg)
    check_tensor("activations", activations)
    if not (weights is None is statistics):
        return _weighted(reg, activations, weights, statistics)
    if transformed():
        return _untraced(transformed_penalty)(reg, activations)
    if torch.compiler.is_compiling():
        return operators.penalty(reg, activations)
    return differentiable_penalty(reg, activations)


def _weighted(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    weights: torch.Tensor | None,
    statistics: ActivationStatistics | None,
) -> torch.Tensor:
    """Do :func:`penalty` with weights or statistics."""
    if weights is not None:
        check_tensor("weights", weights)
    if statistics is None:
        if transformed():
            return _untraced(transformed_penalty)(reg, activations, weights)
        if torch.compiler.is_compiling():
            return operators.penalty(reg, activations, weights)
        return weighted_penalty(reg, activations, weights)
    if transformed():
        raise NotImplementedError(
            "statistics cannot be counted inside transforms of torch.func; "
            "call penalty outside of them, or without statistics"
        )
    _refuse_to_count_in_exports()
    return _counted_penalty(reg, activations, weights, statistics)


@_untraced
def partial_sum(
    reg: ActivityRegularization, activations: torch.Tensor, *, weights: torch.Tensor | None = None
) -> Total:
    """Do :meth:`ActivityRegularization.partial_sum`; waits for a device."""
    x = plain("activations", activations)
    w = weights_for(x, weights)
    with stream_of(x):
        return reg.partial_sum(view(x), weights=w)


def apply(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    gradients: torch.Tensor,
    *,
    scale: float = 1.0,
    weights: torch.Tensor | None = None,
    statistics: ActivationStatistics | None = None,
) -> torch.Tensor:
    """Do :meth:`ActivityRegularization.apply`; the penalty does not require grad.

    ``torch.compile`` takes it into a graph unless there are statistics; see :func:`penalty`.
    """
    if statistics is not None:
        _refuse_to_count_in_exports()
        return _counted_update(reg, activations, gradients, scale, False, weights, statistics)
    return _called(
        check_and_update, operators.update, reg, activations, gradients, scale, False, weights
    )


@_untraced
def apply_all(
    reg: ActivityRegularization,
    labels: list[Any],
    activations: tuple[torch.Tensor, ...],
    gradients: tuple[torch.Tensor, ...],
    *,
    scale: float = 1.0,
    weights: tuple[torch.Tensor | None, ...] | None = None,
    statistics: ActivationStatistics | None = None,
) -> Penalties:
    """Do :meth:`ActivityRegularization.apply_all`; the layers are on one device."""
    pairs = [
        pair(x, g, f"gradients[{label!r}]")
        for label, x, g in zip(labels, activations, gradients, strict=True)
    ]
    devices = {x.device for x, _ in pairs}
    if len(devices) > 1:
        raise ValueError(
            f"activations are on several devices ({', '.join(sorted(map(str, devices)))}); "
            f"call apply_all for each"
        )
    given: dict[Any, Any] | None = None
    if weights is not None:
        given = {
            label: weights_for(x, w)
            for label, (x, _), w in zip(labels, pairs, weights, strict=True)
        }
    xs, gs = ([view(tensor) for tensor in tensors] for tensors in zip(*pairs, strict=True))
    with stream_of(pairs[0][0]):
        total, layers = reg.apply_all(
            dict(zip(labels, xs, strict=True)),
            dict(zip(labels, gs, strict=True)),
            scale=scale,
            weights=given,
            statistics=statistics,
        )
        values = [as_tensor(layers[label], x) for label, (x, _) in zip(labels, pairs, strict=True)]
        widest, _ = max(pairs, key=lambda pair: pair[0].dtype == torch.float64)
        whole = as_tensor(total, widest)
    for _, g in pairs:
        torch.autograd.graph.increment_version(g)
    return Penalties(whole, values)


def penalty_and_gradient(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do :meth:`ActivityRegularization.penalty_and_gradient`; neither result requires grad."""
    if out is not None:
        given = reg, activations, out, scale, True, weights
        return _called(check_and_update, operators.update, *given), out
    found: tuple[torch.Tensor, torch.Tensor] = _called(
        penalty_and_new_gradient,
        operators.penalty_and_new_gradient,
        reg,
        activations,
        scale,
        weights,
    )
    return found


@_untraced
def add_gradient(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    gradients: torch.Tensor,
    total: Total | None = None,
    *,
    count: int | None = None,
    scale: float = 1.0,
    weights: torch.Tensor | None = None,
) -> None:
    """Do :meth:`ActivityRegularization.add_gradient`."""
    x, g = pair(activations, gradients)
    w = weights_for(x, weights)
    with stream_of(x):
        reg.add_gradient(view(x), view(g), total, count=count, scale=scale, weights=w)
    torch.autograd.graph.increment_version(g)


class ActivityRegularizer(torch.nn.Module):
    r"""A layer that regularizes what passes through it.

    Forward returns the activations as they are. Backward adds the gradient of their penalty to the
    gradient that comes in, so the penalty need not be added to the loss.

    Parameters
    ----------
    reg : ActivityRegularization
        Norm and strength; readable as ``.reg``. A warm-up assigns ``layer.reg.lam``.
    scale : float, default 1.0
        Multiplies λ for the gradient alone. Where the loss is multiplied, as by a ``GradScaler``,
        assign the same factor before the forward pass. Infinity and NaN propagate.

    Attributes
    ----------
    penalty : torch.Tensor or None
        The penalty of the last forward pass in training mode, without ``scale`` and without a
        graph; None after one in evaluation mode or inside a transform of ``torch.func``.

    Notes
    -----
    λ and ``scale`` are those of the forward pass. In evaluation mode the layer does nothing at all.
    Under ``no_grad`` the penalty is found, and there is no gradient to add to.

    The gradient is added to what comes back, so nothing is where the loss does not depend on the
    output. A layer that is called several times adds the gradient of each call; ``penalty`` is the
    last one's.

    Weights go with the activations, ``layer(activations, weights)``: a mask of padding, or the
    norms of a decoder's columns. If they require grad, backward adds to their gradient, too, as if
    the penalty were in the loss; pass ``weights.detach()`` where it should not.

    λ and ``scale`` are settings and not part of ``state_dict``. Copies and pickles keep them. In
    compiled code they are inputs, and in an exported program what they were at the time; there, no
    ``penalty`` is kept. ``torch.fx.symbolic_trace`` keeps the layer whole.

    The output shares the input's memory, and PyTorch refuses to change it in place: put
    ``ReLU(inplace=True)`` before this layer. Forward-mode AD is refused, as it has no way back.

    Examples
    --------
    >>> layer = ActivityRegularizer(ActivityRegularization.l1(0.5))
    >>> activations = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
    >>> layer(activations).sum().backward()
    >>> layer.penalty, activations.grad
    (tensor(1.5000), tensor([1.5000, 0.5000, 1.0000]))
    """

    def __init__(self, reg: ActivityRegularization, *, scale: float = 1.0) -> None:
        super().__init__()
        check_regularization(reg)
        self.reg = reg
        self.scale = scale
        self.penalty: torch.Tensor | None = None

    @property
    def scale(self) -> float:
        """What λ is multiplied by for the gradient; assigning checks it."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = check_scale(value)
        # for graphs, as λ has one; of an array without axes, PyTorch makes a number, to compile in
        self._scale_array = np.array([self._scale])

    def forward(
        self, activations: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``activations``, in training mode so that backward adds the gradient.

        ``weights`` are those of :func:`penalty`.
        """
        if isinstance(activations, Proxy):  # symbolic_trace: the layer is one node
            options = {} if weights is None else {"weights": weights}
            tracer = activations.tracer
            return tracer.create_proxy(
                "call_module", tracer.path_of_module(self), (activations,), options
            )
        check_tensor("activations", activations)
        if weights is not None:
            check_tensor("weights", weights)
        return _called(_regularized, _regularized_in_a_graph, self, activations, weights)

    def extra_repr(self) -> str:
        """Return what stands between the parentheses of ``repr``."""
        return repr(self.reg) if self._scale == 1.0 else f"{self.reg!r}, scale={self._scale!r}"


def _regularized(
    layer: ActivityRegularizer, activations: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    layer.penalty = None
    if not layer.training:
        return activations
    if not transformed():
        layer.penalty = penalty_value(layer.reg, activations, weights)
    return pass_through(layer.reg, layer._scale, activations, weights)


def _regularized_in_a_graph(
    layer: ActivityRegularizer, activations: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    training = layer.training
    if not operators.is_exporting():  # which refuses a module that changes
        tensors = [None if each is None else each.detach() for each in (activations, weights)]
        layer.penalty = operators.penalty(layer.reg, *tensors) if training else None
    if not training:
        return activations
    scale = operators.as_input((layer._scale,), layer._scale_array)
    return operators.pass_through(layer.reg, scale, activations, weights)
