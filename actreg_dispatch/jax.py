"""JAX arrays, under ``jit``, ``grad``, ``vmap`` and the rest of JAX's transformations.

:func:`penalty` is a function that JAX differentiates, batches and compiles. The methods of
:class:`~actreg_dispatch.ActivityRegularization` that write nothing lead here when they are given
JAX arrays, traced ones included.

The numbers come from the CPU kernels on every route, so they have the bits that NumPy arrays get:

* An array that has values is read where it is if that is the CPU, and copied to the host if it is
  on another device or spread over several. On a CUDA device that CuPy can use, CuPy's kernels
  compute where it is; this route has not been run on a GPU yet.
* What is traced becomes a callback, which is given an array that is spread over several devices as
  a whole. On the CPU it is a ``buffer_callback``: the kernels read and write XLA's own buffers.
  ``pure_callback``, which serves the other devices, makes JAX arrays of what comes and copies what
  goes: L1 and its gradient, of 1e6 float32 on two cores, take 1.2 ms with it and 0.3 without. It
  also has to wait for these arrays in a thread that JAX may need to make them.

Gradients by weights, and what lies beyond gradients, are JAX's own arithmetic, right to rounding.

XLA flushes subnormal numbers to zero in its threads; for the time of a callback they are kept.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from actreg_dispatch.derivatives import gradient_expression, weights_gradient_expression
from actreg_dispatch.dispatch import checked_weights
from actreg_dispatch.dtypes import compute_dtype, round_to
from actreg_dispatch.errors import BackendUnavailableError, MixedArraysError
from actreg_dispatch.layers import penalties_of_rows
from actreg_dispatch.norms import signed_by_type, sqrt
from actreg_dispatch.options import Options, check_scale, constants_of, count_of, divided_axes
from actreg_dispatch.registry import AUTO, NUMPY, array_type_of, requested, why_unavailable
from actreg_dispatch.regularization import ActivityRegularization, check_regularization
from actreg_dispatch.row_norms import row_axes
from actreg_dispatch.runtime.huge_pages import FROM_BYTES, ask_for_huge_pages
from actreg_dispatch.statistics import refuse_statistics
from actreg_dispatch.sums.exact import Total

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # it is experimental, so it may go as it came
    buffer_callback = None

__all__ = ["add_gradient", "apply", "apply_all", "partial_sum", "penalty", "penalty_and_gradient"]

_ALIGNMENT = 64  # bytes; XLA takes over a NumPy array that lies so, and copies others


def penalty(
    reg: ActivityRegularization,
    activations: jax.Array,
    *,
    weights: jax.Array | None = None,
    statistics: None = None,
) -> jax.Array:
    r"""Return the penalty of ``activations``, differentiably.

    ``reg.penalty(activations)`` is the same function; see
    :meth:`~actreg_dispatch.ActivityRegularization.penalty` for what it computes. The gradient is
    that of :meth:`~actreg_dispatch.ActivityRegularization.apply`. What comes in from further up,
    the cotangent, multiplies λ as ``scale`` does, for each example of a ``vmap`` on its own.

    Parameters
    ----------
    reg : ActivityRegularization
        Close over it; it is not an argument for a transformed function. What is traced, as under
        ``jit``, keeps ``lam`` and the chosen backend as they are while it is traced.
    activations : jax.Array
        Of float16, bfloat16, float32 or float64, any shape; may be traced. On a GPU or TPU they
        are copied to the host, and gradients back; on a CUDA device, arrays that have values go to
        CuPy, if it can run there, without a copy (not yet run on a GPU).
    weights : jax.Array, optional
        As :meth:`~actreg_dispatch.ActivityRegularization.penalty` describes them; may be traced.
        Where they are, or the activations, a weight that is negative or not finite is not an error
        but makes the penalty NaN and the gradient unspecified, and so does a mask that leaves λ too
        large for the dtype.

    Returns
    -------
    jax.Array
        0-d, in the compute dtype T, on the device of ``activations``.

    Notes
    -----
    It is a ``jax.custom_vjp``, not a ``custom_jvp``: reverse mode then gets the gradient from the
    kernels with the cotangent in it, whereas a tangent rule that JAX transposes would multiply
    them in XLA, which rounds once more and flushes subnormal numbers. So forward mode (``jvp``,
    ``jacfwd``) of the penalty itself is refused by JAX. Derivatives of the gradient, in either
    mode, are right to rounding, computed by JAX; with them ``jax.hessian`` works.

    So is the gradient with respect to floating weights. It is that of the formula where a weight is
    0, too, except that an element which is left out gives 0 if it is not finite, or is not when
    divided by the largest of the others. A mask has no gradient.

    Under ``vmap`` the examples are computed one after the other, at some 4 µs each or more.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from actreg_dispatch import ActivityRegularization
    >>> reg = ActivityRegularization.l1(0.5)
    >>> value, gradient = jax.value_and_grad(reg.penalty)(jnp.array([1.0, -2.0, 0.0]))
    >>> float(value), gradient.tolist()
    (1.5, [0.5, -0.5, 0.0])
    """
    _check(reg, activations, weights)
    refuse_statistics(statistics, "JAX arrays")
    if _is_concrete(activations, weights):
        return _at_once(reg, activations, weights)
    # Weights that have values are not differentiated, and without jit nothing else would tell.
    attached = isinstance(weights, jax.core.Tracer) and not _is_mask(weights)
    return _penalty(_frozen(reg), attached, activations, weights)


def penalty_and_gradient(
    reg: ActivityRegularization,
    activations: jax.Array,
    out: None = None,
    *,
    scale: Any = 1.0,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the penalty, as :func:`penalty` does, and its gradient, an array like ``activations``.

    ``scale`` is a number or a 0-d floating array, which may be traced, and ``weights`` are those
    of :func:`penalty`. JAX arrays cannot be written, so ``out`` is refused with a TypeError.
    """
    _check(reg, activations, weights)
    if out is not None:
        raise _immutable("out")
    number, traced = _checked_scale(scale)
    if number is not None and _is_concrete(activations, weights):
        return _both_at_once(reg, activations, weights, number)
    if number is not None:
        compute = _compute_dtype(activations)
        traced = jnp.asarray(round_to(compute, number))
    return _evaluate(  # type: ignore[no-any-return]
        _frozen(reg), number, activations, traced, weights
    )


