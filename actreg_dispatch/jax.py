"""JAX arrays, under ``jit``, ``grad``, ``vmap`` and the rest of JAX's transformations.

:func:`penalty` is a function that JAX differentiates, batches and compiles. The methods of
:class:`~actreg_dispatch.ActivityRegularization` that write nothing lead here when they are given
JAX arrays, traced ones included.

The numbers come from the CPU kernels on every route, so they have the bits that NumPy arrays get:

* An array that has values is read where it is if that is the CPU, and copied to the host if it is
  on another device or spread over several.
* What is traced becomes a callback, which is given an array that is spread over several devices as
  a whole. On the CPU it is a ``buffer_callback``: the kernels read and write XLA's own buffers.
  ``pure_callback``, which serves the other devices, makes JAX arrays of what comes and copies what
  goes: L1 and its gradient, of 1e6 float32 on two cores, take 1.2 ms with it and 0.3 without. It
  also has to wait for these arrays in a thread that JAX may need to make them.

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

from actreg_dispatch.derivatives import gradient_expression
from actreg_dispatch.dtypes import compute_dtype, round_to
from actreg_dispatch.errors import BackendUnavailableError
from actreg_dispatch.layers import penalties_of_rows
from actreg_dispatch.norms import signed_by_type, sqrt
from actreg_dispatch.options import Options, check_scale, constants_of, count_of
from actreg_dispatch.registry import requested
from actreg_dispatch.regularization import ActivityRegularization, check_regularization
from actreg_dispatch.runtime.huge_pages import FROM_BYTES, ask_for_huge_pages
from actreg_dispatch.sums.exact import Total

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # it is experimental, so it may go as it came
    buffer_callback = None

__all__ = ["add_gradient", "apply", "apply_all", "partial_sum", "penalty", "penalty_and_gradient"]

_ALIGNMENT = 64  # bytes; XLA takes over a NumPy array that lies so, and copies others


def penalty(reg: ActivityRegularization, activations: jax.Array) -> jax.Array:
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
        are copied to the host, and gradients back.

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
    _check(reg, activations)
    if _is_concrete(activations):
        return _at_once(reg, activations)
    return _penalty(_frozen(reg), activations)


def penalty_and_gradient(
    reg: ActivityRegularization, activations: jax.Array, out: None = None, *, scale: Any = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Return the penalty, as :func:`penalty` does, and its gradient, an array like ``activations``.

    ``scale`` is a number or a 0-d floating array, which may be traced. JAX arrays cannot be
    written, so ``out`` is refused with a TypeError.
    """
    _check(reg, activations)
    if out is not None:
        raise _immutable("out")
    number, traced = _checked_scale(scale)
    if number is not None and _is_concrete(activations):
        return _both_at_once(reg, activations, number)
    if number is not None:
        compute = _compute_dtype(activations)
        traced = jnp.asarray(round_to(compute, number))
    return _evaluate(_frozen(reg), number, activations, traced)  # type: ignore[no-any-return]


def partial_sum(reg: ActivityRegularization, activations: jax.Array) -> Total:
    """Return the sum that the norm takes, exactly; on the host, for which this waits."""
    _check(reg, activations)
    if isinstance(activations, jax.core.Tracer):
        raise TypeError(
            "activations are traced, but a partial sum is a Python number of unlimited precision; "
            "call partial_sum outside of jit, grad and vmap"
        )
    return reg.partial_sum(np.asarray(activations))


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


def _check(reg: Any, activations: Any) -> None:
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


def _is_concrete(array: Any) -> bool:
    """Return whether ``array`` has values, all within reach, and it is plain where to put more."""
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return False
    sharding = array.sharding
    return len(sharding.device_set) == 1 or isinstance(sharding, jax.sharding.NamedSharding)


def _frozen(reg: ActivityRegularization) -> Options:
    # A callback runs in a thread of its own, where use_backend does not reach.
    backend, _ = requested(reg.backend)
    return reg.options._replace(backend=backend)


_regularization = functools.lru_cache(maxsize=256)(ActivityRegularization.from_options)


# Arrays with values.


def _at_once(reg: ActivityRegularization, activations: Any) -> Any:
    (value,) = _placed(activations, reg.penalty(np.asarray(activations)))
    return value


def _both_at_once(reg: ActivityRegularization, activations: Any, scale: float) -> tuple[Any, Any]:
    values = np.asarray(activations)
    gradient = _aligned_zeros(values.shape, values.dtype)
    penalty = reg.apply(values, gradient, scale=scale)
    value, gradient = _placed(activations, penalty, gradient)
    return value, gradient


def _placed(activations: Any, *results: Any) -> Any:
    """Return a penalty and perhaps a gradient as JAX arrays where ``activations`` are.

    They are committed to the device if the activations are. A gradient is spread over several as
    they are; a penalty is on each of them.
    """
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _penalty(options: Options, x: Any) -> Any:
    return _value(options, x)


def _forward(options: Options, x: Any) -> tuple[Any, Any]:
    return _value(options, x), x


