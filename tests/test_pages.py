"""Huge pages: a hint to the system, which reaches new memory, and nothing else."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import pytest

from actreg_dispatch.runtime import huge_pages

SIZE = 16 << 20


@pytest.fixture
def memory():
    """Return new memory."""
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as new:
        yield new


def address_of(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def is_advised(address):
    """Return what the system knows of the memory there."""
    for area in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", area)
        if bounds and int(bounds[1], 16) <= address < int(bounds[2], 16):
            return " hg" in area.partition("VmFlags:")[2]
    raise AssertionError(f"nothing is at {address:#x}")


linux = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/proc/self/smaps").exists(),
    reason="no huge pages, or no file that tells of them",
)


@linux
def test_new_memory_gets_them(memory):
    memory[5:8] = b"abc"
    start = address_of(memory)
    assert not is_advised(start)
    huge_pages.ask_for_huge_pages(start + 1, SIZE - 1)
    assert not is_advised(start)  # of a page that is not all meant
    assert is_advised(start + mmap.PAGESIZE)
    assert is_advised(start + SIZE - 1)
    assert memory[:10] == b"\0\0\0\0\0abc\0\0"


@linux
@pytest.mark.parametrize(("size", "switch"), [(1 << 20, "1"), (SIZE, "0")])
def test_little_memory_does_not_and_the_switch_of_numpy_holds(memory, monkeypatch, size, switch):
    monkeypatch.setenv("NUMPY_MADVISE_HUGEPAGE", switch)
    start = address_of(memory)
    huge_pages.ask_for_huge_pages(start, size)
    assert not is_advised(start + mmap.PAGESIZE)


def test_a_system_without_them_is_left_alone(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert huge_pages._madvise() is None
    monkeypatch.setattr(huge_pages, "_ADVISE", None)
    huge_pages.ask_for_huge_pages(0, 1 << 40)
