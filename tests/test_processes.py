"""At home in other people's processes: forks, threads, signals.

What may end or hang a process runs in one of its own, on every threading layer there is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

LAYERS = ["omp", "workqueue", "tbb"]

PREAMBLE = """
import hashlib, itertools, os, signal, sys, threading, time
import numpy as np

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores

SIZE = 200_003  # for the parallel kernels

def result(seed=0, cases=6):
    from actreg_dispatch import ActivityRegularization
    values = np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)
    views = (values, values[::-1], values[::2])  # flat and strided kernels
    found = []
    for norm, view in list(itertools.product(("l1", "l2"), views))[:cases]:
        gradients = np.ones_like(view)
        penalty = ActivityRegularization(0.1, norm).apply(view, gradients)
        found.append((float(penalty), hashlib.sha256(gradients.tobytes()).hexdigest()))
    return found
"""


@pytest.fixture(scope="module", params=LAYERS)
def layer(request, python):
    """Each threading layer that there is, as the environment of a process."""
    environment = {"NUMBA_THREADING_LAYER": request.param, "NUMBA_NUM_THREADS": "2"}
    environment["LD_LIBRARY_PATH"] = str(Path(sys.prefix, "lib"))  # where pip puts libtbb.so
    probe = python("-c", "import numba; numba.get_num_threads()", check=False, **environment)
    if probe.returncode and request.param != "workqueue":
        pytest.skip(f"Numba has no threading layer {request.param} here")
    return environment


@pytest.fixture
def script(layer, python, tmp_path):
    """Run a script on a threading layer and return what it printed."""

    def run(code, timeout=300, **environment):
        file = tmp_path / "script.py"
        file.write_text(PREAMBLE + code)
        done = python(str(file), timeout=timeout, check=False, **layer, **environment)
        assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
        return done.stdout

    return run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes(script):
    code = """
expected = result()
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        ok = result() == expected
        if os.fork() == 0:  # and its own child
            os._exit(0 if result() == expected else 1)
        os._exit(0 if ok and os.wait()[1] == 0 else 1)
    assert os.waitpid(pid, 0)[1] == 0
assert result() == expected  # the parent goes on in parallel
from actreg_dispatch.runtime.threads import may_use_threads
assert may_use_threads()
import ctypes
pid = ctypes.CDLL(None).fork()  # by a library in C, which calls no hooks
if pid == 0:
    os._exit(0 if result() == expected else 1)
assert os.waitpid(pid, 0)[1] == 0
print("done")
"""
    assert script(code) == "done\n"


def test_a_child_that_imports_the_package_after_the_fork(script):
    code = """
import numba

@numba.njit(parallel=True)
def theirs(x):
    total = 0.0
    for i in numba.prange(x.size):
        total += x[i]
    return total

theirs(np.ones(1000))
assert "actreg_dispatch" not in sys.modules
for threads in (0, 1):
    pid = os.fork()
    if pid == 0:
        if threads:  # of the child's own
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        os._exit(0 if len(result()) == 6 else 1)
    assert os.waitpid(pid, 0)[1] == 0
print("done")
"""
    assert script(code) == "done\n"


def test_a_fork_at_the_first_use_of_threads(script):
    code = """
import numba
import actreg_dispatch
from actreg_dispatch.runtime.threads import may_use_threads

for attempt in range(4):
    pid = os.fork()  # each starts afresh
    if pid == 0:
        import actreg_dispatch.runtime.threads as threads
        threads._PROCESS = os.getpid()
        starting = threading.Thread(target=may_use_threads)
        starting.start()
        time.sleep(1e-3 * attempt)
        child = os.fork()
        if child == 0:
            os._exit(0 if len(result()) == 6 else 1)
        starting.join()
        os._exit(os.waitpid(child, 0)[1] != 0)
    assert os.waitpid(pid, 0)[1] == 0
print("done")
"""
    assert script(code) == "done\n"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_of_processes_compute(script, method):
    code = f"""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

