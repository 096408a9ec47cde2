"""Penalty and gradient as functions that JAX transforms, and the rules of their derivatives.

``number`` is the scale if it is known, which a float32 might not hold.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from actreg_dispatch.derivatives import gradient_expression, weights_gradient_expression
from actreg_dispatch.jax.callbacks import called_back, regularization_of
from actreg_dispatch.jax.checks import compute_dtype_of, is_concrete, is_mask
from actreg_dispatch.jax.values import at_once, both_at_once
from actreg_dispatch.norms import signed_by_type, sqrt
from actreg_dispatch.options import Options, constants_of, count_of, divided_axes

__all__ = ["differentiable_penalty", "evaluate"]


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
def differentiable_penalty(options: Options, attached: bool, x: Any, w: Any) -> Any:
    """Return the penalty; weights, if any, have a gradient if they are ``attached``."""
    return _value(options, x, w)


def _forward(options: Options, attached: bool, x: Any, w: Any) -> tuple[Any, Any]:
    x, w = _arrays(x, w)
    return _value(options, x, w), (x, w)


def _backward(options: Options, attached: bool, arrays: Any, cotangent: Any) -> tuple[Any, Any]:
    x, w = arrays
    _, gradient = evaluate(options, None, x, cotangent, w)
    if not attached:
        return gradient, None
    return gradient, (cotangent * _weights_gradient(options, x, w)).astype(w.dtype)


differentiable_penalty.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(options: Options, x: Any, w: Any) -> Any:
    x, w = _arrays(x, w)
    if is_concrete(x, w):
        return at_once(regularization_of(options), x, w)
    (value,) = called_back(options, x, w)
    return value


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def evaluate(options: Options, number: float | None, x: Any, scale: Any, w: Any) -> tuple[Any, Any]:
    """Return penalty and gradient; ``scale`` is what multiplies the gradient, about ``number``."""
    x, scale, w = _arrays(x, scale, w)
    if is_concrete(x, w) and (number is not None or is_concrete(scale)):
        reg = regularization_of(options)
        return both_at_once(reg, x, w, float(scale) if number is None else number)
    value, gradient = called_back(options, x, w, number, scale)
    return value, gradient


@_value.defjvp
def _value_jvp(options: Options, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, w), (dx, dw) = _arrays(*primals), _arrays(*tangents)
    value, gradient = evaluate(options, 1.0, x, jnp.ones((), compute_dtype_of(x)), w)
    return value, _slope(options, x, w, gradient, dx, dw)


@evaluate.defjvp
def _evaluate_jvp(
    options: Options, number: float | None, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    (x, scale, w), (dx, dscale, dw) = _arrays(*primals), _arrays(*tangents)
    compute = compute_dtype_of(x)
    results = evaluate(options, number, x, scale, w)
    _, gradient = evaluate(options, 1.0, x, jnp.ones((), compute), w)
    along_arrays = _hessian_vector_product(options, x.astype(compute), w, dx.astype(compute), dw)
    along = along_arrays * scale.astype(compute) + gradient.astype(compute) * dscale.astype(compute)
    return results, (_slope(options, x, w, gradient, dx, dw), along.astype(x.dtype))


def _slope(options: Options, x: Any, w: Any, gradient: Any, dx: Any, dw: Any) -> Any:
    """Return the derivative of the penalty along a change of activations and weights."""
    compute = compute_dtype_of(x)
    slope = jnp.sum(gradient.astype(compute) * dx.astype(compute))
    if w is None or is_mask(w):
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
    compute = compute_dtype_of(x)
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
        if is_mask(w):
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