def _backward(options: Options, x: Any, cotangent: Any) -> tuple[Any]:
    return (_evaluate(options, None, x, cotangent)[1],)


_penalty.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(options: Options, x: Any) -> Any:
    if _is_concrete(x):
        return _at_once(_regularization(options), x)
    (value,) = _called_back(options, x)
    return value


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _evaluate(options: Options, number: float | None, x: Any, scale: Any) -> tuple[Any, Any]:
    """Return penalty and gradient; ``scale`` is what multiplies the gradient, about ``number``."""
    if _is_concrete(x) and (number is not None or _is_concrete(scale)):
        reg = _regularization(options)
        return _both_at_once(reg, x, float(scale) if number is None else number)
    value, gradient = _called_back(options, x, number, scale)
    return value, gradient


@_value.defjvp
def _value_jvp(options: Options, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    value, gradient = _evaluate(options, 1.0, x, jnp.ones((), _compute_dtype(x)))
    return value, _inner(gradient, dx)


@_evaluate.defjvp
def _evaluate_jvp(
    options: Options, number: float | None, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    (x, scale), (dx, dscale) = primals, tangents
    compute = _compute_dtype(x)
    results = _evaluate(options, number, x, scale)
    _, gradient = _evaluate(options, 1.0, x, jnp.ones((), compute))
    along_x = _hessian_vector_product(options, x.astype(compute), dx.astype(compute))
    along = along_x * scale.astype(compute) + gradient.astype(compute) * dscale.astype(compute)
    return results, (_inner(gradient, dx), along.astype(x.dtype))


def _inner(gradient: Any, dx: Any) -> Any:
    compute = _compute_dtype(gradient)
    return jnp.sum(gradient.astype(compute) * dx.astype(compute))


def _hessian_vector_product(options: Options, x: Any, dx: Any) -> Any:
    """Return the second derivative of the penalty times ``dx``, in JAX's own arithmetic."""
    if not x.size:
        return jnp.zeros_like(dx)
    lam, _, epsilon = constants_of(options, x.dtype, count_of(options.reduction, x.shape))
    lams = tuple(jnp.asarray(each, x.dtype) for each in lam)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    usual = (largest >= jnp.finfo(x.dtype).tiny) & jnp.isfinite(largest)
    unit = jnp.where(usual, largest, 1)

    def gradient(x: Any) -> Any:
        return gradient_expression(options.norm, x, unit, lams, epsilon, jnp.where)

    return jax.jvp(gradient, (x,), (dx,))[1]


@sqrt.register(jax.Array)
@sqrt.register(jax.core.Tracer)
def _(value: Any) -> Any:
    return jnp.sqrt(value)


@signed_by_type.register(jax.Array)
@signed_by_type.register(jax.core.Tracer)
def _(x: Any, a: Any) -> Any:
    return jnp.where(x > 0, a, jnp.where(x < 0, -a, 0))


def _called_back(options: Options, x: Any, *scale: Any) -> Any:
    """Return the penalty alone, or with ``scale``, as ``number, scale``, the gradient, too."""
    number, *traced = scale or (None,)
    call = _callback(options, x.shape, x.dtype, number, bool(scale))
    return call(x, *traced) if number is None else call(x)


@functools.lru_cache(maxsize=256)  # JAX compiles anew for what is not the same function
def _callback(
    options: Options,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    number: float | None,
    with_gradient: bool,
) -> Callable[..., Any]:
    """Return the function of traced arrays that computes on the host."""
    kept = _subnormals_kept()
    reg = _regularization(options)
    # What the choice of a backend may raise is raised here; a callback must not.
    zeros = (0.0,) * len(options.lam)
    _regularization(options._replace(lam=zeros)).penalty(np.empty((0,) * len(shape) or 0, dtype))
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

    def fill(out: Any, x: Any, scale: Any) -> None:
        """Compute each example of a batch; under ``vmap`` there are axes before those of one."""
        batch = out[0].shape
        x = np.broadcast_to(x, batch + shape)
        with kept():
            if fill_at_once(out, x, scale):
                return
            scale = np.broadcast_to(scale, batch)
            if with_gradient:
                out[1][...] = 0
            for index in np.ndindex(batch):
                example = (*index, ...)
                if with_gradient:
                    number = float(scale[index])
                    out[0][index] = reg.apply(x[example], out[1][example], scale=number)
                else:
                    out[0][index] = reg.penalty(x[example])

    fixed = 1.0 if number is None else number

    def in_place(context: Any, out: Any, x: Any, scale: Any = fixed) -> None:
        fill([np.asarray(buffer) for buffer in out], np.asarray(x), np.asarray(scale))

    def by_value(x: Any, scale: Any = fixed) -> Any:
        x, scale = np.asarray(x), np.asarray(scale)
        batch = np.broadcast_shapes(x.shape[: x.ndim - len(shape)], scale.shape)
        out = [np.empty(batch + result.shape, result.dtype) for result in results]
        fill(out, x, scale)
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
