"""Many layers at once: the bits of a loop, in one compiled call where the arrays are plain."""

from __future__ import annotations

import logging
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from supported import dtypes

from actreg_dispatch import (
    ActivityNorm,
    ActivityRegularization,
    MixedArraysError,
    UnknownBackendError,
    get_backend,
)
from actreg_dispatch.layers import penalties_of_rows
from actreg_dispatch.norms import NORMS
from actreg_dispatch.options import Constants
from actreg_dispatch.oracle import binary64, exact_sum

norms = pytest.mark.parametrize("norm", ActivityNorm, ids=lambda norm: norm.value)
SHAPES = [(5,), (), (0,), (3, 4), (0, 3), (2, 3, 4), (9000,), (33_333,), (1,)]


def layers_of(shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    xs = [np.asarray(rng.normal(size=shape)).astype(dtype) for shape in shapes]
    gs = [np.asarray(rng.normal(size=shape)).astype(dtype) for shape in shapes]
    return xs, gs


def assert_as_in_a_loop(reg, xs, gs, **options):
    """Compare with one call for each layer, whose bits other tests compare with exact numbers."""
    alone = [g.copy() for g in gs]
    expected = [reg.apply(x, g, **options) for x, g in zip(xs, alone, strict=True)]
    total, penalties = reg.apply_all(xs, gs, **options)
    assert [type(p) for p in penalties] == [type(p) for p in expected]
    assert [p.tobytes() for p in penalties] == [p.tobytes() for p in expected]
    assert [g.tobytes() for g in gs] == [g.tobytes() for g in alone]
    exact = exact_sum(np.array(expected), ActivityNorm.L1) if all(map(np.isfinite, expected)) else 0
    if exact:
        assert total == np.array(expected).dtype.type(binary64(exact))
    return total


@pytest.fixture
def taken(monkeypatch):
    """Count the calls that the compiled function takes."""
    backend = get_backend("numba")
    calls, real = [], backend.fused_batch

    def watched(*arguments):
        result = real(*arguments)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(backend, "fused_batch", watched)
    return calls


@norms
@dtypes
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:6], [(100_000,)], [(400,)] * 100, [(2, 0)]])
def test_layers_are_done_as_in_a_loop(taken, norm, dtype, shapes):
    assert_as_in_a_loop(ActivityRegularization(0.1, norm), *layers_of(shapes, dtype))
    assert taken == [True]


@norms
@pytest.mark.parametrize("reduction", ["mean", "batch", (-1,)])
def test_each_layer_has_a_reduction_of_its_own(taken, norm, reduction):
    shapes = [shape for shape in SHAPES if shape]
    reg = ActivityRegularization(0.1, norm, reduction=reduction)
    assert_as_in_a_loop(reg, *layers_of(shapes, np.float32), scale=-3.0)
    assert taken == [True]


@norms
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layers_on_a_tie_take_an_exact_sum(taken, norm, dtype):
    half_bit = 2.0**-24 if dtype == np.float32 else 2.0**-53
    tie = [1.0, half_bit if norm is ActivityNorm.L1 else math.sqrt(half_bit), 0.0]
    xs = [np.array(values, dtype) for values in ([1.0, 2.0], tie, [3.0])]
    assert_as_in_a_loop(ActivityRegularization(1.0, norm), xs, [np.ones_like(x) for x in xs])
    assert taken == [True]


@pytest.mark.parametrize("small", [0.0, 1e-9])
def test_a_layer_without_a_gradient_is_left_alone(small):
    xs, gs = [np.full(3, small), np.ones(3)], [np.ones(3), np.ones(3)]
    assert_as_in_a_loop(ActivityRegularization(0.5, "l2"), xs, gs)
    assert (gs[0] == 1).all()


@norms
def test_what_is_not_finite_stays_in_its_layer(norm):
    xs = [np.array(values) for values in ([1.0, 2.0], [math.inf, 1.0], [3.0], [math.nan, 0.0])]
    gs = [np.zeros_like(x) for x in xs]
    total = assert_as_in_a_loop(ActivityRegularization(0.5, norm), xs, gs)
    assert math.isnan(total)
    assert np.isfinite(gs[0]).all()


