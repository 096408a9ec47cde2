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

from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from actreg_dispatch.dtypes import round_to
from actreg_dispatch.jax.checks import (
    check,
    checked_scale,
    compute_dtype_of,
    is_concrete,
    is_mask,
)
from actreg_dispatch.jax.rules import differentiable_penalty, evaluate
from actreg_dispatch.jax.values import at_once, both_at_once, values_of
from actreg_dispatch.options import Options
from actreg_dispatch.registry import requested
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.statistics import refuse_statistics
from actreg_dispatch.sums.exact import Total

__all__ = ["add_gradient", "apply", "apply_all", "partial_sum", "penalty", "penalty_and_gradient"]


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
    check(reg, activations, weights)
    refuse_statistics(statistics, "JAX arrays")
    if is_concrete(activations, weights):
        return at_once(reg, activations, weights)
    # Weights that have values are not differentiated, and without jit nothing else would tell.
    attached = isinstance(weights, jax.core.Tracer) and not is_mask(weights)
    return differentiable_penalty(_frozen(reg), attached, activations, weights)


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
    check(reg, activations, weights)
    if out is not None:
        raise _immutable("out")
    number, traced = checked_scale(scale)
    if number is not None and is_concrete(activations, weights):
        return both_at_once(reg, activations, weights, number)
    if number is not None:
        compute = compute_dtype_of(activations)
        traced = jnp.asarray(round_to(compute, number))
    return evaluate(  # type: ignore[no-any-return]
        _frozen(reg), number, activations, traced, weights
    )


def partial_sum(
    reg: ActivityRegularization, activations: jax.Array, *, weights: jax.Array | None = None
) -> Total:
    """Return the sum that the norm takes, exactly; on the host, for which this waits."""
    check(reg, activations, weights)
    for name, array in (("activations", activations), ("weights", weights)):
        if isinstance(array, jax.core.Tracer):
            raise TypeError(
                f"{name} are traced, but a partial sum is a Python number of unlimited precision; "
                f"call partial_sum outside of jit, grad and vmap"
            )
    x, w = values_of(reg, activations, weights)
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


def _frozen(reg: ActivityRegularization) -> Options:
    # A callback runs in a thread of its own, where use_backend does not reach.
    backend, _ = requested(reg.backend)
    return reg.options._replace(backend=backend)
