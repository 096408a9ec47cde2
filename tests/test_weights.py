"""Weights of elements: sums, gradients, what a mask counts, and what is refused."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from supported import DTYPES, dtypes

from actreg_dispatch import (
    ActivationStatistics,
    ActivityNorm,
    ActivityRegularization,
    MixedArraysError,
    dispatch,
)
from actreg_dispatch.backends.numba.exact import EXACT_TERMS
from actreg_dispatch.norms import NORMS, Norm
from actreg_dispatch.oracle import exact_result, exact_sum

norms = pytest.mark.parametrize("norm", list(ActivityNorm))
NARROW = ("float16", "bfloat16")
narrow = pytest.mark.parametrize("dtype", [DTYPES[name] for name in NARROW], ids=NARROW)
SHAPES = {"full": (6, 50), "features": (50,), "tokens": (6, 1), "one": ()}


def compute_dtype_of(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def random(shape, dtype, seed=0):
    """Return numbers of both signs, some of them 0."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * (rng.random(shape) < 0.8)).astype(dtype)


def check(backend, norm, x, weights, lam=0.3, **options):
    """Compare all operations with rational arithmetic, to the bit."""
    g = np.linspace(-1, 1, x.size).reshape(x.shape).astype(x.dtype)
    expected = exact_result(x, g, norm, lam, weights=weights)
    fresh = exact_result(x, np.zeros_like(x), norm, lam, weights=weights)
    reg = backend.regularization(lam, norm, **options)
    there, w = backend.array(x), backend.array(weights)
    found = backend.updated(reg, x, g, weights=w)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]
    assert backend.host(reg.penalty(there, weights=w)).tobytes() == expected[0].tobytes()
    for out in (None, backend.array(np.full_like(x, math.nan))):
        penalty, gradient = reg.penalty_and_gradient(there, out, weights=w)
        assert backend.host(penalty).tobytes() == fresh[0].tobytes()
        assert_array_equal(backend.host(gradient), fresh[1])
    for part in reg.partial_sum(there, weights=w).parts:
        power = ActivityNorm.L1 if part.degree == 1 else ActivityNorm.L2
        assert Fraction(part.units, 2**3222) == exact_sum(x, power, weights)


@norms
@narrow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_bit_is_that_of_rational_arithmetic(backend, norm, dtype, shape):
    x = random((6, 50), dtype)
    for weights in (
        np.abs(random(shape, dtype, seed=1)),
        np.abs(random(shape, compute_dtype_of(dtype), seed=2)),
        random(shape, bool, seed=3),
    ):
        check(backend, norm, x, np.asarray(weights))


@norms
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_of_any_size(backend, norm, dtype):
    rng, reach = np.random.default_rng(4), 18 if dtype == np.float32 else 150
    for x_reach, w_reach in ((reach, 0), (0, reach), (reach, reach), (2 * reach, reach / 2)):
        x = (rng.normal(size=300) * 10 ** rng.uniform(-x_reach, x_reach, 300)).astype(dtype)
        w = np.abs(rng.normal(size=300) * 10 ** rng.uniform(-w_reach, w_reach, 300)).astype(dtype)
        check(backend, norm, x, w)


@pytest.mark.parametrize("norm", ["l1", "l2_squared", "l1_l2_squared"])
@pytest.mark.parametrize(
    ("x", "w"),
    [
        (1e200, 1e-200),
        (1e-170, 1e200),
        (5e-324, 5e-324),
        (5e-324, 1.7e308),
        (1.7e308, 5e-324),
        (2.0**-480, 2.0**64),
        (2.0**-480, np.nextafter(2.0**64, 0)),
        (1.0 + 2.0**-52, 1.0 + 2.0**-52),
    ],
)
def test_extreme_products(backend, norm, x, w):
    for count in (1, 3, EXACT_TERMS + 1):
        values = np.full(count, x)
        values[0] = np.nextafter(x, 1.0)
        check(backend, ActivityNorm(norm), values, np.full(count, w))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_rows_and_many_blocks(backend, dtype):
    x = random((70, 1001), dtype)
    for weights in (np.abs(random(1001, dtype, 1)), np.abs(random((70, 1), dtype, 2)), x > 0.1):
        check(backend, ActivityNorm.L1_L2_SQUARED, x, weights)
        check(backend, ActivityNorm.L2, x.T, np.broadcast_to(weights, x.shape).T)