@norms
def test_layers_that_are_not_plain_are_done_one_by_one(taken, norm):
    xs, gs = layers_of([(6, 5), (4,), (7,)], np.float32)
    room = np.zeros((6, 10), np.float32)
    for odd in (room[:, ::2], np.asfortranarray(gs[0]), room[:, :5].astype(">f4")):
        x = xs[0].astype(odd.dtype)
        assert_as_in_a_loop(ActivityRegularization(0.1, norm), [xs[1], x], [gs[1], odd])
    doubles = layers_of([(3,)], np.float64)
    assert_as_in_a_loop(ActivityRegularization(0.1, norm), [*xs, *doubles[0]], [*gs, *doubles[1]])
    misaligned = np.frombuffer(bytearray(33), np.uint8)[1:].view(np.float64)
    for x, g in ((np.ones(4), misaligned), (misaligned, np.ones(4))):
        assert_as_in_a_loop(ActivityRegularization(0.1, norm), [np.ones(2), x], [np.ones(2), g])
    assert taken == [False] * 6


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_the_backend_is_chosen_as_for_one_layer(name):
    assert_as_in_a_loop(ActivityRegularization(0.1, backend=name), *layers_of(SHAPES, np.float32))


def test_the_total_takes_no_other_choice_of_a_backend(monkeypatch, caplog):
    monkeypatch.setenv("ACTREG_BACKEND", "bogus")
    reg, gradients = ActivityRegularization(1.0, backend="numba"), [np.zeros(3), np.zeros(2)]
    with caplog.at_level(logging.DEBUG, "actreg_dispatch"):
        assert reg.apply_all([np.ones(3), np.ones(2)], gradients).total == 5.0
    assert len(caplog.records) == 1
    assert all((g == 1).all() for g in gradients)
    with pytest.raises(UnknownBackendError):
        ActivityRegularization(1.0).apply_all([np.ones(3)], gradients[:1])
    assert (gradients[0] == 1).all()


@norms
def test_the_total_may_be_too_large(norm):
    xs = [np.array([1e308])] * 3
    lam = {ActivityNorm.L1: 1.0, ActivityNorm.L2: 1.0, ActivityNorm.HOYER: 8e307}
    reg = ActivityRegularization(lam.get(norm, 1e-300), norm)
    assert reg.apply_all(xs, [np.zeros(1) for _ in xs]).total == math.inf


LARGEST = np.finfo(np.float64).max


@pytest.mark.parametrize(
    ("penalties", "total"),
    [
        ([1.7e308, 1.7e308, math.nan], math.nan),
        ([1.7e308, math.inf, 1.7e308], math.inf),
        ([math.nan, math.inf], math.nan),
        ([LARGEST, np.nextafter(2.0**970, 0), 2.0**916], LARGEST),  # just below the tie
        ([LARGEST, np.nextafter(2.0**970, 0), 2.0**917], math.inf),
    ],
)
def test_a_total_at_the_end_of_the_range(backend, penalties, total):
    xs = [backend.array([penalty]) for penalty in penalties]
    gs = [backend.array([0.0]) for _ in penalties]
    found = backend.regularization(1.0, "l1").apply_all(xs, gs)
    np.testing.assert_equal(float(found.total), total)


def test_a_total_of_several_dtypes_on_a_device_keeps_subnormal_numbers(cupy):
    penalties = [np.float32(1e-40), np.float64(0.0), np.float32(3.0), np.float64(1e-300)]
    for chosen in ([0, 1], [0, 2, 3], [1, 2]):
        xs = [cupy.asarray(penalties[k]).reshape(1) for k in chosen]
        total = ActivityRegularization(1.0).apply_all(xs, [cupy.zeros_like(x) for x in xs]).total
        assert total.get() == math.fsum(float(penalties[k]) for k in chosen)


def test_names_lead_to_the_penalties():
    xs, gs = ({"a": np.ones(3), "b": np.full(2, -2.0)} for _ in range(2))
    total, layers = ActivityRegularization(0.5).apply_all(xs, dict(reversed(gs.items())))
    assert layers == {"a": 1.5, "b": 2.0}
    assert total == 3.5
    assert gs["b"].tolist() == [-2.5, -2.5]


def test_a_layer_without_axes_has_no_batch():
    gradients = [np.zeros(3), np.zeros(())]
    with pytest.raises(ValueError, match=r"^activations\[1\] have no axes, but"):
        ActivityRegularization(0.5, reduction="batch").apply_all(
            [np.ones(3), np.ones(())], gradients
        )
    assert not gradients[0].any()


def test_no_layers_at_all():
    assert ActivityRegularization(0.5).apply_all([], []) == (0.0, [])
    assert ActivityRegularization(0.5).apply_all({}, {}) == (0.0, {})


