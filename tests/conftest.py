"""One fixture for every backend, and the switch that says which ones must not be missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest

from actreg_dispatch import ActivityRegularization, files, registry, warmup

BACKENDS = ("numpy", "numba", "cupy")
LIBRARIES = ("torch", "jax", "dask")  # whose arrays a module of their own leads to the backends
DEPENDENCIES = ("numpy", "numba")  # installed with the package, so always required

hypothesis.settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        choices=BACKENDS + LIBRARIES,
        help="fail, rather than skip, where this backend or library is not usable; repeatable",
    )

    parser.addoption(
        "--certify",
        action="store_true",
        help="certify sums of any size on CUDA, where few elements are otherwise summed exactly",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Keep the threads of several processes from spinning while they wait for each other.

    Two at a time, the demo's training takes 14 times as long where NumPy's BLAS has two threads.
    """
    if getattr(config.option, "numprocesses", None):  # all of them inherit the variables
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@dataclass
class UsableBackend:
    """A backend under test and the arrays that are native to it."""

    name: str

    @property
    def module(self) -> Any:
        """The module whose arrays they are."""
        return sys.modules["cupy" if self.name == "cupy" else "numpy"]

    def array(self, values: Any, dtype: Any = None) -> Any:
        """Return ``values`` as the backend's own kind of array."""
        host = np.asarray(values, dtype)
        return self.module.asarray(host)

    def host(self, values: Any) -> np.ndarray:
        return values.get() if self.name == "cupy" else np.asarray(values)

    def regularization(self, lam: float, norm: Any, **options: Any) -> ActivityRegularization:
        return ActivityRegularization(lam, norm, backend=self.name, **options)

    def updated(self, reg: Any, activations: Any, gradients: Any, **options: Any) -> Any:
        """Return the penalty, and what ``apply`` makes of ``gradients``; all on the host."""
        device = self.array(gradients.copy())
        penalty = reg.apply(self.array(activations), device, **options)
        return self.host(penalty), self.host(device)


