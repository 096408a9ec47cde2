"""What holds on a GPU alone: streams, memory, indices, the arithmetic of long numbers.

That results are right is for the suites that run on every backend.
"""

from __future__ import annotations

import math
import os
import types
from fractions import Fraction

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from actreg_dispatch import ActivityRegularization, use_backend
from actreg_dispatch import norms as norms_module
from actreg_dispatch.norms import NORMS, Norm, signed, sqrt
from actreg_dispatch.options import Constants
from actreg_dispatch.sums.extended import Extended

norms = pytest.mark.parametrize("norm", NORMS.values(), ids=lambda norm: norm.name)


def on_host(values, gradients, norm, lam, **options):
    """Return penalty and updated gradients by the reference, which other tests hold to be right."""
    updated = gradients.copy()
    reg = ActivityRegularization(lam, norm.name, backend="numpy", **options)
    return reg.apply(values, updated), updated


@norms
def test_scratch_memory_is_small_comes_from_the_allocator_and_is_given_back(cupy, norm):
    x, g = cupy.ones(10_000, np.float32), cupy.zeros(10_000, np.float32)
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        penalty = ActivityRegularization(0.1, norm.name).apply(x, g)
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
@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("operation", ["apply", "penalty", "partial_sum", "add_gradient"])
def test_the_device_of_the_arrays_is_entered(cupy, monkeypatch, norm, operation, certified):
    from actreg_dispatch.backends import cuda
    from actreg_dispatch.backends.cuda.kernels import kernels_of

    here, elsewhere, seen = cupy.ones(3, np.float32), Elsewhere(), []
    array = types.SimpleNamespace(
        device=elsewhere, dtype=here.dtype, itemsize=4, strides=(4,), data=here.data, size=3
    )

    def launched(*_, **__):
        seen.append(elsewhere.is_current)

    monkeypatch.setattr(cuda, "launch", launched)
    monkeypatch.setattr(cuda, "CERTIFIED_FROM", 3 if certified else 4)
    kernels = kernels_of(norm)._replace(certify=launched, finish=launched)
    monkeypatch.setattr(cuda, "kernels_of", lambda norm, **_: kernels)
    constants = Constants((0.5,) * norm.n_lams, (0.5,) * norm.n_lams, 0.0)
    options = {
        "apply": (array, norm, constants),
        "penalty": (norm, constants),
        "partial_sum": (norm,),
        "add_gradient": (array, norm, constants, (1.0,) * norm.n_coefficients),
    }
    getattr(cuda.BACKEND, operation)(array, *options[operation])
    sums = 4 if certified else 2
    assert len(seen) == {"apply": sums + norm.two_pass, "penalty": sums}.get(operation, 1)
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
    reg = ActivityRegularization(0.5, norm.name)
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
    expected, gradients = on_host(values, np.ones_like(values), norm, 0.5)
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


@pytest.mark.xdist_group("memory")  # of several gigabytes
@norms
@pytest.mark.parametrize("kind", ["sum", "sum_certified", "apply", "apply_certified", "update"])
def test_indices_have_64_bits(cupy, norm, kind):
    """Elements 2**31 and 2**32 apart, of views that are larger than any memory.

    Three rows of 2**31 elements overlap, all but the first of each, which alone are visited.
    """
    from actreg_dispatch.backends.cuda.kernels import kernels_of
    from actreg_dispatch.backends.cuda.source import counters_of

    kernel = getattr(kernels_of(norm), kind)
    if kernel is None:
        return
    threads, far = 256, 2**31
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, threads)).astype(np.float32)
    rows, room = cupy.asarray(values), cupy.zeros((3, threads), np.float32)
    x, g = (
        cupy.lib.stride_tricks.as_strided(array, (3, far), array.strides) for array in (rows, room)
    )
    lam, two = (0.5,) * norm.n_lams, cupy.asarray(2.0, np.float32)
    known = [two] * norm.n_coefficients + [cupy.ones((), bool)] * norm.two_pass
    sums = cupy.zeros(len(norm.terms) * counters_of(weighted=False), np.int64)
    if "certified" in kind:
        sums = cupy.zeros(len(norm.terms) * 2)
    extra = [*lam, *known, g] if kind == "update" else [sums]
    if "apply" in kind:
        extra = [*lam, sums, g]
    kernel(x, 3 * far, far, *extra, size=threads, block_size=threads)
    if "sum" in kind:
        assert not room.any()
    else:
        lam = tuple(map(np.float32, lam))
        expected = norm.gradient(values, lam, (np.float32(2),) * norm.n_coefficients)
        assert_array_equal(room.get(), expected)
    if kind != "update":
        alone, of_rows = (
            cupy.zeros_like(sums),
            getattr(kernels_of(norm), kind.replace("apply", "sum")),
        )
        of_rows(rows, values.size, threads, alone, size=threads, block_size=threads)
        assert_array_equal(sums.get(), alone.get())


