"""Threads that share everything, released at once: each result is that of exact arithmetic.

Where the interpreter has a lock, threads take turns after a microsecond. Where it has none, they
run at once. What needs a fresh process is in test_processes.py.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from actreg_dispatch import (
    ActivationStatistics,
    ActivityRegularization,
    Backend,
    available_backends,
    dispatch,
    get_backend,
    norms,
    register_backend,
    register_norm,
    registry,
    row_norms,
    use_backend,
)
from actreg_dispatch.backends.numba import compiling
from actreg_dispatch.norms import ActivityNorm, Norm
from actreg_dispatch.oracle import exact_result, exact_row_result

THREADS = 6
NORMS = ActivityNorm.L1, ActivityNorm.L2, ActivityNorm.HOYER  # of one pass, of two, of two sums
LAYOUTS = {
    "short": lambda x: x[:16],
    "matrix": lambda x: x.reshape(6, 40),
    "deep": lambda x: x.reshape(2, 3, 4, 10),
    "columns": lambda x: x.reshape(6, 40).T,
    "strided": lambda x: x[::3],
}


@pytest.fixture(autouse=True)
def _quick_turns():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*works):
    """Call each function in a thread of its own, all at once, and return what they returned."""
    barrier, found, errors = threading.Barrier(len(works)), {}, []

    def run(number, work):
        try:
            barrier.wait(60)
            found[number] = work()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(works)]
    hook, threading.excepthook = threading.excepthook, lambda _: None  # they are raised below
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)  # kernels may have to be compiled, on a busy machine
    finally:
        threading.excepthook = hook
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    assert len(found) == len(works), "some threads do not come to an end"
    return [found[number] for number in range(len(works))]


class Case:
    """A call whose exact result is known."""

    def __init__(self, norm, dtype, layout, lam=0.1):
        values = np.random.default_rng(1).normal(size=240).astype(dtype)
        self.norm, self.x = norm, LAYOUTS[layout](values)
        self.g = np.full_like(self.x, 0.25)
        self.penalty, self.updated = exact_result(self.x, self.g, norm, lam)

    def check(self, reg):
        """Call both functions, and compare all bits."""
        g = self.g.copy(order="K")
        found = reg.apply(self.x, g), reg.penalty(self.x)
        assert [each.tobytes() for each in found] == [self.penalty.tobytes()] * 2
        assert g.tobytes() == self.updated.tobytes()


@pytest.fixture(scope="module")
def cases():
    of_all = NORMS, (np.float32, np.float64), LAYOUTS
    return [Case(*each) for each in itertools.product(*of_all)]


@pytest.fixture
def _no_kernels(monkeypatch):
    """Let every kernel be compiled, or loaded, anew."""
    monkeypatch.setattr(compiling, "KERNELS", {})


@pytest.mark.usefixtures("_no_kernels")
def test_regularizations_are_shared_from_their_first_call_on(cases):
    for repeat in range(4):  # kernels are new in the first, plans in all
        regs = {norm: ActivityRegularization(0.1, norm) for norm in NORMS}

        def work(number, regs=regs, repeat=repeat):
            start = (7 * number + repeat) % len(cases)
            for case in cases[start:] + cases[:start]:  # shapes and layouts in turns
                case.check(regs[case.norm])

        at_once(*(lambda number=number: work(number) for number in range(THREADS)))


def test_large_arrays_at_once():
    x = np.random.default_rng(2).normal(size=60_001).astype(np.float32)
    expected = {norm: exact_result(x, np.ones_like(x), norm, 0.1) for norm in NORMS[:2]}

    def work():
        for norm, (penalty, updated) in expected.items():
            g, reg = np.ones_like(x), ActivityRegularization(0.1, norm)
            for each in range(3):
                g[...] = 1
                assert reg.apply(x, g).tobytes() == penalty.tobytes(), each
                assert g.tobytes() == updated.tobytes()

    at_once(*[work] * THREADS)


def test_a_kernel_is_compiled_once(monkeypatch):
    monkeypatch.setattr(compiling, "KERNELS", {})
    made = []

    def factory(key):
        made.append(key)
        time.sleep(1e-3)
        return object()

    for key in range(20):
        kernels = at_once(*[lambda key=key: compiling.kernel_of(factory, key)] * THREADS)
        assert len(set(map(id, kernels))) == 1
    assert made == list(range(20))


def test_lam_is_that_of_one_assignment():
    """In every call, and, once all are done, in all forms that it is kept in."""
    lams = [0.5, 1.0, 2.0, 4.0]
    x = np.array([1.0, -2.0, 4.0])
    strided = np.repeat(x, 2)[::2]
    reg, stop = ActivityRegularization(0.5), threading.Event()
    reg.penalty(x)

    def assign(lam):
        for _ in range(300):
            reg.lam = lam
            done.wait(60)
            kept = {reg.lam, reg.penalty(x) / 7, reg.penalty(strided) / 7}
            kept.add(float(reg._dispatcher.assigned.lam_array[0]))
            if len(kept) > 1:
                done.abort()
            assert len(kept) == 1, kept
            done.wait(60)

    def call():
        while not stop.is_set():
            for values in (x, strided):
                g = np.zeros(3)
                penalty = reg.apply(values, g)
                assert penalty / 7 in lams
                assert g.tolist() == [penalty / 7, -penalty / 7, penalty / 7]

    done = threading.Barrier(len(lams))
    calling = threading.Thread(target=call)
    calling.start()
    try:
        at_once(*(lambda lam=lam: assign(lam) for lam in lams))
    finally:
        stop.set()
        calling.join()


class Slow(tuple):
    """A λ that lets other threads go on while it is taken in."""

    __slots__ = ()

    def __len__(self):
        time.sleep(1e-5)
        return super().__len__()


def test_lam_is_assigned_as_a_whole():
    options = ActivityRegularization(0.5).options
    dispatcher = dispatch.Dispatcher(options)

    def assign(lam):
        for _ in range(20):
            dispatcher.options = options._replace(lam=Slow((lam,)))

    for _ in range(5):
        at_once(*(lambda lam=lam: assign(lam) for lam in (0.5, 1.0, 2.0, 4.0)))
        now = dispatcher.assigned
        assert now.options.lam[0] == now.lam == now.lam_array[0]


class Doubling(Backend):
    """The reference, under another name."""

    def __init__(self, name, loaded):
        time.sleep(1e-3)
        loaded.append(name)
        self.name, self._real = name, get_backend("numpy")
        self.dtypes = self._real.dtypes

    def partial_sum(self, *arguments):
        return self._real.partial_sum(*arguments)

    def penalty(self, *arguments, **options):
        return self._real.penalty(*arguments, **options)

    def apply(self, *arguments, **options):
        return self._real.apply(*arguments, **options)

    def add_gradient(self, *arguments, **options):
        self._real.add_gradient(*arguments, **options)


@pytest.mark.usefixtures("registered")
def test_backends_are_registered_while_others_call(cases):
    reg, loaded, names = {norm: ActivityRegularization(0.1, norm) for norm in NORMS}, [], []
    few = cases[::7]

    def register():
        for number in range(20):
            name = f"doubling_{number}"
            register_backend(
                name, lambda name=name: Doubling(name, loaded), array_type="numpy.ndarray"
            )
            names.append(name)

    def choose(number):
        for _ in range(6):
            chosen = ["numba", "numpy", (*names, "numpy")[-2:][0]][number]
            with use_backend(chosen):
                for case in few:
                    assert registry.requested()[0] == chosen
                    case.check(reg[case.norm])
            assert registry.requested()[0] == "auto"

    def look():
        for _ in range(6):
            assert {"numba", "numpy"} <= set(available_backends())
            fresh = type("Fresh", (np.ndarray,), {})
            assert registry.array_type_of(fresh) == "numpy.ndarray"
            with pytest.raises(ValueError, match="no_such"):
                ActivityRegularization(0.1, backend="no_such")

    at_once(register, *[lambda n=n: choose(n) for n in range(3)], *[look] * 2)
    assert len(available_backends()) >= 22
    assert sorted(loaded) == sorted(names)  # each once


@pytest.mark.usefixtures("registered")
def test_a_backend_is_loaded_once():
    loaded, names = [], [f"doubling_{number}" for number in range(10)]
    for name in names:
        register_backend(name, lambda name=name: Doubling(name, loaded), array_type="numpy.ndarray")
        found = at_once(*[lambda name=name: get_backend(name)] * THREADS)
        assert len(set(map(id, found))) == 1
    assert loaded == names


@pytest.mark.usefixtures("registered")
def test_a_backend_chosen_by_what_the_environment_was_meanwhile_is_no_plan(monkeypatch):
    """As another thread may change the variable between the two times that it is read."""

    class Odd(Doubling):
        def fused_kernel(self, *arguments, **options):
            return lambda *_: 7.0

    register_backend("odd", lambda: Odd("odd", []), array_type="numpy.ndarray")
    real = dispatch.choose

    def choose(*arguments, **options):
        monkeypatch.setenv("ACTREG_BACKEND", "odd")
        return real(*arguments, **options)

    reg, x = ActivityRegularization(0.5), np.ones(4)
    monkeypatch.setattr(dispatch, "choose", choose)
    reg.penalty(x)
    monkeypatch.setattr(dispatch, "choose", real)
    monkeypatch.delenv("ACTREG_BACKEND")
    assert reg.penalty(x) == reg.penalty(x) == 2.0


def norm_like_l1(name):
    return Norm(name, (1,), lambda lam, s: lam[0] * s[0], lambda x, lam, c: norms.signed(lam[0], x))


def test_norms_are_registered_while_others_are_named(monkeypatch):
    monkeypatch.setattr(norms, "NORMS", dict(norms.NORMS))
    made = {f"like_l1_{n}": [norm_like_l1(f"like_l1_{n}") for _ in range(2)] for n in range(50)}

    def register(which):
        won = set()
        for name, both in made.items():
            try:
                register_norm(both[which])
                won.add(name)
            except ValueError as error:
                assert "is taken" in str(error)  # noqa: PT017
        return won

    def name():
        for _ in range(100):
            with pytest.raises(ValueError, match="is unknown; use one of: 'l1', 'l2'"):
                ActivityRegularization(0.1, "no_such")

    first, second, *_ = at_once(lambda: register(0), lambda: register(1), name, name)
    assert first | second == set(made)
    assert not first & second


def test_a_norm_of_rows_is_the_same_one_each_time():
    l2, axes = norms.NORMS["l2"], [(3, -axis) for axis in range(1000, 1300)]
    found = at_once(*[lambda: [row_norms.row_norm(l2, axis) for axis in axes]] * THREADS)
    again = [row_norms.row_norm(l2, axis) for axis in axes]
    assert all(one is other for each in found for one, other in zip(each, again, strict=True))
    reg, x = ActivityRegularization.l2(0.1, axis=-1), np.arange(12.0).reshape(3, 4)
    penalty, updated = exact_row_result(x, np.zeros_like(x), 0.1, (-1,))

    def work():
        g = np.zeros_like(x)
        assert reg.apply(x, g) == penalty
        assert g.tobytes() == updated.tobytes()

    at_once(*[work] * THREADS)


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_totals_of_shared_statistics_are_right(name):
    reg = ActivityRegularization(0.1, backend=name)
    x = np.random.default_rng(3).normal(size=(8, 5)) * (np.arange(40).reshape(8, 5) % 3 > 0)
    g, statistics, times = np.zeros_like(x), ActivationStatistics(per_feature=True), 60

    def work(number):
        scaled, mine = x * (number + 1), g.copy()
        for _ in range(times):
            reg.apply(scaled, mine, statistics=statistics)

    at_once(*(lambda number=number: work(number) for number in range(THREADS)))
    calls = THREADS * times
    assert statistics.elements == calls * x.size
    assert statistics.nonzero == calls * np.count_nonzero(x)
    assert statistics.largest == THREADS * np.abs(x).max()
    assert statistics.active.tolist() == (calls * np.count_nonzero(x, axis=0)).tolist()


def test_nothing_that_is_counted_is_lost():
    statistics, active = ActivationStatistics(per_feature=True), np.array([1, 0, 2])

    def work():
        for _ in range(2000):
            statistics.add(4, 3, 1.0, active)

    at_once(*[work] * THREADS)
    calls = 2000 * THREADS
    assert (statistics.elements, statistics.nonzero) == (4 * calls, 3 * calls)
    assert statistics.active.tolist() == [calls, 0, 2 * calls]


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_of_first_calls_at_once_all_have_the_same_units(name):
    """Or are refused before anything is written; units of length 1 would broadcast."""
    reg = ActivityRegularization(0.1, backend=name)

    def work(statistics, units):
        x, g = np.ones((4, units)), np.zeros((4, units))
        try:
            reg.apply(x, g, statistics=statistics)
        except ValueError as error:
            assert "pass statistics of their own" in str(error)  # noqa: PT017
            assert not g.any()
            return None
        assert g.all()
        return units

    for _ in range(60):
        statistics = ActivationStatistics(per_feature=True)
        found = at_once(*(lambda n=n: work(statistics, n) for n in (1, 3, 1, 3)))  # noqa: B023
        (units,) = {units for units in found if units is not None}
        assert statistics.elements == 2 * 4 * units
        assert statistics.active.tolist() == [8] * units


def test_what_is_counted_after_a_clear_has_the_units_of_what_it_is_added_to():
    statistics = ActivationStatistics(per_feature=True)
    statistics.check(np.ones((2, 4)))  # a call is under way
    statistics.clear()
    statistics.check(np.ones(1))
    statistics.add(1, 1, 1.0, np.ones(1, np.int64))
    statistics.add(8, 8, 1.0, np.full(4, 2))
    assert (statistics.elements, statistics.active.tolist()) == (1, [1])


def test_the_environment_changes_while_names_of_kernels_are_made(monkeypatch):
    variables = [f"ACTREG_TEST_{number}" for number in range(30)]
    expected = compiling.source_hash()

    def change():
        for _ in range(10):
            for variable in variables:
                os.environ[variable] = "1"
            for variable in variables:
                del os.environ[variable]

    def look():
        for _ in range(100):
            assert compiling.source_hash() == expected

    at_once(change, look, look)


def test_opening_zarr_arrays_leaves_the_settings_of_zarr_alone(tmp_path):
    if sys.version_info < (3, 11):
        pytest.skip("Zarr 3 needs Python 3.11")
    import zarr

    stores = importlib.import_module("actreg_dispatch.files.stores")
    paths = [str(tmp_path / str(number)) for number in range(THREADS)]
    for path in paths:
        zarr.create_array(path, shape=(4,), chunks=(2,), dtype="f4")

    def work(path):
        for _ in range(5):
            store = stores.open_store("gradients", path, None, writes=True)
            store._array[...] = 0.0  # which Zarr would otherwise leave out
            assert Path(path, "c", "0").exists()

    at_once(*(lambda path=path: work(path) for path in paths))
    assert zarr.config.get("array.write_empty_chunks") is False
