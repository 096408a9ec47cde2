"""Statistics of activations: counted on the way, without changing a bit."""

from __future__ import annotations

import math
import threading

import dask.array as da
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from supported import dtypes

from actreg_dispatch import ActivationStatistics, ActivityRegularization
from actreg_dispatch.norms import NORMS

norms = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture(params=["numpy", "numba"])
def name(request):
    return request.param


def random(shape, dtype=np.float32, seed=0):
    """Return numbers of both signs, half of them 0."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * (rng.random(shape) < 0.5)).astype(dtype)


def check(statistics, *arrays):
    """Compare with what NumPy counts of pairs of activations and what of them is kept."""
    kept = [x[np.broadcast_to(keep, x.shape)].astype(np.float64) for x, keep in arrays]
    every = np.concatenate(kept)
    assert statistics.elements == every.size
    assert statistics.nonzero == np.count_nonzero(every)
    assert statistics.largest == np.abs(every).max(initial=0.0)
    assert statistics.share_of_zeros == (every == 0).sum() / every.size


@norms
@dtypes
def test_what_is_counted_changes_no_bit(name, norm, dtype):
    reg, x = ActivityRegularization(0.1, norm, backend=name), random((60, 70), dtype)
    statistics = ActivationStatistics()
    expected, found = np.ones_like(x), np.ones_like(x)
    assert reg.apply(x, expected) == reg.apply(x, found, statistics=statistics)
    assert found.tobytes() == expected.tobytes()
    check(statistics, (x, True))
    assert reg.penalty(x[:, ::3], statistics=statistics) == reg.penalty(x[:, ::3])
    check(statistics, (x, True), (x[:, ::3], True))


@dtypes
def test_what_weighs_nothing_is_not_counted(name, dtype):
    reg, x = ActivityRegularization(0.1, "l2", backend=name), random((60, 700), dtype)
    for w in (random(700, dtype, 1) > 0, np.abs(random((60, 1), dtype, 2)), x != x[0, 0]):
        statistics = ActivationStatistics(per_feature=True)
        kept = np.broadcast_to(w != 0, x.shape)
        padded = np.where(kept, x, np.array(math.nan, dtype))
        reg.apply(padded, np.zeros_like(x), weights=w, statistics=statistics)
        check(statistics, (x, kept))
        assert_array_equal(statistics.active, ((x != 0) & kept).sum(axis=0))


@pytest.mark.parametrize("shape", [(5,), (200, 300), (7, 11, 13), (0, 4), (4, 0), (300, 1)])
def test_units_are_counted_along_the_last_axis(name, shape):
    reg, x = ActivityRegularization(0.1, backend=name), random(shape)
    others = tuple(range(x.ndim - 1))
    statistics = ActivationStatistics(per_feature=True)
    assert statistics.active is None
    for times in (1, 2):
        reg.penalty(x, statistics=statistics)
        assert_array_equal(statistics.active, times * (x != 0).sum(axis=others))
        assert statistics.active.dtype == np.int64
    reg.penalty(np.asfortranarray(x), statistics=statistics)
    assert statistics.active.sum() == 3 * np.count_nonzero(x)


def test_nan_is_the_largest_and_not_zero(name):
    reg, statistics = ActivityRegularization(0.1, backend=name), ActivationStatistics()
    reg.penalty(np.array([1.0, -math.inf]), statistics=statistics)
    assert statistics.largest == math.inf
    reg.penalty(np.array([math.nan, 0.0, -math.nan, 5.0]), statistics=statistics)
    reg.penalty(np.array([1.0]), statistics=statistics)
    assert math.isnan(statistics.largest)
    assert (statistics.elements, statistics.nonzero) == (7, 6)


@pytest.mark.parametrize("size", [20, 20_000, 40_000])
def test_nan_stays_the_largest_whatever_is_counted_after_it(name, size):
    reg, x = ActivityRegularization(0.1, backend=name), np.ones((size // 2, 4), np.float32)
    x[0, 0] = math.nan
    for view, weights in ((x[:, :2], None), (x[:, :2], np.ones(2, np.float32)), (x, None)):
        statistics = ActivationStatistics()
        reg.penalty(view, weights=weights, statistics=statistics)
        assert math.isnan(statistics.largest)


def test_an_exact_sum_counts_once(name):
    reg, statistics = ActivityRegularization.l2_squared(1.0, backend=name), ActivationStatistics()
    tie = np.array([1.0, 2.0**-12, 0.0], np.float32)
    reg.apply(tie, np.zeros_like(tie), statistics=statistics)
    assert (statistics.elements, statistics.nonzero) == (3, 2)


def test_layers_are_counted_together(name):
    reg, statistics = ActivityRegularization(0.1, "l2", backend=name), ActivationStatistics()
    xs = [random(5), random((40, 30))]
    expected, found = ([np.ones_like(x) for x in xs] for _ in range(2))
    total, _ = reg.apply_all(xs, expected)
    assert reg.apply_all(xs, found, statistics=statistics).total == total
    for one, other in zip(expected, found, strict=True):
        assert_array_equal(one, other)
    check(statistics, *((x, True) for x in xs))


def test_statistics_of_nothing_begin_anew():
    statistics = ActivationStatistics()
    assert math.isnan(statistics.share_of_zeros)
    assert repr(statistics) == (
        "<ActivationStatistics: 0 of 0 elements are not 0, the largest is 0.0>"
    )
    ActivityRegularization(0.1).penalty(np.ones(3), statistics=statistics)
    assert statistics.elements == 3
    statistics.clear()
    assert statistics.elements == 0


def test_threads_may_share_statistics():
    reg, statistics, x = ActivityRegularization(0.1), ActivationStatistics(), np.ones(10)

    def work():
        for _ in range(200):
            reg.penalty(x, statistics=statistics)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statistics.elements == 8000


def test_a_call_that_raises_counts_nothing(name):
    reg, statistics = ActivityRegularization(0.1, backend=name), ActivationStatistics()
    for call in (
        lambda: reg.penalty(np.ones(3), weights=-np.ones(3), statistics=statistics),
        lambda: reg.apply(np.ones(3), np.ones(4), statistics=statistics),
        lambda: reg.apply_all([np.ones(3)] * 2, [np.ones(3), np.ones(2)], statistics=statistics),
    ):
        with pytest.raises(ValueError, match=r"^(weights|gradients)"):
            call()
    assert statistics.elements == 0


def test_statistics_that_do_not_fit_are_refused(name):
    reg, g = ActivityRegularization(0.1, backend=name), np.zeros((2, 3))
    with pytest.raises(TypeError, match=r"statistics=\{\} are of type dict; pass an Activation"):
        reg.apply(np.ones((2, 3)), g, statistics={})
    statistics = ActivationStatistics(per_feature=True)
    reg.penalty(np.ones(4), statistics=statistics)
    with pytest.raises(ValueError, match=r"count 4 units, but .* activations has 3; pass"):
        reg.apply(np.ones((2, 3)), g, statistics=statistics)
    with pytest.raises(ValueError, match="activations have no axes; pass ActivationStatistics"):
        reg.penalty(np.array(1.0), statistics=statistics)
    assert not g.any()
    assert statistics.elements == 4


def test_layers_must_have_the_units_of_each_other(name):
    reg, statistics = ActivityRegularization(0.1, backend=name), ActivationStatistics()
    xs, gs = ([make((2, n)) for n in (3, 1, 3)] for make in (np.ones, np.zeros))
    assert reg.apply_all(xs, gs, statistics=statistics).total
    assert statistics.elements == 14
    statistics = ActivationStatistics(per_feature=True)
    for g in gs:
        g[...] = 0
    with pytest.raises(ValueError, match=r"count 3 units, but .* activations has 1; pass"):
        reg.apply_all(xs, gs, statistics=statistics)
    assert not any(g.any() for g in gs)
    assert statistics.active is None


def check_not_counted(x, name):
    reg, statistics = ActivityRegularization(0.1), ActivationStatistics()
    with pytest.raises(TypeError, match=f"statistics cannot be counted of {name} arrays; leave"):
        reg.penalty(x, statistics=statistics)
    with pytest.raises(TypeError, match="cannot be updated in place"):
        reg.apply(x, x, statistics=statistics)


def test_lazy_arrays_cannot_be_counted():
    check_not_counted(da.ones(3), "Dask")


def test_jax_arrays_cannot_be_counted(jax):
    check_not_counted(jax.numpy.ones(3), "JAX")