@norms
@pytest.mark.parametrize("kind", ["sum", "sum_certified", "apply", "apply_certified", "update"])
def test_indices_of_a_layer_have_64_bits(cupy, norm, kind):
    """A layer of 2**32 elements, of which one block visits its own alone."""
    from actreg_dispatch.backends.cuda.kernels import kernels_of
    from actreg_dispatch.backends.cuda.source import columns_of, counters_of

    kernel, one = (getattr(kernels_of(norm, batch=batch), kind) for batch in (True, False))
    if kernel is None:
        return
    threads = 256
    x, g = cupy.full(threads, 3, np.float32), cupy.zeros(threads, np.float32)
    table = np.zeros((1, len(columns_of(norm))), np.int64)
    table[0, :5] = x.data.ptr, g.data.ptr, 2**32, 0, 2**24
    table.view(np.float64)[:, 5:] = 0.5
    counters = counters_of(weighted=False)
    room = (2, np.float64) if "certified" in kind else (counters, np.int64)
    sums, alone = (cupy.zeros(len(norm.terms) * room[0], room[1]) for _ in range(2))
    two = cupy.full(1, 2, np.float32)
    known = [two] * norm.n_coefficients + [cupy.ones(1, bool)] * norm.two_pass
    known = known if kind == "update" else []
    kernel(cupy.asarray(table), 1, x, *known, sums, size=threads, block_size=threads)
    assert (g != 0).all() == (kind not in ("sum", "sum_certified"))
    if "sum" in kind:
        one(x, threads, threads, alone, size=threads, block_size=threads)
        assert_array_equal(sums.get(), alone.get())


def test_a_sum_that_overflows_among_few_is_exact(cupy):
    x = np.full(9, 8e307)
    expected, _ = on_host(x, np.zeros(9), NORMS["l1"], 1e-10)
    assert ActivityRegularization(1e-10).penalty(cupy.asarray(x)).get() == expected


def test_a_subnormal_coefficient_reaches_the_device(cupy):
    values = np.array([3e-42, 0.0], np.float32)
    expected = on_host(values, np.zeros_like(values), NORMS["l2"], 0.5, epsilon=0)[1]
    reg, x, g = ActivityRegularization(0.5, "l2", epsilon=0), *map(cupy.asarray, (values, expected))
    g[...] = 0
    reg.add_gradient(x, g, reg.partial_sum(x))
    assert g.get().tobytes() == expected.tobytes()
    assert g.get()[0] > 0


