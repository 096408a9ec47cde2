"""The backends there are, and which one serves a call.

A backend is asked for by name or, without a name, found by the type of the array. Nothing is
imported to find out: an array can only be CuPy's if the caller has imported CuPy, so a class that
was never seen is compared with the libraries in :data:`sys.modules`, and a backend's own module is
loaded the first time that it is chosen.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.errors import BackendUnavailableError, UnknownBackendError
from actreg_dispatch.runtime.threads import lock_over_fork

__all__ = [
    "AUTO",
    "CUPY",
    "ENVIRONMENT_VARIABLE",
    "LIBRARIES",
    "NUMPY",
    "RAW_ENVIRONMENT",
    "RAW_KEY",
    "array_type_of",
    "asked_by_context",
    "available_backends",
    "backend_names",
    "check_name",
    "choose",
    "get_backend",
    "library_of",
    "register_backend",
    "requested",
    "usable",
    "use_backend",
    "why_unavailable",
]

ENVIRONMENT_VARIABLE = "ACTREG_BACKEND"
AUTO = "auto"
NUMPY = "numpy.ndarray"
CUPY = "cupy.ndarray"
LIBRARIES = {
    "torch.Tensor": "actreg_dispatch.torch",
    "jax.Array": "actreg_dispatch.jax",
    "jax.core.Tracer": "actreg_dispatch.jax",
    "dask.array.Array": "actreg_dispatch.dask",
}
"""Array type -> the module that leads arrays of another library to the backends."""

REFERENCE = "numpy"  # the backend that takes any byte order and alignment

logger = logging.getLogger("actreg_dispatch")


@dataclass
class _Entry:
    """A registered backend: loaded at most once, on first use."""

    load: Callable[[], Backend]
    array_type: str
    install: str
    backend: Backend | None = None
    unavailable_because: str | None = None  # None: not asked yet; written last


_ENTRIES: dict[str, _Entry] = {}  # replaced as a whole, so that threads may walk through it
# Class of an array -> dotted name of its library's array type.
_ARRAY_TYPES: MutableMapping[type, str] = weakref.WeakKeyDictionary()
_DECISIONS: dict[tuple[str, str, np.dtype[Any], bool], tuple[Backend, str]] = {}
_MODULES: dict[str | None, Any] = {None: None}  # those of LIBRARIES that have been imported
_LOCK = threading.RLock()
lock_over_fork(_LOCK)
_OVERRIDE: ContextVar[str | None] = ContextVar("actreg_dispatch_backend", default=None)


def register_backend(
    name: str, load: Callable[[], Backend], *, array_type: str, install: str = ""
) -> None:
    """Make a backend known under ``name``.

    Name and array type are given here, not read from the backend, so that a backend can be known
    without being loaded.

    Parameters
    ----------
    name : str
        The name that ``backend=``, :func:`use_backend` and ``ACTREG_BACKEND`` know it by;
        lower case. A name that is taken is refused.
    load : callable
        Takes nothing and returns the :class:`Backend`; a class will do. Called at most once, the
        first time that the backend is chosen or asked about. Whatever it raises is reported as
        the reason why the backend is unavailable.
    array_type : str
        Dotted name of the array class that the backend computes on, such as ``"numpy.ndarray"``
        or ``"cupy.ndarray"``. Arrays of that class go, without an explicit choice, to the backend
        that was registered for it first among those that are available and take their dtype.
    install : str, optional
        What to do if the backend is unavailable; appears in the error.

    Raises
    ------
    ValueError
        If ``name`` is empty, ``"auto"``, not lower case, padded with space, or taken, or
        ``array_type`` is not a dotted name.
    """
    if not isinstance(name, str) or name in ("", AUTO) or name != name.strip().lower():
        raise ValueError(f"name={name!r} cannot name a backend: use a lower-case word, not 'auto'")
    if "." not in array_type:
        raise ValueError(f"array_type={array_type!r} is no dotted name: write it like {NUMPY!r}")
    global _ENTRIES
    with _LOCK:
        if name in _ENTRIES:
            raise ValueError(f"name={name!r} is taken: choose another name for this backend")
        _ENTRIES = {**_ENTRIES, name: _Entry(load, array_type, install)}
        _ARRAY_TYPES.clear()
        _DECISIONS.clear()


def backend_names() -> tuple[str, ...]:
    """Return every registered name, usable or not, in order of registration."""
    return tuple(_ENTRIES)


def why_unavailable(name: str) -> str:
    """Return why the registered backend ``name`` cannot run here and a remedy; empty if it can."""
    entry = _ENTRIES[name]
    if entry.unavailable_because is None:
        with _LOCK:
            if entry.unavailable_because is None:
                entry.unavailable_because = _load(entry)
    return entry.unavailable_because


def _load(entry: _Entry) -> str:
    try:
        backend = entry.load()
        if not isinstance(backend, Backend):
            raise TypeError(f"{backend!r} is not derived from actreg_dispatch.Backend")
        entry.backend = backend
        if backend.is_available():
            return ""
        reason = backend.unavailable_because
    except (RecursionError, MemoryError):  # which says nothing about the backend
        raise
    except Exception as error:  # a broken installation must not break the other backends
        reason = f"{type(error).__name__}: {error}"
    return f"{reason}. {entry.install}".strip()


def _known() -> str:
    return ", ".join(backend_names())


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that can run here.

    Examples
    --------
    >>> "numpy" in available_backends()
    True
    """
    return tuple(name for name in backend_names() if not why_unavailable(name))