class Library(UsableBackend):
    """A library whose arrays are led to the backends."""

    def array(self, values: Any, dtype: Any = None) -> Any:
        host = np.array(values, dtype)
        if self.name == "torch":
            return sys.modules["torch"].from_numpy(host)
        if self.name == "jax":
            return sys.modules["jax"].numpy.asarray(host)
        chunks = tuple(max(1, -(-length // 3)) for length in host.shape)
        return sys.modules["dask.array"].from_array(host, chunks)

    def host(self, values: Any) -> np.ndarray:
        return np.asarray(values)

    def regularization(self, lam: float, norm: Any, **options: Any) -> ActivityRegularization:
        return ActivityRegularization(lam, norm, **options)

    def updated(self, reg: Any, activations: Any, gradients: Any, **options: Any) -> Any:
        if self.name == "torch":
            return super().updated(reg, activations, gradients, **options)
        # Arrays that cannot be written: the same addition, in NumPy.
        penalty, gradient = reg.penalty_and_gradient(self.array(activations), **options)
        return self.host(penalty), gradients + self.host(gradient)


@dataclass
class Files(UsableBackend):
    """Arrays in files, which a module of their own computes with."""

    folder: Path

    def array(self, values: Any, dtype: Any = None) -> Path:
        with tempfile.NamedTemporaryFile(suffix=".npy", dir=self.folder, delete=False) as file:
            np.save(file, np.asarray(values, dtype))
        return Path(file.name)

    def host(self, values: Any) -> np.ndarray:
        return np.asarray(np.load(values) if isinstance(values, Path) else values)

    def regularization(self, lam: float, norm: Any, **options: Any) -> Any:
        return OfFiles(self, ActivityRegularization(lam, norm, **options))


@dataclass
class OfFiles:
    """A regularization whose methods are the functions of that module."""

    files: Files
    reg: ActivityRegularization

    def penalty(self, activations: Path, **options: Any) -> Any:
        return files.penalty(self.reg, activations, **options).penalty

    def apply(self, activations: Path, gradients: Path, **options: Any) -> Any:
        return files.apply(self.reg, activations, gradients, **options).penalty

    def penalty_and_gradient(self, activations: Path, **options: Any) -> Any:
        gradients = self.files.array(np.zeros_like(np.load(activations)))
        return self.apply(activations, gradients, **options), gradients


def pytest_report_header() -> list[str]:
    lines = [f"backends: {', '.join(registry.available_backends())}"]
    for name in BACKENDS:
        reason = registry.why_unavailable(name)
        if reason:
            lines.append(f"backend {name} is left out: {reason}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``backend`` on all that are usable or required.

    One that asks for ``arrays`` runs on the arrays of other libraries, too, and one that asks for
    ``arrays_or_files`` also on files.
    """
    required = (*DEPENDENCIES, *metafunc.config.getoption("--require-backend"))
    names = [n for n in BACKENDS if n in required or not registry.why_unavailable(n)]
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", names, indirect=True, scope="session")
    names += [n for n in LIBRARIES if n in required or importlib.util.find_spec(n)]
    for fixture, more in (("arrays", []), ("arrays_or_files", ["files"])):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names + more, indirect=True, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run CUDA kernels."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        fixtures = ("backend", "arrays", "arrays_or_files")
        names = {*map(parameters.get, fixtures), *item.fixturenames}
        if "cupy" in names:
            item.add_marker("cuda")


@pytest.fixture(scope="session", autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    """Let the processes share the work of compiling, before each needs what another compiles.

    Most of the suite needs most of the kernels, and compiling them takes 40 s where the cache is
    empty. A few tests need few: they compile their own.
    """
    worker = getattr(request.config, "workerinput", None)
    on_the_host = [each for each in request.session.items if not each.get_closest_marker("cuda")]
    if worker is None or len(on_the_host) < 1000:
        return
    dtypes = (np.float16, np.float32, ml_dtypes.bfloat16, np.float64)
    mine = dtypes[int(worker["workerid"][2:]) :: worker["workercount"]]
    warmup(mine, backend="numba", strided=True)


@pytest.fixture(scope="session", autouse=True)
def _certificates(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--certify"):
        cuda = importlib.import_module("actreg_dispatch.backends.cuda")
        cuda.CERTIFIED_FROM = 0


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> UsableBackend:
    """Each backend in turn; a required one that cannot run here fails."""
    return _usable(request.param)


def _usable(name: str) -> UsableBackend:
    reason = registry.why_unavailable(name)
    if reason:
        pytest.fail(f"backend {name}: {reason}")
    return UsableBackend(name)


@pytest.fixture(scope="session")
def arrays(request: pytest.FixtureRequest) -> UsableBackend:
    """Each backend, and each library whose arrays are led to the backends, in turn."""
    return _arrays_of(request.param)


@pytest.fixture(scope="session")
def arrays_or_files(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> UsableBackend:
    """Do as ``arrays``, and then with files."""
    if request.param == "files":
        return Files("files", tmp_path_factory.mktemp("arrays"))
    return _arrays_of(request.param)


def _arrays_of(name: str) -> UsableBackend:
    if name in BACKENDS:
        return _usable(name)
    importlib.import_module("dask.array" if name == "dask" else name)
    if name == "jax":
        sys.modules["jax"].config.update("jax_enable_x64", True)
    return Library(name)


@pytest.fixture(scope="session")
def cupy(request: pytest.FixtureRequest) -> Any:
    """Return the cupy module, where it has a device."""
    reason = registry.why_unavailable("cupy")
    if reason:
        required = "cupy" in request.config.getoption("--require-backend")
        (pytest.fail if required else pytest.skip)(f"no CUDA device: {reason}")
    return sys.modules["cupy"]


@pytest.fixture(scope="session")
def torch(request: pytest.FixtureRequest) -> Any:
    """Return the torch module, where it is installed."""
    return _installed(request, "torch")


@pytest.fixture
def jax(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return the jax module, where it is installed, with float64."""
    jax = _installed(request, "jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax
    jax.config.update("jax_enable_x64", before)


def _installed(request: pytest.FixtureRequest, name: str) -> Any:
    if name in request.config.getoption("--require-backend"):
        return importlib.import_module(name)
    return pytest.importorskip(name)


@pytest.fixture(scope="session")
def software_device(cupy: Any) -> None:
    """Skip where a GPU computes, which counts nothing."""
    if "SOFTGPU" not in os.environ:
        pytest.skip("only a software device counts bytes")


@pytest.fixture(scope="session")
def profiled(
    software_device: None, python: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, list[dict[str, Any]]]]:
    """Run code that calls ``record(name, call)``, and return what was launched in each call.

    What was copied and waited for, too.
    """

    def run(code: str) -> dict[str, list[dict[str, Any]]]:
        file = tmp_path_factory.mktemp("profile") / "profile.json"
        file.touch()
        done = python("-c", _RECORD.format(code), timeout=1200, SOFTGPU_PROFILE=str(file))
        found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
        return found

    return run


_RECORD = """
import json, os
found = {{}}
def record(name, call):
    with open(os.environ["SOFTGPU_PROFILE"]) as lines:
        lines.seek(0, 2)
        call()
        found[name] = [json.loads(line) for line in lines]
{}
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACTREG_BACKEND", raising=False)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register backends that are forgotten afterwards."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr(registry, "_ARRAY_TYPES", {})
    monkeypatch.setattr(registry, "_DECISIONS", {})


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run Python code in a fresh process, elsewhere, and return what it printed.

    It imports the checkout, as the tests do, whose kernels are in the cache.
    """
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    checkout = str(Path(__file__).parent.parent)

    def run(*arguments: str, check: bool = True, timeout: float = 300, **environment: str) -> Any:
        paths = environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH"), checkout
        done = subprocess.run(
            [sys.executable, *arguments],
            env=os.environ
            | {"PYTHONUTF8": "1"}
            | environment
            | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            cwd=elsewhere,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run
