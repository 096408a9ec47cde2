"""What may enter: types, dtypes, shapes, writability, overlap; checked before anything is written.

The checks read descriptions only (shape, strides, address), so they cost the same for an array on a
device as for one on the host and wait for nothing. What the elements of weights may be is checked
by the backends, which read them anyway.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from actreg_dispatch.dtypes import COMPUTE_DTYPES, compute_dtype
from actreg_dispatch.errors import MixedArraysError
from actreg_dispatch.registry import CUPY, LIBRARIES, NUMPY, array_type_of

__all__ = [
    "check_activations",
    "check_apart",
    "check_gradients",
    "check_weights",
]

# np.shares_memory solves a bounded Diophantine equation; this many steps take about 0.1 s.
_OVERLAP_WORK: Any = 1_000_000


def _checked(name: str, array: Any, *, masks: bool = False) -> tuple[str, Any]:
    """Return the array type of ``array`` and the plain array that it is, which may be a mask.

    A subclass may say what it likes of its shape and dtype, and redefine arithmetic.
    """
    cls = type(array)
    masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    if masked is not None and issubclass(cls, masked):
        raise TypeError(f"{name} are a masked array; pass {name}.filled(0), or their plain data")
    array_type = array_type_of(cls)
    plain: Any = np.ndarray if array_type == NUMPY else None
    if array_type == CUPY:
        plain = sys.modules["cupy"].ndarray
    if plain is not None and cls is not plain:
        try:
            array = plain.view(array, plain)  # by its memory, whatever the class says of itself
        except TypeError:
            array_type = None
    if array_type is None:
        raise TypeError(
            f"{name} must be a NumPy or CuPy array, not a {cls.__module__}.{cls.__qualname__}; "
            f"convert it, for example with numpy.asarray, or pass one of PyTorch, JAX or Dask"
        )
    if array_type in LIBRARIES:
        raise MixedArraysError(
            f"{name} are a {array_type} among arrays of another library; pass arrays of one, "
            f"no data is moved unasked"
        )
    is_mask = masks and array.dtype.kind == "b"
    if array.dtype not in COMPUTE_DTYPES and not is_mask and compute_dtype(array.dtype) is None:
        raise TypeError(
            f"{name} have dtype {array.dtype}; convert them to float32 or float64, "
            f"for example with {name}.astype(numpy.float32)"
        )
    if array_type == CUPY:
        _check_loadable(name, array)
    return array_type, array


def _check_loadable(name: str, array: Any) -> None:
    """Refuse what a GPU does not read as NumPy does, or what would end its context."""
    if not array.dtype.isnative:
        raise TypeError(
            f"{name} have dtype {array.dtype}, whose byte order is foreign to the device; "
            f"swap it on the host"
        )
    steps = [s for s, length in zip(array.strides, array.shape, strict=True) if length > 1]
    if array.size and any(number % array.itemsize for number in (array.data.ptr, *steps)):
        raise ValueError(
            f"{name} are not aligned: their address or strides are no multiples of "
            f"{array.itemsize} bytes, which a GPU cannot load; lay them out anew"
        )


def check_activations(activations: Any, name: str = "activations") -> tuple[str, Any]:
    """Return the array type of ``activations``, and them as a plain array.

    Raises
    ------
    TypeError
        If it is not an array of a known library, is masked, or has an unsupported dtype.
    ValueError
        If it is an array on a device and not aligned.
    """
    return _checked(name, activations)


def check_gradients(
    activations: Any,
    gradients: Any,
    array_type: str,
    name: str = "gradients",
    other_name: str = "activations",
) -> Any:
    """Return ``gradients`` as a plain array to which the gradient can be added.

    ``array_type`` and ``activations``, named ``other_name``, are what :func:`check_activations`
    returned.

    Raises
    ------
    TypeError
        If ``gradients`` is not an array of the same library and dtype.
    ValueError
        If it has another shape, is read-only, overlaps itself or the activations, or is an array
        on another device, or on a device and not aligned.
    """
    other = array_type_of(type(gradients))
    if other not in (None, array_type):
        raise MixedArraysError(
            f"{other_name} are a {array_type} but {name} are a {other}; move one of them, "
            f"no data is moved unasked"
        )
    _, gradients = _checked(name, gradients)
    if activations.dtype != gradients.dtype:
        raise TypeError(
            f"{name} have dtype {gradients.dtype} but {other_name} have {activations.dtype}; "
            f"give both one dtype, for example with {name}.astype({other_name}.dtype)"
        )
    if activations.shape != gradients.shape:
        raise ValueError(
            f"{name} have shape {gradients.shape} but {other_name} have {activations.shape}; "
            f"shapes must be equal, nothing is broadcast"
        )
    if array_type == CUPY and activations.device != gradients.device:
        raise ValueError(
            f"{name} are on {gradients.device} but {other_name} on {activations.device}; "
            f"move one of them, no data is moved unasked"
        )
    if not getattr(getattr(gradients, "flags", None), "writeable", True):
        raise ValueError(f"{name} are read-only; pass a writable array, such as {name}.copy()")
    if math.prod(gradients.shape) == 0 or array_type not in (NUMPY, CUPY):
        return gradients  # where arrays of other libraries lie is for their backend to know
    write = _host_alias(gradients)
    if _overlaps_itself(write):
        raise ValueError(
            f"{name} overlap themselves: several elements share one memory cell, as in a "
            f"broadcast view; pass a copy of {name}"
        )
    if _share_memory(_host_alias(activations), write):
        raise ValueError(
            f"{name} share memory with {other_name}; the update would change its own input: "
            f"pass a copy of one of them"
        )
    return gradients


def check_weights(
    activations: Any,
    weights: Any,
    array_type: str,
    gradients: Any = None,
    name: str = "weights",
    other_name: str = "activations",
) -> Any:
    """Return ``weights`` as a plain array, a view that has the shape of the activations.

    The arguments are those of :func:`check_gradients`, and what it returned, if there are any.

    Raises
    ------
    TypeError
        If ``weights`` is not an array of the same library, or of another dtype than that of the
        activations, their compute dtype and bool.
    ValueError
        If it does not broadcast to their shape, shares memory with the gradients, or is an array on
        another device, or on a device and not aligned.
    """
    other = array_type_of(type(weights))
    if other not in (None, array_type):
        raise MixedArraysError(
            f"{other_name} are a {array_type} but {name} are a {other}; move one of them, "
            f"no data is moved unasked"
        )
    _, weights = _checked(name, weights, masks=True)
    compute = COMPUTE_DTYPES[activations.dtype]
    if weights.dtype.kind != "b" and weights.dtype not in (activations.dtype, compute):
        raise TypeError(
            f"{name} have dtype {weights.dtype}, but {other_name} have {activations.dtype}; give "
            f"them that one, {compute} or bool, for example with {name}.astype({other_name}.dtype)"
        )
    if array_type == CUPY and activations.device != weights.device:
        raise ValueError(
            f"{name} are on {weights.device} but {other_name} on {activations.device}; "
            f"move one of them, no data is moved unasked"
        )
    written = gradients is not None and gradients.size and weights.size
    if written and _share_memory(_host_alias(weights), _host_alias(gradients)):
        raise ValueError(
            f"{name} share memory with the gradients; the update would change its own input: "
            f"pass a copy of one of them"
        )
    library = sys.modules[array_type.partition(".")[0]]
    try:
        return library.broadcast_to(weights, activations.shape)
    except ValueError:
        raise ValueError(
            f"{name} have shape {weights.shape}, which does not broadcast to {activations.shape}, "
            f"that of {other_name}; give an axis that all of them share the length 1"
        ) from None


def check_apart(arrays: list[tuple[str, Any, bool]]) -> None:
    """Refuse arrays that share memory, if one of the two is written.

    Each is given by its name, itself, and whether it is written; all are of NumPy or CuPy.

    Raises
    ------
    ValueError
        If two do, naming both.
    """
    intervals = []
    for name, array, written in arrays:
        alias = _host_alias(array)
        start = alias.__array_interface__["data"][0]
        reach = [s * (n - 1) for s, n in zip(alias.strides, alias.shape, strict=True)]
        if alias.size:
            low = start + sum(min(r, 0) for r in reach)
            high = start + sum(max(r, 0) for r in reach) + alias.itemsize
            intervals.append((low, high, name, alias, written))
    intervals.sort(key=lambda interval: interval[:2])
    open_ones: list[Any] = []  # those that reach beyond where the next one starts
    for interval in intervals:
        start, _, name, alias, written = interval
        open_ones = [other for other in open_ones if other[1] > start]
        for _, _, other_name, other, other_written in open_ones:
            if (written or other_written) and _share_memory(alias, other):
                raise ValueError(
                    f"{name} and {other_name} share memory; the update would depend on the order "
                    f"of the layers: pass copies"
                )
        open_ones.append(interval)


class _Interface:
    """The address and strides of an array on a device, in the form that NumPy reads."""

    def __init__(self, array: Any) -> None:
        description = dict(array.__cuda_array_interface__)
        description["version"] = 3
        description["strides"] = array.strides
        self.__array_interface__ = description


def _host_alias(array: Any) -> np.ndarray[Any, Any]:
    """Return a NumPy array of the same address, shape and strides, never to be read or written.

    Overlap is arithmetic on addresses, which NumPy's functions do without touching the memory.
    """
    return np.asarray(array if isinstance(array, np.ndarray) else _Interface(array))


def _share_memory(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Whether some byte belongs to both; interleaved views do not count. In doubt, yes."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(array: np.ndarray[Any, Any]) -> bool:
    """Whether two elements share a byte."""
    if array.flags.forc:
        return False
    reach = array.itemsize
    axes = [(abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1]
    for stride, length in sorted(axes):
        if stride < reach:
            break
        reach += stride * (length - 1)
    else:
        return False  # every axis steps over all that the denser ones reach
    # Elements i and j that first differ along an axis overlap just if elements 0 and j - i along
    # that axis do, so it is enough to compare the first slice with the others, axis by axis.
    for _ in range(array.ndim):
        if _share_memory(array[:1], array[1:]):
            return True
        array = array[0, ...]
    return False
