"""JAX arrays: the bits of the promise under every transformation, derivatives, devices, threads."""

from __future__ import annotations

import sys
import threading
import types

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from actreg_dispatch import (
    ActivityNorm,
    ActivityRegularization,
    BackendUnavailableError,
    MixedArraysError,
    UnknownBackendError,
    register_backend,
    use_backend,
)
from actreg_dispatch.norms import Norm
from actreg_dispatch.oracle import exact_result

jax = pytest.importorskip("jax")
jnp = jax.numpy

# Where there is a jax to import.
import actreg_dispatch.jax as actreg_jax  # noqa: E402
from actreg_dispatch import get_backend  # noqa: E402
from actreg_dispatch.jax import callbacks as actreg_callbacks  # noqa: E402
from actreg_dispatch.jax import rules as actreg_rules  # noqa: E402
from actreg_dispatch.jax import values as actreg_values  # noqa: E402

norms = pytest.mark.parametrize("norm", ActivityNorm, ids=lambda norm: norm.value)
dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])

PLAIN = {
    ActivityNorm.L1: lambda x: 0.1 * jnp.sum(jnp.abs(x)),
    ActivityNorm.L2: lambda x: 0.1 * jnp.sqrt(jnp.sum(x * x)),
    ActivityNorm.L2_SQUARED: lambda x: 0.1 * jnp.sum(x * x),
    ActivityNorm.L1_L2_SQUARED: lambda x: 0.1 * jnp.sum(jnp.abs(x)) + 0.1 * jnp.sum(x * x),
    ActivityNorm.HOYER: lambda x: 0.1 * jnp.sum(jnp.abs(x)) ** 2 / jnp.sum(x * x),
}


@pytest.fixture(autouse=True, scope="module")
def _float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(params=["buffers", "values"])
def callbacks(request, monkeypatch):
    """Run callbacks on XLA's buffers, and, as on devices other than the CPU, on values."""
    if request.param == "values":
        monkeypatch.setattr(actreg_callbacks, "buffer_callback", None)
    actreg_callbacks._callback.cache_clear()
    yield request.param
    actreg_callbacks._callback.cache_clear()


def values_of(shape, dtype, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return np.where(values > 1, 0.0, values).astype(jnp.dtype(dtype))


def exact(values, norm, lam=0.1, scale=1.0, epsilon=None):
    return exact_result(values, np.zeros_like(values), norm, lam, epsilon, scale)


def assert_same_bits(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes(), (found, expected)


def scanned(function):
    """Evaluate in the body of a loop."""
    return lambda x: jax.lax.scan(lambda carry, _: (carry, function(x)), 0.0, jnp.arange(2))[1][1]


# The bits.


@norms
@dtypes
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7, 5), (1500,)], ids=str)
def test_the_penalty_is_exactly_rounded_on_every_route(norm, dtype, shape):
    values = values_of(shape, dtype)
    expected, _ = exact(values, norm)
    reg, x = ActivityRegularization(0.1, norm), jnp.asarray(values)
    for function in (reg.penalty, lambda x: actreg_jax.penalty(reg, x)):
        for route in (function, jax.jit(function), jax.checkpoint(function), scanned(function)):
            assert isinstance(route(x), jax.Array)
            assert_same_bits(route(x), expected)


@norms
@dtypes
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7, 5), (1500,)], ids=str)
def test_the_gradient_is_exactly_rounded_on_every_route(norm, dtype, shape):
    values = values_of(shape, dtype)
    expected = exact(values, norm)
    reg, x = ActivityRegularization(0.1, norm), jnp.asarray(values)
    for route in (
        reg.penalty_and_gradient,
        jax.jit(reg.penalty_and_gradient),
        jax.value_and_grad(reg.penalty),
        jax.jit(jax.value_and_grad(reg.penalty)),
        jax.value_and_grad(jax.jit(reg.penalty)),
        jax.value_and_grad(jax.checkpoint(reg.penalty)),
        jax.jit(jax.value_and_grad(jax.checkpoint(reg.penalty))),
        jax.value_and_grad(scanned(reg.penalty)),
    ):
        for found, wanted in zip(route(x), expected, strict=True):
            assert_same_bits(found, wanted)
    assert_same_bits(x, values)


@norms
@pytest.mark.parametrize("size", [40_001, 300_001])  # the large one is dispatched to another thread
def test_large_arrays_are_exactly_rounded_in_callbacks(callbacks, norm, size):
    values = values_of(size, "float32")
    reg, x = ActivityRegularization(0.1, norm), jnp.asarray(values)
    expected = exact(values, norm) if size < 100_000 else reg.penalty_and_gradient(values)
    for route in (jax.jit(reg.penalty_and_gradient), jax.jit(jax.value_and_grad(reg.penalty))):
        for found, wanted in zip(route(x), expected, strict=True):
            assert_same_bits(found, wanted)


@norms
@pytest.mark.parametrize("scale", [65536.0, -0.1, 0.0, 1e-45, 1e37])
def test_the_scale_is_rounded_once_wherever_it_comes_from(norm, scale):
    values = values_of(50, "float32")
    reg, x = ActivityRegularization(0.1, norm), jnp.asarray(values)
    expected = exact(values, norm, scale=scale)
    for route in (
        reg.penalty_and_gradient,
        jax.jit(reg.penalty_and_gradient, static_argnames="scale"),
    ):
        for found, wanted in zip(route(x, scale=scale), expected, strict=True):
            assert_same_bits(found, wanted)
    rounded = np.float32(scale)  # what a traced float32 can hold
    expected = exact(values, norm, scale=float(rounded))
    for route in (reg.penalty_and_gradient, jax.jit(reg.penalty_and_gradient)):
        for found, wanted in zip(route(x, scale=jnp.asarray(rounded)), expected, strict=True):
            assert_same_bits(found, wanted)
    pulled = jax.vjp(reg.penalty, x)[1](jnp.asarray(rounded))[0]
    assert_same_bits(pulled, expected[1])


@norms
def test_the_scale_may_be_traced_where_the_activations_are_not(norm):
    values = values_of(50, "float32")
    reg = ActivityRegularization(0.1, norm)
    found = jax.jit(lambda scale: reg.penalty_and_gradient(jnp.asarray(values), scale=scale))(3.0)
    for result, wanted in zip(found, exact(values, norm, scale=3.0), strict=True):
        assert_same_bits(result, wanted)