def get_backend(name: str) -> Backend:
    """Return the backend registered under ``name``, loaded and usable.

    Raises
    ------
    UnknownBackendError
        If no backend has that name; the message lists the names.
    BackendUnavailableError
        If it cannot run here; the message says why and what to install.
    """
    source = f"name={name!r}"
    spelled = check_name(name, source)
    if spelled == AUTO:
        raise UnknownBackendError(f"{source} is no single backend; use one of: {_known()}")
    return usable(spelled, source)


def usable(name: str, source: str) -> Backend:
    """Return the backend ``name``, or raise an error that begins with ``source``.

    Raises
    ------
    UnknownBackendError, BackendUnavailableError
        If there is none of that name, or it cannot run here.
    """
    if name not in _ENTRIES:  # a pickled choice may be older than this process
        raise UnknownBackendError(f"{source} names no backend; use one of: {_known()}")
    reason = why_unavailable(name)
    backend = _ENTRIES[name].backend
    if reason or backend is None:
        raise BackendUnavailableError(f"{source}: backend {name!r} cannot run here: {reason}")
    return backend


def check_name(name: Any, source: str) -> str:
    """Return ``name`` in the registry's spelling, or raise an error that begins with ``source``."""
    spelled = name.strip().lower() if isinstance(name, str) else None
    if spelled in ("", AUTO):
        return AUTO
    if spelled is None or spelled not in _ENTRIES:
        raise UnknownBackendError(f"{source} names no backend; use one of: {AUTO}, {_known()}")
    return spelled


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Choose a backend for every call inside a ``with`` block.

    Holds in the current thread and the asyncio tasks started in the block (and in threads started
    in it, where they inherit the context: by default in free-threaded builds of Python 3.14), and
    gives way only to the ``backend=`` argument of :class:`ActivityRegularization`. Blocks nest;
    ``"auto"`` means by array type, whatever the environment variable says.

    Parameters
    ----------
    name : str
        ``"auto"`` or a registered name; case and surrounding space do not matter.

    Raises
    ------
    UnknownBackendError
        If no backend has that name.

    Examples
    --------
    >>> import numpy as np
    >>> from actreg_dispatch import ActivityRegularization
    >>> with use_backend("numpy"):
    ...     float(ActivityRegularization.l1(0.5).penalty(np.array([1.0, -3.0])))
    2.0
    """
    return _overriding(check_name(name, f"use_backend({name!r})"))


@contextlib.contextmanager
def _overriding(name: str) -> Iterator[None]:
    token = _OVERRIDE.set(name)
    try:
        yield
    finally:
        _OVERRIDE.reset(token)


def _environment() -> str | None:
    """Return the environment variable as it is now, or None.

    ``os.environ.get`` encodes and decodes on every call, which costs more than a small kernel
    does (1 µs against 0.04 µs); the dict under it holds what ``os.environ`` writes.
    """
    value = RAW_ENVIRONMENT.get(RAW_KEY)
    return value if value is None else os.fsdecode(value)


try:
    RAW_ENVIRONMENT: Any = os.environ._data  # type: ignore[attr-defined]
    RAW_KEY: Any = os.environ.encodekey(ENVIRONMENT_VARIABLE)
except AttributeError:  # an interpreter with another os.environ
    RAW_ENVIRONMENT, RAW_KEY = os.environ, ENVIRONMENT_VARIABLE

# While this, and the variable as it lies in RAW_ENVIRONMENT, are the same objects, so is the answer
# of :func:`requested`, at a fraction of the cost.
asked_by_context = _OVERRIDE.get


def requested(explicit: str | None = None) -> tuple[str, str]:
    """Return the name that is asked for, and who asks for it, as an error would say it.

    Parameters
    ----------
    explicit : str or None
        The checked ``backend=`` argument of the call; None when there is none.

    Raises
    ------
    UnknownBackendError
        If the environment variable names no backend.
    """
    if explicit is not None:
        return explicit, f"backend={explicit!r}"
    override = _OVERRIDE.get()
    if override is not None:
        return override, f"use_backend({override!r})"
    value = _environment()
    if value is None:
        return AUTO, "the array type"
    source = f"the environment variable {ENVIRONMENT_VARIABLE}={value!r}"
    return check_name(value, source), source


def array_type_of(cls: type) -> str | None:
    """Return the dotted name of the known array type that ``cls`` belongs to, or None."""
    known = _ARRAY_TYPES.get(cls)
    if known is None:
        with _LOCK:
            nearest: type = object
            for array_type in {*LIBRARIES, *(entry.array_type for entry in _ENTRIES.values())}:
                module, _, attribute = array_type.rpartition(".")
                base = getattr(sys.modules.get(module), attribute, None)
                if isinstance(base, type) and issubclass(cls, base) and issubclass(base, nearest):
                    nearest = base
                    known = _ARRAY_TYPES[cls] = array_type
    return known


def library_of(cls: type) -> Any:
    """Return the module of :data:`LIBRARIES` for arrays of ``cls``; None if backends take them."""
    name = _name_of_library(cls)
    return _MODULES[name]


def _name_of_library(cls: type) -> str | None:
    """Return the name of that module, which has been imported, or None."""
    array_type = _ARRAY_TYPES.get(cls) or array_type_of(cls)
    name = LIBRARIES.get(array_type) if array_type else None
    if name and name not in _MODULES:  # waits where another thread is importing it
        _MODULES[name] = importlib.import_module(name)
    return name


# Dynamo cannot trace a lock, nor an import by a name that is computed. So it calls this function
# and takes what is returned for a constant, as torch.compiler.assume_constant_result would say.
_name_of_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(
    array_type: str,
    dtype: np.dtype[Any],
    explicit: str | None,
    *,
    aligned: bool = True,
    log: bool = True,
) -> tuple[Backend, str]:
    """Return the backend that serves arrays of this type and dtype, and the array type it takes.

    Parameters
    ----------
    array_type : str
        What :func:`array_type_of` says of the arrays.
    dtype : numpy.dtype
        Their dtype, byte order included.
    explicit : str or None
        The checked ``backend=`` argument; None when there is none.
    aligned : bool
        Whether their elements lie at multiples of their size.
    log : bool
        Whether to log the decision.

    Returns
    -------
    backend : Backend
    target : str
        The backend's array type. Where it is not ``array_type``, the data has to move.

    Raises
    ------
    UnknownBackendError, BackendUnavailableError
        If what is asked for does not exist or cannot run here.
    TypeError
        If the backend does not take the dtype.
    """
    name, source = requested(explicit)
    key = name, array_type, dtype, aligned
    decision = _DECISIONS.get(key)
    if decision is None:
        with _LOCK:
            decision = _DECISIONS[key] = _decide(*key, source)
    backend, target = decision
    if log and logger.isEnabledFor(logging.DEBUG):
        moves = "" if target == array_type else f", moved from {array_type} to {target}"
        logger.debug("backend %s for %s %s by %s%s", backend.name, array_type, dtype, source, moves)
    return backend, target


def _decide(
    name: str, array_type: str, dtype: np.dtype[Any], aligned: bool, source: str
) -> tuple[Backend, str]:
    if name == AUTO:
        name = _by_array_type(array_type, dtype)
    backend, target = usable(name, source), _ENTRIES[name].array_type
    if dtype.newbyteorder("=") not in backend.dtypes and dtype not in backend.dtypes:
        raise TypeError(
            f"{source}: backend {name!r} does not take {dtype} activations; "
            f"convert them, or choose another backend"
        )
    if array_type == target == NUMPY and not (aligned and dtype in backend.dtypes):
        # What compiled kernels do not take is left to the reference. A move makes it native.
        backend = usable(REFERENCE, source)
    return backend, target


def _by_array_type(array_type: str, dtype: np.dtype[Any]) -> str:
    """Return the first usable backend for the arrays, or the first one, to be complained about."""
    names = [name for name in backend_names() if _ENTRIES[name].array_type == array_type]
    for name in names:
        backend = None if why_unavailable(name) else _ENTRIES[name].backend
        if backend is not None and dtype in backend.dtypes:
            return name
    return names[0]


def _module(name: str) -> Callable[[], Backend]:
    """Return a loader of one of the package's own backends."""

    def load() -> Backend:
        return importlib.import_module(f"actreg_dispatch.backends.{name}").BACKEND  # type: ignore[no-any-return]

    return load


register_backend(
    "numba",
    _module("numba"),
    array_type=NUMPY,
    install="Install it with: python -m pip install numba",
)
register_backend(REFERENCE, _module("reference"), array_type=NUMPY)
register_backend(
    "cupy",
    _module("cuda"),
    array_type=CUPY,
    install=(
        "On a machine with an NVIDIA GPU and driver, install CuPy for its CUDA version with:"
        " python -m pip install cupy-cuda13x (or cupy-cuda12x)"
    ),
)