if __name__ == "__main__":
    expected = [result(seed) for seed in range(4)]
    context = multiprocessing.get_context({method!r})
    with context.Pool(2) as pool:
        assert pool.map(result, range(4)) == expected
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        assert list(executor.map(result, range(4))) == expected
    print("done")
"""
    assert script(code) == "done\n"


@pytest.mark.parametrize("layer", ["workqueue"], indirect=True)  # a compiler knows no layer
def test_a_fork_while_another_thread_compiles(script):
    code = """
import actreg_dispatch
from actreg_dispatch.backends.numba import compiling

thread = threading.Thread(target=result, kwargs={"cases": 1})  # each process compiles its own
thread.start()
while compiling.COMPILING.acquire(blocking=False):  # until it is at work
    compiling.COMPILING.release()
    time.sleep(1e-3)
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if len(result(cases=1)) == 1 else 1)
    children.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
thread.join()
print("done")
"""
    assert script(code, ACTREG_CACHE="0") == "done\n"


@pytest.mark.parametrize(
    "seconds", [2, pytest.param(20, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_many_threads_at_once(script, seconds):
    code = f"""
seconds = {seconds}
results = {{}}
barrier = threading.Barrier(8)

def work(seed):
    barrier.wait()  # the first use is at once, too
    found, end = set(), time.monotonic() + seconds
    while time.monotonic() < end:
        found.add(tuple(result(seed)))
    results[seed] = found

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for seed in range(8):
    assert results[seed] == {{tuple(result(seed))}}, seed
print("done")
"""
    assert script(code) == "done\n"


def test_inside_the_parallel_region_of_another_library(script):
    code = """
import numba
from numba import objmode

seen = {}

def call(i):
    seen[i] = result(i)

@numba.njit(parallel=True)
def theirs(n):
    for i in numba.prange(n):
        with objmode():
            call(i)

theirs(4)
assert seen == {i: result(i) for i in range(4)}
print("done")
"""
    assert script(code) == "done\n"


def test_kernels_release_the_interpreter_lock(script):
    """While a long call computes, a thread in Python is never kept waiting for half of it."""
    code = """
from actreg_dispatch import ActivityRegularization
from actreg_dispatch.backends.numba import compiling

ticks, stop = [], False

def tick():
    while not stop:
        ticks.append(time.perf_counter())
        time.sleep(1e-3)

def lets_others_work(call):
    call()
    for _ in range(10):
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
        seen = [begin, *(t for t in list(ticks) if begin < t < end), end]
        if max(b - a for a, b in zip(seen, seen[1:])) < (end - begin) / 2:
            return True
    return False

thread = threading.Thread(target=tick)
thread.start()
try:
    reg = ActivityRegularization(0.1)
    flat = np.ones(60_000_000, np.float32)
    wide = np.lib.stride_tricks.as_strided(flat, (3000, 40_000), (0, 4))
    assert lets_others_work(lambda: reg.penalty(flat))
    assert lets_others_work(lambda: reg.penalty(wide))
    assert lets_others_work(lambda: reg.partial_sum(wide))
    reg.penalty(flat[:100])
finally:
    stop = True
    thread.join()
kernels = [getattr(k, "targetoptions", None) for k in compiling.KERNELS.values()]
assert all(options["nogil"] for options in kernels if options)
assert sum(options is not None for options in kernels) >= 3  # the serial ones, too
print("done")
"""
    assert script(code) == "done\n"


def test_asyncio(script):
    code = """
import asyncio

async def main():
    return await asyncio.gather(*(asyncio.to_thread(result, seed) for seed in range(4)))

assert asyncio.run(main()) == [result(seed) for seed in range(4)]
print("done")
"""
    assert script(code) == "done\n"


def test_an_interrupt_leaves_the_gradients_as_they_were_or_updates_them_all(script):
    code = """
import signal
from actreg_dispatch import ActivityRegularization