@norms
def test_under_vmap_each_example_has_its_own_penalty_and_cotangent(callbacks, norm):
    values = values_of((4, 3, 6), "float32")
    weights = np.float32([1.0, -0.3, 0.0, 1e-3])
    rows = [
        exact(row, norm, scale=float(weight)) for row, weight in zip(values, weights, strict=True)
    ]
    penalties = np.array([penalty for penalty, _ in rows])
    gradients = np.array([gradient for _, gradient in rows])
    reg, x = ActivityRegularization(0.1, norm), jnp.asarray(values)

    def weighted(x):
        return jnp.sum(jax.vmap(reg.penalty)(x) * weights)

    for wrap in (lambda function: function, jax.jit):
        assert_same_bits(wrap(jax.vmap(reg.penalty))(x), penalties)
        assert_same_bits(wrap(jax.grad(weighted))(x), gradients)
        found = wrap(jax.vmap(lambda x, w: reg.penalty_and_gradient(x, scale=w)))(x, weights)
        assert_same_bits(found[0], penalties)
        assert_same_bits(found[1], gradients)
        turned = wrap(jax.vmap(jax.grad(reg.penalty), in_axes=2, out_axes=2))
        first = exact(np.ascontiguousarray(values[:, :, 0]), norm)[1]
        assert_same_bits(turned(x)[:, :, 0], first)


@norms
def test_vmap_over_the_scale_alone_and_vmap_within_vmap(callbacks, norm):
    values = values_of((2, 3, 5), "float32")
    scales = np.float32([2.0, -1.0, 0.5])
    reg = ActivityRegularization(0.1, norm)

    def gradient(x, scale):
        return reg.penalty_and_gradient(x, scale=scale)[1]

    found = jax.vmap(gradient, (None, 0))(jnp.asarray(values[0]), scales)
    expected = [exact(values[0], norm, scale=float(scale))[1] for scale in scales]
    assert_same_bits(found, np.array(expected))
    found = jax.jit(jax.vmap(jax.vmap(gradient, (0, None)), (None, 0)))(values[0], scales)
    expected = [[exact(row, norm, scale=float(scale))[1] for row in values[0]] for scale in scales]
    assert_same_bits(found, np.array(expected))
    found = jax.vmap(jax.vmap(jax.grad(reg.penalty)))(jnp.asarray(values))
    expected = [[exact(row, norm)[1] for row in matrix] for matrix in values]
    assert_same_bits(found, np.array(expected))


@norms
@pytest.mark.parametrize("size", [6, 300_000])
def test_subnormal_numbers_are_not_flushed_in_threads_of_xla(callbacks, norm, size):
    values = np.resize(np.float32([1e-40, -3e-42, 2e-45, 0.0, 1e-20, 3e-20]), size)
    for lam in (1.0, 1e-20):
        reg = ActivityRegularization(lam, norm, epsilon=0.0 if norm is ActivityNorm.L2 else None)
        expected = reg.penalty_and_gradient(values)
        if size < 100:
            for found, wanted in zip(
                expected, exact(values, norm, lam, 1.0, reg.epsilon), strict=True
            ):
                assert_same_bits(found, wanted)
        x = jnp.asarray(values)
        for route in (jax.jit(reg.penalty_and_gradient), jax.jit(jax.value_and_grad(reg.penalty))):
            for found, wanted in zip(route(x), expected, strict=True):
                assert_same_bits(found, wanted)


def test_a_callback_leaves_the_thread_as_it_found_it():
    from actreg_dispatch.runtime.subnormals import subnormals_kept

    seen = []

    def look(x):
        def half():
            return float(np.float32(1e-40) * np.float32(0.5))

        before = half()
        with subnormals_kept():
            within = half()
        seen.append((before, within, half()))
        return np.asarray(x)

    x = jnp.ones(3)
    jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(look, x, x))(x))
    ((before, within, after),) = seen
    assert within == float(np.float32(5e-41))
    assert before == after


def test_the_threads_of_the_kernels_keep_subnormals_though_a_callback_started_them(python):
    code = """
import jax, numpy as np
from actreg_dispatch import ActivityRegularization
values = np.full(300_000, 1e-40, np.float32)
reg = ActivityRegularization.l2_squared(0.25)
found = jax.jit(jax.grad(reg.penalty))(values)  # the first parallel kernel of the process
assert (np.asarray(found) == np.float32(5e-41)).all()
gradients = np.zeros_like(values)
reg.apply(values, gradients)
assert (gradients == np.float32(5e-41)).all()
print("done")
"""
    assert python("-W", "error", "-c", code).stdout == "done\n"


def test_arrays_that_have_values_take_no_callback(monkeypatch):
    monkeypatch.setattr(actreg_rules, "called_back", None)
    reg, x = ActivityRegularization.l2(1.0), jnp.asarray([3.0, 4.0])
    assert float(reg.penalty(x)) == 5.0
    assert jax.grad(reg.penalty)(x).tolist() == [0.6, 0.8]
    penalty, gradient = reg.penalty_and_gradient(x)
    assert float(penalty) == 5.0
    assert not np.asarray(gradient).flags.writeable
    assert gradient.tolist() == [0.6, 0.8]


@norms
def test_nan_and_infinity_propagate(norm):
    values = np.float32([1.0, np.inf, 0.0, -np.inf, np.nan])
    for x in (values, values[:4]):
        reg = ActivityRegularization(0.5, norm)
        expected = reg.penalty_and_gradient(x)
        for route in (jax.value_and_grad(reg.penalty), jax.jit(jax.value_and_grad(reg.penalty))):
            for found, wanted in zip(route(jnp.asarray(x)), expected, strict=True):
                assert_array_equal(found, wanted)


@pytest.mark.parametrize(("reduction", "count"), [("mean", 21), ("batch", 3), (1, 7)])
def test_reductions_divide_the_strength_in_callbacks(reduction, count):
    values = values_of((3, 7), "float32")
    reg = ActivityRegularization.l2(0.1, reduction=reduction)
    expected = exact(values, ActivityNorm.L2, 0.1 / count)
    for found, wanted in zip(
        jax.jit(jax.value_and_grad(reg.penalty))(values), expected, strict=True
    ):
        assert_same_bits(found, wanted)
    hessian = 0.1 / count * np.asarray(jax.hessian(PLAIN[ActivityNorm.L2])(values)) / 0.1
    assert_allclose(jax.hessian(reg.penalty)(jnp.asarray(values)), hessian, rtol=1e-4, atol=1e-6)


