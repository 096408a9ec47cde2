"""PyTorch: tensors led to the backends where they lie, and penalties that autograd knows.

The methods of :class:`~actreg_dispatch.ActivityRegularization` take dense tensors of float16,
bfloat16, float32 and float64, of any shape and strides. Nothing is copied: on the CPU the backends
work on the tensor's memory as a NumPy array, on a CUDA device as a CuPy array, on PyTorch's current
stream there. They look at tensors as an optimizer does: graphs are neither followed nor recorded,
so ``reg.apply(activations, activations.grad)`` works on a leaf, and autograd is told of what was
written. The one method that autograd can differentiate is ``reg.penalty``, which is
:func:`penalty`; :class:`ActivityRegularizer` is a layer.

The penalty is a 0-d tensor of the compute dtype on the device of the activations. Gradients are
tensors of the dtype, shape and device of the activations. bfloat16 takes ``ml_dtypes``, which gives
NumPy and CuPy that dtype; a CUDA device takes CuPy.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from actreg_dispatch.errors import MixedArraysError
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.registry import array_type_of, usable
from actreg_dispatch.regularization import (
    ActivityRegularization,
    Penalties,
    check_regularization,
)
from actreg_dispatch.rounding import PairedSum, PartialSum
from actreg_dispatch.runtime.huge_pages import FROM_BYTES, ask_for_huge_pages
from actreg_dispatch.strength import check_scale, count_of

__all__ = [
    "ActivityRegularizer",
    "add_gradient",
    "apply",
    "apply_all",
    "partial_sum",
    "penalty",
    "penalty_and_gradient",
]

_DTYPES: dict[Any, np.dtype[Any]] = {
    torch.float16: np.dtype(np.float16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
_ON_THE_HOST: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)


# What the methods of ActivityRegularization call.


@torch.compiler.disable
def penalty(reg: ActivityRegularization, activations: torch.Tensor) -> torch.Tensor:
    r"""Return the penalty of ``activations``, differentiably.

    λ·Σ|xᵢ| for ``"l1"``, λ·√(Σxᵢ²) for ``"l2"``, λ·Σxᵢ² for ``"l2_squared"``, λ₁·Σ|xᵢ| + λ₂·Σxᵢ²
    for ``"l1_l2_squared"``. It is the same function as ``reg.penalty(activations)``.

    Parameters
    ----------
    reg : ActivityRegularization
        Norm and strength. λ is that of this call, even if it is assigned before ``backward``.
    activations : torch.Tensor
        Of a supported dtype (see the module), any shape and strides; may be empty.

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

    Second and higher derivatives, forward-mode AD (not inside itself) and the transforms of
    ``torch.func`` work. Derivatives beyond the gradient are PyTorch's arithmetic, so that their
    last bits are not promised, and ``vmap`` goes sample by sample. ``torch.compile`` leaves the
    function out of its graphs, and says so where it must not (``fullgraph=True``).

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
    _check_tensor("activations", activations)
    return _differentiable(_Penalty, reg, activations)


@torch.compiler.disable
def partial_sum(reg: ActivityRegularization, activations: torch.Tensor) -> PartialSum | PairedSum:
    """Do :meth:`ActivityRegularization.partial_sum`; waits for a device."""
    x = _plain("activations", activations)
    with _where(x):
        return reg.partial_sum(_view(x))


