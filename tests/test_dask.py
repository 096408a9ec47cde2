"""Dask arrays: lazy, independent of the chunks, on every scheduler."""

from __future__ import annotations

import logging
import math
import operator
import os
import signal
import time

import dask
import dask.array as da
import distributed
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse

from actreg_dispatch import (
    ActivityNorm,
    ActivityRegularization,
    MixedArraysError,
    registry,
    use_backend,
)
from actreg_dispatch.backends.reference import ReferenceBackend
from actreg_dispatch.norms import NORMS
from actreg_dispatch.oracle import exact_result
from actreg_dispatch.runtime import threads
from actreg_dispatch.sums.exact import PairedSum, PartialSum

norms = pytest.mark.parametrize("norm", ActivityNorm, ids=lambda norm: norm.value)


@pytest.fixture(autouse=True)
def _one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return rng.normal(size=(12, 10)) * 10.0 ** rng.uniform(-8, 8, (12, 10))


def bits(*arrays):
    return [np.asarray(array).tobytes() for array in arrays]


def no_computing(graph, keys, **options):
    raise AssertionError("computed while the graph was being built")


# What is computed.


@norms
@given(
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    data=st.data(),
)
def test_no_chunking_changes_a_bit(norm, shape, dtype, data):
    whole = np.random.default_rng(math.prod(shape)).normal(size=shape).astype(dtype)
    chunks = []
    for length in shape:
        cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
        chunks.append(tuple(np.diff([0, *cuts, length]).tolist()))
    reg = ActivityRegularization(0.1, norm)
    penalty, gradient = reg.penalty_and_gradient(da.from_array(whole, tuple(chunks)), scale=-3.0)
    expected = exact_result(whole, np.zeros_like(whole), norm, 0.1, None, -3.0)
    assert bits(*dask.compute(penalty, gradient)) == bits(*expected)
    assert bits(reg.penalty(da.from_array(whole, tuple(chunks))).compute()) == bits(expected[0])


@norms
def test_bfloat16(norm):
    whole = np.random.default_rng(1).normal(size=(5, 9)).astype(ml_dtypes.bfloat16)
    reg = ActivityRegularization(0.1, norm)
    penalty, gradient = reg.penalty_and_gradient(da.from_array(whole, chunks=(2, 4)))
    assert (penalty.dtype, gradient.dtype) == (np.float32, ml_dtypes.bfloat16)
    expected = exact_result(whole, np.zeros_like(whole), norm, 0.1)
    assert bits(*dask.compute(penalty, gradient)) == bits(*expected)


@norms
def test_a_tree_of_many_sums(norm):
    whole = np.random.default_rng(2).normal(size=(300, 4))
    reg = ActivityRegularization(0.1, norm)
    for split_every in (2, 300):
        with dask.config.set(split_every=split_every):
            penalty = reg.penalty(da.from_array(whole, chunks=(1, 2)))
            assert bits(penalty.compute()) == bits(reg.penalty(whole))


@norms
def test_foreign_byte_order_and_fortran_order(norm, values):
    reg = ActivityRegularization(0.1, norm)
    expected = bits(*reg.penalty_and_gradient(values))
    for other in (values.astype(">f8"), np.asfortranarray(values)):
        found = dask.compute(reg.penalty_and_gradient(da.from_array(other, chunks=5)))[0]
        assert bits(found[0], np.ascontiguousarray(found[1], np.float64)) == expected


@norms
def test_chunks_that_dask_made_scalars(norm, values):
    reg = ActivityRegularization(0.1, norm)
    for lazy in (da.from_array(values, chunks=5)[3, 4], da.from_array(values, chunks=5).max()):
        penalty, gradient = dask.compute(*reg.penalty_and_gradient(lazy))
        expected = reg.penalty_and_gradient(np.asarray(lazy.compute()))
        assert bits(penalty, gradient) == bits(*expected)
        assert gradient.shape == ()


def test_infinity_and_nan_propagate():
    activations = da.from_array(np.array([math.inf, 1.0, math.nan, -2.0]), chunks=1)
    reg = ActivityRegularization.l1(0.5)
    penalty, gradient = dask.compute(*reg.penalty_and_gradient(activations))
    assert math.isnan(penalty)
    assert gradient.tolist() == [0.5, 0.5, 0.0, -0.5]
    assert reg.penalty(activations[:2]).compute() == math.inf