def test_pieces_add_up_to_the_penalty():
    reg, x = ActivityRegularization.l2(0.1), jnp.asarray(values_of(100, "float32"))
    total = sum(reg.partial_sum(piece) for piece in (x[:30], x[30:]))
    assert_same_bits(reg.finish(total), reg.penalty(x))


# Derivatives.


def test_the_gradient_is_zero_at_zero():
    zeros = jnp.zeros(3)
    for norm in ActivityNorm:
        reg = ActivityRegularization(0.1, norm)
        assert jax.grad(reg.penalty)(zeros).tolist() == [0.0, 0.0, 0.0]
        assert jax.jit(jax.grad(reg.penalty))(zeros).tolist() == [0.0, 0.0, 0.0]
    assert jax.grad(PLAIN[ActivityNorm.L1])(zeros).tolist() != [0.0, 0.0, 0.0]  # what JAX has
    assert np.isnan(jax.grad(PLAIN[ActivityNorm.L2])(zeros)).all()


@norms
@dtypes
def test_first_derivatives_agree_with_those_of_jax(norm, dtype):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.dtype(dtype))
    found = jax.grad(ActivityRegularization(0.1, norm).penalty)(x)
    expected = jax.grad(PLAIN[norm])(x.astype("float64"))
    rtol = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-6, "float64": 1e-14}[dtype]
    assert_allclose(found.astype("float64"), expected, rtol=rtol)


@norms
def test_higher_derivatives_agree_with_those_of_jax(norm):
    x, v = (jnp.asarray(np.random.default_rng(seed).normal(size=5)) for seed in (1, 2))
    ours, theirs = ActivityRegularization(0.1, norm).penalty, PLAIN[norm]
    for second in (
        jax.hessian,
        lambda function: jax.jacrev(jax.jacrev(function)),
        lambda function: lambda x: jax.jvp(jax.grad(function), (x,), (v,)),
        lambda function: jax.grad(lambda x: jnp.vdot(jax.grad(function)(x), v)),
        lambda function: jax.jacfwd(jax.hessian(function)),
        lambda function: jax.grad(lambda x: jnp.sum(jax.hessian(function)(x) ** 2)),
    ):
        found, expected = (jax.jit(second(function))(x) for function in (ours, theirs))
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-12, atol=1e-15), found, expected)
    batch = jnp.stack([x, v])
    found, expected = (jax.vmap(jax.hessian(function))(batch) for function in (ours, theirs))
    assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert_allclose(jax.hessian(ours)(x), found[0], rtol=1e-12, atol=1e-15)


@norms
def test_penalty_and_gradient_are_differentiable(norm):
    x, s = jnp.asarray(np.random.default_rng(3).normal(size=5)), jnp.asarray(0.7)
    reg = ActivityRegularization(0.1, norm)

    def ours(x, s):
        penalty, gradient = reg.penalty_and_gradient(x, scale=s)
        return penalty + jnp.sum(gradient**3)

    def theirs(x, s):
        return PLAIN[norm](x) + jnp.sum((s * jax.grad(PLAIN[norm])(x)) ** 3)

    for mode in (jax.grad, jax.jacfwd):
        found, expected = (mode(function, argnums=(0, 1))(x, s) for function in (ours, theirs))
        assert_allclose(found[0], expected[0], rtol=1e-12)
        assert_allclose(found[1], expected[1], rtol=1e-12)


@norms
def test_numpy_arrays_and_numbers_are_differentiated_as_jax_arrays(norm):
    # of which JAX hands on to a rule what they are, neither traced nor arrays of its own
    x, w, s = np.array([1.0, -2.0, 0.5]), np.array([0.5, 0.0, 2.0]), 0.7
    reg = ActivityRegularization(0.1, norm)

    def both(x, s, w):
        penalty, gradient = reg.penalty_and_gradient(x, scale=s, weights=w)
        return penalty + jnp.sum(gradient**3)

    def alone(x, w):
        return reg.penalty(x, weights=w)

    def along(*inputs):
        return jax.jvp(both, inputs, inputs)

    for transformed, inputs in (
        (jax.value_and_grad(reg.penalty), (x,)),
        (jax.hessian(reg.penalty), (x,)),
        (jax.value_and_grad(alone, (0, 1)), (x, w)),
        (jax.value_and_grad(both, (0, 1, 2)), (x, s, w)),
        (along, (x, s, w)),
    ):
        found, expected = transformed(*inputs), transformed(*map(jnp.asarray, inputs))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for each, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert_same_bits(each, wanted)


@pytest.mark.parametrize("size", [0.0, 1e-200, 1e200])
def test_second_derivatives_of_l2_are_finite_at_zero_and_far_out(size):
    x = jnp.asarray([3.0, -4.0, 0.0]) * size
    reg = ActivityRegularization.l2(1.0, epsilon=0.0)
    found = jax.hessian(reg.penalty)(x)
    unit = np.array([0.6, -0.8, 0.0])
    wanted = (np.eye(3) - np.outer(unit, unit)) / (5.0 * size) if size else np.zeros((3, 3))
    assert_allclose(found, wanted, rtol=1e-14, atol=1e-16 / (size or 1.0))
    if not size:
        assert not jax.jit(jax.jacrev(jax.hessian(reg.penalty)))(x).any()


def test_second_derivatives_of_l2_are_zero_where_it_has_no_gradient():
    x = jnp.asarray([0.3, 0.4])
    assert not jax.hessian(ActivityRegularization.l2(1.0, epsilon=0.26).penalty)(x).any()
    assert jax.hessian(ActivityRegularization.l2(1.0, epsilon=0.24).penalty)(x).all()


