"""What every backend must do, on the arrays that are native to it.

Results are compared, bit for bit, with rational arithmetic (:mod:`actreg_dispatch.oracle`).
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from actreg_dispatch import ActivityNorm, dispatch
from actreg_dispatch.oracle import exact_result, exact_sum

DTYPES = (np.float32, np.float64)

norms = pytest.mark.parametrize("norm", ActivityNorm, ids=lambda norm: norm.value)
one_sum = pytest.mark.parametrize(
    "norm", [ActivityNorm.L1, ActivityNorm.L2, ActivityNorm.L2_SQUARED], ids=lambda norm: norm.value
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


def assert_exact(
    arrays,
    activations,
    norm,
    *,
    lam=0.1,
    count=1,
    gradients=None,
    scale=1.0,
    weights=None,
    **options,
):
    """Apply and compare penalty and gradients with rational arithmetic; all arrays on the host.

    ``count`` is what λ is divided by.
    """
    if gradients is None:
        gradients = np.linspace(-1, 1, activations.size).reshape(activations.shape)
        gradients = gradients.astype(activations.dtype)
    exact = norm, lam / count, options.get("epsilon"), scale, weights
    expected, updated = exact_result(activations, gradients, *exact)
    reg = arrays.regularization(lam, norm, **options)
    weigh = {} if weights is None else {"weights": arrays.array(weights)}
    penalty, found = arrays.updated(reg, activations, gradients, scale=scale, **weigh)
    alone = arrays.host(reg.penalty(arrays.array(activations), **weigh))
    assert penalty.tobytes() == alone.tobytes() == expected.tobytes(), (penalty, expected)
    assert found.tobytes() == updated.tobytes()
    _, gradient = exact_result(activations, np.zeros_like(gradients), *exact)
    penalty, found = reg.penalty_and_gradient(arrays.array(activations), scale=scale, **weigh)
    assert arrays.host(penalty).tobytes() == expected.tobytes()
    assert arrays.host(found).tobytes() == gradient.tobytes()


@norms
@dtypes
@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 1000, 4099])
def test_penalty_and_gradients_are_exactly_rounded(arrays, norm, dtype, size):
    rng = np.random.default_rng(size)
    assert_exact(arrays, rng.normal(size=size).astype(dtype), norm)


@norms
@dtypes
def test_a_large_array_is_exactly_rounded(arrays, norm, dtype):
    size = 9_001 if arrays.name in ("numpy", "cupy") else 70_001  # parallel kernels, several blocks
    rng = np.random.default_rng(1)
    assert_exact(arrays, np.maximum(rng.normal(size=size), 0).astype(dtype), norm)


@norms
@dtypes
def test_magnitudes_far_apart_are_exactly_rounded(arrays, norm, dtype):
    rng = np.random.default_rng(2)
    values = rng.normal(size=3000) * 10.0 ** rng.uniform(-12, 12, 3000)
    assert_exact(arrays, values.astype(dtype), norm)


@norms
def test_subnormal_numbers_are_not_flushed(arrays, norm):
    values = np.float32([1e-40, -3e-42, 2e-45, 0.0, 1e-20, 3e-20])
    start = np.float32([1e-41, 1e-45, -1e-40, 1e-43, 0.0, 0.0])
    # Hoyer's coefficients grow as 1/|x|: with a large λ they overflow, and NaN has many bits.
    for lam in (0.0, 0.5, 1e-20, 1.0 if norm is ActivityNorm.HOYER else 1e30):
        assert_exact(arrays, values, norm, lam=lam, gradients=start)
    if norm is ActivityNorm.L2:  # of a norm that is subnormal too
        assert_exact(arrays, values[:3], norm, gradients=start[:3], epsilon=0.0)


@norms
def test_many_ones_are_counted_exactly(arrays, norm):
    assert_exact(arrays, np.ones(10_007, np.float32), norm, lam=1.0)


@norms
@dtypes
@pytest.mark.parametrize("scale", [65536.0, -0.1, 0.0, 1e-45, 1e37])
@pytest.mark.parametrize("size", [7, 40_001])
def test_the_scale_multiplies_the_gradient_alone(arrays, norm, dtype, scale, size):
    values = np.random.default_rng(5).normal(size=size if arrays.name != "cupy" else 7)
    values[::3] = 0.0
    assert_exact(arrays, values.astype(dtype), norm, scale=scale)


def test_the_sign_of_a_scale_of_zero_counts(backend):
    reg = backend.regularization(0.5, "l1")
    for step in (1, 2):  # contiguous or not
        for scale in (0.0, -0.0, 0.0):
            x, g = np.ones(6)[::step], np.full(6, -0.0)[::step]
            _, updated = backend.updated(reg, x, g, scale=scale)
            assert (np.signbit(updated) == np.signbit(scale)).all()


@norms
@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_a_scale_that_is_not_finite_propagates(arrays, norm, scale):
    values = np.float32([0.0, -0.0, 2.0, -3.0])
    with np.errstate(invalid="ignore"):
        added = {
            ActivityNorm.L1: np.float32([0.0, 0.0, scale, -scale]),
            ActivityNorm.L2: np.float32(scale) * values,
            ActivityNorm.L2_SQUARED: np.float32(scale) * values,
            ActivityNorm.L1_L2_SQUARED: np.float32(scale) * values,
            ActivityNorm.HOYER: np.float32(scale) * np.float32([0.0, 0.0, 1.0, 1.0]),
        }[norm]
    reg = arrays.regularization(0.5, norm)
    penalty, found = arrays.updated(reg, values, np.ones(4, np.float32), scale=scale)
    assert penalty == arrays.host(reg.penalty(arrays.array(values)))
    assert_array_equal(found, 1 + added)


@norms
@dtypes
@pytest.mark.parametrize(
    ("reduction", "count"), [("mean", 21), ("batch", 3), (-1, 7), ((0, -1), 21)]
)
def test_reductions_divide_the_strength(arrays, norm, dtype, reduction, count):
    values = np.random.default_rng(6).normal(size=(3, 7)).astype(dtype)
    expected = exact_result(values, np.ones_like(values), norm, 0.1 / count)
    reg = arrays.regularization(0.1, norm, reduction=reduction)
    found = arrays.updated(reg, values, np.ones_like(values))
    alone = arrays.host(reg.penalty(arrays.array(values)))
    assert [a.tobytes() for a in (*found, alone)] == [a.tobytes() for a in (*expected, expected[0])]


@norms
@dtypes
def test_the_result_has_the_dtype_and_kind_of_the_input(backend, norm, dtype):
    reg = backend.regularization(0.1, norm)
    activations = backend.array([[1.0, 2.0]], dtype)
    for result in (reg.penalty(activations), reg.apply(activations, activations.copy())):
        assert result.dtype == dtype
        assert result.shape == ()
        assert type(result) is (type(activations) if backend.name == "cupy" else dtype)


@norms
@dtypes
def test_empty_and_zero_dimensional_arrays(arrays, norm, dtype):
    for shape in ((0,), (3, 0, 2), ()):
        assert_exact(arrays, np.full(shape, -2.0, dtype), norm)


LAYOUTS = {
    "fortran order": lambda a: a.T,
    "transposed": lambda a: a.transpose(2, 0, 3, 1),
    "every second": lambda a: a[:, ::2],
    "last axis strided": lambda a: a[..., ::3],
    "reversed": lambda a: a[::-1, :, ::-2],
    "one channel": lambda a: a[..., 1:3],
    "one row": lambda a: a[2, :, 1, 0],
    "length one axes": lambda a: a[:1, None, :, :1],
    "five axes": lambda a: a[::2, ::2, ::2, None, ::2],
}


@norms
@pytest.mark.parametrize("gradient_layout", ["as the activations", "fresh", "other order"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides_in_place(backend, norm, layout, gradient_layout):
    rng = np.random.default_rng(3)
    base = backend.array(rng.normal(size=(6, 7, 5, 9)).astype(np.float32))
    activations = layout(base)
    values = backend.host(activations)
    start = rng.normal(size=values.shape).astype(np.float32)
    if gradient_layout == "as the activations":
        room = base * 0 + 9
        gradients = layout(room)
    elif gradient_layout == "fresh":
        room = gradients = backend.array(start.copy())
    else:
        room = backend.array(start.T.copy())
        gradients = room.T
    gradients[...] = backend.array(start)
    before = backend.host(room).copy()

    found = backend.regularization(0.1, norm).apply(activations, gradients)

    penalty, updated = exact_result(values, start, norm, 0.1)
    assert backend.host(found) == penalty
    assert_array_equal(backend.host(gradients), updated)
    gradients[...] = backend.array(start)  # what is left of the change lies outside the view
    assert backend.host(room).tobytes() == before.tobytes()


def test_a_broadcast_view_may_be_read(backend):
    column = backend.array([[1.0], [-2.0]])
    wide = backend.module.broadcast_to(column, (2, 5))
    gradients = backend.array(np.zeros((2, 5)))
    assert float(backend.regularization(1.0, "l1").apply(wide, gradients)) == 15.0
    assert_array_equal(backend.host(gradients), [[1.0] * 5, [-1.0] * 5])


@pytest.mark.parametrize("epsilon", [None, 0.0, 25.0, 26.0])
def test_epsilon_decides_where_l2_has_a_gradient(arrays, epsilon):
    for values in (np.array([3.0, 4.0]), np.array([1e-5, 0.0], np.float32)):
        assert_exact(arrays, values, ActivityNorm.L2, epsilon=epsilon)


@dtypes
def test_l2_of_small_activations_follows_epsilon(backend, dtype):
    eps = float(np.finfo(dtype).eps)
    for size in (math.sqrt(eps) * 0.99, math.sqrt(eps) * 1.01):
        gradients = backend.array([0.0], dtype)
        backend.regularization(0.5, "l2").apply(backend.array([size], dtype), gradients)
        assert float(gradients[0]) == (0.5 if size * size > eps else 0.0)


@dtypes
def test_l1_has_no_gradient_at_zero_or_nan(backend, dtype):
    activations = backend.array([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0], dtype)
    gradients = backend.array(np.zeros(6), dtype)
    penalty = backend.regularization(0.5, "l1").apply(activations, gradients)
    assert math.isnan(float(penalty))
    assert backend.host(gradients).tolist() == [0.0, 0.0, 0.0, 0.5, -0.5, 0.5]


@norms
@dtypes
@pytest.mark.parametrize("size", [5, 200])
def test_infinity_and_nan_propagate(backend, norm, dtype, size):
    for bad, expected in (([math.inf, 1.0], math.inf), ([-math.inf, math.nan], math.nan)):
        if norm is ActivityNorm.HOYER:  # the ratio of two infinite sums
            expected = math.nan
        activations, gradients = np.ones(size, dtype), backend.array(np.zeros(size), dtype)
        activations[1:3] = bad
        reg = backend.regularization(0.5, norm)
        penalty = reg.apply(backend.array(activations), gradients)
        assert_array_equal(float(penalty), expected)
        assert_array_equal(float(reg.penalty(backend.array(activations))), expected)
        with np.errstate(invalid="ignore"):
            added = {
                ActivityNorm.L1: 0.5 * ((activations > 0).astype(dtype) - (activations < 0)),
                ActivityNorm.L2: 0.5 * activations / dtype(expected),
                ActivityNorm.L2_SQUARED: activations,
                ActivityNorm.L1_L2_SQUARED: activations
                + 0.5 * ((activations > 0).astype(dtype) - (activations < 0)),
                ActivityNorm.HOYER: np.full(size, math.nan, dtype),
            }[norm]
        assert_array_equal(backend.host(gradients), added)


@dtypes
def test_l2_with_a_nan_poisons_every_gradient(backend, dtype):
    gradients = backend.array([0.0, 0.0], dtype)
    activations = backend.array([math.nan, 1.0], dtype)
    backend.regularization(0.5, "l2").apply(activations, gradients)
    assert np.isnan(backend.host(gradients)).all()


@norms
def test_a_penalty_too_large_for_float32_is_infinite(backend, norm):
    activations = backend.array([3e38, 3e38, 3e38], np.float32)
    found = float(backend.regularization(1.0, norm).penalty(activations))
    assert found == (3.0 if norm is ActivityNorm.HOYER else math.inf)  # which is scale-free


def test_a_sum_beyond_float64_is_infinite(backend):
    activations = backend.array([1.7e308, 1.7e308])
    assert float(backend.regularization(1.0, "l1").penalty(activations)) == math.inf


@norms
@dtypes
def test_the_sum_of_any_pieces_leads_to_the_penalty_of_the_whole(backend, norm, dtype):
    rng = np.random.default_rng(4)
    values = (rng.normal(size=1001) * 10.0 ** rng.uniform(-6, 6, 1001)).astype(dtype)
    reg = backend.regularization(0.1, norm)
    pieces = [reg.partial_sum(backend.array(p)) for p in np.split(values, [0, 1, 400, 900])]
    whole = reg.partial_sum(backend.array(values))
    assert sum(pieces) == sum(reversed(pieces)) == whole
    assert whole.dtype == dtype
    for total in whole.parts:
        power = ActivityNorm.L1 if total.degree == 1 else ActivityNorm.L2
        assert Fraction(total.units, 2**3222) == exact_sum(values, power)
    penalty = reg.finish(whole)
    assert type(penalty) is dtype
    assert penalty == backend.host(reg.penalty(backend.array(values)))


@norms
@dtypes
@pytest.mark.parametrize("reduction", ["sum", "mean", "batch", (1,)])
def test_the_gradient_of_pieces_is_that_of_the_whole(backend, norm, dtype, reduction):
    values = np.random.default_rng(7).normal(size=(40, 5)).astype(dtype)
    count = {"sum": None, "mean": 200, "batch": 40, (1,): 5}[reduction]
    reg = backend.regularization(0.1, norm, reduction=reduction)
    whole, gradients = (backend.array(np.ones_like(values)) for _ in range(2))
    activations = backend.array(values)
    penalty = reg.apply(activations, whole, scale=-3.0)
    pieces = [(slice(0, 1),), (slice(1, 33), slice(0, 2)), (slice(1, 33), slice(2, 5))]
    pieces += [(slice(33, 33),), (slice(33, None),)]
    total = sum(reg.partial_sum(activations[piece]) for piece in pieces)
    assert reg.finish(total, count=count) == backend.host(penalty)
    for piece in pieces:
        reg.add_gradient(activations[piece], gradients[piece], total, count=count, scale=-3.0)
    assert backend.host(gradients).tobytes() == backend.host(whole).tobytes()


@dtypes
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_hoyer_is_between_lam_and_lam_times_the_number_of_elements(backend, dtype, size):
    reg = backend.regularization(0.5, "hoyer")
    for values, expected in (([0.0, -1.0, 0.0, 0.0], 0.5), ([1.0, -1.0, 1.0, 1.0], 2.0)):
        found = float(reg.penalty(backend.array(values, dtype) * dtype(size)))
        assert found == pytest.approx(expected, rel=1e-15)


@dtypes
def test_no_piece_has_a_gradient_where_the_whole_has_none(backend, dtype):
    reg = backend.regularization(0.1, "l2", epsilon=1.0)
    activations, gradients = backend.array([0.5, 0.5], dtype), backend.array([0.0, 0.0], dtype)
    total = reg.partial_sum(activations)
    reg.add_gradient(activations, gradients, total)
    assert not backend.host(gradients).any()
    reg.add_gradient(activations, gradients, total + total + total)
    assert backend.host(gradients).all()


@norms
def test_out_is_overwritten_wherever_it_lies(backend, norm):
    values = np.random.default_rng(8).normal(size=(4, 6)).astype(np.float32)
    reg, activations = backend.regularization(0.1, norm), backend.array(values)
    penalty, gradient = reg.penalty_and_gradient(activations)
    assert penalty == reg.penalty(activations)
    room = backend.array(np.full((4, 12), np.nan, np.float32))
    out = room[:, ::2]
    assert reg.penalty_and_gradient(activations, out)[1] is out
    assert_array_equal(backend.host(out), backend.host(gradient))
    assert np.isnan(backend.host(room)[:, 1::2]).all()
    assert_array_equal(backend.host(activations), values)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@norms
def test_gradients_are_written_over_whatever_is_there(backend, norm, dtype):
    values = np.where(np.arange(48) % 5, np.linspace(-2.0, 2.0, 48), -0.0).reshape(6, 8)
    options = backend.regularization(0.1, norm).options
    for rows in (values, np.zeros((6, 8))):
        x = backend.array(rows.astype(dtype))
        expected = backend.array(np.zeros((6, 8), dtype))
        penalty = backend.regularization(0.1, norm).apply(x, expected)
        total = backend.regularization(0.1, norm).partial_sum(x)
        room = backend.array(np.full((12, 16), np.nan, dtype))
        for out in (room[:6, :8], room[::2, ::2], room.T[::2, ::2].T):
            room[...] = np.nan
            dispatch.add_gradient(options, x, out, total, None, 1.0, overwrite=True)
            assert backend.host(out).tobytes() == backend.host(expected).tobytes()
            room[...] = np.nan
            found = backend.regularization(0.1, norm).penalty_and_gradient(x, out)[0]
            assert backend.host(found).tobytes() == backend.host(penalty).tobytes()
            assert backend.host(out).tobytes() == backend.host(expected).tobytes()
            assert np.isnan(backend.host(room)).sum() == 12 * 16 - 48


@one_sum
def test_partial_sums_of_strided_subnormal_and_empty_pieces(backend, norm):
    values = np.array([[5e-324, 1e-310, -2.5], [3.0, 1e300, 0.0], [-0.0, 7.0, 1.0]])
    reg = backend.regularization(0.1, norm)
    for piece in (values.T[::2, ::-1], values[:0], values[1, 1]):
        exact = exact_sum(np.asarray(piece), norm)
        found = reg.partial_sum(
            backend.array(values).T[::2, ::-1] if piece.size == 6 else backend.array(piece)
        )
        assert Fraction(found.units, 2**3222) == exact


@one_sum
def test_the_partial_sum_of_what_is_not_finite(backend, norm):
    reg = backend.regularization(0.1, norm)

    def total(*values):
        return float(reg.partial_sum(backend.array(values)))

    assert total(1.0, -math.inf) == math.inf
    assert math.isnan(total(math.inf, math.nan))
    finite, infinite = (reg.partial_sum(backend.array([value])) for value in (1.0, math.inf))
    assert float(reg.finish(finite + infinite)) == math.inf


# Weights.

BAD = (-1.0, math.inf, math.nan)  # as weights
WEIGHTS = {
    "of features": (50,),
    "of tokens": (6, 1),
    "of elements": (6, 50),
}


@norms
@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
def test_with_weights_all_is_exactly_rounded(arrays_or_files, norm, shape):
    rng = np.random.default_rng(9)
    for dtype in DTYPES:
        values, keep = rng.normal(size=(6, 50)).astype(dtype), rng.random(shape) < 0.8
        weights = (rng.random(shape) * keep).astype(dtype)
        assert_exact(arrays_or_files, values, norm, scale=-3.0, weights=weights)
        values[~np.broadcast_to(keep, values.shape)] = math.nan
        for each in (keep, weights):
            assert_exact(arrays_or_files, values, norm, scale=-3.0, weights=each)


MASK = np.array([[True, True, False], [False, False, False]])


@pytest.mark.parametrize(
    ("reduction", "mask", "count"),
    [
        ("sum", MASK, 1),
        ("mean", MASK, 2),
        ("batch", MASK, 1),
        ((1,), MASK, 2),
        ((0, 1), MASK, 2),
        ("mean", MASK[:, :1], 3),
        ("mean", MASK[0], 4),
        ("batch", MASK[0], 2),
        (1, MASK[:, :1], 3),
        ("mean", np.array(True), 6),
        ("mean", MASK[1], 1),
        ("mean", MASK.astype(np.float32), 6),
        ("batch", MASK.astype(np.float32), 2),
    ],
)
def test_a_mask_counts_what_it_keeps_and_other_weights_count_nothing(
    arrays_or_files, reduction, mask, count
):
    x = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    x[~np.broadcast_to(mask, x.shape).astype(bool)] = math.nan
    options = {"reduction": reduction, "count": count, "weights": mask}
    assert_exact(arrays_or_files, x, ActivityNorm.L1, **options)


@pytest.mark.parametrize("norm", ["l1", "l2"])  # of one pass and of two
@pytest.mark.parametrize(
    "wrong",
    [np.ones(4), np.ones((1, 2, 3)), np.ones(3, np.int64), *(np.full((2, 1), v) for v in BAD)],
    ids=["shape", "axes", "dtype", *map(str, BAD)],
)
def test_wrong_weights_leave_everything_unwritten(arrays_or_files, norm, wrong):
    kind, reg = arrays_or_files, arrays_or_files.regularization(0.5, norm)
    x, g, weights = map(kind.array, (np.ones((2, 3)), np.full((2, 3), 7.0), wrong))
    if kind.name == "cupy" and wrong.shape == (2, 1):  # nothing waits to see them
        assert math.isnan(reg.penalty(x, weights=weights))
        return
    writes = kind.name not in ("jax", "dask")
    with pytest.raises((TypeError, ValueError), match="weights"):
        kind.host(
            reg.apply(x, g, weights=weights)
            if writes
            else reg.penalty_and_gradient(x, weights=weights)[0]
        )
    assert (kind.host(g) == 7.0).all()


# Properties.

elements = st.floats(-1e6, 1e6, width=32).map(lambda v: v if abs(v) > 1e-3 else 0.0)
arrays = hnp.arrays(
    np.float64, hnp.array_shapes(max_dims=3, max_side=6), elements=elements, fill=st.nothing()
)


@norms
@given(values=arrays)
def test_apply_adds_and_leaves_activations_alone(backend, norm, values):
    activations = backend.array(values)
    once, twice = backend.array(values * 0), backend.array(values * 0)
    reg = backend.regularization(0.25, norm)
    reg.apply(activations, once)
    reg.apply(activations, twice)
    reg.apply(activations, twice)
    assert_array_equal(backend.host(activations), values)
    assert_array_equal(backend.host(twice), 2 * backend.host(once))


@one_sum
@given(values=arrays, exponent=st.integers(-20, 20), sign=st.sampled_from([-1.0, 1.0]))
def test_the_penalty_is_absolutely_homogeneous(backend, norm, values, exponent, sign):
    degree = 2 if norm is ActivityNorm.L2_SQUARED else 1
    reg = backend.regularization(0.25, norm)
    penalty = float(reg.penalty(backend.array(values)))
    scaled = float(reg.penalty(backend.array(sign * 2.0**exponent * values)))
    assert scaled == 2.0 ** (exponent * degree) * penalty  # powers of two scale without rounding


@norms
@given(values=arrays)
def test_a_change_of_sign_changes_the_sign_of_the_gradient(backend, norm, values):
    reg = backend.regularization(0.25, norm)
    plus, minus = backend.array(values * 0), backend.array(values * 0)
    penalty = reg.apply(backend.array(values), plus)
    assert float(penalty) == float(reg.apply(backend.array(-values), minus))
    assert_array_equal(backend.host(plus), -backend.host(minus))


@norms
@given(values=arrays, seed=st.integers(0, 2**32 - 1))
def test_a_permutation_permutes_the_gradient(backend, norm, values, seed):
    order = np.random.default_rng(seed).permutation(values.size)
    flat = values.ravel()
    reg = backend.regularization(0.25, norm)
    gradients, shuffled = backend.array(flat * 0), backend.array(flat * 0)
    penalty = reg.apply(backend.array(flat), gradients)
    assert float(penalty) == float(reg.apply(backend.array(flat[order]), shuffled))
    assert_array_equal(backend.host(gradients)[order], backend.host(shuffled))


@norms
@given(
    values=hnp.arrays(
        np.float64,
        hnp.array_shapes(max_dims=2, max_side=4),
        elements=st.floats(0.125, 8.0).flatmap(lambda v: st.sampled_from([v, -v])),
        fill=st.nothing(),
    )
)
def test_the_gradient_is_the_derivative(backend, norm, values):
    reg = backend.regularization(0.25, norm)
    gradients = backend.array(values * 0)
    reg.apply(backend.array(values), gradients)
    found, h = backend.host(gradients), 2.0**-17
    for index in np.ndindex(values.shape):
        sides = []
        for step in (h, -h):
            moved = values.copy()
            moved[index] += step
            sides.append(float(reg.penalty(backend.array(moved))))
        assert_allclose(found[index], (sides[0] - sides[1]) / (2 * h), rtol=1e-5, atol=1e-7)