def test_l2_has_no_gradient_up_to_epsilon():
    activations = da.from_array(np.array([3.0, 4.0]), chunks=1)
    for epsilon, expected in ((25.0, [0.0, 0.0]), (24.0, [0.6, 0.8])):
        reg = ActivityRegularization.l2(1.0, epsilon=epsilon)
        assert reg.penalty_and_gradient(activations)[1].compute().tolist() == expected


@norms
@pytest.mark.parametrize("reduction", ["mean", "batch", 1])
def test_reductions_count_over_all_chunks(norm, reduction, values):
    reg = ActivityRegularization(0.1, norm, reduction=reduction)
    expected = bits(*reg.penalty_and_gradient(values, scale=2.0))
    lazy = reg.penalty_and_gradient(da.from_array(values, chunks=(5, 3)), scale=2.0)
    assert bits(*dask.compute(*lazy)) == expected


@norms
@pytest.mark.parametrize("reduction", ["sum", "mean", "batch", -1])
def test_unknown_lengths_are_counted_lazily(norm, reduction, values):
    rows, columns = values[:, 0] > 0, values[0] > 0
    activations = da.from_array(values, chunks=(5, 3))
    reg = ActivityRegularization(0.1, norm, reduction=reduction)
    for lazy, whole in (
        (activations[da.from_array(rows, chunks=5)], values[rows]),
        (activations[:, da.from_array(columns, chunks=3)], values[:, columns]),
        (
            activations[da.from_array(rows, chunks=5)][:, da.from_array(columns, chunks=3)],
            values[rows][:, columns],
        ),
        (activations[activations > 0], values[values > 0]),
        (activations[activations > 1e300], values[:0, 0]),
    ):
        with dask.config.set(scheduler=no_computing):
            assert math.isnan(lazy.size)
            built = reg.penalty_and_gradient(lazy)
            assert_array_equal(built[1].shape, lazy.shape)
        assert bits(*dask.compute(*built)) == bits(*reg.penalty_and_gradient(whole))


@norms
def test_partial_sums_are_lazy_and_add_up_with_any_others(norm, values):
    reg = ActivityRegularization(0.1, norm)
    with dask.config.set(scheduler=no_computing):
        lazy = reg.partial_sum(da.from_array(values[:7], chunks=3))
    one = lazy.compute()
    assert type(one) is (PairedSum if len(NORMS[norm].terms) > 1 else PartialSum)
    assert one == reg.partial_sum(values[:7])
    for total in (sum([lazy, reg.partial_sum(values[7:])]), reg.partial_sum(values[7:]) + lazy):
        assert bits(reg.finish(total.compute())) == bits(reg.penalty(values))
    with pytest.raises(TypeError, match=r"total=Delayed.*computed if it is lazy"):
        reg.finish(lazy)


# Weights.


