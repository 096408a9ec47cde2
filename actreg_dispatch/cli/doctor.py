"""``actreg doctor``: what is installed, what is usable, what is chosen, and whether it is right."""

from __future__ import annotations

import itertools
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from actreg_dispatch import __version__
from actreg_dispatch.errors import BackendError
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.oracle import exact_result
from actreg_dispatch.registry import (
    CUPY,
    ENVIRONMENT_VARIABLE,
    NUMPY,
    backend_names,
    choose,
    get_backend,
    requested,
    why_unavailable,
)
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.runtime.threads import threading_layer

__all__ = ["examine", "self_test"]

_LIBRARIES = ("torch", "jax", "keras", "dask", "zarr")
_EXTRAS = {"zarr": "files"}  # the others have the extra of their name
_SIZES = (0, 1, 7, 300)
_PARALLEL_SIZE = 40_000  # large enough for the kernels with threads


def examine(say: Callable[[str], None] = print) -> int:
    """Print the findings line by line and return the exit status: 0 when all is well."""
    healthy = True
    say(f"actreg_dispatch {__version__}")
    say(f"Python {platform.python_version()} on {platform.platform()} ({os.cpu_count()} CPUs)")
    say(f"NumPy {np.__version__}")
    say("")
    say("Backends; their test takes up to a minute the first time, since it compiles")
    for name in backend_names():
        reason = why_unavailable(name)
        if reason:
            say(_entry(name, f"unusable: {reason}"))
            continue
        try:
            self_test(name)
            details = _details(name)
        except Exception as error:  # a broken backend may raise anything
            healthy = False
            say(_entry(name, f"FAILED its self-test: {error}"))
        else:
            say(_entry(name, f"usable, agrees with exact arithmetic{details}"))
    say("")
    say("Other libraries, whose arrays the backends compute")
    for name in _LIBRARIES:
        say(_entry(name, _installed(name)))
    say("")
    return 0 if _examine_choice(say) and healthy else 1


def _entry(name: str, text: str) -> str:
    """Return lines of at most 80 characters, indented but for the name."""
    return _wrap(f"{name:6} {text}", subsequent_indent=" " * 7)


def _wrap(text: str, **indents: Any) -> str:
    """Wrap a text at 80 characters, but not within a command."""
    kept = re.sub(r"python -m pip install \S+", lambda found: found[0].replace(" ", "\0"), text)
    wrapped = textwrap.fill(kept, 80, break_long_words=False, break_on_hyphens=False, **indents)
    return wrapped.replace("\0", " ")


def _installed(name: str) -> str:
    """Return the version of a library, or how to install it; does not import it."""
    try:
        return f"installed, version {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        extra = _EXTRAS.get(name, name)
        return f"not installed: python -m pip install 'actreg-dispatch[{extra}]'"


def _examine_choice(say: Callable[[str], None]) -> bool:
    """Say which backend the environment variable selects; return whether there is one."""
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    say(f"{ENVIRONMENT_VARIABLE} is {'not set' if value is None else repr(value)}")
    try:
        requested()
        for array_type in (NUMPY, CUPY):
            if array_type == NUMPY or not why_unavailable("cupy"):
                backend, _ = choose(array_type, np.dtype(np.float32), None)
                say(f"  a {array_type} is computed by {backend.name}")
    except BackendError as error:
        say(_wrap(str(error), initial_indent="  ", subsequent_indent="  "))
        return False
    return True


def _details(name: str) -> str:
    """Return what there is to know of a usable backend's machinery."""
    if name == "numba":
        numba: Any = sys.modules["numba"]
        layer = threading_layer()
        threads = f"{layer}, {numba.get_num_threads()} threads" if layer else "none, no threads"
        return f"; Numba {numba.__version__}, threading layer {threads}"
    if name == "cupy":
        cupy: Any = sys.modules["cupy"]
        device = cupy.cuda.Device()
        properties = cupy.cuda.runtime.getDeviceProperties(device.id)
        return (
            f"; CuPy {cupy.__version__}, {properties['name'].decode()}, compute capability "
            f"{device.compute_capability}, {properties['totalGlobalMem'] / 2**30:.1f} GiB"
        )
    return ""


def self_test(name: str) -> None:
    """Compare penalty and gradient of one backend with rational arithmetic, bit for bit.

    Raises
    ------
    AssertionError
        If a bit differs; the message says for which norm, dtype and size.
    BackendError
        If the backend is unknown or cannot run here.
    """
    taken = get_backend(name).dtypes
    rng = np.random.default_rng(0)
    dtypes = [d for d in map(np.dtype, (np.float16, np.float32, np.float64)) if d in taken]
    cases = list(itertools.product(dtypes, ActivityNorm, _SIZES))
    cases.append((np.dtype(np.float32), ActivityNorm.L1, _PARALLEL_SIZE))
    for dtype, norm, size in cases:
        spread = 10.0 ** rng.integers(-4, 4, size)
        activations = (rng.normal(size=size) * spread).astype(dtype)
        gradients = rng.normal(size=size).astype(dtype)
        penalty, updated = exact_result(activations, gradients, norm, 0.1)
        found = ActivityRegularization(0.1, norm, backend=name).apply(activations, gradients)
        if found.tobytes() != penalty.tobytes() or gradients.tobytes() != updated.tobytes():
            raise AssertionError(
                f"{norm.value} of {size} {dtype} values: penalty {found!r}, exactly rounded "
                f"{penalty!r}; {np.count_nonzero(gradients != updated)} gradients differ"
            )
