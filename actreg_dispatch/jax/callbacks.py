"""What is traced, computed on the host: the callbacks, and what a thread of XLA needs for them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from actreg_dispatch.dtypes import compute_dtype
from actreg_dispatch.errors import BackendUnavailableError
from actreg_dispatch.layers import penalties_of_rows
from actreg_dispatch.options import Options
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.runtime.huge_pages import FROM_BYTES, ask_for_huge_pages

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # it is experimental, so it may go as it came
    buffer_callback = None

__all__ = ["called_back", "regularization_of"]

regularization_of = functools.lru_cache(maxsize=256)(ActivityRegularization.from_options)


def called_back(
    options: Options, x: Any, w: Any, number: float | None = None, scale: Any = None
) -> Any:
    """Return the penalty alone, or with ``scale`` the gradient, too."""
    weights = None if w is None else (w.shape, w.dtype)
    call = _callback(options, x.shape, x.dtype, weights, number, scale is not None)
    return call(x, scale if number is None else None, w)


@functools.lru_cache(maxsize=256)  # JAX compiles anew for what is not the same function
def _callback(
    options: Options,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    weights: tuple[tuple[int, ...], np.dtype[Any]] | None,
    number: float | None,
    with_gradient: bool,
) -> Callable[..., Any]:
    """Return the function of traced arrays that computes on the host."""
    kept = _subnormals_kept()
    reg = regularization_of(options)
    # What the choice of a backend may raise is raised here; a callback must not.
    zeros = (0.0,) * len(options.lam)
    regularization_of(options._replace(lam=zeros)).penalty(
        np.empty((0,) * len(shape) or 0, dtype),
        weights=None if weights is None else np.zeros((), weights[1]),
    )
    compute = compute_dtype(dtype)
    results = [jax.ShapeDtypeStruct((), compute)]
    if with_gradient:
        results.append(jax.ShapeDtypeStruct(shape, dtype))

    def fill_at_once(out: Any, x: Any, scale: Any) -> bool:
        """Compute all examples by one function if they are contiguous and have one scale.

        Or none, of a single small one, which is quicker by itself.
        """
        if not out[0].shape and x.nbytes < FROM_BYTES:
            return False
        if not (x.flags.c_contiguous and x.size and np.all(scale == scale.flat[0])):
            return False
        examples = (-1, *shape)
        gradients = out[1].reshape(examples) if with_gradient else None
        if gradients is not None:
            ask_for_huge_pages(gradients.ctypes.data, gradients.nbytes)
        found = penalties_of_rows(reg.options, x.reshape(examples), gradients, scale.flat[0])
        if found is not None:
            out[0][...] = found.reshape(out[0].shape)
        return found is not None

    def fill(out: Any, x: Any, scale: Any, w: Any) -> None:
        """Compute each example of a batch; under ``vmap`` there are axes before those of one."""
        batch = out[0].shape
        x = np.broadcast_to(x, batch + shape)
        with kept():
            if w is None and fill_at_once(out, x, scale):
                return
            scale = np.broadcast_to(scale, batch)
            if weights is not None:
                w = np.broadcast_to(w, batch + weights[0])
            if with_gradient:
                out[1][...] = 0
            for index in np.ndindex(batch):
                example = (*index, ...)
                given = None if w is None else w[example]
                try:
                    if with_gradient:
                        number, gradient = float(scale[index]), out[1][example]
                        found = reg.apply(x[example], gradient, scale=number, weights=given)
                    else:
                        found = reg.penalty(x[example], weights=given)
                except ValueError:  # the values of weights, for all else has been checked
                    if w is None:
                        raise
                    found = math.nan
                out[0][index] = found

    fixed = 1.0 if number is None else number

    def on_host(x: Any, scale: Any, w: Any) -> tuple[Any, Any, Any]:
        scale = np.asarray(fixed if scale is None else scale)
        return np.asarray(x), scale, None if w is None else np.asarray(w)

    def in_place(context: Any, out: Any, *operands: Any) -> None:
        fill([np.asarray(buffer) for buffer in out], *on_host(*operands))

    def by_value(*operands: Any) -> Any:
        x, scale, w = on_host(*operands)
        batches = [x.shape[: x.ndim - len(shape)], scale.shape]
        if weights is not None:
            batches.append(w.shape[: w.ndim - len(weights[0])])
        batch = np.broadcast_shapes(*batches)
        out = [np.empty(batch + result.shape, result.dtype) for result in results]
        fill(out, x, scale, w)
        return out

    def sharing(*operands: Any) -> Any:
        return buffer_callback(in_place, results, vmap_method="expand_dims")(*operands)

    def copying(*operands: Any) -> Any:
        return jax.pure_callback(by_value, results, *operands, vmap_method="expand_dims")

    def call(*operands: Any) -> Any:
        if buffer_callback is None:
            return copying(*operands)
        return jax.lax.platform_dependent(*operands, cpu=sharing, default=copying)

    return jax.jit(call)  # type: ignore[no-any-return]


def _subnormals_kept() -> Callable[[], contextlib.AbstractContextManager[None]]:
    try:
        # It compiles, so not before.
        from actreg_dispatch.runtime.subnormals import subnormals_kept
    except Exception as error:
        raise BackendUnavailableError(
            f"traced arrays are computed in threads of XLA, which flush subnormal numbers to zero, "
            f"and Numba, which undoes that, cannot run here: {type(error).__name__}: {error}. "
            f"Mend Numba, or call outside of jit and vmap"
        ) from error
    return subnormals_kept
