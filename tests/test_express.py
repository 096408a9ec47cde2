"""The short way through compiled functions must do and refuse what the general way does."""

from __future__ import annotations

import ctypes
import math

import ml_dtypes
import numpy as np
import pytest

from actreg_dispatch import (
    ActivityNorm,
    ActivityRegularization,
    dispatch,
    get_backend,
    use_backend,
    warmup,
)
from actreg_dispatch.backends import numba
from actreg_dispatch.backends.numba import PARALLEL_FROM, compiling
from actreg_dispatch.backends.numba.calls import call_of
from actreg_dispatch.backends.numba.plans import plan_of
from actreg_dispatch.norms import NORMS, named_norm
from actreg_dispatch.options import constants_of
from actreg_dispatch.oracle import exact_result

LARGE = PARALLEL_FROM + 5


@pytest.fixture(params=["l1", "l2", "l2_squared"])
def reg(request):
    """Return a regularization that has already served arrays like those of the tests."""
    made = ActivityRegularization(0.1, request.param)
    for _ in range(2):
        made.apply(np.ones(3), np.zeros(3))
        made.penalty(np.ones(3))
    return made


@pytest.mark.parametrize(
    ("activations", "gradients", "error", "message"),
    [
        (np.ones(3), np.zeros(4), ValueError, "shape"),
        (np.ones((2, 3)), np.zeros((3, 2)), ValueError, "shape"),
        (np.ones(6), np.zeros((2, 3)), ValueError, "shape"),
        (np.ones((1, 3)), np.zeros(3), ValueError, "shape"),
        (np.ones(3), np.zeros(3, np.float32), TypeError, "dtype"),
        (np.ones(3, np.float32), np.zeros(3), TypeError, "dtype"),
        (np.ones(3, np.int64), np.zeros(3, np.int64), TypeError, "dtype"),
        (np.ones(3), [0.0, 0.0, 0.0], TypeError, "gradients"),
        ([1.0, 1.0, 1.0], np.zeros(3), TypeError, "activations"),
        (np.ma.ones(3), np.zeros(3), TypeError, "masked"),
        (np.ones(3), np.ma.zeros(3), TypeError, "masked"),
    ],
    ids=str,
)
def test_what_is_refused_at_first_is_refused_later(reg, activations, gradients, error, message):
    before = np.array(gradients)
    for _ in range(2):
        with pytest.raises(error, match=message):
            reg.apply(activations, gradients)
    assert (np.array(gradients) == before).all()


def test_read_only_and_overlapping_gradients_are_refused(reg):
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        reg.apply(np.ones(3), frozen)
    room = np.ones(4)
    for x, g in (
        (room, room),
        (room[:3], room[1:]),
        (room[1:], room[:3]),
        (room[1:2], room[:2][1:]),
    ):
        with pytest.raises(ValueError, match="share memory"):
            reg.apply(x, g)
    assert (room == 1).all()
    gradients = np.zeros(5)
    reg.apply(gradients[:2] + 1, gradients[2:4])  # neighbours do not overlap
    room = np.ones(4)
    reg.apply(room[:2], room[2:])
    assert (room[:2] == 1).all()
    assert (room[2:] > 1).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_sequence_of_calls_is_right(reg, dtype):
    rng = np.random.default_rng(0)
    shapes = [(3,), (0,), (LARGE,), (3,), (2, 3), (), (2, 1, 4), (300, 200), (3,)]
    for shape in shapes:
        for spread in (False, True):
            x = np.asarray(rng.normal(size=(*shape, 2)) if spread else rng.normal(size=shape))
            x = x.astype(dtype)[..., 0] if spread else x.astype(dtype)
            g = np.zeros((*shape, 3), dtype)[..., 1] if spread else np.zeros(shape, dtype)
            g[...] = rng.normal(size=shape)
            penalty, updated = exact_result(x, g, reg.norm, 0.1)
            for found in (reg.apply(x, g), reg.penalty(x)):
                assert type(found) is type(penalty)
                assert found == penalty
            assert g.tobytes() == updated.tobytes()


def test_a_new_lam_counts_at_the_next_call(reg):
    x, g = np.ones(4), np.zeros(4)
    size = 2.0 if reg.norm is ActivityNorm.L2 else 4.0
    for lam in (0.5, 0.0, 8.0):
        reg.lam = lam
        for _ in range(2):
            assert reg.apply(x, g) == reg.penalty(x) == lam * size
    reg.lam = 1e39
    x, g = x.astype(np.float32), g.astype(np.float32)
    before = g.copy()
    for _ in range(2):
        with pytest.raises(ValueError, match="too large"):
            reg.apply(x, g)
    assert (g == before).all()