def test_a_norm_of_elsewhere_has_kernels_whatever_its_name(cupy, monkeypatch):
    monkeypatch.setattr(norms_module, "NORMS", dict(NORMS))
    norm = Norm(
        "naïve",
        terms=(1, 2),
        penalty=lambda lam, s: lam[0] * s[0] + s[1] / (lam[1] + s[0]),
        coefficients=lambda lam, s: (-s[0] / s[1], sqrt(lam[0] * s[1])),
        gradient=lambda x, lam, c: signed(c[0], x) - lam[1] * (x / c[1]),
        guard=lambda s, epsilon: s[0] * s[1] > epsilon,
    )
    norms_module.register_norm(norm)
    for unit in (1e-200, 1.0, 1e180):
        values = unit * np.random.default_rng(0).normal(size=(40, 7))
        expected, updated = on_host(values, np.ones_like(values), norm, (0.1, 0.7), epsilon=0)
        g = cupy.ones((40, 7))
        reg = ActivityRegularization((0.1, 0.7), norm.name, epsilon=0)
        assert reg.apply(cupy.asarray(values), g).get().tobytes() == expected.tobytes()
        assert g.get().tobytes() == updated.tobytes()


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
    penalty = ActivityRegularization(0.1, norm.name).apply(convert(x), convert(g))
    expected, updated = on_host(values.T, np.ones_like(values.T), norm, 0.1)
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
    x, g = cupy.arange(1, 101, dtype=np.float32) ** 2, cupy.zeros(100, np.float32)
    for limit in range(512, 8192, 512):
        pool = cupy.cuda.MemoryPool()
        pool.set_limit(size=limit)
        with cupy.cuda.using_allocator(pool.malloc):
            try:
                ActivityRegularization(0.5, norm.name).apply(x, g)
            except MemoryError:
                assert (g.get() == 0).all()
            else:
                break
    assert limit > 512
    assert (g.get() != 0).all()


@norms
def test_the_size_of_the_grid_does_not_show(cupy, monkeypatch, norm):
    from actreg_dispatch.backends.cuda import kernels

    values = np.random.default_rng(0).normal(size=9001)
    expected, updated = on_host(values, np.ones_like(values), norm, 0.1)
    for blocks in (1, 3, 1024):
        monkeypatch.setattr(kernels, "MAX_BLOCKS", blocks)
        monkeypatch.setattr(kernels, "FEW_BLOCKS", blocks)
        g = cupy.ones(9001)
        found = ActivityRegularization(0.1, norm.name).apply(cupy.asarray(values), g)
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
    expected, updated = on_host(values, np.ones_like(values), NORMS["l2"], 0.1)
    for name in ("numpy", "numba", "cupy"):
        with use_backend(name):
            for asarray, host in ((np.array, np.asarray), (cupy.array, cupy.asnumpy)):
                x, g = asarray(values), asarray(np.ones_like(values))
                penalty = ActivityRegularization(0.1, "l2").apply(x, g)
                assert type(penalty) is (np.float32 if asarray is np.array else cupy.ndarray)
                assert host(penalty).tobytes() == expected.tobytes()
                assert_array_equal(host(g), updated)


# The type of number for sums beyond binary64's range is written twice.

OPERATIONS = {
    "add(a, b)": lambda a, b: a + b,
    "subtract(a, b)": lambda a, b: a - b,
    "multiply(a, b)": lambda a, b: a * b,
    "divide(a, b)": lambda a, b: a / b,
    "root(a)": lambda a, b: sqrt(a),
    "negative(a)": lambda a, b: -a,
    "signed(a, b)": signed,
    "extended(double(greater(a, b)))": lambda a, b: Extended(float(a > b)),
    "extended(double(a))": lambda a, b: Extended(float(a)),
}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan]
# Exponents of results that lie round the limits of binary64: subnormal numbers, and infinity.
LIMITS = [-1127, -1100, -1074, -1022 - 52, 970]


