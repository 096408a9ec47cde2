"""What is a JAX array that a call takes, and whether it has values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from actreg_dispatch.dispatch import checked_weights
from actreg_dispatch.dtypes import compute_dtype
from actreg_dispatch.errors import MixedArraysError
from actreg_dispatch.options import check_scale, constants_of, count_of
from actreg_dispatch.registry import NUMPY, array_type_of
from actreg_dispatch.regularization import check_regularization
from actreg_dispatch.row_norms import row_axes

__all__ = ["check", "checked_scale", "compute_dtype_of", "is_concrete", "is_mask"]


def check(reg: Any, activations: Any, weights: Any = None) -> None:
    """Raise what can be raised before anything is computed or traced."""
    check_regularization(reg)
    if not isinstance(activations, jax.Array):  # which tracers are, too
        cls = type(activations)
        raise TypeError(
            f"activations must be a JAX array, not a {cls.__module__}.{cls.__qualname__}; "
            f"convert it with jax.numpy.asarray, or call a method of the regularization"
        )
    options, dtype = reg.options, _stored_dtype(activations)
    constants_of(options, dtype, count_of(options.reduction, activations.shape))
    row_axes(options.norm, activations.ndim)
    if weights is None:
        return
    if not (isinstance(weights, jax.Array) and isinstance(weights.dtype, np.dtype)):  # or keys
        cls = type(weights)
        error = TypeError if array_type_of(cls) is None else MixedArraysError
        raise error(
            f"weights must be a JAX array of numbers or bools, as the activations are one, not a "
            f"{cls.__module__}.{cls.__qualname__}; convert them with jax.numpy.asarray"
        )
    x, w = (np.broadcast_to(np.zeros((), a.dtype), a.shape) for a in (activations, weights))
    checked_weights(options, x, w, NUMPY)  # shapes and dtypes alone


def _stored_dtype(activations: Any) -> np.dtype[Any]:
    dtype = activations.dtype
    if not isinstance(dtype, np.dtype) or compute_dtype(dtype) is None:  # keys have other dtypes
        raise TypeError(
            f"activations have dtype {dtype}; convert them to float32 or float64, "
            f"for example with activations.astype(jax.numpy.float32)"
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:  # results would become float32
        raise TypeError(
            "activations have dtype float64, but 64-bit types are switched off; "
            "convert them to float32, or set jax_enable_x64"
        )
    return dtype


def compute_dtype_of(activations: Any) -> np.dtype[Any]:
    """Return the compute dtype of activations whose dtype has been checked."""
    compute = compute_dtype(activations.dtype)
    assert compute is not None
    return compute


def checked_scale(scale: Any) -> tuple[float | None, Any]:
    """Return ``scale`` as a number, or None and a traced scalar."""
    if not isinstance(scale, jax.Array):
        return check_scale(scale), None
    if scale.shape or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(
            f"scale has shape {scale.shape} and dtype {scale.dtype}; pass a real number, "
            f"or a floating array of no axes, such as scale.astype(jax.numpy.float32)"
        )
    if isinstance(scale, jax.core.Tracer):
        return None, scale
    return float(scale), None


def is_concrete(array: Any, weights: Any = None) -> bool:
    """Return whether arrays have values, all within reach, and it is plain where to put more."""
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return False
    if weights is not None and not is_concrete(weights):
        return False
    sharding = array.sharding
    return len(sharding.device_set) == 1 or isinstance(sharding, jax.sharding.NamedSharding)


def is_mask(weights: Any) -> bool:
    """Return whether weights are of bool, which have no gradient."""
    return weights.dtype == np.bool_  # type: ignore[no-any-return]