@norms
def test_arrays_of_any_strides(backend, norm):
    x, w, g = (random((40, 30), np.float32, seed) for seed in range(3))
    reg = backend.regularization(0.3, norm)
    for cut in ((slice(None, None, 2),), (slice(None), slice(None, None, -3)), (slice(5, 6),)):
        expected = exact_result(x[cut], g[cut], norm, 0.3, weights=abs(w)[cut])
        there, weights, gradients = (backend.array(each) for each in (x, abs(w), g))
        penalty = reg.apply(there[cut], gradients[cut], weights=weights[cut])
        assert backend.host(penalty).tobytes() == expected[0].tobytes()
        assert_array_equal(backend.host(gradients)[cut], expected[1])


@norms
@dtypes
@pytest.mark.parametrize("left_out", [math.nan, math.inf, -math.inf, 1.0])
def test_what_weighs_nothing_is_left_out_whatever_it_is(backend, norm, dtype, left_out):
    for zero in (np.array(0.0, dtype), np.array(-0.0, compute_dtype_of(dtype)), np.array(False)):
        x, w = np.array([3.0, left_out, -4.0], dtype), np.ones(3, zero.dtype)
        w[1] = zero
        g = np.array([0.0, -0.0, 0.0], dtype)
        reg = backend.regularization(0.5, norm)
        expected = reg.penalty(backend.array(x[::2]))
        penalty, updated = backend.updated(reg, x, g, scale=math.inf, weights=backend.array(w))
        assert penalty == backend.host(expected)
        assert updated[1] == 0
        assert np.signbit(updated[1])


@norms
def test_weights_of_one_change_nothing(backend, norm):
    x = random(1000, np.float32)
    reg = backend.regularization(0.3, norm)
    expected = backend.updated(reg, x, np.ones_like(x))
    for w in (np.ones(1, np.float32), np.ones(1000, bool)):
        found = backend.updated(reg, x, np.ones_like(x), weights=backend.array(w))
        assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]


@norms
def test_pieces_with_weights_add_up_to_the_whole(backend, norm):
    x, w, g = random((40, 30), np.float32), np.abs(random(30, np.float32, 1)), np.ones((40, 30))
    reg = backend.regularization(0.3, norm)
    penalty, updated = backend.updated(reg, x, g.astype("f4"), weights=backend.array(w))
    there, weights, gradients = (backend.array(each) for each in (x, w, g.astype("f4")))
    pieces = [
        (slice(0, 7), slice(None)),
        (slice(7, None), slice(0, 9)),
        (slice(7, None), slice(9, None)),
    ]
    total = sum(reg.partial_sum(there[piece], weights=weights[piece[1]]) for piece in pieces)
    assert reg.finish(total) == penalty
    for piece in pieces:
        reg.add_gradient(there[piece], gradients[piece], total, weights=weights[piece[1]])
    assert_array_equal(backend.host(gradients), updated)


