"""One fixture for every backend, and the switch that says which ones must not be missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import numpy as np
import pytest

from actreg_dispatch import ActivityRegularization, registry

BACKENDS = ("numpy", "numba", "cupy")
DEPENDENCIES = ("numpy", "numba")  # installed with the package, so always required

hypothesis.settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        choices=BACKENDS,
        help="fail, rather than skip, where this backend is not usable; may be repeated",
    )


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


def pytest_report_header() -> list[str]:
    lines = [f"backends: {', '.join(registry.available_backends())}"]
    for name in BACKENDS:
        reason = registry.why_unavailable(name)
        if reason:
            lines.append(f"backend {name} is left out: {reason}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``backend`` on all that are usable or required."""
    if "backend" in metafunc.fixturenames:
        required = (*DEPENDENCIES, *metafunc.config.getoption("--require-backend"))
        names = [n for n in BACKENDS if n in required or not registry.why_unavailable(n)]
        metafunc.parametrize("backend", names, indirect=True, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run CUDA kernels."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "cupy" in {parameters.get("backend"), *item.fixturenames}:
            item.add_marker("cuda")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> UsableBackend:
    """Each backend in turn; a required one that cannot run here fails."""
    reason = registry.why_unavailable(request.param)
    if reason:
        pytest.fail(f"backend {request.param}: {reason}")
    return UsableBackend(request.param)


@pytest.fixture(scope="session")
def cupy(request: pytest.FixtureRequest) -> Any:
    """Return the cupy module, where it has a device."""
    reason = registry.why_unavailable("cupy")
    if reason:
        required = "cupy" in request.config.getoption("--require-backend")
        (pytest.fail if required else pytest.skip)(f"no CUDA device: {reason}")
    return sys.modules["cupy"]


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
    """Run Python code in a fresh process, elsewhere, and return what it printed."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*arguments: str, check: bool = True, timeout: float = 300, **environment: str) -> Any:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONUTF8": "1"} | environment,
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