def partial_sum(
    reg: ActivityRegularization, activations: jax.Array, *, weights: jax.Array | None = None
) -> Total:
    """Return the sum that the norm takes, exactly; on the host, for which this waits."""
    _check(reg, activations, weights)
    for name, array in (("activations", activations), ("weights", weights)):
        if isinstance(array, jax.core.Tracer):
            raise TypeError(
                f"{name} are traced, but a partial sum is a Python number of unlimited precision; "
                f"call partial_sum outside of jit, grad and vmap"
            )
    x, w = _values_of(reg, activations, weights)
    return reg.partial_sum(x, weights=w)


def apply(*arguments: Any, **options: Any) -> NoReturn:
    """Refuse, with a TypeError that names what to call instead: JAX arrays cannot be written."""
    raise _immutable("gradients")


apply_all = add_gradient = apply


def _immutable(name: str) -> TypeError:
    return TypeError(
        f"{name} cannot be updated in place, for JAX arrays are immutable; add what "
        f"penalty_and_gradient(activations) returns to them, or differentiate "
        f"actreg_dispatch.jax.penalty(reg, activations) with jax.grad"
    )


# Checks.


def _check(reg: Any, activations: Any, weights: Any = None) -> None:
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


def _compute_dtype(activations: Any) -> np.dtype[Any]:
    compute = compute_dtype(activations.dtype)
    assert compute is not None  # it has been checked
    return compute


def _checked_scale(scale: Any) -> tuple[float | None, Any]:
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