def weights_of(shape, dtype, seed=5):
    """Return weights of which some are 0."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.random(shape) * (rng.random(shape) < 0.7)).astype(dtype)


WEIGHTS = {"full": (12, 10), "features": (10,), "rows": (12, 1), "one": (1, 1), "0-d": ()}


@norms
@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", [bool, np.float64])
@pytest.mark.parametrize("chunks", [(5, 3), (12, 10), (1, 4)])
def test_weights_have_the_bits_of_the_whole_array(norm, shape, dtype, chunks, values):
    w = weights_of(shape, dtype)
    for reduction in ("sum", "mean", "batch", 1):
        reg = ActivityRegularization(0.1, norm, reduction=reduction)
        activations = da.from_array(values, chunks=chunks)
        own = tuple(
            1 if w.shape[axis] == 1 else activations.chunks[axis] for axis in range(-w.ndim, 0)
        )
        weights = da.from_array(w, chunks=own)
        with dask.config.set(scheduler=no_computing):
            lazy = reg.penalty_and_gradient(activations, scale=2.0, weights=weights)
            total = reg.partial_sum(activations, weights=weights)
            alone = reg.penalty(activations, weights=weights)
        assert (alone.name, lazy[1].chunks) == (lazy[0].name, activations.chunks)
        expected = reg.penalty_and_gradient(values, scale=2.0, weights=w)
        assert bits(*dask.compute(*lazy)) == bits(*expected)
        assert total.compute() == reg.partial_sum(values, weights=w)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weights_of_the_compute_dtype_and_of_that_of_the_activations(dtype, values):
    x, reg = (values * 1e-8).astype(dtype), ActivityRegularization.l2(0.1)
    for w in (weights_of(10, dtype), weights_of((12, 10), np.float32)):
        lazy = reg.penalty_and_gradient(
            da.from_array(x, chunks=5), weights=da.from_array(w, chunks=5)
        )
        assert bits(*dask.compute(*lazy)) == bits(*reg.penalty_and_gradient(x, weights=w))


def test_weights_of_other_chunks_are_rechunked_and_activations_never(values):
    reg, w = ActivityRegularization.l2(0.1), weights_of((12, 10), np.float64)
    activations = da.from_array(values, chunks=(5, 3))
    expected = bits(*reg.penalty_and_gradient(values, weights=w))
    for chunks in (12, (1, 10), ((4, 0, 8), (10,))):
        lazy = reg.penalty_and_gradient(activations, weights=da.from_array(w, chunks=chunks))
        assert lazy[1].chunks == activations.chunks
        assert bits(*dask.compute(*lazy)) == expected


def test_weights_of_empty_arrays_are_rechunked():
    activations, weights = da.ones(0, chunks=((0, 0),)), da.ones(0, chunks=((0, 0, 0),))
    lazy = ActivityRegularization.l2(0.1).penalty_and_gradient(activations, weights=weights)
    assert dask.compute(*lazy)[0] == 0
    assert lazy[1].chunks == activations.chunks


@pytest.mark.usefixtures("registered")
def test_weights_that_are_broadcast_are_never_expanded(values):
    largest = []

    class Spy(ReferenceBackend):
        name = "spy"

        def partial_sum(self, activations, norm, weights=None):
            largest.append(weights.strides)
            return super().partial_sum(activations, norm, weights)

    registry.register_backend("spy", Spy, array_type="numpy.ndarray")
    weights = da.from_array(weights_of((12, 1), np.float64), chunks=(4, 1))
    activations = da.from_array(values, chunks=(4, 10))
    ActivityRegularization(0.1, backend="spy").penalty(activations, weights=weights).compute()
    assert largest == [(8, 0)] * 3


@pytest.mark.parametrize("reduction", ["sum", "mean", "batch", -1])
@pytest.mark.parametrize("dtype", [bool, np.float64])
def test_weights_of_unknown_lengths(reduction, dtype, values):
    rows = values[:, 0] > 0
    chosen = da.from_array(rows, chunks=5)
    activations = da.from_array(values, chunks=(5, 3))[chosen]
    reg = ActivityRegularization(0.1, "l2", reduction=reduction)
    for shape in ((12, 10), (12, 1), (10,), (1, 10)):
        w = weights_of(shape, dtype)
        weights = da.from_array(w, chunks=tuple({12: 5, 10: 3, 1: 1}[n] for n in shape))
        if shape[0] == 12:
            w, weights = w[rows], weights[chosen]
        with dask.config.set(scheduler=no_computing):
            lazy = reg.penalty_and_gradient(activations, weights=weights)
        expected = reg.penalty_and_gradient(values[rows], weights=w)
        assert bits(*dask.compute(*lazy)) == bits(*expected)


def test_unknown_lengths_that_do_not_match_are_refused(values):
    reg = ActivityRegularization(0.1)
    activations = da.from_array(values, chunks=(5, 10))
    some = activations[activations[:, 0] > 0]
    with pytest.raises(ValueError, match=r"weights have 2 chunks along axis -2 and activations 3"):
        reg.penalty(some, weights=da.ones((12, 1), chunks=(6, 1)))
    one_each = da.ones((3, 1), chunks=1)  # which no task may broadcast
    for lazy in reg.penalty_and_gradient(some, weights=one_each):
        with pytest.raises(ValueError, match=r"weights have a chunk of.*call compute_chunk_sizes"):
            lazy.compute()


def test_what_weighs_nothing_is_left_out_in_any_chunk(values):
    x, mask = values.copy(), values > 0
    x[~mask] = math.nan
    reg = ActivityRegularization.l2(0.1, reduction="mean")
    lazy = reg.penalty_and_gradient(
        da.from_array(x, chunks=4), weights=da.from_array(mask, chunks=4)
    )
    assert bits(*dask.compute(*lazy)) == bits(*reg.penalty_and_gradient(x, weights=mask))
    assert not lazy[1].compute()[~mask].any()


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_bad_weights_raise_in_the_task(norm, bad, values):
    w = np.ones((12, 10))
    w[11, 9] = bad
    reg = ActivityRegularization(0.1, norm)
    weights = da.from_array(w, chunks=5)
    lazy = reg.penalty_and_gradient(da.from_array(values, chunks=5), weights=weights)
    for each in lazy:
        with pytest.raises(ValueError, match=r"weights have .*use 0 to leave an element out"):
            each.compute()


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.ones(10), MixedArraysError, r"weights are a numpy\.ndarray .*dask\.array\.from_array"),
        ([1.0], MixedArraysError, r"weights are a builtins\.list but activations a dask\.array"),
        (da.ones(12), ValueError, r"weights have shape \(12,\), which does not broadcast to \(12,"),
        (da.ones((1, 12, 10)), ValueError, "does not broadcast"),
        (da.ones(10, dtype=np.float32), TypeError, "weights have dtype float32, but activations"),
        (da.ones(10, dtype=int), TypeError, "weights have dtype int64; convert them"),
        (da.ma.masked_greater(da.ones(10), 3), TypeError, "weights are a masked array"),
    ],
    ids=["NumPy", "list", "shape", "axes", "float32", "int", "masked"],
)
def test_weights_that_do_not_fit_are_refused_when_the_graph_is_built(
    weights, error, message, values
):
    reg, activations = ActivityRegularization.l1(0.1), da.from_array(values, chunks=5)
    for call in (reg.penalty, reg.penalty_and_gradient, reg.partial_sum):
        with pytest.raises(error, match=message):
            call(activations, weights=weights)


def test_equal_weights_have_equal_names_and_no_others(values):
    reg, activations = ActivityRegularization.l2(0.1), da.from_array(values, chunks=5)

    def names(weights):
        penalty, gradient = reg.penalty_and_gradient(activations, weights=weights)
        return penalty.name, gradient.name, reg.partial_sum(activations, weights=weights).key

    each = [None, da.ones(10), da.ones(10, dtype=bool), da.ones((12, 10)), da.zeros(10)]
    distinct = [names(weights) for weights in each]
    for kind in zip(*distinct, strict=True):
        assert len(set(kind)) == len(each)
    assert [names(weights) for weights in each] == distinct


# Laziness, graphs and names.


@norms
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nothing_is_computed_to_build_the_graph(norm, dtype, values):
    activations = da.from_array((values * 1e-8).astype(dtype), chunks=(5, 3)) * 2
    reg = ActivityRegularization(0.1, norm)
    computed = []

    def count(graph, keys, **options):
        computed.append(keys)
        return dask.get(graph, keys, **options)

    with dask.config.set(scheduler=count):
        penalty, gradient = reg.penalty_and_gradient(activations)
        alone = reg.penalty(activations)
        reg.partial_sum(activations)
        for lazy in (penalty, alone):
            assert isinstance(lazy, da.Array)
            assert (lazy.shape, lazy.dtype) == ((), max(np.dtype(dtype), np.dtype(np.float32)))
            assert (type(lazy._meta), lazy._meta.dtype) == (np.ndarray, lazy.dtype)
        assert (gradient.chunks, gradient.dtype) == (activations.chunks, dtype)
        assert type(gradient._meta) is np.ndarray
        assert not computed
        found = penalty.compute()
    assert computed
    assert type(found) is penalty.dtype.type


@norms
def test_the_graph_grows_linearly(norm):
    reg = ActivityRegularization(0.1, norm)

    def tasks(chunks, shape):
        activations = da.zeros(shape, chunks=chunks)
        penalty, gradient = reg.penalty_and_gradient(activations)
        merged = {**penalty.__dask_graph__(), **gradient.__dask_graph__()}
        return len(merged) - len(activations.__dask_graph__()), math.prod(activations.numblocks)

    for chunks, shape in (((1,), (64,)), ((1,), (4096,)), ((1, 8, 8), (512, 8, 8))):
        size, number = tasks(chunks, shape)
        assert 2 * number < size <= 3 * number + 10  # a sum, a gradient, less than one addition
    assert tasks((1,), (1,))[0] <= 6


@norms
def test_gradient_chunks_depend_on_no_other_chunk_but_in_l2(norm, values):
    read = []

    def block(block_id=None):
        read.append(block_id)
        return values[4 * block_id[0] : 4 * block_id[0] + 4]

    activations = da.map_blocks(block, chunks=((4, 4, 4), 10), dtype=float, meta=values[:0])
    _, gradient = ActivityRegularization(0.1, norm).penalty_and_gradient(activations)
    gradient.blocks[1].compute()
    assert set(read) == ({(0, 0), (1, 0), (2, 0)} if NORMS[norm].two_pass else {(1, 0)})


def test_a_built_graph_keeps_the_lambda_that_it_was_built_with(values):
    activations = da.from_array(values, chunks=5)
    reg = ActivityRegularization.l1(0.1)
    expected = bits(*reg.penalty_and_gradient(values))
    penalty, gradient = reg.penalty_and_gradient(activations)
    reg.lam = 7.0
    assert bits(*dask.compute(penalty, gradient)) == expected
    assert reg.lam == 7.0
    assert bits(reg.penalty(activations).compute()) == bits(reg.penalty(values))


def test_equal_calls_have_equal_names_and_no_others(values):
    activations = da.from_array(values.astype(np.float32), chunks=5)

    def names(reg, activations=activations, **options):
        penalty, gradient = reg.penalty_and_gradient(activations, **options)
        return penalty.name, gradient.name, reg.partial_sum(activations).key

    class Other(ActivityRegularization):
        pass

    for _ in range(2):
        distinct = [
            names(ActivityRegularization(0.1)),
            names(ActivityRegularization(0.2)),
            names(ActivityRegularization(0.1, reduction="mean")),
            names(ActivityRegularization(0.1, reduction="batch")),
            names(ActivityRegularization(0.1, "l2")),
            names(ActivityRegularization(0.1, "l2", epsilon=0.0)),
            names(ActivityRegularization(0.1, "l2_squared")),
            names(ActivityRegularization(0.1, backend="numpy")),
            names(ActivityRegularization(0.1), activations.rechunk(4)),
            names(ActivityRegularization(0.1), activations.astype(np.float64)),
        ]
        for kind in zip(*distinct, strict=True):
            assert len(set(kind)) == len(distinct)
        again = ActivityRegularization(3.0)
        again.lam = 0.1
        again.apply(values.copy(), values.copy())  # what the object remembers is no part of it
        assert names(again) == names(Other(0.1)) == distinct[0]  # options are all that tasks get
        scaled = {names(again, scale=scale)[1] for scale in (1.0, 2.0, -0.0, 0.0, math.nan)}
        assert len(scaled) == 5
        assert distinct[0][1] in scaled
        assert names(again, scale=np.float32(2.0)) == names(again, scale=2)
    assert names(again)[0] == again.penalty(activations).name
    assert dask.base.tokenize(again) == dask.base.tokenize(ActivityRegularization(0.1))


def test_names_are_the_same_in_another_process(python):
    code = """
