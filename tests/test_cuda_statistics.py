"""Statistics of arrays on a device: counted there, and read when somebody asks."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import types

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from supported import dtypes

from actreg_dispatch import ActivationStatistics, ActivityRegularization
from actreg_dispatch.norms import NORMS

norms = pytest.mark.parametrize("norm", NORMS)
REG = ActivityRegularization(0.1)


def random(shape, dtype=np.float32, seed=0):
    """Return numbers of both signs, half of them 0, of which some are -0.0."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * (rng.random(shape) < 0.5)).astype(dtype)


def check(statistics, *arrays):
    """Compare with what NumPy counts of pairs of activations and what of them is kept."""
    pairs = [(x.astype(np.float64), np.broadcast_to(keep, x.shape)) for x, keep in arrays]
    every = np.concatenate([x[keep] for x, keep in pairs])
    assert statistics.elements == every.size
    assert statistics.nonzero == np.count_nonzero(every)
    assert_array_equal(statistics.largest, np.abs(every).max(initial=0.0))
    if statistics.per_feature:
        units = pairs[0][0].shape[-1]
        active = [((x != 0) & keep).reshape(-1, units).sum(axis=0) for x, keep in pairs]
        assert_array_equal(statistics.active, sum(active))
        assert statistics.active.dtype == np.int64


LAYOUTS = {
    "few": lambda a: a[0, 0, :1],
    "contiguous": lambda a: a,
    "offset": lambda a: a.reshape(-1)[3:],  # not at an address that vectors are loaded from
    "fortran": lambda a: a.T,
    "channels": lambda a: a[..., 1:4],
    "transposed": lambda a: a.transpose(1, 2, 0),
    "reversed": lambda a: a[::-1, :, ::-2],
    "broadcast": lambda a: np.lib.stride_tricks.as_strided(
        a[0], (70, *a.shape[1:]), (0, *a.strides[1:])
    ),
    "empty": lambda a: a[:0],
}


def on_device(cupy, x):
    """Return the same elements on a device, with the same strides."""
    if not x.size or x.flags.c_contiguous:
        return cupy.asarray(x)
    whole, memory = x.base, x.base
    while memory is not None:
        whole, memory = memory, memory.base
    room = cupy.asarray(whole.ravel(order="K"))
    start = x.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    return cupy.ndarray(x.shape, x.dtype, room.data + start, x.strides)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("per_feature", [False, True])
def test_elements_are_counted_as_on_the_host(cupy, dtype, layout, per_feature):
    x = layout(random((60, 40, 30), dtype))
    there = on_device(cupy, x)
    assert_array_equal(there.get(), x)
    statistics = ActivationStatistics(per_feature=per_feature)
    for times in (1, 2):
        REG.penalty(there, statistics=statistics)
        check(statistics, *[(x, True)] * times)


@pytest.mark.parametrize("units", [1, 2, 3, 255, 256, 257, 1000, 70_001])
@pytest.mark.parametrize("rows", [1, 97])
def test_any_number_of_units_is_counted(cupy, monkeypatch, units, rows):
    from actreg_dispatch.backends.cuda import kernels

    monkeypatch.setattr(kernels, "FEW_BLOCKS", 3)
    if units * rows > 1_000_000:
        rows = 5
    statistics, x = ActivationStatistics(per_feature=True), random((rows, units))
    REG.penalty(cupy.asarray(x), statistics=statistics)
    check(statistics, (x, True))


@dtypes
@pytest.mark.parametrize("per_feature", [False, True])
def test_what_weighs_nothing_is_not_counted(cupy, dtype, per_feature):
    reg, x = ActivityRegularization(0.1, "l2"), random((60, 700), dtype)
    for w in (random(700, dtype, 1) > 0, np.abs(random((60, 1), dtype, 2)), x != x[0, 0]):
        statistics = ActivationStatistics(per_feature=per_feature)
        kept = np.broadcast_to(w != 0, x.shape)
        assert 0 < kept.sum() < x.size
        there = cupy.asarray(np.where(kept, x, np.array(math.nan, dtype)))
        reg.apply(there, cupy.zeros_like(there), weights=cupy.asarray(w), statistics=statistics)
        reg.penalty(there, weights=cupy.asarray(w), statistics=statistics)
        check(statistics, (x, kept), (x, kept))


