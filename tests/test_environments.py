"""Environments that are not whole: the package does what it can and says what it cannot.

What is broken is a stand-in for the library that is broken, found first on the path, in a process
of its own; none of our functions is replaced.
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import os
import tracemalloc
import weakref
from pathlib import Path, PurePosixPath

import numba
import numpy as np
import pytest

import actreg_dispatch
from actreg_dispatch import ActivityRegularization, warmup
from actreg_dispatch.backends.numba import compiling

USE = """
import numpy as np
from actreg_dispatch import ActivityRegularization
for size in (5, 100_000):
    x, g = np.full(size, -2.0, np.float32), np.zeros(size, np.float32)
    right = ActivityRegularization.l1(0.5).apply(x, g) == size and (g == -0.5).all()
    penalty = ActivityRegularization.l2(0.5).penalty(x[::-1])
    if not right or penalty != np.float32(0.5 * 2 * size**0.5):
        raise SystemExit("a wrong result")
"""
DOCTOR = """
import runpy, sys
sys.argv[1:] = ["doctor"]
runpy.run_module("actreg_dispatch", run_name="__main__")  # ends with the doctor's status
"""
CUPY = """
__version__ = "14.2.0"
class ndarray: pass
class ElementwiseKernel:
    def __init__(self, *_, **__): pass
    def __call__(self, *_, **__): raise RuntimeError("cudaErrorUnknown: the driver is gone")
ReductionKernel = ElementwiseKernel
class cuda:
    class runtime:
        @staticmethod
        def getDeviceCount():
            return DEVICES
"""
NO_DRIVER = CUPY + "DEVICES = 0\ncuda.runtime.getDeviceCount = lambda: 1 / 0\n"
NO_DEVICE = CUPY + "DEVICES = 0\n"
NO_SEMAPHORES = """
import _multiprocessing
class SemLock:
    def __init__(self, *_): raise OSError(38, "Function not implemented")
    SEM_VALUE_MAX = 1
_multiprocessing.SemLock = SemLock
"""


@pytest.fixture
def stand_in(tmp_path):
    """Put modules where they are found first; return the environment for that."""

    def write(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(path)}

    return write


CUPYS = {
    "no driver": (NO_DRIVER, "no CUDA device answers: division by zero"),
    "no device": (NO_DEVICE, "finds no CUDA device"),
    "broken": ("raise ImportError('libcuda.so.1: cannot open')", "libcuda.so.1: cannot open"),
    "broken worse": ("import ctypes; raise OSError('wrong ELF class')", "wrong ELF class"),
    "two wheels": (
        f"import warnings\nwarnings.warn('multiple CuPy packages are installed')\n{NO_DEVICE}",
        "finds no CUDA device",
    ),
}


# A software CUDA device wraps whatever is imported as cupy.
real_import = pytest.mark.skipif("SOFTGPU" in os.environ, reason="CuPy is wrapped here")


@real_import
@pytest.mark.parametrize("kind", CUPYS)
@pytest.mark.parametrize("flags", [[], ["-W", "error"]], ids=["", "warnings are errors"])
def test_a_cupy_that_does_not_work(python, stand_in, kind, flags):
    source, reason = CUPYS[kind]
    environment = stand_in(cupy=source)
    imported = f"try:\n    import cupy\nexcept Exception: pass\n{USE}"
    asked = """
from actreg_dispatch import BackendUnavailableError
os.environ["ACTREG_BACKEND"] = "cupy"
try:
    ActivityRegularization.l1(0.5).penalty(x)
except BackendUnavailableError as error:
    print(error)
del os.environ["ACTREG_BACKEND"]
"""
    code = f"import os\n{imported}{asked}" + ("" if flags else DOCTOR)
    told, _, doctor = python(*flags, "-c", code, **environment).stdout.partition("\n")
    assert told.startswith("the environment variable ACTREG_BACKEND='cupy'")
    assert "pip install cupy-cuda13x" in told
    if not flags:
        lines = " ".join(doctor.split())  # as they are before they are wrapped
        assert "cupy unusable: " in lines
        assert reason in lines
        assert "pip install cupy-cuda13x" in lines


@real_import
def test_a_driver_that_fails_at_the_first_call(python, stand_in):
    """A device answers, so the backend is chosen; its error comes through, the array is whole."""
    environment = stand_in(cupy=f"{CUPY}DEVICES = 1\ndef asarray(x): return x\n")
    code = """
import numpy as np
from actreg_dispatch import ActivityRegularization
g = np.zeros(3)
try:
    ActivityRegularization(0.5, backend="cupy").apply(np.ones(3), g)
except Exception as error:
    print(type(error).__name__, (g == 0).all())