@torch.compiler.disable
def apply(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    gradients: torch.Tensor,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """Do :meth:`ActivityRegularization.apply`; the penalty does not require grad."""
    return _update(reg, *_pair(activations, gradients), scale)


@torch.compiler.disable
def apply_all(
    reg: ActivityRegularization,
    labels: list[Any],
    activations: tuple[torch.Tensor, ...],
    gradients: tuple[torch.Tensor, ...],
    *,
    scale: float = 1.0,
) -> Penalties:
    """Do :meth:`ActivityRegularization.apply_all`; the layers are on one device."""
    pairs = [
        _pair(x, g, f"gradients[{label!r}]")
        for label, x, g in zip(labels, activations, gradients, strict=True)
    ]
    devices = {x.device for x, _ in pairs}
    if len(devices) > 1:
        raise ValueError(
            f"activations are on several devices ({', '.join(sorted(map(str, devices)))}); "
            f"call apply_all for each"
        )
    xs, gs = ([_view(tensor) for tensor in tensors] for tensors in zip(*pairs, strict=True))
    with _where(pairs[0][0]):
        total, layers = reg.apply_all(
            dict(zip(labels, xs, strict=True)), dict(zip(labels, gs, strict=True)), scale=scale
        )
        values = [_as_tensor(layers[label], x) for label, (x, _) in zip(labels, pairs, strict=True)]
        widest, _ = max(pairs, key=lambda pair: pair[0].dtype == torch.float64)
        whole = _as_tensor(total, widest)
    for _, g in pairs:
        torch.autograd.graph.increment_version(g)
    return Penalties(whole, values)


@torch.compiler.disable
def penalty_and_gradient(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do :meth:`ActivityRegularization.penalty_and_gradient`; neither result requires grad."""
    if out is None:
        x = _plain("activations", activations)
        gradient = _new(x).zero_()
        return _update(reg, x, gradient, scale), gradient
    x, g = _pair(activations, out, "out")
    with _where(x):
        found, _ = reg.penalty_and_gradient(_view(x), _view(g), scale=scale)
        value = _as_tensor(found, x)
    torch.autograd.graph.increment_version(g)
    return value, out


@torch.compiler.disable
def add_gradient(
    reg: ActivityRegularization,
    activations: torch.Tensor,
    gradients: torch.Tensor,
    total: PartialSum | PairedSum | None = None,
    *,
    count: int | None = None,
    scale: float = 1.0,
) -> None:
    """Do :meth:`ActivityRegularization.add_gradient`."""
    x, g = _pair(activations, gradients)
    with _where(x):
        reg.add_gradient(_view(x), _view(g), total, count=count, scale=scale)
    torch.autograd.graph.increment_version(g)


def _update(
    reg: ActivityRegularization, x: torch.Tensor, g: torch.Tensor, scale: float
) -> torch.Tensor:
    """Do :func:`apply` for plain tensors of one dtype and device."""
    with _where(x):
        value = _as_tensor(reg.apply(_view(x), _view(g), scale=scale), x)
    torch.autograd.graph.increment_version(g)
    return value


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

    λ and ``scale`` are settings and not part of ``state_dict``. Copies and pickles keep them.

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

    @torch.compiler.disable
    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """Return ``activations``, in training mode so that backward adds the gradient."""
        _check_tensor("activations", activations)
        self.penalty = None
        if not self.training:
            return activations
        if not _transformed():
            self.penalty = _Penalty.forward(self.reg, activations)
        if not _recorded(activations):
            return activations
        return _Passing.apply(self.reg, self._scale, activations)

    def extra_repr(self) -> str:
        """Return what stands between the parentheses of ``repr``."""
        return repr(self.reg) if self._scale == 1.0 else f"{self.reg!r}, scale={self._scale!r}"


# For autograd.


def _transformed() -> bool:
    """Whether tensors may carry more than values: in a transform of ``torch.func``, or tangents."""
    functorch: bool = torch._C._are_functorch_transforms_active()
    return functorch or forward_ad._current_level >= 0


def _recorded(*arguments: Any) -> bool:
    """Whether something will want to differentiate what is computed of ``arguments``."""
    return _transformed() or (
        torch.is_grad_enabled()
        and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
    )


def _differentiable(function: Any, *arguments: Any) -> Any:
    """Apply an autograd function, or do its forward alone where that will do."""
    return (function.apply if _recorded(*arguments) else function.forward)(*arguments)


def _check_nesting() -> None:
    """Refuse forward-mode AD inside itself, where PyTorch takes the result for a constant."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1:
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


class _Regularizing(torch.autograd.Function):
    """What the functions have in common: activations that are saved, and λ as it was."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """Do what PyTorch would, but not look at signatures, which takes it 15 µs."""
        if _transformed():
            return super().apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*arguments)

    @staticmethod
    def keep(ctx: Any, reg: ActivityRegularization, *tensors: torch.Tensor) -> None:
        ctx.reg, ctx.lam = reg, reg.lam
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def kept(ctx: Any) -> ActivityRegularization:
        if ctx.reg.lam == ctx.lam:
            return ctx.reg  # type: ignore[no-any-return]
        reg = copy.copy(ctx.reg)
        reg.lam = ctx.lam
        return reg  # type: ignore[no-any-return]


class _Penalty(_Regularizing):
    """The penalty of the activations."""

    @staticmethod
    def forward(reg: ActivityRegularization, activations: torch.Tensor) -> torch.Tensor:
        x = _plain("activations", activations)
        with _where(x):
            return _as_tensor(reg.penalty(_view(x)), x)

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
        one = torch.ones((), dtype=_compute_dtype(activations), device=activations.device)
        gradient = _differentiable(_Gradient, _Penalty.kept(ctx), activations, one, None)
        return (gradient * tangent).sum(dtype=one.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _sample_by_sample(_Penalty, info, in_dims, *arguments)


class _Gradient(_Regularizing):
    """``gradients``, or zeros, plus ``scale`` times the gradient of the penalty."""

    @staticmethod
    def forward(
        reg: ActivityRegularization,
        activations: torch.Tensor,
        scale: torch.Tensor,
        gradients: torch.Tensor | None,
    ) -> torch.Tensor:
        x = _plain("activations", activations)
        updated = _new(x).zero_() if gradients is None else _new(gradients).copy_(gradients)
        _update(reg, x, _plain("gradients", updated), float(scale))
        return updated

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        reg, activations, scale, gradients = inputs
        ctx.adds = gradients is not None
        _Gradient.keep(ctx, reg, activations, scale)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        _, pull_back = torch.func.vjp(_expression(_Gradient.kept(ctx)), *ctx.saved_tensors)
        return None, *pull_back(incoming), incoming if ctx.adds else None

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


class _Passing(_Regularizing):
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
        _Passing.keep(ctx, reg, activations)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        (activations,) = ctx.saved_tensors
        scale = torch.tensor(ctx.scale, dtype=torch.float64)
        reg = _Passing.kept(ctx)
        return None, None, _differentiable(_Gradient, reg, activations, scale, incoming)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        raise NotImplementedError(
            "ActivityRegularizer adds to the gradients of a backward pass, which forward-mode AD "
            "has not; add actreg_dispatch.torch.penalty(reg, activations) to the loss"
        )


def _expression(
    reg: ActivityRegularization,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the gradient of the penalty as operations of PyTorch, which can differentiate it."""

    def gradient(activations: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x = activations.to(_compute_dtype(activations))
        count = count_of(reg.reduction, x.shape)
        if reg.norm is ActivityNorm.L1_L2_SQUARED:
            first, second = (lam / count * scale for lam in reg.lam)
            return (first * x.sign() + second * 2 * x).to(activations.dtype)
        strength = reg.lam / count * scale
        if reg.norm is ActivityNorm.L1:
            added = strength * x.sign()
        elif reg.norm is ActivityNorm.L2_SQUARED:
            added = strength * 2 * x
        else:
            total = (x * x).sum()
            floor = torch.finfo(x.dtype).eps if reg.epsilon is None else reg.epsilon
            none = total <= floor
            added = (strength * x / total.where(~none, 1).sqrt()).where(~none, 0)
        return added.to(activations.dtype)

    return gradient


# Tensors as arrays.


def _check_tensor(name: str, tensor: Any) -> None:
    if isinstance(tensor, torch.Tensor):
        return
    if tensor is None:
        raise TypeError(
            f"{name} are None, as .grad is before the first backward(); "
            f"pass a tensor, such as torch.zeros_like(activations)"
        )
    kind = array_type_of(type(tensor))
    if kind is not None:
        raise MixedArraysError(
            f"{name} are a {kind}, not a torch.Tensor; pass tensors only, no data is moved unasked"
        )
    raise TypeError(f"{name} must be a torch.Tensor, not a {type(tensor).__qualname__}")


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _pair(
    activations: Any, gradients: Any, name: str = "gradients"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as plain tensors; their shapes and overlap are left to be checked as arrays."""
    x, g = _plain("activations", activations), _plain(name, gradients)
    if g.dtype != x.dtype:
        raise TypeError(
            f"{name} have dtype {g.dtype} but activations have {x.dtype}; "
            f"give both one dtype, for example with {name}.to(activations.dtype)"
        )
    if g.device != x.device:
        raise ValueError(
            f"{name} are on {g.device} but activations on {x.device}; "
            f"move one of them, no data is moved unasked"
        )
    return x, g


def _new(like: torch.Tensor) -> torch.Tensor:
    """Return a tensor such as ``like``, whose values are still to come."""
    new = torch.empty_like(like)
    if new.is_cpu and new.nbytes >= FROM_BYTES:
        plain = _plain("gradients", new)
        ask_for_huge_pages(plain.data_ptr(), plain.untyped_storage().nbytes())
    return new


def _plain(name: str, tensor: Any) -> torch.Tensor:
    """Return a tensor of PyTorch's own class on the memory of ``tensor``, or raise.

    What PyTorch computes lazily, or keeps elsewhere, looks much like a tensor and has no memory,
    or other memory than its values are read from.
    """
    _check_tensor(name, tensor)
    if type(tensor) not in _PLAIN_CLASSES:
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise TypeError(
                f"{name} are a {type(tensor).__module__}.{type(tensor).__qualname__}, a subclass "
                f"that keeps its values elsewhere, if anywhere; pass a plain tensor"
            )
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.as_subclass(torch.Tensor)
    if tensor.dtype not in _DTYPES:
        if tensor.dtype == torch.bfloat16:
            _DTYPES[torch.bfloat16] = _bfloat16(name)
        else:
            raise TypeError(
                f"{name} have dtype {tensor.dtype}; convert them to float32 or float64, "
                f"for example with {name}.to(torch.float32)"
            )
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} are not dense but {layout}; pass a dense tensor, see to_dense()")
    if not (tensor.is_cpu or tensor.is_cuda):
        raise TypeError(
            f"{name} are on {tensor.device}, whose memory no backend knows; "
            f"move them to the CPU or a CUDA device"
        )
    if tensor.is_neg():
        raise TypeError(f"{name} are negated lazily; pass {name}.resolve_neg()")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"{name} are inside a transform of torch.func, where memory cannot be written; use "
            f"actreg_dispatch.torch.penalty there, or call this outside"
        )
    reach = _reach(tensor)
    if reach and (
        not tensor.data_ptr() or tensor.untyped_storage().nbytes() < reach * tensor.itemsize
    ):
        raise ValueError(
            f"{name} have no memory, or less than their shape takes, as where a storage was freed; "
            f"pass {name}.clone() of a tensor that holds its values"
        )
    plain: torch.Tensor = tensor.detach()
    if type(plain) not in _PLAIN_CLASSES:
        raise TypeError(
            f"{name} become a {type(plain).__qualname__} in the mode that is active; "
            f"call this outside"
        )
    return plain


def _reach(tensor: torch.Tensor) -> int:
    """Return how many elements of its storage a tensor needs."""
    size, offset = int(tensor.numel()), int(tensor.storage_offset())
    if not size:
        return 0
    if tensor.is_contiguous():
        return offset + size
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return offset + 1 + sum((int(length) - 1) * int(stride) for length, stride in steps)


def _view(tensor: torch.Tensor) -> Any:
    """Return a plain tensor as a NumPy array, or a CuPy array if it is on a device, in place."""
    if tensor.is_cuda:
        return _device_view(tensor)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_DTYPES[torch.bfloat16])
    return tensor.numpy()


def _bfloat16(name: str) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        raise TypeError(
            f"{name} have dtype torch.bfloat16, which takes ml_dtypes; "
            f"install it with: python -m pip install ml_dtypes"
        ) from None
    return dtype


def _device_view(tensor: torch.Tensor) -> Any:
    """Return a tensor on a CUDA device as a CuPy array that keeps it alive."""
    cupy, dtype = sys.modules["cupy"], _DTYPES[tensor.dtype]
    size, index = _reach(tensor) - tensor.storage_offset(), tensor.device.index
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), size * dtype.itemsize, tensor, index)
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    return cupy.ndarray(tuple(tensor.shape), dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def _where(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which CuPy computes where, and in the order that, PyTorch would."""
    return _ON_THE_HOST if tensor.is_cpu else _current_stream(tensor.device)


@contextlib.contextmanager
def _current_stream(device: torch.device) -> Iterator[None]:
    usable("cupy", f"the device {device} of the tensors")
    cuda, stream = sys.modules["cupy"].cuda, torch.cuda.current_stream(device)
    if hasattr(cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        adopted = cuda.Stream.from_external(stream)
    else:  # CuPy 13, or a PyTorch that knows no protocol for streams
        adopted = cuda.ExternalStream(stream.cuda_stream, device.index)
    with cuda.Device(device.index), adopted:
        yield


def _as_tensor(value: Any, activations: torch.Tensor) -> torch.Tensor:
    """Return a penalty as a 0-d tensor, of PyTorch's own memory, without waiting for it."""
    if activations.is_cpu:
        return torch.from_numpy(np.asarray(value))
    room = torch.empty((), dtype=_compute_dtype(activations), device=activations.device)
    _device_view(room)[...] = value
    return room
