"""Living with forks and other threads: when Numba's threads may be used, and what locks do.

As Numba ships them, parallel kernels end the process in two ordinary situations: in a forked child
whose parent has used them, with GNU OpenMP; and where a second thread enters one, with the layer
``workqueue``. There the kernels run serially.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["lock_over_fork", "may_use_threads", "threading_layer"]

_LOGGER = logging.getLogger("actreg_dispatch")
_MAIN_THREAD = threading.main_thread().ident

_layer: str | None = None  # "" if there is none
_orphaned = False  # a child of a process that had threads, which were not forked with it


def may_use_threads() -> bool:
    """Return whether a parallel kernel may be launched from this thread of this process."""
    if _orphaned:
        return False
    layer = threading_layer()
    if layer == "workqueue":  # which takes one caller at a time: no other thread may come
        return threading.get_ident() == _MAIN_THREAD and threading.active_count() == 1
    return layer != ""


def threading_layer() -> str:
    """Return Numba's threading layer, whose threads this starts; empty if none can be loaded."""
    return _layer if _layer is not None else _launch()


def lock_over_fork(lock: Any) -> None:
    """Let a fork wait for ``lock``, so that no child inherits it from a thread it does not have."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )


def _launched() -> str:
    """Return the layer whose threads run in this process, or did in one that forked it."""
    numba = sys.modules.get("numba")
    try:
        return str(numba.threading_layer()) if numba else ""
    except Exception:  # none runs, or Numba is being imported
        return ""


def _launch() -> str:
    """Start the threads, as the first parallel kernel would, and return their layer."""
    global _layer
    import numba

    try:
        numba.get_num_threads()
        _layer = _launched()
    except Exception as error:  # no layer can be loaded; -W error makes its warnings fatal, too
        _layer = ""
        _LOGGER.debug("no threads, parallel kernels run serially: %s", error)
    return _layer


def _after_fork() -> None:
    global _orphaned, _MAIN_THREAD
    _MAIN_THREAD = threading.get_ident()
    _orphaned = _orphaned or _launched() != ""


def _runs_alone() -> bool:
    """Return whether this thread is the only one of the process, as far as the system tells."""
    try:
        return len(list(Path("/proc/self/task").iterdir())) == 1
    except OSError:
        return False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
# Forked before this was imported: the layer is there, its threads are not.
_orphaned = _launched() != "" and _runs_alone()