def test_a_new_choice_of_backend_counts_at_the_next_call(reg, monkeypatch):
    used = []
    reference = get_backend("numpy")
    original = reference.apply
    monkeypatch.setattr(reference, "apply", lambda *a: used.append("numpy") or original(*a))
    x, g = np.ones(3), np.zeros(3)
    reg.apply(x, g)
    assert not used
    with use_backend("numpy"):
        reg.apply(x, g)
        assert len(used) == 1
    reg.apply(x, g)
    monkeypatch.setenv("ACTREG_BACKEND", "numpy")
    reg.apply(x, g)
    reg.apply(x, g)
    assert len(used) == 3
    monkeypatch.setenv("ACTREG_BACKEND", "numba")
    reg.apply(x, g)
    reg.apply(x, g)
    monkeypatch.delenv("ACTREG_BACKEND")
    reg.apply(x, g)
    assert len(used) == 3


def test_contiguous_arrays_go_by_the_fused_kernel(reg, monkeypatch):
    backend = get_backend("numba")
    for name in ("penalty", "apply"):
        monkeypatch.setattr(backend, name, None)
    for shape in ((3,), (1, 3), (1, 1, 3), (1, 1, 1, 1, 3), (1,) * 31 + (3,), ()):
        x, g = np.ones(shape), np.zeros(shape)
        for _ in range(2):
            assert reg.apply(x, g) == reg.penalty(x)


def test_arrays_of_another_number_of_axes_keep_the_plan_of_the_others(reg, monkeypatch):
    pairs = [(np.ones(shape), np.zeros(shape)) for shape in ((3,), (1, 3), (1, 1, 3))]
    for x, g in pairs:
        assert reg.apply(x, g) == reg.penalty(x)
    monkeypatch.setattr(get_backend("numba"), "fused_kernel", None)
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":  # before, there is no plan but the kernel
        monkeypatch.setattr(dispatch.Dispatcher, "_planned", None)
    for x, g in pairs * 2:
        assert reg.apply(x, g) == reg.penalty(x)


def test_epsilon_and_what_is_not_finite():
    reg = ActivityRegularization.l2(0.5, epsilon=25.0)
    for _ in range(2):
        gradients = np.zeros(2)
        assert reg.apply(np.array([3.0, 4.0]), gradients) == 2.5
        assert (gradients == 0).all()
    for norm in ActivityNorm:
        reg = ActivityRegularization(1.0, norm)
        for value in (math.inf, math.nan, -math.inf):
            gradients = np.zeros(2, np.float32)
            for _ in range(2):
                penalty = reg.apply(np.array([value, 1.0], np.float32), gradients)
                # a ratio of two infinite sums is NaN
                expected = math.nan if norm is ActivityNorm.HOYER else abs(value)
                np.testing.assert_equal(float(penalty), expected)


@pytest.mark.parametrize("other", [">f2", np.int16, np.uint16, "V2", "S2", np.float32, np.uint8])
def test_sixteen_bits_of_another_kind_are_refused(other):
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        reg = ActivityRegularization(0.5)
        gradients = np.zeros(4, other)
        before = gradients.tobytes()
        for _ in range(2):
            with pytest.raises(TypeError, match="gradients have dtype"):
                reg.apply(np.ones(4, dtype), gradients)
            reg.apply(np.ones(4, dtype), np.zeros(4, dtype))
        assert gradients.tobytes() == before


def test_foreign_byte_order_is_refused_after_any_array():
    misaligned = np.frombuffer(bytearray(33), np.uint8)[1:25].view(np.float64)
    foreign = np.zeros(3, np.dtype(np.float64).newbyteorder("S"))
    for shape in ((3,), (1, 3)):
        reg = ActivityRegularization(0.5)
        for gradients in (misaligned.reshape(shape), np.zeros(shape)):
            reg.apply(np.ones(shape), gradients)
            with pytest.raises(TypeError, match="dtype"):
                reg.apply(np.ones(shape), foreign.reshape(shape))
    assert (foreign == 0).all()
    assert (misaligned == [1, 1, 1]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_misaligned_arrays_are_left_to_the_reference(monkeypatch, dtype):
    used = []
    reference = get_backend("numpy")
    original = reference.apply
    monkeypatch.setattr(reference, "apply", lambda *a: used.append(1) or original(*a))
    room = bytearray(3 * np.dtype(dtype).itemsize + 1)
    misaligned = np.frombuffer(room, np.uint8)[1:].view(dtype)
    reg, aligned = ActivityRegularization(0.5), np.ones(3, dtype)
    for pair in ((aligned, misaligned), (misaligned, aligned)):
        reg.apply(np.ones(3, dtype), np.zeros(3, dtype))
        reg.apply(*pair)
    assert len(used) == 2
    assert (misaligned == 0.5).all()
    assert (aligned == 1.5).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, LARGE, 300_001])