@norms
@dtypes
@pytest.mark.parametrize("certified", [False, True])
def test_what_is_counted_changes_no_bit(cupy, monkeypatch, norm, dtype, certified):
    from actreg_dispatch.backends import cuda

    monkeypatch.setattr(cuda, "CERTIFIED_FROM", 0 if certified else 1 << 20)
    reg, statistics = ActivityRegularization(0.1, norm), ActivationStatistics(per_feature=True)
    values = random((60, 70), dtype)
    x = cupy.asarray(values)
    expected, found = cupy.ones_like(x), cupy.ones_like(x)
    penalty = reg.apply(x, expected)
    assert reg.apply(x, found, statistics=statistics).get() == penalty.get()
    assert found.get().tobytes() == expected.get().tobytes()
    assert reg.penalty(x, statistics=statistics).get() == penalty.get()
    check(statistics, (values, True), (values, True))


@dtypes
@pytest.mark.parametrize("per_feature", [False, True])
def test_nan_is_the_largest_and_not_zero(cupy, dtype, per_feature):
    tiny = np.nextafter(np.array(0, dtype), np.array(1, dtype))
    for values in (
        [0.0, -0.0],
        [-tiny, 0.0],
        [math.inf, -1.0],
        [-math.inf, 3.0],
        [math.nan, math.inf],
        [-math.nan, 0.0],
        [np.finfo(np.float64).max, -1.0] if dtype == np.float64 else [60000.0, 3.0],
    ):
        x, statistics = np.array([values], dtype), ActivationStatistics(per_feature=per_feature)
        assert (x[0, 0] != 0) == (values[0] != 0)
        REG.penalty(cupy.asarray(x), statistics=statistics)
        check(statistics, (x, True))
        REG.penalty(cupy.ones((3, 2), dtype), statistics=statistics)
        check(statistics, (x, True), (np.ones((3, 2), dtype), True))


def test_counts_of_host_and_device_add_up(cupy):
    statistics, x = ActivationStatistics(per_feature=True), random((50, 7))
    there, moving = cupy.asarray(x[:20]), ActivityRegularization(0.1, backend="cupy")
    REG.penalty(x, statistics=statistics)
    REG.penalty(there, statistics=statistics)
    check(statistics, (x, True), (x[:20], True))
    moving.penalty(x[:1], statistics=statistics)
    ActivityRegularization(0.1, backend="numba").penalty(there, statistics=statistics)
    REG.penalty(cupy.asarray(9 * x[:1]), statistics=statistics)
    arrays = [(part, True) for part in (x, x[:20], x[:1], x[:20], 9 * x[:1])]
    check(statistics, *arrays)
    assert repr(statistics).startswith("<ActivationStatistics: ")
    for copied in (copy.copy(statistics), pickle.loads(pickle.dumps(statistics))):
        REG.penalty(there, statistics=copied)
        check(copied, *arrays, (x[:20], True))
    check(statistics, *arrays)
    statistics.clear()
    assert (statistics.elements, statistics.active) == (0, None)
    REG.penalty(cupy.ones(3), statistics=statistics)  # of other units
    assert statistics.active.tolist() == [1, 1, 1]


