"""Tensors as arrays: NumPy's or CuPy's views of their memory, and what must not pass for one."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from actreg_dispatch.errors import MixedArraysError
from actreg_dispatch.registry import array_type_of, usable
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.runtime.huge_pages import FROM_BYTES, ask_for_huge_pages
from actreg_dispatch.statistics import ActivationStatistics
from actreg_dispatch.torch.internals import is_wrapped, plain_class

__all__ = [
    "DTYPES",
    "as_tensor",
    "check_and_update",
    "check_tensor",
    "compute_dtype_of",
    "new_like",
    "pair",
    "penalty_and_new_gradient",
    "plain",
    "stream_of",
    "update",
    "view",
    "weights_for",
]

DTYPES: dict[Any, np.dtype[Any]] = {
    torch.float16: np.dtype(np.float16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
"""Supported dtype of a tensor -> that of its view; bfloat16 joins them when it is first met."""

_ON_THE_HOST: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)


def update(
    reg: ActivityRegularization,
    x: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    overwrite: bool = False,
    weights: Any = None,
    statistics: ActivationStatistics | None = None,
) -> torch.Tensor:
    """Do ``reg.apply``, or write the gradient over ``g``, for plain tensors; tell autograd.

    Weights are an array, or None; where gradients are overwritten, nothing is counted.
    """
    with stream_of(x):
        if overwrite:
            found, _ = reg.penalty_and_gradient(view(x), view(g), scale=scale, weights=weights)
        else:
            found = reg.apply(view(x), view(g), scale=scale, weights=weights, statistics=statistics)
        value = as_tensor(found, x)
    torch.autograd.graph.increment_version(g)
    return value


def check_and_update(
    reg: ActivityRegularization,
    activations: Any,
    gradients: Any,
    scale: float,
    overwrite: bool = False,
    weights: Any = None,
    statistics: ActivationStatistics | None = None,
) -> torch.Tensor:
    """Do :func:`update` for tensors of any kind, or raise."""
    x, g = pair(activations, gradients, "out" if overwrite else "gradients")
    return update(reg, x, g, scale, overwrite, weights_for(x, weights), statistics)


def penalty_and_new_gradient(
    reg: ActivityRegularization, activations: Any, scale: float, weights: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both for a tensor of any kind, or raise."""
    x = plain("activations", activations)
    w = weights_for(x, weights)
    gradient = new_like(x).zero_()
    return update(reg, x, gradient, scale, weights=w), gradient


def weights_for(x: torch.Tensor, weights: Any) -> Any:
    """Return weights of the plain tensor ``x`` as an array; None if there are none."""
    if weights is None:
        return None
    w = plain("weights", weights, masks=True)
    if w.device != x.device:
        raise ValueError(
            f"weights are on {w.device} but activations on {x.device}; "
            f"move one of them, no data is moved unasked"
        )
    return view(w)


def check_tensor(name: str, tensor: Any) -> None:
    """Refuse what is not a tensor, calling it ``name``."""
    if isinstance(tensor, torch.Tensor):
        return
    if tensor is None:
        raise TypeError(
            f"{name} are None, as .grad is before the first backward(); "
            f"pass a tensor, such as torch.zeros_like(activations)"
        )
    array_type = array_type_of(type(tensor))
    if array_type is not None:
        raise MixedArraysError(
            f"{name} are a {array_type}, not a torch.Tensor; pass tensors only, no data is moved "
            f"unasked"
        )
    raise TypeError(f"{name} must be a torch.Tensor, not a {type(tensor).__qualname__}")


def compute_dtype_of(tensor: torch.Tensor) -> torch.dtype:
    """Return the compute dtype T of activations like ``tensor``."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def pair(
    activations: Any, gradients: Any, name: str = "gradients"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as plain tensors; their shapes and overlap are left to be checked as arrays."""
    x, g = plain("activations", activations), plain(name, gradients)
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


def new_like(like: torch.Tensor) -> torch.Tensor:
    """Return a tensor such as ``like``, whose values are still to come."""
    new = torch.empty_like(like)
    if new.is_cpu and new.nbytes >= FROM_BYTES:
        room = plain("gradients", new)
        ask_for_huge_pages(room.data_ptr(), room.untyped_storage().nbytes())
    return new