def _is_concrete(array: Any, weights: Any = None) -> bool:
    """Return whether arrays have values, all within reach, and it is plain where to put more."""
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return False
    if weights is not None and not _is_concrete(weights):
        return False
    sharding = array.sharding
    return len(sharding.device_set) == 1 or isinstance(sharding, jax.sharding.NamedSharding)


def _is_mask(weights: Any) -> bool:
    return weights.dtype == np.bool_  # type: ignore[no-any-return]


def _frozen(reg: ActivityRegularization) -> Options:
    # A callback runs in a thread of its own, where use_backend does not reach.
    backend, _ = requested(reg.backend)
    return reg.options._replace(backend=backend)


_regularization = functools.lru_cache(maxsize=256)(ActivityRegularization.from_options)


# Arrays with values.


def _at_once(reg: ActivityRegularization, activations: Any, weights: Any) -> Any:
    x, w = _values_of(reg, activations, weights)
    (value,) = _placed(activations, reg.penalty(x, weights=w))
    return value


def _both_at_once(
    reg: ActivityRegularization, activations: Any, weights: Any, scale: float
) -> tuple[Any, Any]:
    x, w = _values_of(reg, activations, weights)
    if isinstance(x, np.ndarray):
        gradient = _aligned_zeros(x.shape, x.dtype)
        penalty = reg.apply(x, gradient, scale=scale, weights=w)
    else:
        penalty, gradient = reg.penalty_and_gradient(x, scale=scale, weights=w)
    value, gradient = _placed(activations, penalty, gradient)
    return value, gradient


def _values_of(reg: ActivityRegularization, activations: Any, weights: Any) -> tuple[Any, Any]:
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


# Traced arrays. ``number`` is the scale if it is known, which a float32 might not hold.


