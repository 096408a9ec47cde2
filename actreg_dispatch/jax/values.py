"""Arrays that have values: computed at once, as NumPy's or CuPy's."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from actreg_dispatch.registry import AUTO, requested, why_unavailable
from actreg_dispatch.regularization import ActivityRegularization

__all__ = ["at_once", "both_at_once", "values_of"]

_ALIGNMENT = 64  # bytes; XLA takes over a NumPy array that lies so, and copies others


def at_once(reg: ActivityRegularization, activations: Any, weights: Any) -> Any:
    """Return the penalty."""
    x, w = values_of(reg, activations, weights)
    (value,) = _placed(activations, reg.penalty(x, weights=w))
    return value


def both_at_once(
    reg: ActivityRegularization, activations: Any, weights: Any, scale: float
) -> tuple[Any, Any]:
    """Return penalty and gradient."""
    x, w = values_of(reg, activations, weights)
    if isinstance(x, np.ndarray):
        gradient = _aligned_zeros(x.shape, x.dtype)
        penalty = reg.apply(x, gradient, scale=scale, weights=w)
    else:
        penalty, gradient = reg.penalty_and_gradient(x, scale=scale, weights=w)
    value, gradient = _placed(activations, penalty, gradient)
    return value, gradient


def values_of(reg: ActivityRegularization, activations: Any, weights: Any) -> tuple[Any, Any]:
    """Return arrays that have values as CuPy's where it can take all of them, else as NumPy's."""
    arrays, convert = (activations, weights), np.asarray
    if all(array is None or _is_for_cupy(reg, array) for array in arrays):
        import cupy

        convert = cupy.from_dlpack
    x, w = (None if array is None else convert(array) for array in arrays)
    return x, w


def _is_for_cupy(reg: ActivityRegularization, array: Any) -> bool:
    """Return whether CuPy can read ``array`` where it is, and no other backend is asked for."""
    devices = array.sharding.device_set
    return (
        len(devices) == 1
        and next(iter(devices)).platform == "gpu"
        and array.dtype != jnp.bfloat16  # which DLPack brings to CuPy from version 14 on
        and requested(reg.backend)[0] in (AUTO, "cupy")
        and not why_unavailable("cupy")
    )


def _placed(activations: Any, *results: Any) -> Any:
    """Return a penalty and perhaps a gradient as JAX arrays where ``activations`` are.

    They are committed to the device if the activations are. A gradient is spread over several as
    they are; a penalty is on each of them.
    """
    if not isinstance(results[0], (np.ndarray, np.generic)):  # CuPy's, so they are there
        return [jnp.from_dlpack(result) for result in results]
    arrays, sharding = [np.asarray(result) for result in results], activations.sharding
    if len(sharding.device_set) > 1:
        everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return jax.device_put(arrays, [everywhere, sharding][: len(arrays)])
    (device,) = sharding.device_set
    if activations.committed:
        return jax.device_put(arrays, device)
    with jax.default_device(device):
        return jax.device_put(arrays)


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    size = math.prod(shape) * dtype.itemsize
    room = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)