import dask.array as da
from actreg_dispatch import ActivityRegularization
activations = da.ones((4, 4), chunks=2)
print(ActivityRegularization.l2(0.1).penalty(activations).name)
print(ActivityRegularization.l1(0.1).penalty_and_gradient(activations.sum())[1].name)
"""
    assert python("-c", code).stdout == python("-c", code).stdout


@norms
def test_the_results_are_ordinary_dask_arrays(norm, values):
    reg = ActivityRegularization(0.1, norm)
    penalty, gradient = reg.penalty_and_gradient(da.from_array(values, chunks=(5, 3)) + 0.0)
    expected_penalty, expected = reg.penalty_and_gradient(values)
    assert_array_equal(gradient[3:9:2, ::-1].compute(), expected[3:9:2, ::-1])
    assert_array_equal(gradient.rechunk((4, 10)).map_blocks(np.negative).compute(), -expected)
    assert_array_equal((gradient.T @ gradient).shape, (10, 10))
    assert_array_equal((gradient / penalty).compute(), expected / expected_penalty)
    assert_array_equal(penalty.map_blocks(operator.neg).compute(), -expected_penalty)
    optimized = dask.optimize(penalty, gradient)
    assert bits(*dask.compute(*optimized)) == bits(expected_penalty, expected)
    kept = dask.persist(penalty, gradient)
    assert bits(*dask.compute(*kept)) == bits(expected_penalty, expected)


def test_chunks_are_never_written(values):
    before = values.copy()
    values.flags.writeable = False
    for norm in ActivityNorm:
        reg = ActivityRegularization(0.1, norm)
        activations = da.from_array(values, chunks=5).persist()
        penalty, gradient = dask.compute(*reg.penalty_and_gradient(activations))
        assert not np.shares_memory(gradient, values)
        assert bits(penalty) == bits(reg.penalty(before))
        assert bits(activations.compute(), values) == bits(before, before)


# What is refused.


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "object", "longdouble"])
def test_dtypes_are_refused_when_the_graph_is_built(dtype):
    activations = da.zeros(4, chunks=2, dtype=dtype)
    reg = ActivityRegularization.l1(0.1)
    for call in (reg.penalty, reg.penalty_and_gradient, reg.partial_sum):
        with pytest.raises(TypeError, match=r"activations have dtype.*convert them to float32"):
            call(activations)


def test_masked_chunks_are_refused_when_the_graph_is_built():
    activations = da.ma.masked_greater(da.ones(4, chunks=2), 3)
    with pytest.raises(TypeError, match="activations are a masked array"):
        ActivityRegularization.l1(0.1).penalty(activations)


def test_chunks_of_no_supported_library_are_refused_when_the_graph_is_built():
    activations = da.ones((4, 4), chunks=2).map_blocks(sparse.csr_array, dtype=float)
    activations._meta = sparse.csr_array((0, 0))
    with pytest.raises(TypeError, match=r"must be a NumPy or CuPy array, not a scipy\.sparse"):
        ActivityRegularization.l1(0.1).penalty(activations)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (lambda block: block.astype(int), "activations have dtype int64"),
        (np.ma.masked_array, "activations are a masked array"),
        (list, "must be a NumPy or CuPy array, not a builtins.list"),
    ],
)
def test_chunks_that_are_not_what_the_array_says_are_refused_by_the_task(chunk, message):
    activations = da.ones(4, chunks=2).map_blocks(chunk, dtype=float, meta=np.empty(0))
    for lazy in ActivityRegularization.l1(0.1).penalty_and_gradient(activations):
        with pytest.raises(TypeError, match=message):
            lazy.compute()


def test_numbers_are_checked_when_the_graph_is_built():
    activations = da.ones(4, chunks=2, dtype=np.float32)
    with pytest.raises(ValueError, match=r"lam=1e\+39 is too large for float32"):
        ActivityRegularization.l1(1e39).penalty(activations)
    with pytest.raises(TypeError, match="scale='2'"):
        ActivityRegularization.l1(0.1).penalty_and_gradient(activations, scale="2")
    with pytest.raises(ValueError, match="activations have no axes"):
        ActivityRegularization.l1(0.1, reduction="batch").penalty(activations.sum())
    unknown = activations[activations > 0] / 1000
    lazy = [ActivityRegularization(lam, reduction="mean").penalty(unknown) for lam in (1e39, 1e40)]
    assert_allclose(lazy[0].compute(), 1e36, rtol=1e-6)  # λ is divided by what is not known yet
    with pytest.raises(ValueError, match=r"lam=1e\+40 is too large for float32"):
        lazy[1].compute()


def test_updates_in_place_are_refused_and_the_functional_form_is_named(values):
    activations = da.from_array(values, chunks=5)
    gradients = da.zeros_like(activations)
    name = gradients.name
    reg = ActivityRegularization.l1(0.1)
    with pytest.raises(TypeError, match=r"gradients .*reg.penalty_and_gradient\(activations\)"):
        reg.apply(activations, gradients)
    with pytest.raises(TypeError, match=r"gradients .*reg.penalty_and_gradient\(activations\)"):
        reg.apply(activations, gradients, weights=activations)
    with pytest.raises(TypeError, match=r"gradients .*dask.array.map_blocks"):
        reg.add_gradient(activations, gradients)
    with pytest.raises(TypeError, match=r"out .*leave it out.*dask.array.store"):
        reg.penalty_and_gradient(activations, np.empty_like(values))
    with pytest.raises(MixedArraysError, match=r"gradients are a dask.array.Array"):
        reg.apply(values, gradients)
    assert gradients.name == name


# Where and how it is computed.


def backends_used(caplog):
    return {record.getMessage().split()[1] for record in caplog.records}


@norms
def test_the_choice_of_backend_is_that_of_the_process_that_builds_the_graph(
    norm, values, caplog, monkeypatch
):
    activations = da.from_array(values, chunks=5)
    expected = bits(*ActivityRegularization(0.1, norm).penalty_and_gradient(values))

    def built(**options):
        return ActivityRegularization(0.1, norm, **options).penalty_and_gradient(activations)

    def found(lazy):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "actreg_dispatch"):
            assert bits(*dask.compute(*lazy, scheduler="threads")) == expected
        return backends_used(caplog)

    by_type, argument = built(), built(backend="numpy")
    with use_backend("numpy"):
        context = built()
        by_type_again = built(backend="auto")
    monkeypatch.setenv("ACTREG_BACKEND", "numpy")
    environment = built()
    assert [found(lazy) for lazy in (argument, context, environment)] == [{"numpy"}] * 3
    assert [found(lazy) for lazy in (by_type, by_type_again)] == [{"numba"}] * 2
    monkeypatch.setenv("ACTREG_BACKEND", "bogus")
    assert found(by_type) == {"numba"}
    with pytest.raises(ValueError, match="ACTREG_BACKEND='bogus'"):
        built()


@pytest.mark.usefixtures("registered")
def test_tasks_run_serial_kernels():
    seen = []

    class Spy(ReferenceBackend):
        name, dtypes = "spy", {np.dtype(np.float32)}

        def add_gradient(self, *arguments):
            seen.append(threads.may_use_threads())
            return registry.get_backend("numba").add_gradient(*arguments)

    registry.register_backend("spy", Spy, array_type="numpy.ndarray")
    whole = np.random.default_rng(3).normal(size=200_000).astype(np.float32)
    reg = ActivityRegularization(0.1, "l2", backend="spy")
    usual = threads.may_use_threads()
    lazy = reg.penalty_and_gradient(da.from_array(whole, chunks=100_000))
    found = dask.compute(*lazy, scheduler="threads", num_workers=2)
    assert seen == [False, False]
    assert threads.may_use_threads() is usual
    assert bits(*found) == bits(*ActivityRegularization(0.1, "l2").penalty_and_gradient(whole))


@norms
def test_serial_kernels_give_the_same_bits(norm):
    import numba

    whole = np.random.default_rng(4).normal(size=50_000)
    reg = ActivityRegularization(0.1, norm)
    expected, usual = bits(*reg.penalty_and_gradient(whole)), threads.may_use_threads()
    threads_before = numba.get_num_threads()
    gradients = np.zeros_like(whole)
    reg.apply(whole, gradients)  # so that the next call is like the last one
    with threads.serially():
        assert not threads.may_use_threads()
        gradients[:] = 0.0
        assert bits(reg.apply(whole, gradients), gradients) == expected
        assert bits(*reg.penalty_and_gradient(whole)) == expected
        assert numba.get_num_threads() == threads_before
    assert threads.may_use_threads() is usual


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_every_scheduler_gives_the_same_bits(scheduler, values):
    regs = [ActivityRegularization(0.1, norm, reduction="mean") for norm in ActivityNorm]
    activations = da.from_array(values, chunks=(5, 3))
    lazy = [reg.penalty_and_gradient(activations) for reg in regs]
    for reg, found in zip(regs, *dask.compute(lazy, scheduler=scheduler), strict=True):
        assert bits(*found) == bits(*reg.penalty_and_gradient(values))
        total = reg.partial_sum(activations).compute(scheduler=scheduler)
        assert total == reg.partial_sum(values)


def block_of(seed, size):
    """Return one chunk, after a while, so that there is time to lose a worker."""
    time.sleep(0.1)
    return np.random.default_rng(seed).normal(size=size) * 10.0 ** (seed % 7)


def test_a_worker_that_is_killed_changes_no_bit():
    size, number = 1000, 40
    whole = np.concatenate([block_of(seed, size) for seed in range(number)])
    blocks = [dask.delayed(block_of, pure=True)(seed, size) for seed in range(number)]
    activations = da.concatenate([da.from_delayed(b, (size,), float) for b in blocks])
    reg = ActivityRegularization.l2(0.1)
    expected = bits(*reg.penalty_and_gradient(whole, scale=2.0))
    options = {"distributed.admin.system-monitor.gil.enabled": False}
    with (
        dask.config.set({**options, "distributed.comm.timeouts.connect": "10s"}),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        victims = client.run(os.getpid)
        futures = client.compute(reg.penalty_and_gradient(activations, scale=2.0))
        deadline = time.monotonic() + 20
        while min(map(len, client.has_what().values())) < 5:  # each has done a part
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not any(future.done() for future in futures)
        os.kill(next(iter(victims.values())), signal.SIGKILL)
        found = client.gather(futures)
        assert bits(*found) == expected
        assert len({*victims.values()} & {*client.run(os.getpid).values()}) < 2


def test_query_planning(python):
    """The arrays that are expressions, which Dask has to be asked for before its import."""
    if not hasattr(da, "array_expr_enabled"):
        pytest.skip("this Dask has no such arrays")
    code = """