def test_gradients_are_overwritten_to_the_last_and_no_further(size, dtype):
    x, whole = np.ones(size, dtype), np.full(size + 2, np.nan, dtype)
    ActivityRegularization(0.5).penalty_and_gradient(x, whole[1:-1])
    assert (whole[1:-1] == 0.5).all()
    assert np.isnan(whole[[0, -1]]).all()


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("strided", [False, True])
def test_warming_up_leaves_nothing_to_compile(monkeypatch, norm, strided):
    monkeypatch.setattr(compiling, "KERNELS", {})
    warmup([np.float16, "float32"], norm, strided=strided)
    monkeypatch.setattr(compiling, "_compiled", None)
    for dtype in (np.float16, np.float32):
        reg = ActivityRegularization(1.0, norm)
        for size in (3, LARGE):
            for spread in (1, 2)[: 1 + strided]:
                x, g = np.ones(spread * size, dtype), np.zeros(spread * size, dtype)
                reg.apply(x[::spread], g[::spread])
                reg.penalty(x[::spread])
        for values in ([1, 2.0**-12, 2.0**-24], [1, 1, 1, 2.0**-13]):  # certain or not
            reg.apply(np.array(values, dtype), np.zeros(len(values), dtype))
        shapes = [(3,), (1, 2), (1, 2, 3), (1, 1, 1, 2)]
        reg.apply_all([np.ones(s, dtype) for s in shapes], [np.zeros(s, dtype) for s in shapes])
        reg.partial_sum(x)


def test_a_lam_that_another_thread_assigns_serves_the_next_call(monkeypatch):
    """Values on a tie, whose penalty takes an exact sum once the gradients are updated."""
    x, reg, backend = np.array([2.0**53, 1.0]), ActivityRegularization(1.0), get_backend("numba")
    real = backend.fused_kernel

    def fused_kernel(*arguments, **options):
        kernel = real(*arguments, **options)

        def interrupted(*each):
            found = kernel(*each)
            reg.lam = 3.0
            return found

        return interrupted

    monkeypatch.setattr(backend, "fused_kernel", fused_kernel)
    for _ in range(2):  # the second call may go by the plan of the first
        reg.lam, gradients = 1.0, np.zeros(2)
        assert reg.apply(x, gradients) == 2.0**53
        assert (gradients == 1).all()
    assert reg.penalty(x) == 3 * 2.0**53


def test_threads_are_used_by_parallel_kernels_and_by_no_others(python):
    code = """
from actreg_dispatch.backends.numba import drivers
for parallel in (False, True):
    codes = [drivers.whole_function(parallel).inspect_llvm()]
    kernels = [drivers.pass_kernel(parallel)]
    kernels += [drivers.batch_kernel(n_lams, parallel) for n_lams in (1, 2)]
    for kernel in kernels:
        codes += kernel.inspect_llvm().values()
    for code in codes:
        assert ("parallel_for" in code) == parallel, code
"""
    python("-c", code, ACTREG_CACHE="0")


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_a_call_depends_on_nothing_that_lies_where_it_writes(name, writes, parallel):
    # Compiled with parallel=True, Numba once took the clearing of a total for dead code.
    norm, x = named_norm(name), np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    constants = constants_of(ActivityRegularization(0.1, name).options, x.dtype, 1)
    whole = numba.kernel_of(numba.drivers.whole_function, parallel).ctypes
    plan = plan_of(norm, x.dtype, writes=writes, parallel=parallel)
    found = set()
    for rest in (0.0, 1e6, math.nan):
        g = np.zeros_like(x)
        call = call_of(x, g, None, norm, constants)
        for field in (call.total, call.coefficients):
            field[:] = [rest] * len(field)
        found.add((whole(ctypes.addressof(plan), ctypes.addressof(call)), g.tobytes()))
    assert len(found) == 1
