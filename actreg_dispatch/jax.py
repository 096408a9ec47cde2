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
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from actreg_dispatch.errors import BackendUnavailableError
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.registry import requested
from actreg_dispatch.regularization import ActivityRegularization, check_regularization
from actreg_dispatch.rounding import PairedSum, PartialSum, compute_dtype, round_to
from actreg_dispatch.strength import check_scale, constants_of, count_of

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # it is experimental, so it may go as it came
    buffer_callback = None

__all__ = ["add_gradient", "apply", "apply_all", "partial_sum", "penalty", "penalty_and_gradient"]

_ALIGNMENT = 64  # bytes; XLA takes over a NumPy array that lies so, and copies others


class _Settings(NamedTuple):
    """What a traced computation keeps of a regularization: all of it, as it is at that time."""

    lam: float | tuple[float, float]
    norm: ActivityNorm
    epsilon: float | None
    reduction: str
    backend: str


def penalty(reg: ActivityRegularization, activations: jax.Array) -> jax.Array:
    r"""Return the penalty of ``activations``, differentiably.

    λ·Σ|xᵢ| for ``"l1"``, λ·√(Σxᵢ²) for ``"l2"``, λ·Σxᵢ² for ``"l2_squared"``, λ₁·Σ|xᵢ| + λ₂·Σxᵢ²
    for ``"l1_l2_squared"``; also what ``reg.penalty(activations)`` returns. The gradient is that of
    :meth:`~actreg_dispatch.ActivityRegularization.apply`: 0 at 0 for L1, 0 for L2 where
    Σxᵢ² ≤ ``epsilon``. What comes in from further up, the cotangent, multiplies λ as ``scale``
    does, for each example of a ``vmap`` on its own.

    Parameters
    ----------
    reg : ActivityRegularization
        Close over it; it is no argument for a transformed function. What is traced, as under
        ``jit``, keeps ``lam`` and the chosen backend as they are while it is traced.
    activations : jax.Array
        Of float16, bfloat16, float32 or float64, any shape; may be traced. On a GPU or TPU they
        are copied to the host, and gradients back.

    Returns
    -------
    jax.Array
        0-d, in the compute dtype T, on the device of ``activations``.

    Raises
    ------
    TypeError
        If ``activations`` are not a JAX array or have an unsupported dtype.
    ValueError
        If ``lam`` is too large for their dtype.
    UnknownBackendError, BackendUnavailableError
        If the backend that is asked for does not exist or cannot run here.

    Notes
    -----
    It is a ``jax.custom_vjp``, not a ``custom_jvp``: reverse mode then gets the gradient from the
    kernels with the cotangent in it, whereas a tangent rule that JAX transposes would multiply
    them in XLA, which rounds once more and flushes subnormal numbers. So forward mode (``jvp``,
    ``jacfwd``) of the penalty itself is refused by JAX. Derivatives of the gradient, in either
    mode, are right to rounding, computed by JAX; with them ``jax.hessian`` works. For L1 they are
    0.

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
    return _penalty(_settled(reg), activations)


def penalty_and_gradient(
    reg: ActivityRegularization, activations: jax.Array, out: None = None, *, scale: Any = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Return the penalty and its gradient, in one pass.

    Parameters
    ----------
    reg : ActivityRegularization
    activations : jax.Array
        As for :func:`penalty`.
    out : None
        JAX arrays cannot be written.
    scale : float or jax.Array, default 1.0
        Multiplies λ for the gradient alone. A number, or a 0-d floating array, which may be traced.

    Returns
    -------
    penalty, gradient : jax.Array
        As :func:`penalty` returns it, and an array of the shape, dtype and device of
        ``activations``.

    Raises
    ------
    TypeError, ValueError, BackendError
        As for :func:`penalty`, or if ``out`` is given or ``scale`` is not a number.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from actreg_dispatch import ActivityRegularization
    >>> reg = ActivityRegularization.l2_squared(0.25)
    >>> value, gradient = jax.jit(reg.penalty_and_gradient)(jnp.array([3.0, 4.0]))
    >>> float(value), gradient.tolist()
    (6.25, [1.5, 2.0])
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
    return _evaluate(_settled(reg), number, activations, traced)  # type: ignore[no-any-return]


def partial_sum(reg: ActivityRegularization, activations: jax.Array) -> PartialSum | PairedSum:
    """Return the sum that the norm takes, exactly; on the host, for which this waits.

    Raises
    ------
    TypeError
        If ``activations`` are traced or have an unsupported dtype.
    """
    _check(reg, activations)
    if isinstance(activations, jax.core.Tracer):
        raise TypeError(
            "activations are traced, but a partial sum is a Python number of unlimited precision; "
            "call partial_sum outside of jit, grad and vmap"
        )
    return reg.partial_sum(np.asarray(activations))


def apply(*arguments: Any, **options: Any) -> NoReturn:
    """Refuse: JAX arrays cannot be written.

    Raises
    ------
    TypeError
        Always; it names the functions to call instead.
    """
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
        kind = type(activations)
        raise TypeError(
            f"activations must be a JAX array, not a {kind.__module__}.{kind.__qualname__}; "
            f"convert it with jax.numpy.asarray, or call a method of the regularization"
        )
    constants_of(reg, _stored_dtype(activations), count_of(reg.reduction, activations.shape))


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


def _settled(reg: ActivityRegularization) -> _Settings:
    # A callback runs in a thread of its own, where use_backend does not reach.
    backend, _ = requested(reg.backend)
    return _Settings(reg.lam, reg.norm, reg.epsilon, reg.reduction, backend)


@functools.lru_cache(maxsize=256)
def _regularization(settings: _Settings) -> ActivityRegularization:
    lam, norm, epsilon, reduction, backend = settings
    return ActivityRegularization(lam, norm, epsilon=epsilon, reduction=reduction, backend=backend)


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
def _penalty(settings: _Settings, x: Any) -> Any:
    return _value(settings, x)


def _forward(settings: _Settings, x: Any) -> tuple[Any, Any]:
    return _value(settings, x), x


def _backward(settings: _Settings, x: Any, cotangent: Any) -> tuple[Any]:
    return (_evaluate(settings, None, x, cotangent)[1],)


_penalty.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(settings: _Settings, x: Any) -> Any:
    if _is_concrete(x):
        return _at_once(_regularization(settings), x)
    (value,) = _called_back(settings, x)
    return value


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _evaluate(settings: _Settings, number: float | None, x: Any, scale: Any) -> tuple[Any, Any]:
    """Return penalty and gradient; ``scale`` is what multiplies the gradient, about ``number``."""
    if _is_concrete(x) and (number is not None or _is_concrete(scale)):
        reg = _regularization(settings)
        return _both_at_once(reg, x, float(scale) if number is None else number)
    value, gradient = _called_back(settings, x, number, scale)
    return value, gradient


@_value.defjvp
def _value_jvp(settings: _Settings, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    value, gradient = _evaluate(settings, 1.0, x, jnp.ones((), _compute_dtype(x)))
    return value, _inner(gradient, dx)


@_evaluate.defjvp
def _evaluate_jvp(
    settings: _Settings, number: float | None, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    (x, scale), (dx, dscale) = primals, tangents
    compute = _compute_dtype(x)
    results = _evaluate(settings, number, x, scale)
    _, gradient = _evaluate(settings, 1.0, x, jnp.ones((), compute))
    bent = _curvature(settings, x.astype(compute), dx.astype(compute)) * scale.astype(compute)
    turned = bent + gradient.astype(compute) * dscale.astype(compute)
    return results, (_inner(gradient, dx), turned.astype(x.dtype))


def _inner(gradient: Any, dx: Any) -> Any:
    compute = _compute_dtype(gradient)
    return jnp.sum(gradient.astype(compute) * dx.astype(compute))


def _curvature(settings: _Settings, x: Any, dx: Any) -> Any:
    """Return the second derivative of the penalty times ``dx``, in JAX's own arithmetic.

    0 for L1, λ·2·dx for squared L2, also beside L1, λ·(dx − u·⟨u, dx⟩)/‖x‖ with u = x/‖x‖ for L2.
    """
    reg = _regularization(settings)
    lam, _, epsilon = constants_of(reg, x.dtype, count_of(reg.reduction, x.shape))
    if settings.norm is ActivityNorm.L1 or not x.size:
        return jnp.zeros_like(dx)
    if settings.norm is ActivityNorm.L2_SQUARED:
        return lam * 2 * dx
    if settings.norm is ActivityNorm.L1_L2_SQUARED:
        return lam[1] * 2 * dx
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    unit = jnp.where(largest > 0, largest, 1)  # so that squares stay in range
    square = jnp.sum(jnp.square(x / unit))
    has_gradient = unit * jnp.sqrt(jax.lax.stop_gradient(square)) > math.sqrt(epsilon)
    square = jnp.where(has_gradient, square, 1)  # or the untaken branch would have a NaN derivative
    along = (x / unit) * (jnp.sum((x / unit) * dx) / square)
    return jnp.where(has_gradient, lam * (dx - along) / (unit * jnp.sqrt(square)), 0)


def _called_back(settings: _Settings, x: Any, *scale: Any) -> Any:
    """Return the penalty alone, or with ``scale``, as ``number, scale``, the gradient, too."""
    number, *traced = scale or (None,)
    call = _callback(settings, x.shape, x.dtype, number, bool(scale))
    return call(x, *traced) if number is None else call(x)


@functools.lru_cache(maxsize=256)  # JAX compiles anew for what is not the same function
def _callback(
    settings: _Settings,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    number: float | None,
    with_gradient: bool,
) -> Callable[..., Any]:
    """Return the function of traced arrays that computes on the host."""
    kept = _subnormals_kept()
    from actreg_dispatch.backends.numba_cpu import clear  # so Numba can run here

    reg = _regularization(settings)
    # What the choice of a backend may raise is raised here; a callback must not.
    _regularization(settings._replace(lam=0.0)).penalty(np.empty(0, dtype))
    compute = compute_dtype(dtype)
    results = [jax.ShapeDtypeStruct((), compute)]
    if with_gradient:
        results.append(jax.ShapeDtypeStruct(shape, dtype))

    def fill(out: Any, x: Any, scale: Any) -> None:
        """Compute each example of a batch; under ``vmap`` there are axes before those of one."""
        batch = out[0].shape
        x = np.broadcast_to(x, batch + shape)
        scale = np.broadcast_to(scale, batch)
        with kept():
            if with_gradient:
                clear(out[1])
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