def test_forward_mode_of_the_penalty_is_an_error_not_a_wrong_number():
    x = jnp.ones(3)
    for wrap in (lambda function: function, jax.jit):
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(wrap(ActivityRegularization.l1(0.1).penalty), (x,), (x,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(ActivityRegularization.l1(0.1).penalty)(x)


# What is refused, and when.


def test_arrays_that_cannot_be_written_are_refused_with_a_way_out():
    reg, x = ActivityRegularization.l1(0.1), jnp.ones(3)
    for call in (
        lambda: reg.apply(x, jnp.zeros(3)),
        lambda: reg.apply(x, np.zeros(3)),
        lambda: reg.add_gradient(x, jnp.zeros(3)),
        lambda: jax.jit(reg.apply)(x, x),
        lambda: reg.penalty_and_gradient(x, jnp.zeros(3)),
        lambda: reg.penalty_and_gradient(x, out=np.zeros(3)),
    ):
        with pytest.raises(
            TypeError,
            match=r"immutable; add what penalty_and_gradient.*actreg_dispatch\.jax\.penalty.*grad",
        ):
            call()
    with pytest.raises(TypeError, match=r"^out "):
        reg.penalty_and_gradient(x, jnp.zeros(3))
    with pytest.raises(TypeError, match=r"^gradients "):
        reg.apply(x, jnp.zeros(3))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "uint8", "float8_e4m3fn"])
def test_other_dtypes_are_refused_while_tracing(dtype):
    reg, x = ActivityRegularization.l1(0.1), jnp.ones(3, dtype)
    for call in (reg.penalty, reg.penalty_and_gradient, reg.partial_sum, jax.jit(reg.penalty)):
        with pytest.raises(TypeError, match=rf"activations have dtype {dtype}; convert them"):
            call(x)


def test_float64_is_refused_where_its_results_would_become_float32(python):
    code = """
import jax, numpy as np
from actreg_dispatch import ActivityRegularization
jax.config.update("jax_enable_x64", True)
x = jax.numpy.ones(3, float)
jax.config.update("jax_enable_x64", False)
for call in (ActivityRegularization.l1(0.5).penalty, ActivityRegularization.l1(0.5).partial_sum):
    try:
        call(x)
    except TypeError as error:
        print(error)
"""
    told = python("-W", "error", "-c", code).stdout
    assert told.count("activations have dtype float64, but 64-bit types are switched off; ") == 2


def test_random_keys_are_no_activations():
    with pytest.raises(TypeError, match="activations have dtype key"):
        ActivityRegularization.l1(0.1).penalty(jax.random.key(0))


@pytest.mark.parametrize("wrong", [np.ones(3), [1.0], 2.0, None])
def test_the_function_takes_jax_arrays_alone(wrong):
    reg = ActivityRegularization.l1(0.1)
    for function in (actreg_jax.penalty, actreg_jax.penalty_and_gradient, actreg_jax.partial_sum):
        with pytest.raises(TypeError, match=r"must be a JAX array.*jax\.numpy\.asarray"):
            function(reg, wrong)


def test_the_first_argument_is_a_regularization():
    with pytest.raises(TypeError, match=r"reg=0\.1 is of type float; pass an ActivityReg"):
        actreg_jax.penalty(0.1, jnp.ones(3))


def test_a_strength_too_large_is_told_while_tracing():
    reg = ActivityRegularization.l1(1e39)
    for call in (reg.penalty, reg.penalty_and_gradient, jax.jit(reg.penalty)):
        with pytest.raises(ValueError, match=r"lam=1e\+39 is too large for float32 activations"):
            call(jnp.ones(3, "float32"))


@pytest.mark.parametrize("wrong", ["2", 1j, None, np.ones(2), [1.0]])
def test_a_scale_that_is_no_number_is_refused(wrong):
    reg, x = ActivityRegularization.l1(0.1), jnp.ones(3)

    def call(x):
        return reg.penalty_and_gradient(x, scale=wrong)

    for route in (call, jax.jit(call)):
        with pytest.raises(TypeError, match=r"scale=.*pass a real number"):
            route(x)


@pytest.mark.parametrize("wrong", [jnp.ones(2), jnp.asarray(1), jnp.asarray(True), jnp.asarray(1j)])
def test_an_array_for_a_scale_is_floating_and_has_no_axes(wrong):
    reg, x = ActivityRegularization.l1(0.1), jnp.ones(3)
    for call in (reg.penalty_and_gradient, jax.jit(reg.penalty_and_gradient)):
        with pytest.raises(TypeError, match=r"scale has shape .* pass a real number"):
            call(x, scale=wrong)


def test_a_partial_sum_is_no_traced_value():
    with pytest.raises(TypeError, match=r"activations are traced.*outside of jit"):
        jax.jit(lambda x: float(ActivityRegularization.l1(0.1).partial_sum(x)))(jnp.ones(3))


def test_a_regularization_is_closed_over_not_passed():
    reg, x = ActivityRegularization.l1(0.1), jnp.ones(3)
    with pytest.raises(TypeError, match="ActivityRegularization"):
        jax.jit(actreg_jax.penalty)(reg, x)
    with pytest.raises(ValueError, match="hashable"):
        jax.jit(actreg_jax.penalty, static_argnums=0)(reg, x)
    assert_same_bits(jax.jit(lambda x: actreg_jax.penalty(reg, x))(x), reg.penalty(x))


def test_the_strength_is_that_of_the_time_of_tracing():
    reg, x = ActivityRegularization.l1(1.0), jnp.ones(3)
    compiled = jax.jit(reg.penalty)
    assert float(compiled(x)) == 3.0
    reg.lam = 2.0
    assert float(compiled(x)) == 3.0
    assert float(jax.jit(lambda x: reg.penalty(x))(x)) == float(reg.penalty(x)) == 6.0
    assert jax.vmap(reg.penalty)(x).tolist() == [2.0, 2.0, 2.0]


def test_the_backend_is_that_of_the_time_of_tracing(monkeypatch):
    reg, x = ActivityRegularization.l1(1.0), jnp.ones(5)
    calls = []

    def spy(*arguments):
        calls.append(threading.get_ident())
        return reference_penalty(*arguments)

    reference = get_backend("numpy")
    reference_penalty = reference.penalty
    monkeypatch.setattr(reference, "penalty", spy)
    with use_backend("numpy"):
        compiled = jax.jit(reg.penalty).lower(x).compile()
    del calls[:]
    assert float(compiled(x)) == 5.0
    assert len(calls) == 1
    assert float(jax.jit(lambda x: reg.penalty(x))(x)) == 5.0
    assert len(calls) == 1


