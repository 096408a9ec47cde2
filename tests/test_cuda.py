"""What holds on a GPU alone: traffic, launches, streams, memory, indices.

That results are right is for the suites that run on every backend. Traffic is counted by a software
CUDA device (``SOFTGPU``) that executes the kernels' PTX; a GPU would need its maker's profiler.
"""

from __future__ import annotations

import json
import os
import types

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from actreg_dispatch import ActivityNorm, ActivityRegularization, use_backend
from actreg_dispatch.oracle import exact_result

norms = pytest.mark.parametrize("norm", ActivityNorm, ids=lambda norm: norm.value)
dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])

SIZE = 100_000
PROFILE = """
import json, os
import cupy, numpy as np, ml_dtypes
from actreg_dispatch import ActivityNorm, ActivityRegularization

found = {}
def record(name, call):
    with open(os.environ["SOFTGPU_PROFILE"]) as lines:
        lines.seek(0, 2)
        call()
        found[name] = [json.loads(line) for line in lines]

rng = np.random.default_rng(0)
for dtype in ("float16", "bfloat16", "float32", "float64"):
    room = cupy.asarray(rng.normal(size=(200, 250, 4)).astype(dtype))
    views = {
        "contiguous": room.ravel()[: SIZE],
        "channels": room[..., 1:3],
        "transposed": room[:, :, :2].transpose(1, 2, 0),
    }
    for layout, x in views.items():
        g = cupy.zeros_like(room).ravel()[: SIZE] if x.ndim == 1 else cupy.zeros(room.shape, dtype)
        if layout == "channels":
            g = g[..., 1:3]
        elif layout == "transposed":
            g = g[:, :, :2].transpose(1, 2, 0)
        assert x.shape == g.shape and x.size == SIZE
        for norm in ActivityNorm:
            reg = ActivityRegularization(0.1, norm)
            record(f"apply {norm.value} {dtype} {layout}", lambda: reg.apply(x, g))
            record(f"penalty {norm.value} {dtype} {layout}", lambda: reg.penalty(x))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def profile(cupy, python, tmp_path_factory):
    """Return what was launched, copied and waited for in each call."""
    if "SOFTGPU" not in os.environ:
        pytest.skip("only a software device counts bytes")
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    file.touch()
    done = python("-c", f"SIZE = {SIZE}\n{PROFILE}", SOFTGPU_PROFILE=str(file))
    return json.loads(done.stdout)


@pytest.mark.xdist_group("profile")  # which takes half a minute to make
@norms
@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels", "transposed"])
@pytest.mark.parametrize("operation", ["apply", "penalty"])
def test_memory_is_passed_once_and_the_host_never_waits(profile, operation, norm, dtype, layout):
    events = profile[f"{operation} {norm.value} {dtype} {layout}"]
    assert [event for event in events if "launch" not in event] == []  # no copy, no wait
    twice = operation == "apply" and norm is ActivityNorm.L2
    assert len(events) == 2 + twice
    moved = sum(event["loaded"] + event["stored"] for event in events)
    accesses = {"penalty": 1, "apply": 3}[operation] + twice
    itemsize = 8 if dtype == "float64" else 4 if dtype == "float32" else 2
    sums = 1 + (norm is ActivityNorm.L1_L2_SQUARED)
    assert accesses <= moved / (SIZE * itemsize) <= (1.01 + 0.01 * sums) * accesses
    assert sum(event["atomic"] for event in events) <= 0.01 * sums * moved
    if layout == "contiguous":
        assert moved / (32 * sum(event["sectors"] for event in events)) >= 1 - 0.02 * sums


@norms
def test_scratch_memory_is_small_comes_from_the_allocator_and_is_given_back(cupy, norm):
    x, g = cupy.ones(10_000, np.float32), cupy.zeros(10_000, np.float32)
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        penalty = ActivityRegularization(0.1, norm).apply(x, g)
    assert 0 < pool.total_bytes() < 2**20
    assert pool.used_bytes() == penalty.data.mem.size
    del penalty
    assert pool.used_bytes() == 0


class Elsewhere:
    """A stand-in for a second device, which knows whether it is the current one."""

    is_current = False

    def __enter__(self):
        self.is_current = True

    def __exit__(self, *_):
        self.is_current = False


@norms
@pytest.mark.parametrize("operation", ["apply", "penalty", "partial_sum", "add_gradient"])
def test_the_device_of_the_arrays_is_entered(cupy, monkeypatch, norm, operation):
    from actreg_dispatch.backends import cupy_cuda

    here, elsewhere, seen = cupy.ones(3, np.float32), Elsewhere(), []
    array = types.SimpleNamespace(
        device=elsewhere, dtype=here.dtype, itemsize=4, strides=(4,), data=here.data, size=3
    )
    for name in ("_launch", "_FINISH", "_FINISH_BOTH", "_FINISH_L2"):
        monkeypatch.setattr(cupy_cuda, name, lambda *_, **__: seen.append(elsewhere.is_current))
    options = {
        "apply": (array, norm, (0.5, 0.5), 0.5, 0.0),
        "penalty": (norm, (0.5, 0.5)),
        "partial_sum": (norm,),
        "add_gradient": (array, norm, 0.5, 1.0),
    }
    getattr(cupy_cuda, operation)(array, *options[operation])
    assert seen
    assert all(seen)
    assert not elsewhere.is_current


@norms
@pytest.mark.parametrize("stream", ["created", "per thread"])
def test_the_current_stream_is_used(cupy, norm, stream):
    """Work that is queued before on the same stream is waited for, by the device alone."""
    streams = {
        "created": lambda: cupy.cuda.Stream(non_blocking=True),
        "per thread": lambda: cupy.cuda.Stream.ptds,
    }
    x, g = cupy.zeros(4099, np.float32), cupy.ones(4099, np.float32)
    reg = ActivityRegularization(0.5, norm)
    values = np.random.default_rng(0).normal(size=4099).astype(np.float32)
    slow = cupy.ElementwiseKernel(
        "T value",
        "T x",
        "for (int k = 0; k < repeats; ++k) x = value + T(k) * T(0)",
        "slow",
        preamble=f"constexpr int repeats = {10 if 'SOFTGPU' in os.environ else 10_000_000};",
    )
    source = cupy.asarray(values)
    cupy.cuda.Device().synchronize()
    current = streams[stream]()
    with current:
        slow(source, x)
        penalty = reg.apply(x, g)
        found, updated = penalty.get(), g.get()
    expected, gradients = exact_result(values, np.ones_like(values), norm, 0.5)
    assert found.tobytes() == expected.tobytes()
    assert updated.tobytes() == gradients.tobytes()


def test_a_call_can_be_captured_into_a_graph(cupy):
    """The graph has a memory pool to itself: it writes to scratch memory whenever it runs."""
    x, g = cupy.ones(5000, np.float32), cupy.zeros(5000, np.float32)
    reg = ActivityRegularization(0.5, "l2")
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        reg.apply(x, g)  # compiles, and fills the pool
        try:
            stream.begin_capture()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            pytest.skip(f"this device has no graphs: {error}")
        penalty = reg.apply(x, g)
        graph = stream.end_capture()
    stream.synchronize()
    g[...] = 0
    x *= 2
    cupy.cuda.Device().synchronize()
    for _ in range(3):
        graph.launch(stream)
    stream.synchronize()
    once = np.zeros(5000, np.float32)
    assert penalty.get() == ActivityRegularization(0.5, "l2").apply(x.get(), once)
    assert_array_equal(g.get(), once + once + once)


@pytest.mark.parametrize("kernel", ["_SUM_SQUARES", "_APPLY_L1", "_APPLY_L2_SQUARED", "_UPDATE_L2"])
def test_indices_have_64_bits(cupy, kernel):
    """Elements 2**31 and 2**32 apart, of views that are larger than any memory.

    Three rows of 2**31 elements overlap, all but the first of each, which alone are visited.
    """
    from actreg_dispatch.backends import cupy_cuda

    threads, far = 256, 2**31
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, threads)).astype(np.float32)
    rows, room = cupy.asarray(values), cupy.zeros((3, threads), np.float32)
    x, g = (
        cupy.lib.stride_tricks.as_strided(array, (3, far), array.strides) for array in (rows, room)
    )
    digits = cupy.zeros(cupy_cuda.PLACES + 2, np.int64)
    extra = (cupy.asarray(2.0, np.float32),) if kernel == "_UPDATE_L2" else (digits,)
    extra += () if kernel == "_SUM_SQUARES" else (g,)
    launch = getattr(cupy_cuda, kernel)
    launch(x, 3 * far, far, 0.5, 0.0, *extra, size=threads, block_size=threads)
    lam = np.float32(0.5)
    expected = {
        "_SUM_SQUARES": 0 * values,
        "_APPLY_L1": lam * np.sign(values),
        "_APPLY_L2_SQUARED": lam * 2 * values,
        "_UPDATE_L2": lam * values / np.float32(2),
    }[kernel]
    assert_array_equal(room.get(), expected)
    if kernel == "_SUM_SQUARES":
        norm = ActivityNorm.L2_SQUARED
        total = cupy_cuda._results(norm, np.dtype("f4"))
        cupy_cuda._finish(norm, digits, 1.0, 0.0, total)
        assert total[0].get() == exact_result(values, values, norm, 1.0)[0]


class Producer:
    """Memory of another library, which describes it in one of the two ways."""

    def __init__(self, array):
        self.array = array


class InterfaceProducer(Producer):
    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__


class DLPackProducer(Producer):
    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@norms
@pytest.mark.parametrize("exchange", ["interface", "dlpack"])
def test_memory_of_other_libraries_is_updated_in_place(cupy, norm, exchange):
    convert = {
        "interface": lambda array: cupy.asarray(InterfaceProducer(array)),
        "dlpack": lambda array: cupy.from_dlpack(DLPackProducer(array)),
    }[exchange]
    values = np.random.default_rng(0).normal(size=(30, 20)).astype(np.float32)
    x, g = cupy.asarray(values).T, cupy.ones((30, 20), np.float32).T
    penalty = ActivityRegularization(0.1, norm).apply(convert(x), convert(g))
    expected, updated = exact_result(values.T, np.ones_like(values.T), norm, 0.1)
    assert penalty.get().tobytes() == expected.tobytes()
    assert_array_equal(g.get(), updated)


@pytest.mark.parametrize("argument", ["activations", "gradients"])
def test_arrays_that_a_gpu_cannot_load_are_refused(cupy, argument):
    good = {"activations": cupy.ones(4, np.float32), "gradients": cupy.zeros(4, np.float32)}
    room = cupy.zeros(40, np.uint8)
    shifted = cupy.ndarray(4, np.float32, room.data + 2)
    stretched = cupy.ndarray(4, np.float32, room.data, strides=(6,))
    for backend in ("cupy", "numba", "numpy"):  # a move is a load, too
        reg = ActivityRegularization(0.1, backend=backend)
        for bad in (shifted, stretched):
            with pytest.raises(ValueError, match=rf"{argument} are not aligned.*lay them out anew"):
                reg.apply(**good | {argument: bad})
            with pytest.raises(ValueError, match="not aligned"):
                reg.partial_sum(bad)
    assert (good["gradients"] == 0).all()
    assert (room == 0).all()
    for harmless in (
        cupy.ndarray((1, 4), np.float32, room.data, strides=(6, 4)),
        cupy.ndarray(0, np.float32, room.data + 1),
    ):
        assert reg.penalty(harmless) == 0


def test_a_byte_order_that_a_gpu_does_not_know_is_refused(cupy):
    room = cupy.zeros((2, 16), np.uint8)
    activations, gradients = room[0].view(">f4"), room[1].view(">f4")
    for backend in ("cupy", "numba"):
        with pytest.raises(TypeError, match=r"activations have dtype >f4.*swap it on the host"):
            ActivityRegularization(0.1, backend=backend).apply(activations, gradients)


@norms
def test_a_device_out_of_memory_leaves_the_gradients_alone(cupy, norm):
    x, g = cupy.ones(100, np.float32), cupy.zeros(100, np.float32)
    for limit in range(512, 5120, 512):
        pool = cupy.cuda.MemoryPool()
        pool.set_limit(size=limit)
        with cupy.cuda.using_allocator(pool.malloc):
            try:
                ActivityRegularization(0.5, norm).apply(x, g)
            except MemoryError:
                assert (g.get() == 0).all()
            else:
                break
    assert limit > 512
    assert (g.get() != 0).all()


@norms
def test_the_size_of_the_grid_does_not_show(cupy, monkeypatch, norm):
    from actreg_dispatch.backends import cupy_cuda

    values = np.random.default_rng(0).normal(size=9001)
    expected, updated = exact_result(values, np.ones_like(values), norm, 0.1)
    for blocks in (1, 3, 1024):
        monkeypatch.setattr(cupy_cuda, "MAX_BLOCKS", blocks)
        g = cupy.ones(9001)
        found = ActivityRegularization(0.1, norm).apply(cupy.asarray(values), g)
        assert found.get().tobytes() == expected.tobytes()
        assert_array_equal(g.get(), updated)


def test_views_that_truly_overlap_are_refused_and_interleaved_ones_are_not(cupy):
    room = cupy.ones(20, np.float32)
    reg = ActivityRegularization(0.5)
    with pytest.raises(ValueError, match="share memory"):
        reg.apply(room[:-1], room[1:])
    reg.apply(room[::2], room[1::2])
    assert_array_equal(room.get(), [1.0, 1.5] * 10)


def test_the_device_serves_under_every_explicit_choice(cupy):
    """The array's own kind comes back, with the same bits, wherever it was computed."""
    values = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    expected, updated = exact_result(values, np.ones_like(values), ActivityNorm.L2, 0.1)
    for name in ("numpy", "numba", "cupy"):
        with use_backend(name):
            for asarray, host in ((np.array, np.asarray), (cupy.array, cupy.asnumpy)):
                x, g = asarray(values), asarray(np.ones_like(values))
                penalty = ActivityRegularization(0.1, "l2").apply(x, g)
                assert type(penalty) is (np.float32 if asarray is np.array else cupy.ndarray)
                assert host(penalty).tobytes() == expected.tobytes()
                assert_array_equal(host(g), updated)