assert ActivityRegularization(0.5).apply(np.ones(3), g) == 1.5
"""
    assert python("-c", code, **environment).stdout.endswith("True\n")


@pytest.mark.parametrize(
    "source", ["raise ImportError('libllvmlite.so')", "raise OSError('broken')", "1 / 0"]
)
def test_without_numba_the_reference_carries_on(python, stand_in, source):
    environment = stand_in(numba=source)
    done = python("-c", f"{USE}print('all right')\n{DOCTOR}", check=False, **environment)
    assert "all right" in done.stdout
    assert "python -m pip install numba" in done.stdout
    assert "a numpy.ndarray is computed by numpy" in done.stdout
    told = python("-c", USE, check=False, ACTREG_BACKEND="numba", **environment)
    assert "BackendUnavailableError" in told.stderr


def test_without_a_threading_layer_all_is_serial(python, stand_in):
    """The layer that is asked for cannot be loaded."""
    environment = {"NUMBA_THREADING_LAYER": "tbb"}
    environment |= stand_in(
        sitecustomize="import sys; sys.modules['numba.np.ufunc.tbbpool'] = None"
    )
    check = "from actreg_dispatch.runtime import threads\nassert not threads.may_use_threads()\n"
    done = python("-c", USE + check + DOCTOR, **environment)
    assert "threading layer none, no threads" in " ".join(done.stdout.split())


@pytest.mark.parametrize("flags", [[], ["-W", "error"]], ids=["", "warnings are errors"])
def test_without_shared_memory_for_semaphores(python, stand_in, flags):
    python(*flags, "-c", USE, **stand_in(sitecustomize=NO_SEMAPHORES))


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (["-OO"], {}),
        (["-W", "error"], {}),
        (["-I"], {}),
        ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ([], {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"}),
        ([], {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/nonexistent"}),
    ],
    ids=["optimized", "warnings are errors", "isolated", "no UTF-8", "no home", "no bytecode"],
)
def test_unusual_settings(python, flags, environment):
    python(*flags, "-c", USE, **environment)
    # All kernels would have to be compiled anew without docstrings or without our path.
    backend = "numpy" if flags in (["-OO"], ["-I"]) else "numba"
    done = python(*flags, "-c", DOCTOR, ACTREG_BACKEND=backend, **environment)
    assert f"a numpy.ndarray is computed by {backend}" in done.stdout


# Nothing is run or written because of a name.


def test_a_name_in_the_environment_imports_nothing(python, stand_in, tmp_path):
    mark = tmp_path / "mark"
    environment = stand_in(evil=f"open({str(mark)!r}, 'w')")
    for name in (
        "evil",
        "evil.backend",
        "evil:run",
        str(tmp_path / "evil.py"),
        "__import__('evil')",
    ):
        done = python("-c", USE, check=False, ACTREG_BACKEND=name, **environment)
        assert "UnknownBackendError" in done.stderr
        assert "use one of: auto, numba, numpy, cupy" in done.stderr
    assert not mark.exists()


def test_files_are_written_in_the_cache_of_numba_alone(python, tmp_path):
    home, cache, work = (tmp_path / name for name in ("home", "cache", "work"))
    for folder in (home, cache, work):
        folder.mkdir()
    code = f"import os; os.chdir({str(work)!r})\n{USE}"
    python("-c", code, HOME=str(home), XDG_CACHE_HOME=str(home), NUMBA_CACHE_DIR=str(cache))
    assert [*home.rglob("*"), *work.rglob("*")] == []
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} <= {".nbi", ".nbc"}


# Gradients are untouched or updated as a whole.


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
@pytest.mark.parametrize("layout", ["flat", "strided", "many axes"])
def test_a_compiler_that_fails_at_any_stage(monkeypatch, norm, layout):
    """Values on a tie, so that every kernel there is for the call is asked for."""
    base = np.zeros((2, 3, 2, 3, 2, 4))
    base[0, 0, 0, 0, 0, ::2] = 1.0, 2.0**-53 if norm == "l1" else 2.0**-27
    base[0, 0, 0, 0, 1, 0] = 0.0 if norm == "l1" else 2.0**-27
    view = {
        "flat": lambda a: a.ravel(),
        "strided": lambda a: a[0, 0, 0, 0, :, ::2],
        "many axes": lambda a: a[:, ::2, :, ::2, :, ::2],
    }[layout]
    x, before = view(base), view(np.ones_like(base))
    expected = np.ones(x.shape)
    ActivityRegularization(0.5, norm, backend="numpy").apply(x, expected)
    ActivityRegularization(0.5).penalty(np.ones(3, np.float32))  # Numba is at work already
    real = {name: getattr(numba, name) for name in ("njit", "cfunc")}

    def fail_from(stage):
        """Compile so many times."""
        compiled = itertools.count()

        def compiler(name):
            def compile_unless(*arguments, **options):
                if next(compiled) >= stage:
                    raise MemoryError("no memory to compile")
                return real[name](*arguments, **options)

            return compile_unless

        for name in real:
            monkeypatch.setattr(numba, name, compiler(name))
        monkeypatch.setattr(compiling, "KERNELS", {})

    for stage in itertools.count():
        fail_from(stage)
        g = view(np.ones_like(base))
        try:
            ActivityRegularization(0.5, norm).apply(x, g)
        except MemoryError:
            assert (g == before).all() or (g == expected).all()
        else:
            break
    assert (g == expected).all()
    # A driver, prepare, finish, a pass, and the other pass of L2, or an exact sum and its driver;
    # what checks contiguous arrays, and what describes them for the exact sum.
    exact = norm != "l2"
    assert stage == 5 + exact + (1 + exact) * (layout == "flat")


@pytest.mark.parametrize("stage", ["there", "compute", "back"])
def test_a_move_that_fails_at_any_stage(cupy, monkeypatch, stage):
    g, out = np.zeros((3, 4))[:, ::2], np.full((3, 2), 7.0)

    def fail(*_, **__):
        raise MemoryError("the device is full")

    if stage == "there":
        monkeypatch.setattr(cupy, "asarray", fail)
    elif stage == "compute":
        monkeypatch.setattr(cupy, "zeros", fail)
    else:
        monkeypatch.setattr(cupy, "asnumpy", fail)
    reg = ActivityRegularization(0.5, backend="cupy")
    with pytest.raises(MemoryError):
        reg.apply(np.ones((3, 2)), g)
    with pytest.raises(MemoryError):
        reg.penalty_and_gradient(np.ones((3, 2)), out=out)
    assert (g == 0).all()
    assert (out == 7).all()


# Nothing stays behind.


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_no_reference_to_an_array_survives_a_call(name, size):
    class Watched(np.ndarray):
        pass

    for cls in (np.ndarray, Watched):
        for view in (slice(None), slice(None, None, 2)):
            x, g = (np.ones(size).view(cls)[view] for _ in range(2))
            reg = ActivityRegularization(0.5, backend=name)
            reg.apply(x, g), reg.penalty(x), reg.partial_sum(x)
            with pytest.raises(ValueError, match="shape"):
                reg.apply(x, g[:-1])
            watched = [weakref.ref(a) for a in (x, g)]
            del x, g
            assert [ref() for ref in watched] == [None, None]


def repeat(calls, size):
    """Return how many bytes more are held after so many calls than after a tenth of them."""
    rng, held = np.random.default_rng(0), []
    warmup(strided=True)  # all kernels, those too that only a tie asks for
    tracemalloc.start()
    for part in (calls // 10, calls - calls // 10):
        for i in range(part):
            x = rng.normal(size=size).astype(np.float32 if i % 2 else np.float64)
            g = np.zeros_like(x)
            ActivityRegularization(0.1, ("l1", "l2", "l2_squared")[i % 3]).apply(x, g)
        del x, g
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return held[1] - held[0]


@pytest.mark.parametrize(("calls", "size"), [(20_000, 10), (100, 200_000)])
def test_memory_does_not_grow(calls, size):
    # What is made once, and kept, is no growth: that comes again.
    assert any(repeat(calls, size) < 20_000 for _ in range(3))


GROWTH = """
import resource
import numpy as np
from actreg_dispatch import ActivityRegularization
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peaks = []
for calls in (CALLS // 10, CALLS):
    for i in range(calls):
        x = np.ones(SIZE, np.float32 if i % 2 else np.float64)
        g = np.zeros_like(x)
        ActivityRegularization(0.1, ("l1", "l2", "l2_squared")[i % 3]).apply(x, g)
    peaks.append(peak())
print(peaks[1] - peaks[0])
"""


@pytest.mark.long
@pytest.mark.parametrize(("calls", "size"), [(1_000_000, 10), (1_000, 5_000_000)])
def test_memory_does_not_grow_over_a_million_calls(python, calls, size):
    kibibytes = int(python("-c", f"CALLS, SIZE = {calls}, {size}\n{GROWTH}", timeout=900).stdout)
    assert kibibytes < 4096


def test_what_is_installed_is_what_is_tested():
    package = Path(actreg_dispatch.__file__).parent
    installed = importlib.metadata.files("actreg-dispatch") or []
    found = {
        file.relative_to(package.name): file.read_binary()
        for file in installed
        if file.parts[0] == package.name and "__pycache__" not in file.parts
    }
    if not found:
        pytest.skip("the package is installed in place")
    sources = {
        PurePosixPath(file.relative_to(package)): file.read_bytes()
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert found == sources