def test_a_backend_that_cannot_run_is_told_while_tracing(monkeypatch, registered):
    def broken():
        raise ImportError("not today")

    register_backend("broken", broken, array_type="numpy.ndarray", install="Mend it")
    reg, x = ActivityRegularization.l1(1.0, backend="broken"), jnp.ones(5)
    with pytest.raises(BackendUnavailableError, match=r"not today.*Mend it"):
        jax.jit(reg.penalty)(x)
    monkeypatch.setenv("ACTREG_BACKEND", "bogus")
    with pytest.raises(UnknownBackendError, match="ACTREG_BACKEND='bogus'"):
        jax.jit(ActivityRegularization.l1(1.0).penalty)(x)


def test_where_numba_cannot_keep_subnormals_traced_arrays_are_refused(monkeypatch):
    actreg_callbacks._callback.cache_clear()
    monkeypatch.setitem(sys.modules, "actreg_dispatch.runtime.subnormals", None)
    reg, x = ActivityRegularization.l1(1.0, backend="numpy"), jnp.ones(5)
    with pytest.raises(BackendUnavailableError, match=r"flush subnormal.*outside of jit"):
        jax.jit(reg.penalty)(x)
    assert float(reg.penalty(x)) == 5.0


# Weights.


WEIGHTED = {
    ActivityNorm.L1: lambda x, w: 0.1 * jnp.sum(w * jnp.abs(x)),
    ActivityNorm.L2: lambda x, w: 0.1 * jnp.sqrt(jnp.sum(w * x * x)),
    ActivityNorm.L2_SQUARED: lambda x, w: 0.1 * jnp.sum(w * x * x),
    ActivityNorm.L1_L2_SQUARED: lambda x, w: 0.1 * jnp.sum(w * (jnp.abs(x) + x * x)),
    ActivityNorm.HOYER: lambda x, w: 0.1 * jnp.sum(w * jnp.abs(x)) ** 2 / jnp.sum(w * x * x),
}


def weights_of(shape, dtype, seed=5):
    return np.abs(values_of(shape, dtype, seed)) if dtype != "bool" else values_of(shape, "f4") > 0


def exact_with_weights(values, norm, weights, lam=0.1, scale=1.0):
    return exact_result(values, np.zeros_like(values), norm, lam, None, scale, weights)


@norms
@pytest.mark.parametrize(
    ("dtype", "weights_dtype", "shape"),
    [
        ("float32", "float32", (5,)),
        ("float32", "bool", (7, 1)),
        ("float64", "float64", (7, 5)),
        ("bfloat16", "bfloat16", ()),
        ("float16", "float32", (1, 5)),
    ],
)
def test_with_weights_every_route_has_the_bits_of_rational_arithmetic(
    norm, dtype, weights_dtype, shape
):
    values, weights = values_of((7, 5), dtype), weights_of(shape, weights_dtype)
    expected = exact_with_weights(values, norm, weights, scale=0.5)
    reg, x, w = ActivityRegularization(0.1, norm), jnp.asarray(values), jnp.asarray(weights)

    def both(x, w, s=0.5):
        return reg.penalty_and_gradient(x, weights=w, scale=s)

    def pulled(x, w):
        value, pull = jax.vjp(lambda x: reg.penalty(x, weights=w), x)
        return value, pull(jnp.asarray(0.5, value.dtype))[0]

    half = jnp.asarray(0.5, jnp.float32)
    for found in (
        both(x, w),
        jax.jit(both)(x, w),
        jax.jit(both)(x, w, half),
        pulled(x, w),
        jax.jit(pulled)(x, w),
    ):
        for result, wanted in zip(found, expected, strict=True):
            assert_same_bits(result, wanted)
    assert_same_bits(reg.penalty(x, weights=w), expected[0])
    assert_same_bits(reg.finish(reg.partial_sum(x, weights=w)), expected[0])


@pytest.mark.parametrize("norm", [ActivityNorm.L2, ActivityNorm.L1_L2_SQUARED])
def test_with_weights_each_example_of_a_vmap_is_computed_on_its_own(callbacks, norm):
    values, weights = values_of((3, 4, 5), "float32"), weights_of((3, 5), "float32")
    reg, x, w = ActivityRegularization(0.1, norm), jnp.asarray(values), jnp.asarray(weights)

    def both(x, w):
        return reg.penalty_and_gradient(x, weights=w)

    def penalty(x, w):
        return reg.penalty(x, weights=w)

    for axes, xs, ws in (
        ((0, 0), x, w),
        ((0, None), x, w[0]),
        ((None, 0), x[0], w),
        ((0, 0), x, w[:, :1] > 0.3),
    ):
        rows = [
            exact_with_weights(
                values[k if axes[0] == 0 else 0], norm, np.asarray(ws[k] if axes[1] == 0 else ws)
            )
            for k in range(3)
        ]
        for found in (
            jax.vmap(both, axes)(xs, ws),
            jax.jit(jax.vmap(jax.value_and_grad(penalty), axes))(xs, ws),
        ):
            assert_same_bits(found[0], np.array([each[0] for each in rows]))
            assert_same_bits(found[1], np.array([each[1] for each in rows]))
    nested = jax.vmap(jax.vmap(penalty, (0, None)), (None, 0))(x, w)
    expected = [[exact_with_weights(v, norm, u)[0] for v in values] for u in weights]
    assert_same_bits(nested, np.array(expected))


@pytest.mark.parametrize("reduction", ["mean", "batch", (0, 1)])
def test_a_mask_counts_what_it_keeps_in_callbacks_and_in_second_derivatives(reduction):
    values, mask = values_of((3, 4), "float64") + 2, np.array([[1, 1, 0, 1], [0] * 4, [1] * 4]) > 0
    count = 2 if reduction == "batch" else 7
    expected = exact_with_weights(values, ActivityNorm.L2, mask, 0.1 / count)
    reg, x, w = ActivityRegularization.l2(0.1, reduction=reduction), jnp.asarray(values), mask * 1.0
    for route in (jax.value_and_grad(reg.penalty), jax.jit(jax.value_and_grad(reg.penalty))):
        for found, wanted in zip(route(x, weights=jnp.asarray(mask)), expected, strict=True):
            assert_same_bits(found, wanted)
    hessian = jax.hessian(lambda x: WEIGHTED[ActivityNorm.L2](x, w) / count)(x)
    for wrap in (lambda function: function, jax.jit):
        found = wrap(jax.hessian(reg.penalty))(x, weights=jnp.asarray(mask))
        assert_allclose(found, hessian, rtol=1e-12, atol=1e-16)