def plain(name: str, tensor: Any, *, masks: bool = False) -> torch.Tensor:
    """Return a tensor of PyTorch's own class on the memory of ``tensor``, maybe a mask, or raise.

    What PyTorch computes lazily, or keeps elsewhere, looks much like a tensor and has no memory,
    or other memory than its values are read from.
    """
    check_tensor(name, tensor)
    if type(tensor) not in _PLAIN_CLASSES:
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise TypeError(
                f"{name} are a {type(tensor).__module__}.{type(tensor).__qualname__}, a subclass "
                f"that keeps its values elsewhere, if anywhere; pass a plain tensor"
            )
        tensor = plain_class(tensor)
    if tensor.dtype not in DTYPES and not (masks and tensor.dtype == torch.bool):
        if tensor.dtype == torch.bfloat16:
            DTYPES[torch.bfloat16] = _bfloat16(name)
        else:
            raise TypeError(
                f"{name} have dtype {tensor.dtype}; convert them to float32 or float64, "
                f"for example with {name}.to(torch.float32)"
            )
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        raise _without_memory(name, tensor) from None
    if tensor.is_nested:
        raise TypeError(f"{name} are nested; pass a dense tensor, see to_dense()")
    if not (tensor.is_cpu or tensor.is_cuda):
        raise TypeError(
            f"{name} are on {tensor.device}, whose memory no backend knows; "
            f"move them to the CPU or a CUDA device"
        )
    if tensor.is_neg():
        raise TypeError(f"{name} are negated lazily; pass {name}.resolve_neg()")
    reach = _reach(tensor)
    if reach and (not address or tensor.untyped_storage().nbytes() < reach * tensor.itemsize):
        raise _without_memory(name, tensor)
    plain: torch.Tensor = tensor.detach()
    if type(plain) not in _PLAIN_CLASSES:
        raise TypeError(
            f"{name} become a {type(plain).__qualname__} in the mode that is active; "
            f"call this outside"
        )
    return plain


def _without_memory(name: str, tensor: torch.Tensor) -> Exception:
    """Return the error that says why a tensor has no memory of its own."""
    if tensor.layout is not torch.strided:
        return TypeError(
            f"{name} are not dense but {tensor.layout}; pass a dense tensor, see to_dense()"
        )
    if is_wrapped(tensor):
        return TypeError(
            f"{name} are inside a transform of torch.func, where memory cannot be written; use "
            f"actreg_dispatch.torch.penalty there, or call this outside"
        )
    return ValueError(
        f"{name} have no memory, or less than their shape takes, as where a storage was freed; "
        f"pass {name}.clone() of a tensor that holds its values"
    )


def _reach(tensor: torch.Tensor) -> int:
    """Return how many elements of its storage a tensor needs."""
    size: int = tensor.numel()
    if not size:
        return 0
    offset: int = tensor.storage_offset()
    if tensor.is_contiguous():
        return offset + size
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return offset + 1 + sum((int(length) - 1) * int(stride) for length, stride in steps)


def view(tensor: torch.Tensor) -> Any:
    """Return a plain tensor as a NumPy array, or a CuPy array if it is on a device, in place."""
    if tensor.is_cuda:
        return _device_view(tensor)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES[torch.bfloat16])
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
    cupy, dtype = sys.modules["cupy"], DTYPES.get(tensor.dtype, np.dtype(bool))
    size, index = _reach(tensor) - tensor.storage_offset(), tensor.device.index
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), size * dtype.itemsize, tensor, index)
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    return cupy.ndarray(tuple(tensor.shape), dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def stream_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
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


def as_tensor(value: Any, activations: torch.Tensor) -> torch.Tensor:
    """Return a penalty as a 0-d tensor, of PyTorch's own memory, without waiting for it."""
    if activations.is_cpu:
        return torch.from_numpy(np.asarray(value))
    room = torch.empty((), dtype=compute_dtype_of(activations), device=activations.device)
    _device_view(room)[...] = value
    return room
