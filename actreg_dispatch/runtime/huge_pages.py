"""Huge pages for new memory, for which NumPy asks for its own arrays, but others do not.

The system makes a page when it is first touched. Of 4 KiB each, that takes several times as long as
the kernels that fill them: zeros in 80 MB of PyTorch's take 22 ms on two cores, or 5 on huge pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

__all__ = ["FROM_BYTES", "ask_for_huge_pages"]

FROM_BYTES = 4 << 20
"""The size from which on NumPy asks for them, too."""


def ask_for_huge_pages(address: int, size: int) -> None:
    """Ask for huge pages where there are ``size`` bytes of memory that nobody has touched.

    It is a hint: it changes no byte, and a system that does not know it leaves all as it is.
    ``NUMPY_MADVISE_HUGEPAGE=0`` switches it off, as it does NumPy's own.
    """
    if size < FROM_BYTES or _ADVISE is None or os.environ.get("NUMPY_MADVISE_HUGEPAGE") == "0":
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only
    end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    _ADVISE(start, end - start, mmap.MADV_HUGEPAGE)


def _madvise() -> Any:
    """Return the system's function, or None if there is none, or it knows no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


_ADVISE = _madvise()