WRONG = {
    "shape": (lambda x, g: (x, np.ones(4)), ValueError, r"^gradients\[1\] have shape \(4,\)"),
    "dtype": (lambda x, g: (x, g.astype("f4")), TypeError, r"^gradients\[1\] have dtype float32"),
    "list": (lambda x, g: ([1.0], g), TypeError, r"^activations\[1\] must be a NumPy or CuPy"),
    "integers": (lambda x, g: (x.astype(int), g), TypeError, r"^activations\[1\] have dtype int64"),
    "itself": (
        lambda x, g: (g, g),
        ValueError,
        r"^gradients\[1\] share .* activations\[1\]",
    ),
    "other shape": (
        lambda x, g: (x.reshape(1, 3), g.reshape(3, 1)),
        ValueError,
        r"^gradients\[1\] have shape",
    ),
    "read-only": (
        lambda x, g: (x, np.broadcast_to(g, g.shape)),
        ValueError,
        r"^gradients\[1\] are read-only",
    ),
}


@norms
@pytest.mark.parametrize("wrong", WRONG)
def test_all_layers_are_checked_before_one_is_written(norm, wrong):
    change, error, message = WRONG[wrong]
    xs, gs = [np.ones(3) for _ in range(3)], [np.zeros(3) for _ in range(3)]
    xs[1], gs[1] = change(xs[1], gs[1])
    with pytest.raises(error, match=message):
        ActivityRegularization(0.5, norm).apply_all(xs, gs)
    assert not gs[0].any()
    assert not gs[2].any()


def test_layers_that_share_memory_are_refused():
    room, x = np.zeros(100), np.ones(40)
    apart, over = (room[:40], room[40:80]), (room[:40], room[39:79])
    reg = ActivityRegularization(0.5)
    with pytest.raises(ValueError, match=r"gradients\[1\] and gradients\[0\] share memory.*copies"):
        reg.apply_all([x, x], over)
    with pytest.raises(ValueError, match=r"activations\['a'\] share memory; the update"):
        reg.apply_all({"a": room[:40], "b": x}, {"a": room[60:], "b": room[20:60]})
    assert not room.any()
    assert reg.apply_all([x, x], apart).total == 40.0  # activations may be shared
    assert (room[:80] == 0.5).all()
    interleaved = room[80:100:2], room[81:100:2]
    assert reg.apply_all([x[:10], x[:10]], interleaved).total == 10.0
    assert (room[80:] == 0.5).all()


@given(data=st.data())
def test_any_places_in_memory(data):
    """Layers anywhere in one buffer are done if no byte of gradients belongs to anything else."""
    buffer = np.zeros(60)
    places = data.draw(
        st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 10)), max_size=4)
    )
    reads = [range(x, x + n) for x, _, n in places]
    writes = [range(g, g + n) for _, g, n in places]
    written = [place for part in writes for place in part]
    legal = len({*written}) == len(written) and not {*written} & {p for r in reads for p in r}
    buffer[sorted({p for r in reads for p in r})] = 2.0
    before = buffer.copy()
    xs, gs = ([buffer[part.start : part.stop] for part in parts] for parts in (reads, writes))
    reg = ActivityRegularization(0.5)
    if legal:
        assert [float(p) for p in reg.apply_all(xs, gs).layers] == [float(x.size) for x in xs]
        before[written] += 0.5
    else:
        with pytest.raises(ValueError, match="share memory"):
            reg.apply_all(xs, gs)
    assert buffer.tolist() == before.tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((2, 3)), [np.ones(3)]), TypeError, "activations are a ndarray; pass lists"),
        (([np.ones(3)], {"a": np.ones(3)}), TypeError, "are a list but gradients are a dict; pass"),
        (([np.ones(3)], []), ValueError, "gradients has 0 layers but activations has 1"),
        (({"a": np.ones(3)}, {"b": np.ones(3)}), ValueError, "differ in the layers 'a', 'b'"),
    ],
)
def test_layers_that_do_not_pair_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ActivityRegularization(0.5).apply_all(*arguments)


