"""Living with forks, signals and threads: when Numba's threads may be used, and what locks do.

As Numba ships them, parallel kernels end or hang the process in two ordinary situations: in a
forked child whose parent has used OpenMP, be it through Numba or through another library; and
where a second thread enters one, with the layer ``workqueue``. There the kernels run serially.
So they do where the caller says that the processors have work already.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

__all__ = ["interrupts_wait", "lock_over_fork", "may_use_threads", "serially", "threading_layer"]

_LOGGER = logging.getLogger("actreg_dispatch")
_MAIN_THREAD = threading.main_thread().ident

_SERIALLY: ContextVar[bool] = ContextVar("actreg_dispatch_serially", default=False)

_layer: str | None = None  # "" if there is none


def may_use_threads() -> bool:
    """Return whether a parallel kernel may be launched from this thread of this process."""
    if _SERIALLY.get():
        return False
    if os.getpid() != _PROCESS:  # a forked child: the threads of its parent were not forked with it
        return False
    layer = threading_layer()
    if layer == "workqueue":  # which takes one caller at a time: no other thread may come
        return threading.get_ident() == _MAIN_THREAD and threading.active_count() == 1
    return layer != ""


@contextlib.contextmanager
def serially() -> Iterator[None]:
    """Let kernels run serially inside a ``with`` block, in this thread or asyncio task.

    For a caller that keeps every processor busy with a piece each. Numba's settings are left alone.
    """
    token = _SERIALLY.set(True)
    try:
        yield
    finally:
        _SERIALLY.reset(token)


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a ``with`` block.

    For compiling: an exception in a function that LLVM calls back ends the process.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.get_ident() != _MAIN_THREAD or not callable(handler):
        yield  # another thread is not interrupted
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[-1])


def threading_layer() -> str:
    """Return Numba's threading layer, whose threads this starts; empty if none can be loaded."""
    return _layer if _layer is not None else _launch()


def lock_over_fork(lock: Any) -> None:
    """Let a fork wait for ``lock``, so that no child inherits it from a thread it does not have."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lock.acquire,
            after_in_parent=lock.release,
            after_in_child=lock._at_fork_reinit,  # as the standard library does
        )


def _launch() -> str:
    """Start the threads, as the first parallel kernel would, and return their layer."""
    global _layer
    import numba

    with _LAUNCHING:
        try:
            numba.get_num_threads()
            _layer = numba.threading_layer()
        except Exception as error:  # none can be loaded; -W error makes its warnings fatal, too
            _layer = ""
            _LOGGER.debug("no threads, parallel kernels run serially: %s", error)
    return _layer


def _is_forked() -> bool:
    """Return whether this process is a fork of its parent, as far as the system tells.

    Then it runs the same command, and the kernel's page is where a start put it at random.
    """
    own, parent = (Path(f"/proc/{pid}") for pid in ("self", os.getppid()))
    try:
        if (own / "cmdline").read_bytes() != (parent / "cmdline").read_bytes():
            return False
        pages = ((process / "maps").read_text(errors="replace") for process in (own, parent))
        places = [[line for line in page.splitlines() if "[vdso]" in line] for page in pages]
    except OSError:
        return False
    return places[0] == places[1]


_LAUNCHING = threading.RLock()
lock_over_fork(_LAUNCHING)
_PROCESS = 0 if _is_forked() else os.getpid()  # the one whose threads may be used