@norms
@pytest.mark.parametrize("shape", [(4, 5), (5,), ()], ids=str)
def test_derivatives_by_weights_agree_with_those_of_jax(norm, shape):
    rng = np.random.default_rng(6)
    x, w = jnp.asarray(rng.normal(size=(4, 5))), jnp.asarray(np.abs(rng.normal(size=shape)) + 0.1)
    reg = ActivityRegularization(0.1, norm)

    def ours(x, w):
        return reg.penalty(x, weights=w) ** 2

    def theirs(x, w):
        return WEIGHTED[norm](x, w) ** 2

    expected = jax.jit(jax.grad(theirs, (0, 1)))(x, w)
    for wrap in (lambda function: function, jax.jit):
        found = wrap(jax.grad(ours, (0, 1)))(x, w)
        assert_allclose(found[1], expected[1], rtol=1e-12, atol=1e-16)
        assert_allclose(found[0], expected[0], rtol=1e-12)


@norms
def test_second_derivatives_by_weights_agree_with_those_of_jax(norm):
    rng = np.random.default_rng(9)
    x, w = jnp.asarray(rng.normal(size=(2, 3))), jnp.asarray(np.abs(rng.normal(size=3)))
    reg = ActivityRegularization(0.1, norm)

    def ours(x, w):
        return reg.penalty(x, weights=w) ** 2

    found, expected = (
        jax.jit(jax.hessian(function, argnums=(0, 1)))(x, w)
        for function in (ours, lambda x, w: WEIGHTED[norm](x, w) ** 2)
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-10, atol=1e-14), found, expected)


@norms
def test_penalty_and_gradient_are_differentiable_by_weights(norm):
    rng = np.random.default_rng(7)
    x, w, s = jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(np.abs(rng.normal(size=5))), 0.7
    reg = ActivityRegularization(0.1, norm)

    def ours(w):
        penalty, gradient = reg.penalty_and_gradient(x, scale=s, weights=w)
        return penalty + jnp.sum(gradient**3)

    def theirs(w):
        return WEIGHTED[norm](x, w) + jnp.sum((s * jax.grad(WEIGHTED[norm])(x, w)) ** 3)

    expected = jax.jit(jax.grad(theirs))(w)
    for mode in (jax.grad, jax.jacfwd):
        assert_allclose(jax.jit(mode(ours))(w), expected, rtol=1e-12)


@norms
@dtypes
def test_gradients_by_weights_have_the_dtype_of_the_weights(norm, dtype):
    x, w = (jnp.asarray(each) for each in (values_of((4, 5), dtype), weights_of(5, dtype) + 1))
    found = jax.grad(lambda w: ActivityRegularization(0.1, norm).penalty(x, weights=w))(w)
    expected = jax.grad(WEIGHTED[norm], 1)(x.astype("float64"), w.astype("float64"))
    assert found.dtype == w.dtype
    rtol = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-6, "float64": 1e-14}[dtype]
    assert_allclose(found.astype("float64"), expected, rtol=rtol, atol=rtol / 100)


def test_a_decoder_whose_norms_are_weights_is_trained_by_its_penalty():
    rng = np.random.default_rng(8)
    codes, decoder = (jnp.asarray(rng.normal(size=size)) for size in ((6, 4), (4, 3)))
    reg = ActivityRegularization.l1(0.1, reduction="batch")

    def ours(codes, decoder):
        return reg.penalty(codes, weights=jnp.linalg.norm(decoder, axis=1))

    def theirs(codes, decoder):
        return WEIGHTED[ActivityNorm.L1](codes, jnp.linalg.norm(decoder, axis=1)) / 6

    found, expected = (
        jax.jit(jax.grad(function, (0, 1)))(codes, decoder) for function in (ours, theirs)
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-13), found, expected)


@norms
@pytest.mark.parametrize("left_out", [np.nan, np.inf, -np.inf, 3e38])
def test_elements_of_weight_zero_are_left_out_of_all_derivatives(norm, left_out):
    x, w = jnp.asarray([3.0, left_out, -4.0], "float32"), jnp.asarray([1.0, 0.0, 2.0], "float32")
    reg = ActivityRegularization(0.1, norm)

    def penalty(x, w):
        return reg.penalty(x, weights=w)

    slopes = jax.grad(penalty, (0, 1))(x[::2], w[::2])
    found = jax.jit(jax.grad(penalty, (0, 1)))(x, w)
    for each, wanted in zip(found, slopes, strict=True):
        assert_allclose(each[::2], wanted, rtol=1e-6)
    assert found[0][1] == 0
    if not np.isfinite(left_out):
        assert found[1][1] == 0
    elif norm is ActivityNorm.L1:
        assert_allclose(found[1][1], 0.1 * left_out, rtol=1e-6)
    hessian = jax.hessian(penalty)(x, w)
    assert_allclose(hessian[::2, ::2], jax.hessian(penalty)(x[::2], w[::2]), rtol=1e-5)
    assert not np.asarray(hessian)[1].any()
    assert not np.asarray(hessian)[:, 1].any()


def test_all_weights_zero_and_no_elements_have_gradients():
    for norm in ActivityNorm:
        reg = ActivityRegularization(0.1, norm)
        for x, w in ((jnp.ones(3), jnp.zeros(3)), (jnp.zeros((0, 3)), jnp.ones(3))):
            found = jax.grad(lambda x, w, r=reg: r.penalty(x, weights=w), (0, 1))(x, w)
            assert not found[0].any()
            assert np.isfinite(found[1]).all()
        assert not found[1].any()


def test_a_mask_has_no_gradient():
    def penalty(x, w):
        return ActivityRegularization.l1(0.1).penalty(x, weights=w)

    mask = jnp.asarray([True, False])
    for wrap in (lambda function: function, jax.jit):
        found = wrap(jax.grad(penalty, (0, 1), allow_int=True))(jnp.ones(2), mask)
        assert found[1].dtype == jax.dtypes.float0
        with pytest.raises(TypeError, match="bool"):
            wrap(jax.grad(penalty, 1))(jnp.ones(2), mask)


