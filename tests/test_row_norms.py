"""Norms of rows: λ·Σ‖row‖, to the bit, however the rows lie, and what is refused."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import dask.array as da
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from supported import dtypes

from actreg_dispatch import ActivationStatistics, ActivityRegularization, files, get_backend, norms
from actreg_dispatch.oracle import exact_result, exact_row_result


def random(shape, dtype, seed=0):
    """Return numbers of both signs, some of them 0, and a row of zeros."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * (rng.random(shape) < 0.8)).astype(dtype)
    x[-1] = 0
    return x


def check(backend, x, axis, lam=0.3, epsilon=None, scale=1.0, weights=None):
    """Compare all operations with rational arithmetic, to the bit."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    g = np.linspace(-1, 1, x.size).reshape(x.shape).astype(x.dtype)
    options = {"epsilon": epsilon, "scale": scale, "weights": weights}
    expected = exact_row_result(x, g, lam, axes, **options)
    fresh = exact_row_result(x, np.zeros_like(x), lam, axes, **options)
    reg = backend.regularization(lam, "l2", axis=axis, epsilon=epsilon)
    given = {} if weights is None else {"weights": backend.array(weights)}
    found = backend.updated(reg, x, g, scale=scale, **given)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]
    there = backend.array(x)
    assert backend.host(reg.penalty(there, **given)).tobytes() == expected[0].tobytes()
    penalty, gradient = reg.penalty_and_gradient(there, scale=scale, **given)
    assert backend.host(penalty).tobytes() == fresh[0].tobytes()
    assert_array_equal(backend.host(gradient), fresh[1])
    assert reg.finish(reg.partial_sum(there, **given)).tobytes() == expected[0].tobytes()


@dtypes
@pytest.mark.parametrize("length", [1, 3, 16, 40, 64, 150])
def test_every_bit_is_that_of_rational_arithmetic(backend, dtype, length):
    check(backend, random((7, length), dtype), -1, scale=-2.5)


@dtypes
@pytest.mark.parametrize("axis", [0, 1, 2, (0, 1), (0, 2), (-1, 1), (2, 0, 1)])
def test_rows_reach_along_any_axes(backend, dtype, axis):
    check(backend, random((3, 5, 6), dtype), axis)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_any_strides(backend, dtype):
    x = random((6, 10, 8), dtype)
    for view in (x[::2], x[:, ::-1], x[..., 1:], x[..., ::3], x.T, x[:, :1], np.asfortranarray(x)):
        check(backend, view, -1)
        check(backend, view, (0, 2))


def test_gradients_of_any_strides_are_updated(backend):
    x, room = random((3, 5, 1, 16), np.float32), np.zeros((3, 5, 1, 16), np.float32)
    expected = exact_row_result(x[..., :8], room[..., :8], 0.3, (1, 2, 3))[1]
    reg, there = backend.regularization(0.3, "l2", axis=(1, 2, 3)), backend.array(room)
    reg.apply(backend.array(x)[..., :8], there[..., :8])  # rows are not evenly spaced
    found = backend.host(there)
    assert_array_equal(found[..., :8], expected)
    assert not found[..., 8:].any()


@dtypes
def test_rows_have_weights(backend, dtype):
    x, compute = random((6, 40), dtype), np.float64 if dtype == np.float64 else np.float32
    x[1, 3] = 0
    for weights in (
        np.abs(random((6, 40), dtype, seed=1)),
        np.abs(random((40,), compute, seed=2)),
        np.abs(random((6, 1), dtype, seed=3)),
        random((6, 40), bool, seed=4),
        random((40,), bool, seed=5),
    ):
        check(backend, x, -1, weights=weights)
        check(backend, x, 0, weights=weights)


def test_what_weighs_nothing_is_left_out_whatever_it_is(backend):
    x = random((5, 20), np.float32)
    mask = np.ones(x.shape, bool)
    mask[1, 4:] = mask[3] = False
    padded = np.where(mask, x, np.float32(math.nan))
    reg = backend.regularization(0.3, "l2", axis=-1, reduction=0)
    g = np.ones_like(x)
    expected = exact_row_result(x, g, 0.3 / 4, (-1,), weights=mask)
    found = backend.updated(reg, padded, g, weights=backend.array(mask))
    assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]


@pytest.mark.parametrize("epsilon", [0.0, 3.0])
def test_each_row_has_a_guard_of_its_own(backend, epsilon):
    x = np.array([[1.0, 1.0], [0.0, 0.0], [2.0, 0.0], [math.sqrt(3.0), 0.0]])
    check(backend, x, 1, epsilon=epsilon)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sizes_of_any_magnitude(backend, dtype):
    rng, reach = np.random.default_rng(4), 18 if dtype == np.float32 else 200
    x = rng.normal(size=(30, 20)) * 10 ** rng.uniform(-reach, reach, (30, 1))
    check(backend, x.astype(dtype), -1)
    check(backend, (x.T / 10**reach).astype(dtype), 0)
    check(backend, np.full((4, 3), np.finfo(dtype).max / 8, dtype), -1, lam=0.1)
    check(backend, np.full((4, 3), np.finfo(dtype).smallest_subnormal, dtype), -1, epsilon=0.0)


def test_weights_too_large_for_quick_sums(backend):
    x = random((5, 6), np.float64)
    check(backend, x, -1, weights=np.array([2.0**100, 1.0, 3e-200, 0.0, 1.0, 2.0**64]))


def test_ties_are_to_even(backend):
    # Sizes are 2^24 and 1: half way between two numbers of float32, and then a little more.
    for extra in (0.0, 2.0**-20):
        x = np.array([[2.0**24, 0.0], [0.6, 0.8], [extra, 0.0]], np.float64).astype(np.float32)
        x[1] = 1.0, 0.0
        check(backend, x, -1, lam=1.0)
    # A square between two numbers of binary64, and a sum of sizes between two.
    check(backend, np.array([[2.0**53, 0.0], [1.0, 0.0]]), -1, lam=1.0)
    check(backend, np.array([[1.0 + 2.0**-52, 2.0**-52]]).repeat(2, axis=0), -1, lam=1.0)
    # Rows whose divisor, in float32, is half way, and a little more or less.
    tie = Fraction(1) + Fraction(1, 2**24)
    for rest in (-1, 0, 1):
        first = float(tie)
        x = np.array([[first, math.sqrt(abs(rest)) * 2.0**-24]] * 3)
        check(backend, x, -1)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_finite_stays_in_its_row(backend, dtype, special):
    x = random((6, 20), dtype)
    x[2, 5] = special
    g = np.ones_like(x)
    reg = backend.regularization(0.3, "l2", axis=-1)
    penalty, found = backend.updated(reg, x, g)
    assert str(float(penalty)) == str(abs(special))
    others = np.arange(6) != 2
    assert_array_equal(found[others], exact_row_result(x[others], g[others], 0.3, (-1,))[1])
    with np.errstate(invalid="ignore"):
        row = np.float32(0.3).astype(dtype) * x[2] / dtype(abs(special))
    assert_array_equal(found[2], g[2] + row)
    both = reg.partial_sum(backend.array(x[:3])) + reg.partial_sum(backend.array(x[3:]))
    assert str(float(reg.finish(both))) == str(abs(special))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(20_000, 16), (300, 2000), (40, 20_000)])
def test_many_rows_and_long_ones(dtype, shape):
    x = random(shape, dtype)
    some, length = shape[0] // 20, shape[1]
    g = np.ones_like(x)
    reg = ActivityRegularization.l2(0.3, axis=-1)
    penalty = reg.apply(x, g)
    sizes = [float(ActivityRegularization.l2(1.0).penalty(row.astype(float))) for row in x]
    compute = np.dtype(dtype).type
    total = float(sum(map(Fraction, sizes)))
    assert penalty == compute(float(compute(0.3)) * total)
    assert_array_equal(g[:some], exact_row_result(x[:some], np.ones_like(x[:some]), 0.3, (1,))[1])
    for piece in (x[:: len(x) // 7], x[:, : length - 1]):
        rows = np.ascontiguousarray(piece)
        assert reg.penalty(piece) == reg.penalty(rows)
    by_columns = np.asfortranarray(x)
    h = np.ones_like(by_columns)
    assert reg.apply(by_columns, h) == penalty
    assert_array_equal(h, g)


def test_one_row_is_the_norm_of_the_whole(backend):
    x = random((4, 5), np.float32)
    g = np.ones_like(x)
    expected = exact_result(x, g, "l2", 0.3)
    for axis, array, gradient in (((0, 1), x, g), (0, x.ravel(), g.ravel())):
        reg = backend.regularization(0.3, "l2", axis=axis)
        found = backend.updated(reg, array, gradient)
        assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_the_sum_of_one_long_row_is_that_of_the_whole(name):
    x = np.ones((2**9 + 1, 2**10), np.float32)[:, ::2]
    for axis, array in (((0, 1), x), (0, x.T.ravel()[::2])):
        reg = ActivityRegularization.l2(1.0, axis=axis, backend=name)
        total = reg.partial_sum(array)
        assert reg.finish(total) == reg.penalty(array) == np.float32(math.sqrt(array.size))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3)])
def test_empty_arrays(backend, shape):
    x = np.zeros(shape, np.float32)
    reg = backend.regularization(0.3, "l2", axis=-1)
    penalty, _ = backend.updated(reg, x, np.zeros_like(x))
    assert (float(penalty), penalty.dtype) == (0.0, np.float32)
    assert float(reg.finish(reg.partial_sum(backend.array(x)))) == 0


def test_pieces_add_up_to_the_whole(backend):
    x = random((9, 30), np.float32)
    reg = backend.regularization(0.3, "l2", axis=-1, reduction="batch")
    g, h = np.ones_like(x), np.ones_like(x)
    penalty, expected = backend.updated(reg, x, g)
    pieces = [slice(0, 2), slice(2, 3), slice(3, 9)]
    total = sum(reg.partial_sum(backend.array(x[piece])) for piece in pieces)
    assert reg.finish(total, count=9).tobytes() == penalty.tobytes()
    there = backend.array(h)
    for piece in pieces:
        reg.add_gradient(backend.array(x[piece]), there[piece], count=9)
    assert_array_equal(backend.host(there), expected)


def test_layers_have_rows(backend):
    shapes = (5, 4), (2, 3, 6), (1, 7)
    xs = [random(shape, np.float32, seed) for seed, shape in enumerate(shapes)]
    reg = backend.regularization(0.3, "l2", axis=-1)
    there, gs = [backend.array(x) for x in xs], [backend.array(np.ones_like(x)) for x in xs]
    penalties = reg.apply_all(there, gs)
    for x, g, penalty in zip(xs, gs, penalties.layers, strict=True):
        expected = exact_row_result(x, np.ones_like(x), 0.3, (-1,))
        assert backend.host(penalty).tobytes() == expected[0].tobytes()
        assert_array_equal(backend.host(g), expected[1])
    expected_of_first = backend.host(gs[0]).copy()
    flat, g = np.ones(3, np.float32), np.ones(3, np.float32)
    reg = backend.regularization(0.3, "l2", axis=1)
    with pytest.raises(ValueError, match=r"activations\[1\] have 1 axes, but axis=\(1,\)"):
        reg.apply_all([there[0], backend.array(flat)], [gs[0], backend.array(g)])
    assert_array_equal(backend.host(gs[0]), expected_of_first)


def test_statistics_count_each_element_once():
    x = random((5, 20), np.float32)
    for rows in (x, x.T[:, :1]):
        found = ActivationStatistics(per_feature=True)
        reg = ActivityRegularization.l2(0.3, axis=-1)
        assert reg.penalty(rows, statistics=found) == reg.penalty(rows)
        assert (found.elements, found.nonzero) == (rows.size, np.count_nonzero(rows))
        assert_array_equal(found.active, np.count_nonzero(rows, axis=0))


@pytest.mark.parametrize(
    ("norm", "axis", "message"),
    [
        ("l1", -1, r"axis=\(-1,\) has no meaning for norm 'l1'; leave it out, it belongs to 'l2'"),
        ("hoyer", 0, "has no meaning for norm 'hoyer'"),
        ("l2", (), r"axis=\(\) is unknown; pass an axis, such as -1"),
        ("l2", "rows", "axis='rows' is unknown"),
        ("l2", True, "axis=True is unknown"),
        ("l2", 1.0, "axis=1.0 is unknown"),
        ("l2", (1, 1), r"axis=\(1, 1\) names an axis twice"),
    ],
)
def test_axes_that_mean_nothing_are_refused(norm, axis, message):
    with pytest.raises(ValueError, match=message):
        ActivityRegularization(0.1, norm, axis=axis)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (
            2,
            r"have 2 axes, but axis=\(2,\) reaches along axis 2; name axes that they have",
        ),
        (-3, "reaches along axis -3"),
        ((1, -1), "names an axis of activations twice"),
    ],
)
def test_axes_that_activations_do_not_have_are_refused(backend, axis, message):
    reg = backend.regularization(0.1, "l2", axis=axis)
    x = np.ones((2, 3), np.float32)
    there, g = backend.array(x), backend.array(x.copy())
    for call in (
        lambda: reg.penalty(there),
        lambda: reg.apply(there, g),
        lambda: reg.penalty_and_gradient(there, g),
        lambda: reg.partial_sum(there),
        lambda: reg.add_gradient(there, g),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert_array_equal(backend.host(g), x)


def test_bad_weights_are_refused_before_anything_is_written():
    x, g = np.ones((3, 4)), np.ones((3, 4))
    reg = ActivityRegularization.l2(0.1, axis=-1)
    weights = np.array([1.0, 1.0, -1.0, 1.0])
    for call in (
        lambda: reg.penalty(x, weights=weights),
        lambda: reg.apply(x, g, weights=weights),
        lambda: reg.partial_sum(x, weights=weights),
        lambda: reg.add_gradient(x, g, weights=weights),
    ):
        with pytest.raises(ValueError, match=r"weights have -1\.0 at"):
            call()
    assert_array_equal(g, np.ones((3, 4)))


def test_the_axis_is_an_option():
    reg = ActivityRegularization.l2(0.1, axis=-1)
    assert reg.axis == (-1,)
    assert repr(reg) == "ActivityRegularization(0.1, 'l2', axis=(-1,))"
    assert pickle.loads(pickle.dumps(reg)) == reg != ActivityRegularization.l2(0.1)
    assert ActivityRegularization.from_options(reg.options) == reg
    reg.lam = 0.2
    assert reg == ActivityRegularization(0.2, "l2", axis=-1)
    assert ActivityRegularization.l2(0.1).axis is None


@pytest.mark.parametrize("axis", [-1, (0, 2)])
def test_arrays_of_all_libraries_have_rows(arrays, axis):
    x, g = random((4, 5, 6), np.float32), np.ones((4, 5, 6), np.float32)
    w = np.abs(random((6,), np.float32, seed=1))
    axes = axis if isinstance(axis, tuple) else (axis,)
    reg = arrays.regularization(0.3, "l2", axis=axis)
    there, weights = arrays.array(x), arrays.array(w)
    if arrays.name == "dask":
        there = there.rechunk(dict.fromkeys(axes, -1))
    for given, of_row in (({}, None), ({"weights": weights}, w)):
        expected = exact_row_result(x, np.zeros_like(x), 0.3, axes, weights=of_row)
        penalty, gradient = reg.penalty_and_gradient(there, **given)
        assert arrays.host(penalty).tobytes() == expected[0].tobytes()
        assert_array_equal(arrays.host(gradient), expected[1])
        assert arrays.host(reg.penalty(there, **given)).tobytes() == expected[0].tobytes()
    if arrays.name not in ("jax", "dask"):
        expected = exact_row_result(x, g, 0.3, axes)
        assert [a.tobytes() for a in arrays.updated(reg, x, g)] == [a.tobytes() for a in expected]
    flat = arrays.array(np.ones((), np.float32))
    with pytest.raises(ValueError, match=r"activations have no axes, but axis="):
        reg.penalty(flat)


def test_chunks_must_hold_whole_rows():
    x = da.ones((6, 8), chunks=(2, 4))
    reg = ActivityRegularization.l2(0.1, axis=-1)
    for call in (reg.penalty, reg.penalty_and_gradient, reg.partial_sum):
        with pytest.raises(ValueError, match=r"2 chunks along axis 1.*rechunk\(\{1: -1\}\)"):
            call(x)
    whole = x.rechunk({1: -1})
    other = ActivityRegularization.l2(0.1, axis=0)
    assert float(reg.penalty(whole).compute()) == reg.penalty(np.ones((6, 8)))
    assert reg.penalty(whole).name != ActivityRegularization.l2(0.1).penalty(whole).name
    assert float(other.penalty(x.rechunk({0: -1})).compute()) == other.penalty(np.ones((6, 8)))


def test_jax_transforms_and_differentiates_norms_of_rows(jax):
    jnp = jax.numpy
    x = random((4, 5), np.float32)
    x[-1] = 1e-25  # whose squares are below the range
    reg = ActivityRegularization.l2(0.3, axis=-1, epsilon=0.0)
    expected = exact_row_result(x, np.zeros_like(x), 0.3, (-1,), epsilon=0.0)
    value, gradient = jax.jit(jax.value_and_grad(reg.penalty))(jnp.asarray(x))
    assert np.asarray(value).tobytes() == expected[0].tobytes()
    assert_array_equal(np.asarray(gradient), expected[1])
    batch = jnp.asarray(np.stack([x, 2 * x]))
    found = jax.vmap(reg.penalty)(batch)
    assert_array_equal(np.asarray(found), [reg.penalty(np.asarray(each)) for each in batch])

    x = jnp.asarray(random((4, 5), np.float32) + np.float32(0.5))
    np.testing.assert_allclose(
        jax.hessian(reg.penalty)(x), jax.jacfwd(jax.grad(lambda x: _rows(jnp, x)))(x), atol=1e-6
    )


def _rows(module, x):
    return 0.3 * module.sqrt((x * x).sum(-1)).sum()


def test_files_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"is a norm of rows.*use Dask"):
        files.penalty(ActivityRegularization.l2(0.1, axis=-1), tmp_path / "x.npy")


REDUCTIONS = ("sum", (0, 1), "batch")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pytorch_compiles_and_exports_norms_of_rows(torch, reduction):
    x = torch.from_numpy(random((4, 5), np.float32)) + 0.5
    w = torch.from_numpy(np.abs(random((5,), np.float32, seed=1)))
    reg = ActivityRegularization.l2(0.3, axis=-1, reduction=reduction)

    def step(x, g):
        return reg.penalty(x, weights=w), reg.apply(x, g)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        y, g = x.clone().requires_grad_(), torch.ones_like(x)
        penalty, applied = function(y, g)
        penalty.backward()
        results.append([each.numpy().tobytes() for each in (penalty.detach(), applied, y.grad, g)])
    torch._dynamo.reset()
    assert results[0] == results[1]


def test_pytorch_differentiates_norms_of_rows_further(torch):
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(3, 4)) + 2.0, requires_grad=True)
    w = torch.tensor(rng.uniform(0.5, 2.0, (4,)), requires_grad=True)
    reg = ActivityRegularization.l2(0.3, axis=-1)
    for function, inputs in ((reg.penalty, (x,)), (lambda x, w: reg.penalty(x, weights=w), (x, w))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    scales, v = np.array([[1.0], [1e-200], [1e200]]), np.array([1.0, 2.0, 0.0, 0.0])
    far = (x.detach() * torch.from_numpy(scales)).requires_grad_()
    reg = ActivityRegularization.l2(0.3, axis=-1, epsilon=0.0)
    (gradient,) = torch.autograd.grad(reg.penalty(far), far, create_graph=True)
    (second,) = torch.autograd.grad((gradient * torch.from_numpy(v)).sum(), far)
    sizes = np.linalg.norm(x.detach().numpy(), axis=1, keepdims=True)
    unit = x.detach().numpy() / sizes
    expected = 0.3 * (v - unit * (unit @ v)[:, None]) / sizes / scales
    np.testing.assert_allclose(second.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_size_of_a_row_may_fall_as_its_sum_grows(monkeypatch, dtype):
    monkeypatch.setattr(norms, "NORMS", dict(norms.NORMS))
    norms.register_norm(
        norms.Norm(
            "inverse",
            terms=(2,),
            penalty=lambda lam, s: lam[0] / s[0],
            coefficients=lambda lam, s: (s[0] * s[0],),
            gradient=lambda x, lam, c: -((lam[0] + lam[0]) * x) / c[0],
            guard=lambda s, epsilon: s[0] > epsilon,
        )
    )
    x = random((300, 30), dtype)
    found = []
    for backend in ("numpy", "numba"):
        g = np.ones_like(x)
        reg = ActivityRegularization(0.3, "inverse", axis=-1, backend=backend)
        found.append((reg.apply(x, g).tobytes(), g.tobytes(), reg.partial_sum(x)))
    assert found[0] == found[1]
    squares = [sum(Fraction(float(value)) ** 2 for value in row) for row in x]
    sizes = [Fraction(1 / float(total)) for total in squares if total]
    assert found[0][2].units == int(sum(sizes) * 2**3222)


def test_sizes_beyond_the_range_of_binary64_decide_nothing(monkeypatch):
    monkeypatch.setattr(norms, "NORMS", dict(norms.NORMS))
    options = {
        "terms": (2,),
        "gradient": lambda x, lam, c: (lam[0] * c[0]) * x,
        "guard": lambda s, epsilon: s[0] > epsilon,
    }
    # The size is infinite, but what is half way between two coefficients still needs care.
    norms.register_norm(
        norms.Norm(
            "fourth_power",
            penalty=lambda lam, s: lam[0] * (s[0] * s[0]),
            coefficients=lambda lam, s: (s[0],),
            **options,
        )
    )
    # The size is finite, but would be NaN if the sum were infinite.
    norms.register_norm(
        norms.Norm(
            "root",
            penalty=lambda lam, s: lam[0] * (s[0] / norms.sqrt(s[0])),
            coefficients=lambda lam, s: (norms.sqrt(s[0]) / s[0],),
            **options,
        )
    )
    halves = np.array([[115261238, 1e-200, 1983], [128775227, 1e-200, 286]]) * 2.0**250
    huge = np.array([[3e200, 4e200], [3.0, 4.0]])
    for norm, x, penalty in (("fourth_power", halves, math.inf), ("root", huge, 5e200)):
        found = []
        for backend in ("numpy", "numba"):
            g, reg = np.zeros_like(x), ActivityRegularization(1.0, norm, axis=-1, backend=backend)
            sizes = [reg.apply(x, g), reg.penalty(x), reg.finish(reg.partial_sum(x))]
            np.testing.assert_allclose(sizes, penalty, rtol=1e-15)
            found.append((np.array(sizes).tobytes(), g.tobytes()))
        assert found[0] == found[1]


@pytest.mark.parametrize("tiny", [0.0, 1e-200, 2.0**-480, 1e-300, 2.0**-55])
def test_a_tie_is_none_if_anything_is_added(backend, tiny):
    # Of each pair the sum of squares is half way between two numbers of binary64; that to even is
    # the lower one, and the other's root is another number.
    pairs = [(115261238, 1983), (128775227, 286), (111717461, 1864), (117065426, 967)]
    x = np.array([[first, tiny, second] for first, second in pairs])
    ones = np.ones(3)
    for scale in (1.0, 2.0**-190, 2.0**-230, 2.0**-300, 2.0**200):
        check(backend, scale * x, -1, epsilon=0.0)
        check(backend, scale * x, -1, epsilon=0.0, weights=ones)


def test_sums_of_few_bits_need_no_exact_sum(monkeypatch):
    # Squares of float32 numbers have 48 bits, so their sums are often half way between two of 53.
    backend = type(get_backend("numba"))
    x = random((500, 16), np.float32).astype(np.float64)
    g, expected = np.ones_like(x), exact_row_result(x, np.ones_like(x), 0.3, (1,))

    def refuse(*arguments):
        raise AssertionError("an exact sum was taken")

    monkeypatch.setattr(backend, "partial_sum", refuse)
    assert ActivityRegularization.l2(0.3, axis=-1).apply(x, g) == expected[0]
    assert_array_equal(g, expected[1])