def test_layers_have_weights_of_their_own_or_none(backend):
    reg = backend.regularization(0.3, "l2")
    xs = [random((4, 5), np.float32, seed) for seed in range(3)]
    ws = [backend.array(np.abs(xs[1])[0]), None, backend.array(xs[2] > 0)]
    expected = [
        backend.updated(reg, x, np.ones_like(x), weights=w) for x, w in zip(xs, ws, strict=True)
    ]
    for names in (None, "abc"):
        layers = [backend.array(x) for x in xs], [backend.array(np.ones_like(x)) for x in xs], ws
        if names:
            layers = [dict(zip(names, each, strict=True)) for each in layers]
            del layers[2]["b"]
        _, penalties = reg.apply_all(*layers[:2], weights=layers[2])
        for k, (penalty, updated) in zip(names or range(3), expected, strict=True):
            assert backend.host(penalties[k]) == penalty
            assert_array_equal(backend.host(layers[1][k]), updated)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([None], ValueError, "weights are not a list of 2, one for each layer"),
        ((), ValueError, "weights are not a list of 2"),
        ([None, np.ones(4)], ValueError, r"weights\[1\] have shape \(4,\)"),
        ([None, -np.ones(3)], ValueError, r"weights\[1\] have -1\.0 at \(0,\)"),
        ([None, "gradients"], ValueError, r"weights\[1\] and gradients\[0\] share memory"),
    ],
)
def test_weights_of_layers_are_checked_before_anything_is_written(weights, error, message):
    xs, gs = [np.ones(3), np.ones(3)], [np.zeros(3), np.zeros(3)]
    if weights and isinstance(weights[-1], str):
        weights = [None, gs[0]]
    with pytest.raises(error, match=message):
        ActivityRegularization(0.5).apply_all(xs, gs, weights=weights)
    with pytest.raises(ValueError, match="not a mapping of some of the layers' names"):
        ActivityRegularization(0.5).apply_all({"a": xs[0]}, {"a": gs[0]}, weights={"b": None})
    assert not any(g.any() for g in gs)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_arrays(backend, shape):
    reg, x = backend.regularization(0.3, "l1"), backend.array(np.zeros(shape))
    for weights in (np.ones(shape), np.ones(shape[-1:], bool), np.array(2.0)):
        assert backend.host(reg.penalty(x, weights=backend.array(weights))) == 0.0


# What is refused.


@pytest.mark.parametrize("bad", [-1.0, -math.inf, math.inf, math.nan, -5e-324])
@pytest.mark.parametrize("norm", ["l1", "l2", "l1_l2_squared"])
def test_bad_weights_are_refused_before_anything_is_written(norm, bad):
    for backend in ("numpy", "numba"):
        reg = ActivityRegularization(0.5, norm, backend=backend)
        for x in (np.ones((3, 4)), np.zeros((3, 4))):
            for w in (np.ones((3, 4)), np.ones(4), np.ones((3, 1))):
                w[-1] = bad
                g = np.full_like(x, 7.0)
                total = reg.partial_sum(x)
                for call in (
                    lambda x=x, w=w, r=reg: r.penalty(x, weights=w),
                    lambda x=x, w=w, r=reg: r.partial_sum(x, weights=w),
                    lambda x=x, w=w, r=reg, g=g: r.apply(x, g, weights=w),
                    lambda x=x, w=w, r=reg, g=g: r.penalty_and_gradient(x, g, weights=w),
                    lambda x=x, w=w, r=reg, g=g, t=total: r.add_gradient(x, g, t, weights=w),
                ):
                    with pytest.raises(ValueError, match=r"weights have .* at \(.*>= 0; use 0 to"):
                        call()
                assert (g == 7.0).all()


def test_one_bad_weight_of_many_is_found_before_anything_is_counted_or_written():
    x, w, g = np.ones((2, 20_000)), np.ones((2, 40_000))[:, ::2], np.zeros((2, 20_000))
    w[1, -1] = -1.0
    statistics = ActivationStatistics()
    for norm in ("l1", "l2"):
        reg = ActivityRegularization(0.5, norm)
        for call in (reg.penalty, lambda x, r=reg, **options: r.apply(x, g, **options)):
            with pytest.raises(ValueError, match=r"weights have -1.0 at \(1, 19999\)"):
                call(x, weights=w, statistics=statistics)
    assert statistics.elements == 0
    assert not g.any()


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_a_bad_weight_without_axes_is_refused(name):
    x, g, w = np.array(2.0), np.array(3.0), np.array(-1.0)
    for norm in ("l1", "l2"):
        reg = ActivityRegularization(0.5, norm, backend=name)
        for call in (reg.penalty, reg.partial_sum, lambda x, r=reg, **w: r.apply(x, g, **w)):
            with pytest.raises(ValueError, match=r"weights have -1.0 at \(\), but"):
                call(x, weights=w)
    assert g == 3.0


