"""Compiling: every kernel once a process, kept on disk for the next, and undisturbed by Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from actreg_dispatch import sums
from actreg_dispatch.norms import MOST_COEFFICIENTS, MOST_LAMS
from actreg_dispatch.runtime.threads import interrupts_wait, lock_over_fork

__all__ = ["COMPILING", "KERNELS", "compile_function", "compile_kernel", "kernel_of", "source_hash"]

_CACHING = {"": True, "0": False, "1": True}.get(os.environ.get("ACTREG_CACHE", "").strip())
if _CACHING is None:
    raise ValueError(
        f"the environment variable ACTREG_CACHE={os.environ['ACTREG_CACHE']!r} must be 0 or 1"
    )


def _sources() -> int:
    """Return a number for the code that kernels are made of."""
    rooms = Path(__file__).parent, Path(sums.__file__).parent
    files = [file for room in rooms for file in sorted(room.glob("*.py"))]
    try:
        return zlib.crc32(b"".join(file.read_bytes() for file in files))
    except OSError:  # then there is no cache either
        return 0


_SOURCES = _sources()  # now: what is edited later is not what this process compiles
_NOT_IN_THE_CODE = {"NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER"}

KERNELS: dict[tuple[Any, ...], Any] = {}
COMPILING = threading.RLock()
lock_over_fork(COMPILING)


def kernel_of(factory: Callable[..., Any], *key: Any) -> Any:
    """Return the kernel that ``factory`` makes of ``key``; compile it once."""
    name = factory, *key
    kernel = KERNELS.get(name)
    if kernel is None:
        with COMPILING:  # other threads wait for the first rather than compile the same
            kernel = KERNELS.get(name)
            if kernel is None:
                with interrupts_wait():
                    kernel = KERNELS[name] = factory(*key)
    return kernel


def compile_kernel(kernel: Any, signature: Any, *key: Any, **options: Any) -> Any:
    """Compile ``kernel``, or load it from Numba's cache on disk.

    ``key`` is what its code depends on besides the signature and :func:`source_hash`.
    """
    return _compiled(numba.njit, kernel, signature, key, nogil=True, **options)


def compile_function(function: Any, signature: Any, *key: Any) -> Any:
    """Compile a C function, which has an ``address``, or load it from Numba's cache on disk.

    It must not raise: Numba prints what a C function raises, and returns 0.
    """
    return _compiled(numba.cfunc, function, signature, key)


def _compiled(
    compiler: Any, function: Any, signature: Any, key: tuple[Any, ...], **options: Any
) -> Any:
    """Compile or load.

    Loading takes 2 to 9 ms where compiling takes 0.1 to 2 s. Numba puts whole files in place, so
    processes may race. Where the cache cannot be read or written, it is done without.
    """
    # Numba's cache goes by the name of a function, and so do symbols, of which two may have been
    # compiled by different processes.
    function.__qualname__ += f".{zlib.crc32(repr(key).encode(), source_hash()):08x}"
    options |= {"error_model": "numpy"}
    if _CACHING:
        with contextlib.suppress(Exception):
            return compiler(signature, cache=True, **options)(function)
    return compiler(signature, **options)(function)


def source_hash() -> int:
    """Return a number for what else the code of a kernel depends on.

    That is the files of kernels and their pieces, those of :mod:`~actreg_dispatch.sums`, how many
    numbers a call has room for, and Numba's environment variables, such as ``NUMBA_BOUNDSCHECK``.
    It is part of the names of functions; Numba itself notices only that the file of the kernel has
    changed.
    """
    options = sorted(
        f"{name}={os.environ.get(name)}"  # which another thread may delete just now
        for name in os.environ
        if name.startswith("NUMBA_") and name not in _NOT_IN_THE_CODE
    )
    options += [str(MOST_LAMS), str(MOST_COEFFICIENTS)]
    return zlib.crc32("\n".join(options).encode(), _SOURCES)