class Liar(list):
    """Says that it has other layers than it has."""

    def __init__(self, layers, length, items):
        super().__init__(layers)
        self.length, self.items = length, items

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("number", [2, 2000])
def test_layers_are_as_many_as_there_are(number):
    reg = ActivityRegularization(0.5)
    xs, gs = [np.ones(3) for _ in range(number)], [np.zeros(3) for _ in range(number)]
    for liar in (Liar(gs, number, []), Liar(gs, number, gs[:1]), Liar(gs, number, 2 * gs)):
        for arguments in ((xs, liar), (liar, xs)):
            with pytest.raises(ValueError, match=r"gradients has \d+ layers but activations has"):
                reg.apply_all(*arguments)
    assert not any(g.any() for g in gs)
    assert reg.apply_all(xs, Liar([], 0, gs)).total == 1.5 * number


def test_lists_may_change_in_another_thread(python):
    """In a process of its own, which would crash if it read what is not there any more."""
    code = """
import sys, threading, time
import numpy as np
from actreg_dispatch import ActivityRegularization

sys.setswitchinterval(1e-6)
reg, xs = ActivityRegularization(0.5), [np.ones(3) for _ in range(400)]
full = [np.zeros(3) for _ in range(400)]
gs, enough, calls = list(full), threading.Event(), [0, 0]
reg.apply_all(xs, gs)  # compiles

def change():
    while not enough.is_set():
        gs.clear()
        gs.extend(full)

thread = threading.Thread(target=change)
thread.start()
begin = time.monotonic()
while (passed := time.monotonic() - begin) < 4 or (passed < 60 and 0 in calls):
    try:
        assert reg.apply_all(xs, gs).total == 600.0
        calls[0] += 1
    except ValueError:
        calls[1] += 1
enough.set()
thread.join()
print("done" if all(calls) else calls)
"""
    assert python("-c", code).stdout == "done\n"


def test_errors_of_floating_point_are_not_for_the_caller():
    with np.errstate(all="raise"):
        reg = ActivityRegularization(5e-324, reduction="mean")
        assert reg.apply_all([np.full(3, 1e308)], [np.zeros(3)]).total == 0.0


def test_a_strength_too_large_for_a_layer_is_refused():
    gradients = [np.zeros(2), np.zeros(2, np.float32)]
    with pytest.raises(ValueError, match=r"lam=1e\+300 is too large for float32 activations\[1\];"):
        ActivityRegularization(1e300).apply_all([np.ones(2), np.ones(2, np.float32)], gradients)
    with pytest.raises(ValueError, match="lam=1e\\+300 is too large for float32"):
        ActivityRegularization(1e300).apply_all([np.ones(2, np.float32)], gradients[1:])
    with pytest.raises(TypeError, match="scale='2' is of type str"):
        ActivityRegularization(0.5).apply_all([np.ones(2)], gradients[:1], scale="2")
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("name", ["numpy", "cupy"])
def test_layers_may_move_to_a_backend_of_another_array_type(cupy, name):
    reg = ActivityRegularization(0.5, backend=name)
    for module in (np, cupy):
        gradients = [module.zeros(3), module.zeros(2, "f4")]
        total, layers = reg.apply_all([module.ones(3), module.ones(2, "f4")], gradients)
        assert type(total) is (np.float64 if module is np else cupy.ndarray)
        assert [float(total), *map(float, layers)] == [2.5, 1.5, 1.0]
        assert all(float(g.sum()) == g.size / 2 for g in gradients)


@norms
@dtypes
@pytest.mark.parametrize("reduction", ["sum", "batch"])
def test_layers_on_a_device(cupy, norm, dtype, reduction):
    if dtype == ml_dtypes.bfloat16 and int(cupy.__version__.split(".")[0]) < 14:
        pytest.skip("CuPy has no bfloat16 before version 14")
    xs, gs = layers_of([(0,), (5,), (3, 4), (1,), (0, 2), (3000,), (4097,), (0,)], dtype)
    reg = ActivityRegularization(0.1, norm, reduction=reduction)
    expected = [g.copy() for g in gs]
    total, layers = reg.apply_all(xs, expected, scale=-2.5)
    there = [cupy.asarray(x) for x in xs], [cupy.asarray(g) for g in gs]
    found = reg.apply_all(*there, scale=-2.5)
    assert found.total.get() == total
    assert {type(p) for p in found.layers} == {cupy.ndarray}
    assert [p.get().tobytes() for p in found.layers] == [p.tobytes() for p in layers]
    assert [g.get().tobytes() for g in there[1]] == [g.tobytes() for g in expected]