def test_weights_that_are_not_differentiated_cost_no_derivative(monkeypatch):
    monkeypatch.setattr(actreg_rules, "_weights_gradient", None)
    reg, w = ActivityRegularization.l1(0.1), jnp.asarray([1.0, 2.0])
    assert jax.grad(lambda x: reg.penalty(x, weights=w))(jnp.ones(2)).tolist() == [0.1, 0.2]


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_bad_weight_is_an_error_or_where_it_is_traced_a_penalty_of_nan(callbacks, bad):
    x, w = jnp.ones(3), jnp.asarray([1.0, bad, 1.0])
    reg = ActivityRegularization.l2(0.1)

    def penalty(x, w):
        return reg.penalty(x, weights=w)

    for call in (
        lambda: reg.penalty(x, weights=w),
        lambda: reg.penalty_and_gradient(x, weights=w),
        lambda: reg.partial_sum(x, weights=w),
        lambda: jax.grad(lambda x: penalty(x, w))(x),
    ):
        with pytest.raises(ValueError, match=r"weights have .* at \(1,\), but must be finite"):
            call()
    assert np.isnan(jax.jit(penalty)(x, w))
    value, slopes = jax.jit(jax.value_and_grad(penalty, (0, 1)))(x, w)
    assert np.isnan(value)
    assert [each.shape for each in slopes] == [(3,), (3,)]
    both = jax.jit(lambda x, w: reg.penalty_and_gradient(x, weights=w))(x, w)
    assert np.isnan(both[0])
    batch = jax.vmap(penalty, (None, 0))(x, jnp.stack([jnp.ones(3), w]))
    assert_array_equal(np.isnan(batch), [False, True])


def test_a_mask_that_leaves_lambda_too_large_is_an_error_or_a_penalty_of_nan():
    reg, x = ActivityRegularization.l1(1e39, reduction="mean"), jnp.ones(100, "float32")
    mask = jnp.arange(100) < 1
    with pytest.raises(ValueError, match="too large for float32"):
        reg.penalty(x, weights=mask)
    assert np.isnan(jax.jit(reg.penalty)(x, weights=mask))


def all_calls(reg, x, weights):
    """Return the calls that take weights, which are traced in the last two."""
    closed = jax.jit(lambda x: reg.penalty(x, weights=weights))
    traced = jax.jit(lambda x, w: reg.penalty_and_gradient(x, weights=w))
    plain = [
        lambda method=method: method(x, weights=weights)
        for method in (reg.penalty, reg.penalty_and_gradient, reg.partial_sum)
    ]
    return [*plain, lambda: closed(x), *([lambda: traced(x, weights)] if is_jax(weights) else [])]


def is_jax(array):
    return isinstance(array, jax.Array)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.ones(3), MixedArraysError, r"weights must be a JAX array.*jax\.numpy\.asarray"),
        ([1.0, 1.0, 1.0], TypeError, r"weights must be a JAX array.*list; .*jax\.numpy\.asarray"),
        (2.0, TypeError, r"weights must be a JAX array.*float; .*jax\.numpy\.asarray"),
        (lambda: jax.random.key(0), TypeError, "weights must be a JAX array of numbers or bools"),
        (lambda: jnp.ones(2), ValueError, r"weights have shape \(2,\), .* broadcast to \(2, 3\)"),
        (lambda: jnp.ones((1, 2, 3)), ValueError, r"weights have shape \(1, 2, 3\)"),
        (lambda: jnp.ones(3, "int32"), TypeError, "weights have dtype int32; convert them"),
        (lambda: jnp.ones(3, "float16"), TypeError, "weights have dtype float16, but activations"),
    ],
    ids=["numpy", "list", "number", "key", "length", "axes", "integers", "other dtype"],
)
def test_weights_that_do_not_fit_are_refused_before_tracing(weights, error, message):
    weights = weights() if callable(weights) else weights
    for call in all_calls(ActivityRegularization.l2(0.1), jnp.ones((2, 3)), weights):
        with pytest.raises(error, match=message):
            call()


def test_a_norm_whose_coefficients_use_lambda_takes_no_weights_before_tracing():
    norm = Norm(
        "scaled_by_coefficients",
        terms=(2,),
        penalty=lambda lam, s: lam[0] * s[0],
        coefficients=lambda lam, s: (lam[0] + lam[0],),
        gradient=lambda x, lam, c: c[0] * x,
    )
    reg = ActivityRegularization(0.1)
    reg._dispatcher.options = reg.options._replace(norm=norm)
    for call in all_calls(reg, jnp.ones(3), jnp.ones(3)):
        with pytest.raises(ValueError, match="weights cannot be used with norm 'scaled_by_coeff"):
            call()


def test_a_partial_sum_takes_no_traced_weights():
    reg, x = ActivityRegularization.l1(0.1), jnp.ones(3)
    with pytest.raises(TypeError, match=r"weights are traced.*outside of jit"):
        jax.jit(lambda w: float(reg.partial_sum(x, weights=w)))(x)


# Where results are.


class OfCuPy:
    """Stands in for an array of CuPy, in memory of the host."""

    def __init__(self, values):
        self.values = np.array(values)

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


def test_arrays_on_a_cuda_device_go_to_cupy_and_back_by_dlpack(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(from_dlpack=OfCuPy))
    monkeypatch.setattr(actreg_values, "_is_for_cupy", lambda reg, array: True)
    seen = []

    def called(name, *results):
        def method(x, weights=None, **options):
            seen.append((name, type(x), type(weights), options))
            return results if results[1:] else results[0]

        return method

    reg = types.SimpleNamespace(
        penalty=called("penalty", OfCuPy(2.0)),
        penalty_and_gradient=called("both", OfCuPy(3.0), OfCuPy([1.0, 4.0])),
    )
    x, w = jnp.ones(2), jnp.ones(2)
    value = actreg_values.at_once(reg, x, None)
    both = actreg_values.both_at_once(reg, x, w, 0.5)
    assert all(isinstance(each, jax.Array) for each in (value, *both))
    assert [each.tolist() for each in (value, *both)] == [2.0, 3.0, [1.0, 4.0]]
    assert seen == [
        ("penalty", OfCuPy, type(None), {}),
        ("both", OfCuPy, OfCuPy, {"scale": 0.5}),
    ]