def test_large_weights_that_overflow_their_own_square_are_not_bad():
    reg, g = ActivityRegularization(1e-300), np.zeros(2)
    assert reg.apply(np.ones(2), g, weights=np.full(2, 1e300)) == 2.0


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            np.ones(4),
            ValueError,
            r"weights have shape \(4,\), which does not broadcast to \(2, 3\)",
        ),
        (np.ones((1, 2, 3)), ValueError, "does not broadcast"),
        (np.ones((2, 1, 1)), ValueError, "does not broadcast"),
        (
            np.ones(3, np.float32),
            TypeError,
            "weights have dtype float32, but activations have float64",
        ),
        (np.ones(3, np.int64), TypeError, "weights have dtype int64; convert them"),
        (
            [1.0, 1.0, 1.0],
            TypeError,
            r"weights must be a NumPy or CuPy array, not a builtins\.list",
        ),
        (2.0, TypeError, "weights must be a NumPy"),
        (np.ma.ones(3), TypeError, "weights are a masked array"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(weights, error, message):
    x, g = np.ones((2, 3)), np.zeros((2, 3))
    for reg in (ActivityRegularization(0.5), ActivityRegularization.l2(0.5)):
        for method, *arguments in (
            (reg.penalty, x),
            (reg.apply, x, g),
            (reg.penalty_and_gradient, x),
            (reg.penalty_and_gradient, x, g),
            (reg.partial_sum, x),
        ):
            with pytest.raises(error, match=message):
                method(*arguments, weights=weights)
    assert not g.any()


def test_weights_of_torch_for_numpy_arrays_are_refused(torch):
    with pytest.raises(MixedArraysError, match=r"weights are a torch\.Tensor; move one of them"):
        ActivityRegularization(0.5).penalty(np.ones(3), weights=torch.ones(3))


def test_weights_must_not_share_memory_with_the_gradients():
    g = np.ones(6)
    for w in (g, g[:1], g[::-1]):
        with pytest.raises(ValueError, match=r"weights share memory with the gradients; .* a copy"):
            ActivityRegularization(0.5).apply(np.ones(6), g, weights=w)
    assert (g == 1.0).all()
    x = np.full(2, 2.0)
    assert ActivityRegularization(0.5).penalty(x, weights=x) == 4.0


def test_a_norm_whose_coefficients_use_lambda_takes_no_weights():
    norm = Norm(
        "scaled_by_coefficients",
        terms=(2,),
        penalty=lambda lam, s: lam[0] * s[0],
        coefficients=lambda lam, s: (lam[0] + lam[0],),
        gradient=lambda x, lam, c: c[0] * x,
    )
    assert not norm.takes_weights
    assert all(each.takes_weights for each in NORMS.values())
    options = ActivityRegularization(0.5).options._replace(norm=norm)
    with pytest.raises(ValueError, match=r"weights cannot be used with norm .*; write λ into its"):
        dispatch.penalty(options, np.ones(3), np.ones(3))


def test_weights_are_read_by_stride_and_never_expanded():
    x, g = np.ones((1000, 1000), np.float32), np.zeros((1000, 1000), np.float32)
    reg = ActivityRegularization.l2(0.5)
    for w in (np.ones(1000, np.float32), np.ones((1000, 1), bool)):
        reg.apply(x, g, weights=w)
        tracemalloc.start()
        reg.apply(x, g, weights=w)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100_000