interrupted = 0
room = np.ones((2, 2, 2, 250_000, 2), np.float32)
axes = np.ones((2,) * 22, np.float32)[::2, :, ::2, :, ::2, :, ::2, :, ::2]
layouts = {
    "flat": room.ravel(),
    "strided": room[..., 0].transpose(3, 0, 1, 2),
    "many axes": axes.transpose([*range(1, 22, 2), *range(0, 22, 2)]),
}
for name, values in layouts.items():
    for norm in ("l1", "l2"):
        reg = ActivityRegularization(0.5, norm)
        expected = np.zeros(values.shape, np.float32)
        reg.apply(values, expected)
        for attempt in range(20):
            g = np.zeros_like(expected)
            timer = threading.Timer(2e-4 * attempt, os.kill, [os.getpid(), signal.SIGINT])
            try:
                timer.start()
                reg.apply(values, g)
                timer.join()
                time.sleep(0.01)
            except KeyboardInterrupt:
                interrupted += 1
            timer.join()
            assert (g == 0).all() or (g == expected).all(), name
assert interrupted > 60, interrupted
assert len(result()) == 6  # all goes on
print("done")
"""
    assert script(code) == "done\n"


@pytest.mark.parametrize("layer", ["workqueue"], indirect=True)
def test_an_interrupt_waits_for_the_compiler(script):
    code = """
import signal
from actreg_dispatch import ActivityRegularization
from actreg_dispatch.backends.numba import compiling

x, g, handler = np.ones(10, np.float32), np.zeros(10, np.float32), signal.getsignal(signal.SIGINT)
reg, interrupted = ActivityRegularization(0.5), 0
reg.apply(x, g)
begin = time.perf_counter()
compiling.KERNELS.clear()
ActivityRegularization(0.5).apply(x, g)
needed = time.perf_counter() - begin
for attempt in range(6):
    compiling.KERNELS.clear()
    timer = threading.Timer(needed * attempt / 6, os.kill, [os.getpid(), signal.SIGINT])
    try:
        timer.start()
        ActivityRegularization(0.5).apply(x, g)
        timer.join()
        time.sleep(0.01)
    except KeyboardInterrupt:
        interrupted += 1
    timer.join()
    assert signal.getsignal(signal.SIGINT) is handler
assert interrupted == 6, interrupted
assert (reg.apply(x, g), len(result(cases=1))) == (5.0, 1)
print("done")
"""
    assert script(code, ACTREG_CACHE="0") == "done\n"


def test_thread_settings_are_left_alone_and_honoured(script):
    code = """
import numba
torch = None
try:
    import torch
    torch.set_num_threads(1)
except ImportError:
    pass
result()
assert numba.get_num_threads() == 2
numba.set_num_threads(1)
expected = result()
assert numba.get_num_threads() == 1
numba.set_num_threads(2)
assert result() == expected
assert torch is None or torch.get_num_threads() == 1
assert {name for name in os.environ if "THREAD" in name} == BEFORE
print("done")
"""
    assert script('BEFORE = {name for name in os.environ if "THREAD" in name}' + code) == "done\n"


def test_workers_of_a_data_loader_compute(script):
    pytest.importorskip("torch")
    code = """
import torch
from torch.utils.data import DataLoader, Dataset

class Rows(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return [penalty for penalty, _ in result(index)]

if __name__ == "__main__":
    (torch.ones(4_000_000) * 2 + 1).sum()  # starts PyTorch's threads, before any of Numba's
    found = []
    for method in ("fork", "spawn"):
        loader = DataLoader(Rows(), batch_size=None, num_workers=2, multiprocessing_context=method)
        found.append([list(map(float, row)) for row in loader])
    expected = [[penalty for penalty, _ in result(i)] for i in range(4)]
    assert found == [expected, expected]
    print("done")
"""
    assert script(code) == "done\n"


def test_a_threaded_scheduler_computes(script):
    code = """
import dask

tasks = [dask.delayed(result)(seed) for seed in range(8)]
expected = [result(seed) for seed in range(8)]
assert list(dask.compute(*tasks, scheduler="threads", num_workers=4)) == expected
print("done")
"""
    assert script(code) == "done\n"