def _arrays(*values: Any) -> list[Any]:
    """Return what a rule is given as JAX arrays; of NumPy arrays and numbers JAX hands those on."""
    as_they_are = type(None), jax.Array
    return [
        each
        if isinstance(each, as_they_are) or getattr(each, "dtype", None) == jax.dtypes.float0
        else jnp.asarray(each)
        for each in values
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _penalty(options: Options, attached: bool, x: Any, w: Any) -> Any:
    """Return the penalty; weights, if any, have a gradient if they are ``attached``."""
    return _value(options, x, w)


def _forward(options: Options, attached: bool, x: Any, w: Any) -> tuple[Any, Any]:
    x, w = _arrays(x, w)
    return _value(options, x, w), (x, w)


def _backward(options: Options, attached: bool, arrays: Any, cotangent: Any) -> tuple[Any, Any]:
    x, w = arrays
    _, gradient = _evaluate(options, None, x, cotangent, w)
    if not attached:
        return gradient, None
    return gradient, (cotangent * _weights_gradient(options, x, w)).astype(w.dtype)


_penalty.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(options: Options, x: Any, w: Any) -> Any:
    x, w = _arrays(x, w)
    if _is_concrete(x, w):
        return _at_once(_regularization(options), x, w)
    (value,) = _called_back(options, x, w)
    return value


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _evaluate(
    options: Options, number: float | None, x: Any, scale: Any, w: Any
) -> tuple[Any, Any]:
    """Return penalty and gradient; ``scale`` is what multiplies the gradient, about ``number``."""
    x, scale, w = _arrays(x, scale, w)
    if _is_concrete(x, w) and (number is not None or _is_concrete(scale)):
        reg = _regularization(options)
        return _both_at_once(reg, x, w, float(scale) if number is None else number)
    value, gradient = _called_back(options, x, w, number, scale)
    return value, gradient


@_value.defjvp
def _value_jvp(options: Options, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, w), (dx, dw) = _arrays(*primals), _arrays(*tangents)
    value, gradient = _evaluate(options, 1.0, x, jnp.ones((), _compute_dtype(x)), w)
    return value, _slope(options, x, w, gradient, dx, dw)


@_evaluate.defjvp
def _evaluate_jvp(
    options: Options, number: float | None, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    (x, scale, w), (dx, dscale, dw) = _arrays(*primals), _arrays(*tangents)
    compute = _compute_dtype(x)
    results = _evaluate(options, number, x, scale, w)
    _, gradient = _evaluate(options, 1.0, x, jnp.ones((), compute), w)
    along_arrays = _hessian_vector_product(options, x.astype(compute), w, dx.astype(compute), dw)
    along = along_arrays * scale.astype(compute) + gradient.astype(compute) * dscale.astype(compute)
    return results, (_slope(options, x, w, gradient, dx, dw), along.astype(x.dtype))


def _slope(options: Options, x: Any, w: Any, gradient: Any, dx: Any, dw: Any) -> Any:
    """Return the derivative of the penalty along a change of activations and weights."""
    compute = _compute_dtype(x)
    slope = jnp.sum(gradient.astype(compute) * dx.astype(compute))
    if w is None or _is_mask(w):
        return slope
    return slope + jnp.sum(_weights_gradient(options, x, w) * dw.astype(compute))


def _hessian_vector_product(options: Options, x: Any, w: Any, dx: Any, dw: Any) -> Any:
    """Return the derivative of the gradient along a change, in JAX's own arithmetic."""
    if not x.size:
        return jnp.zeros_like(dx)

    def gradient(x: Any, w: Any) -> Any:
        return _expressed(gradient_expression, options, x, w)

    return jax.jvp(gradient, (x, w), (dx, dw))[1]


def _weights_gradient(options: Options, x: Any, w: Any) -> Any:
    """Return the gradient by the weights, of their shape and the compute dtype, by JAX itself."""
    compute = _compute_dtype(x)
    if not x.size:
        return jnp.zeros(w.shape, compute)
    each = _expressed(weights_gradient_expression, options, x.astype(compute), w)
    summed = jax.linear_transpose(
        lambda w: jnp.broadcast_to(w, x.shape), jax.ShapeDtypeStruct(w.shape, compute)
    )
    return summed(each)[0]


def _expressed(expression: Any, options: Options, x: Any, w: Any) -> Any:
    """Return an expression of :mod:`actreg_dispatch.derivatives` for x of the compute dtype."""
    count = count_of(options.reduction, x.shape)
    lam, _, epsilon = constants_of(options, x.dtype, count)
    lams = tuple(jnp.asarray(each, x.dtype) for each in lam)
    size = jnp.abs(x)
    if w is not None:
        if _is_mask(w):
            factor = (count / _kept_of(options, jnp.broadcast_to(w, x.shape))).astype(x.dtype)
            lams = tuple(each * factor for each in lams)
        w = w.astype(x.dtype)
        size = jnp.where(w != 0, size, 0)
    largest = jax.lax.stop_gradient(jnp.max(size, options.norm.axis, keepdims=True))
    usual = (largest >= jnp.finfo(x.dtype).tiny) & jnp.isfinite(largest)
    unit = jnp.where(usual, largest, 1)
    if w is not None:
        x = jnp.where((w != 0) | jnp.isfinite(x / unit), x, 0)
    return expression(options.norm, x, unit, lams, epsilon, jnp.where, w)


def _kept_of(options: Options, mask: Any) -> Any:
    """Return what λ is divided by for a mask, which may be traced."""
    axes = divided_axes(options.reduction, mask.ndim)
    others = tuple(axis for axis in range(mask.ndim) if axis not in axes)
    return jnp.maximum(mask.any(axis=others).sum(), 1)


@sqrt.register(jax.Array)
@sqrt.register(jax.core.Tracer)
def _(value: Any) -> Any:
    return jnp.sqrt(value)


@signed_by_type.register(jax.Array)
@signed_by_type.register(jax.core.Tracer)
def _(x: Any, a: Any) -> Any:
    return jnp.where(x > 0, a, jnp.where(x < 0, -a, 0))


def _called_back(
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
    reg = _regularization(options)
    # What the choice of a backend may raise is raised here; a callback must not.
    zeros = (0.0,) * len(options.lam)
    _regularization(options._replace(lam=zeros)).penalty(
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