def test_layers_are_counted_together(cupy):
    reg, statistics = ActivityRegularization(0.1, "l2"), ActivationStatistics()
    xs = [random(5), random((40, 30))]
    there = [cupy.asarray(x) for x in xs]
    expected, found = ([cupy.ones_like(x) for x in there] for _ in range(2))
    total, _ = reg.apply_all(there, expected)
    assert reg.apply_all(there, found, statistics=statistics).total.get() == total.get()
    for one, other in zip(expected, found, strict=True):
        assert one.get().tobytes() == other.get().tobytes()
    check(statistics, *((x, True) for x in xs))


def test_streams_and_threads_may_share_statistics(cupy):
    statistics, x = ActivationStatistics(per_feature=True), random((40, 30))
    there = cupy.asarray(x)
    cupy.cuda.Device().synchronize()

    def work():
        for stream in (*streams, cupy.cuda.Stream.ptds):
            with stream:
                REG.penalty(there, statistics=statistics)

    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(statistics, *[(x, True)] * 6)


def test_nothing_is_counted_or_written_where_a_call_raises(cupy):
    statistics, g = ActivationStatistics(per_feature=True), cupy.zeros((2, 3))
    REG.penalty(cupy.ones(4), statistics=statistics)
    for call, message in (
        (lambda: REG.apply(g + 1, g, statistics=statistics), "count 4 units, but .* has 3; pass"),
        (lambda: REG.penalty(cupy.array(1.0), statistics=statistics), "activations have no axes"),
        (lambda: REG.apply(g + 1, cupy.ones(4), statistics=statistics), "^gradients"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not g.get().any()
    assert statistics.elements == 4


@pytest.mark.parametrize("reg", [REG, ActivityRegularization.l2(0.5, axis=1)])
def test_a_capture_is_refused(cupy, monkeypatch, reg):
    """A graph would count when it is launched, wherever the counters are by then."""
    captured = types.SimpleNamespace(ptr=0, is_capturing=lambda: True)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: captured)
    x, g, statistics = cupy.ones((3, 2)), cupy.zeros((3, 2)), ActivationStatistics()
    with pytest.raises(ValueError, match=r"statistics .* CUDA graph.* capture the call without"):
        reg.apply(x, g, statistics=statistics)
    assert not g.get().any()


def test_a_device_out_of_memory_leaves_the_gradients_alone(cupy):
    x, g, statistics = cupy.ones(100), cupy.zeros(100), ActivationStatistics(per_feature=True)
    for limit in range(512, 8192, 512):
        pool = cupy.cuda.MemoryPool()
        pool.set_limit(size=limit)
        with cupy.cuda.using_allocator(pool.malloc):
            try:
                REG.apply(x, g, statistics=statistics)
            except MemoryError:
                assert not g.get().any()
            else:
                break
    assert limit > 512
    assert statistics.elements == 100


@pytest.mark.parametrize("what", ["count", "count_units"])
@pytest.mark.parametrize("weighted", [False, True])
def test_indices_have_64_bits(cupy, what, weighted):
    """Rows 2**31 elements apart, of views that are larger than any memory; few are visited."""
    from actreg_dispatch.backends.cuda.counting import counting_kernels

    threads, far = 256, 2**31
    values, weights = random((2, 3, threads))
    rows, narrow = cupy.asarray(values), cupy.asarray(weights)
    x, w = (cupy.lib.stride_tricks.as_strided(a, (3, far), a.strides) for a in (rows, narrow))
    totals, active = cupy.zeros(3, np.uint64), cupy.zeros(threads, np.uint64)
    known, units = ([w] if weighted else []), what == "count_units"
    known += [far, totals, active] if units else [totals]
    kernel = getattr(counting_kernels(weighted=weighted), what)
    kernel(x, 3 * far, far, *known, size=threads, block_size=threads)
    kept = (weights != 0) if weighted else np.ones_like(values, bool)
    assert totals.get()[:2].tolist() == [kept.sum(), np.count_nonzero(values[kept])]
    assert totals.get()[2:].view(np.float64) == np.abs(values[kept]).max()
    if units:
        assert_array_equal(active.get(), ((values != 0) & kept).sum(axis=0))