def test_which_arrays_go_to_cupy(monkeypatch):
    def array(platform, *, devices=1, dtype="float32"):
        each = [types.SimpleNamespace(platform=platform)] * devices
        return types.SimpleNamespace(
            sharding=types.SimpleNamespace(device_set=each), dtype=jnp.dtype(dtype)
        )

    reg = ActivityRegularization.l1(0.1)
    monkeypatch.setattr(actreg_values, "why_unavailable", lambda name: "")
    assert actreg_values._is_for_cupy(reg, array("gpu"))
    assert not actreg_values._is_for_cupy(reg, array("cpu"))
    assert not actreg_values._is_for_cupy(reg, array("gpu", devices=2))
    assert not actreg_values._is_for_cupy(reg, array("gpu", dtype="bfloat16"))
    with use_backend("numpy"):
        assert not actreg_values._is_for_cupy(reg, array("gpu"))
    monkeypatch.setattr(actreg_values, "why_unavailable", lambda name: "no device")
    assert not actreg_values._is_for_cupy(reg, array("gpu"))


def test_results_are_where_the_activations_are_and_a_sharded_array_is_taken_as_a_whole(python):
    code = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from actreg_dispatch import ActivityRegularization

first, second = jax.devices()
values = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)

def same(found, expected):
    return np.asarray(found).tobytes() == np.asarray(expected).tobytes()

mesh = Mesh(np.array([first, second]), "d")
halves = NamedSharding(mesh, PartitionSpec("d"))
for norm in ("l1", "l2", "l2_squared"):
    reg = ActivityRegularization(0.1, norm)
    penalty, gradient = reg.penalty_and_gradient(values)
    for device in (first, second):
        x = jax.device_put(values, device)
        for route in (reg.penalty_and_gradient, jax.jit(reg.penalty_and_gradient),
                      jax.value_and_grad(reg.penalty), jax.jit(jax.value_and_grad(reg.penalty))):
            found = route(x)
            assert same(found[0], penalty) and same(found[1], gradient)
            assert all(a.devices() == {device} and a.committed for a in found)
        with jax.default_device(device):
            x = jax.numpy.asarray(values)
        found = reg.penalty_and_gradient(x)
        assert not any(a.committed for a in found) and found[1].devices() == {device}
    x = jax.device_put(values, halves)
    for route in (reg.penalty_and_gradient, jax.jit(reg.penalty_and_gradient),
                  jax.value_and_grad(reg.penalty), jax.jit(jax.value_and_grad(reg.penalty))):
        found = route(x)
        assert same(found[0], penalty) and same(found[1], gradient)
        assert all(a.devices() == {first, second} for a in found)
        jax.block_until_ready(found[0] + x + found[1])  # goes together with other arrays
    assert reg.penalty_and_gradient(x)[1].sharding == halves
    assert reg.partial_sum(x) == reg.partial_sum(values)
    weights = np.abs(values[0])
    penalty, gradient = reg.penalty_and_gradient(values, weights=weights)
    w = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
    for route in (reg.penalty_and_gradient, jax.jit(reg.penalty_and_gradient)):
        found = route(x, weights=w)
        assert same(found[0], penalty) and same(found[1], gradient)
    rows = np.array([reg.penalty_and_gradient(row)[1] for row in values])
    assert same(jax.vmap(jax.grad(reg.penalty))(x), rows)
    assert same(jax.jit(jax.vmap(jax.grad(reg.penalty)))(x), rows)
    pieces = values.reshape(2, 4, 5)
    found = jax.pmap(jax.grad(reg.penalty))(pieces)
    assert same(found, np.array([reg.penalty_and_gradient(piece)[1] for piece in pieces]))
print("done")
"""
    flags = "--xla_force_host_platform_device_count=2"
    assert python("-c", code, XLA_FLAGS=flags).stdout == "done\n"


# In other people's processes.


def test_jax_is_left_as_it_was(python):
    code = """
import sys, warnings
import jax, numpy as np
before = dict(jax.config.values)
import actreg_dispatch
assert "actreg_dispatch.jax" not in sys.modules
x = jax.numpy.ones(3)
reg = actreg_dispatch.ActivityRegularization.l1(0.5)
for route in (reg.penalty, jax.jit(reg.penalty), jax.grad(reg.penalty), reg.penalty_and_gradient):
    for result in jax.tree.leaves(route(x)):
        assert result.dtype == np.float32
assert "actreg_dispatch.jax" in sys.modules
assert dict(jax.config.values) == before and not jax.config.jax_enable_x64
assert jax.numpy.ones(3, float).dtype == np.float32
"""
    assert python("-W", "error", "-c", code).stderr == ""


def test_who_has_no_jax_arrays_loads_no_jax(python):
    code = """
import sys
import numpy as np
from actreg_dispatch import ActivityRegularization
reg = ActivityRegularization.l1(0.5)
reg.penalty_and_gradient(np.ones(3))
try:
    reg.penalty([1.0])
except TypeError:
    pass
print([name for name in sys.modules if name.split(".")[0] in ("jax", "jaxlib")])
"""
    assert python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_many_threads_compile_and_compute_at_once(python, layer):
    probe = python(
        "-c", "import numba; numba.get_num_threads()", check=False, NUMBA_THREADING_LAYER=layer
    )
    if probe.returncode and layer != "workqueue":
        pytest.skip(f"Numba has no threading layer {layer} here")
    code = """
import faulthandler, threading
import jax, jax.numpy as jnp, numpy as np
from actreg_dispatch import ActivityRegularization

faulthandler.dump_traceback_later(200, exit=True)
values = np.random.default_rng(0).normal(size=200_003).astype(np.float32)
regs = [ActivityRegularization(0.1, norm) for norm in ("l1", "l2", "l2_squared")]
expected = [reg.penalty_and_gradient(values) for reg in regs]
wrong, rounds = [], [0] * 4

def work(number):
    x = jnp.asarray(values)
    for turn in range(8):
        for reg, (penalty, gradient) in zip(regs, expected):
            both = jax.jit(lambda x: (jax.value_and_grad(reg.penalty)(x * 1), reg.penalty(x + 0)))
            pending = [both(x) for _ in range(3)]
            pending.append((reg.penalty_and_gradient(x), penalty))
            for (found, slope), alone in pending:
                same = np.asarray(slope).tobytes() == gradient.tobytes()
                if not (same and found == penalty == alone):
                    wrong.append((number, turn, reg))
        rounds[number] += 1

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong
assert rounds == [8] * 4
print("done")
"""
    done = python("-c", code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")
    assert done.stdout == "done\n", done.stderr


def test_many_layers_cannot_be_updated_in_place_either():
    with pytest.raises(TypeError, match=r"gradients .*cannot be updated in place"):
        ActivityRegularization(0.5).apply_all([jnp.ones(3)], [jnp.ones(3)])