import dask, numpy as np
import dask.array as da
from actreg_dispatch import ActivityNorm, ActivityRegularization
assert da.array_expr_enabled()
values = np.random.default_rng(0).normal(size=(7, 10))
activations = da.from_array(values, chunks=(3, 4))
assert not isinstance(activations, da.core.Array)
for norm in ActivityNorm:
    reg = ActivityRegularization(0.1, norm, reduction="mean")
    expected = reg.penalty_and_gradient(values)
    penalty, gradient = reg.penalty_and_gradient(activations)
    assert penalty.compute() == expected[0]
    assert (gradient.compute() == expected[1]).all()
    assert reg.partial_sum(activations).compute() == reg.partial_sum(values)
    for w in (values[0] > 0, abs(values)):
        expected = reg.penalty_and_gradient(values, weights=w)
        weights = da.from_array(w, chunks=(3, 4)[-w.ndim :])
        found = reg.penalty_and_gradient(activations, weights=weights)
        assert found[0].compute() == expected[0]
        assert (found[1].compute() == expected[1]).all()
print("same")
"""
    done = python("-c", code, DASK_ARRAY__QUERY_PLANNING="True")
    assert done.stdout == "same\n"


# CuPy.


@norms
@pytest.mark.parametrize("reduction", ["sum", "batch"])
def test_chunks_of_cupy_stay_on_the_device(cupy, norm, reduction, values):
    reg = ActivityRegularization(0.1, norm, reduction=reduction)
    activations = da.from_array(cupy.asarray(values), chunks=(5, 10), asarray=False)
    with dask.config.set(scheduler=no_computing):
        penalty, gradient = reg.penalty_and_gradient(activations)
    assert type(penalty._meta) is type(gradient._meta) is cupy.ndarray
    found = dask.compute(penalty, gradient)
    assert [type(each) for each in found] == [cupy.ndarray] * 2
    assert found[0].shape == ()
    assert bits(*(each.get() for each in found)) == bits(*reg.penalty_and_gradient(values))
    assert reg.partial_sum(activations).compute() == reg.partial_sum(values)
    assert type(penalty.map_blocks(operator.neg).compute()) is cupy.ndarray


def test_chunks_of_numpy_travel_to_a_device_that_is_asked_for(cupy, values):
    reg = ActivityRegularization.l2(0.1, backend="cupy")
    found = dask.compute(*reg.penalty_and_gradient(da.from_array(values, chunks=(6, 10))))
    assert type(found[0]) is np.float64
    assert type(found[1]) is np.ndarray
    assert bits(*found) == bits(*ActivityRegularization.l2(0.1).penalty_and_gradient(values))


def test_many_layers_cannot_be_updated_in_place_either():
    with pytest.raises(TypeError, match=r"gradients .*cannot be updated in place"):
        ActivityRegularization(0.5).apply_all([da.ones(3)], [da.ones(3)])