def operands(rng, operation, size=3000):
    """Return two arrays of significands and two of exponents, many with results at a limit."""

    def significands():
        full = rng.integers(1 << 52, 1 << 53, size)
        few, odd = rng.integers(1, 64, size), (1 << 52) + rng.integers(0, 4, size)
        almost, power = (1 << 53) - rng.integers(1, 4, size), 1 << rng.integers(0, 53, size)
        chosen = np.choose(rng.integers(0, 5, size), [full, few, odd, almost, power])
        return chosen.astype(np.float64) * rng.choice([-1.0, 1.0], size)

    def exponents():
        return rng.choice([0, *LIMITS, -2200, 2000], size) + rng.integers(-60, 60, size)

    a, b, power, other = significands(), significands(), exponents(), exponents()
    limit = rng.choice(LIMITS, size) + rng.integers(-54, 55, size)
    near = {
        "add(a, b)": other + rng.integers(-56, 57, size),
        "subtract(a, b)": other + rng.integers(-56, 57, size),
        "multiply(a, b)": limit - 52 - other,
        "divide(a, b)": limit + 52 + other,
        "root(a)": 2 * limit + rng.integers(0, 2, size),
    }.get(operation, limit)
    power = np.where(rng.random(size) < 0.7, near, power)
    if operation == "root(a)":
        a = np.where(rng.random(size) < 0.9, np.abs(a), a)
        a = np.where(rng.random(size) < 0.3, np.floor(np.sqrt(np.abs(a))) ** 2, a)
    some = size // 10
    a[:some], b[some // 2 : 3 * some // 2] = (rng.choice(SPECIAL, some) for _ in range(2))
    b[-some:], other[-some:] = a[-some:], power[-some:]
    return a, power, b, other


@pytest.mark.parametrize("operation", OPERATIONS)
def test_numbers_of_any_exponent_are_those_of_the_host(cupy, operation):
    from actreg_dispatch.backends.cuda.source import OPTIONS, preamble

    evaluate = cupy.ElementwiseKernel(
        "float64 x, int64 power, float64 y, int64 other",
        "int64 significand, int64 exponent, float64 number",
        f"""
        extended a(x), b(y);
        if (x != 0.0 && isfinite(x)) a.e += power;
        if (y != 0.0 && isfinite(y)) b.e += other;
        const extended result = {operation};
        significand = (long long)(result.m >> 11) * (result.is_negative ? -1 : 1);
        exponent = result.e + 11;
        number = double(result);
        """,
        "actreg_test",
        preamble=preamble(),
        options=OPTIONS,
    )
    given = operands(np.random.default_rng(0), operation)
    found = [each.get().tolist() for each in evaluate(*map(cupy.asarray, given))]

    def extended(significand, exponent):
        if significand == 0.0 or not math.isfinite(significand):
            return Extended(significand)
        return Extended(Fraction(significand) * Fraction(2) ** exponent)

    beyond = 0
    for *sample, significand, exponent, number in zip(
        *(each.tolist() for each in given), *found, strict=True
    ):
        x, power, y, other = sample
        expected = OPERATIONS[operation](extended(x, power), extended(y, other))
        as_binary64 = float(expected)
        assert number == as_binary64 or (number != number and as_binary64 != as_binary64), sample
        if isinstance(expected.value, Fraction):
            beyond += as_binary64 != expected.value
            assert expected.value == extended(float(significand), exponent).value, sample
    assert beyond > 500 or "double" in operation


@norms
@pytest.mark.parametrize("epsilon", [0.0, 5e-324, 2.0**-1060, 2.0**-1022, 1.0, 1e308])
def test_sums_beyond_binary64_lead_to_what_they_do_on_the_host(cupy, norm, epsilon):
    options = {"epsilon": epsilon} if norm.has_guard else {}
    values = [2.0**-537, 1.5 * 2.0**-530, 2.0**-511, 2.0**511.5, 1.5 * 2.0**512, 1e-200, 1e300]
    values += [math.sqrt(epsilon), np.nextafter(math.sqrt(epsilon), 1.0)]
    for value in values:
        x, g = np.array([value, -value, 0.0]), np.zeros(3)
        expected, updated = on_host(x, g, norm, 1e-5, **options)
        there = cupy.asarray(g)
        penalty = ActivityRegularization(1e-5, norm.name, **options).apply(cupy.asarray(x), there)
        assert penalty.get().tobytes() == expected.tobytes()
        assert there.get().tobytes() == updated.tobytes()