@pytest.mark.parametrize("epsilon", [None, 25.0])
def test_epsilon_counts_for_layers_on_a_device(cupy, epsilon):
    reg = ActivityRegularization(0.5, "l2", epsilon=epsilon)
    xs = [np.array(values) for values in ([3.0, 4.0], [3.0, 5.0], [1e-9, 0.0])]
    gs, there = [np.zeros(2) for _ in xs], [cupy.zeros(2) for _ in xs]
    reg.apply_all(xs, gs)
    reg.apply_all([cupy.asarray(x) for x in xs], there)
    assert [g.get().tolist() for g in there] == [g.tolist() for g in gs]
    assert not gs[2].any()


def test_layers_on_a_device_that_are_not_plain_are_done_one_by_one(cupy):
    reg, room = ActivityRegularization(0.1), cupy.zeros((3, 8), np.float32)
    xs = [cupy.ones((3, 4), np.float32), cupy.ones(2)]
    penalties = reg.apply_all(xs, [room[:, ::2], cupy.zeros(2)])
    assert [float(p) for p in penalties.layers] == [float(reg.penalty(x)) for x in xs]
    assert (room[:, ::2] == np.float32(0.1)).all()
    assert not room[:, 1::2].any()
    empty = reg.apply_all([cupy.zeros(0)], [cupy.zeros(0)])
    assert float(empty.total) == 0.0


@norms
def test_layers_of_several_libraries_are_refused(cupy, norm):
    here, there = ([module.ones(3), module.zeros(3)] for module in (np, cupy))
    with pytest.raises(MixedArraysError, match="activations are of several libraries"):
        ActivityRegularization(0.1, norm).apply_all([here[0], there[0]], [here[1], there[1]])
    assert not here[1].any()


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("norm", NORMS.values(), ids=lambda norm: norm.name)
def test_as_many_launches_for_all_layers_as_for_one(cupy, monkeypatch, norm, certified):
    from actreg_dispatch.backends import cuda

    monkeypatch.setattr(cuda, "CERTIFIED_FROM", 200 if certified else 201)

    xs, gs = [cupy.arange(1.0, 11) ** 2] * 20, [cupy.zeros(10) for _ in range(20)]
    kernels, calls = cuda.kernels_of(norm, batch=True), []

    def counting(kernel):
        return lambda *arguments, **options: calls.append(kernel) or kernel(*arguments, **options)

    watched = type(kernels)(*(kernel and counting(kernel) for kernel in kernels))
    monkeypatch.setattr(cuda, "kernels_of", lambda norm, batch: watched)
    lam = (0.1,) * norm.n_lams
    assert cuda.BACKEND.apply_batch(xs, gs, norm, [Constants(lam, lam, 0.0)] * 20)
    assert len(calls) == 2 + norm.two_pass + 2 * certified
    assert all((g != 0).all() for g in gs)


# Rows of one array.


def rows_of(kind, dtype):
    rows = np.random.default_rng(3).normal(size=(7, 4, 6))
    if kind == "odd":
        rows[1] = 0.0
        rows[2, 1, 1], rows[3, 0, 0] = np.nan, np.inf
        rows[4] = 0.0
        rows[4, :2, 0] = 1.0, 2.0 ** (-53 if dtype is np.float64 else -24)  # a tie, of L1
        rows[5, 3, 3] = 0.0
    return rows.astype(dtype)


@norms
@pytest.mark.parametrize("reduction", ["sum", "mean", "batch"])
@dtypes
@pytest.mark.parametrize("kind", ["usual", "odd", "long"])
def test_rows_are_done_as_in_a_loop_over_zeros(norm, reduction, dtype, kind):
    x = rows_of(kind, dtype)
    if kind == "long":
        x = np.repeat(x.reshape(7, 24), 700, axis=1)
    options = ActivityRegularization(0.1, norm, reduction=reduction).options
    expected = np.zeros_like(x)
    reg = ActivityRegularization.from_options(options)
    penalties = [reg.apply(*row, scale=-2.0) for row in zip(x, expected, strict=True)]
    for gradients in (None, np.full_like(x, np.nan)):
        found = penalties_of_rows(options, x, gradients, -2.0)
        assert_array_equal(found.astype(penalties[0].dtype), penalties)
        if gradients is not None:
            assert gradients.tobytes() == expected.tobytes()


def test_rows_of_other_backends_are_not_taken():
    x = np.ones((2, 3))
    options = ActivityRegularization(0.1, "l1", backend="numpy").options
    assert penalties_of_rows(options, x, None, 1.0) is None
