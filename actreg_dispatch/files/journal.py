"""The journal: what makes an update of a file, block by block, safe against any interruption.

Before a block of gradients is overwritten, its old values are on disk, in a file next to them. So
at any moment a block is old, new, or can be made old again; whatever was interrupted goes on from
the block that was under way, and ends with the bits of an uninterrupted run.

The file is one page that says what is applied to what, and two slots, each a page that describes a
block and the block's old values. A slot counts if its checksums fit. Slots take turns: one that is
half written, because just then the power failed, leaves the other, the block before, whose new
values were on disk by then. To go on from there is right, too, and the block after it has not been
touched.

Who can write to the folder can write a journal, and checksums tell only what is torn. So nothing in
a journal is a name: it says which files it is of by what :meth:`Store.identity` tells, and which
bytes of them by the number of a block, and all of it must fit the files that the caller names.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actreg_dispatch.files.checks import elements_of
from actreg_dispatch.files.stores import (
    FilesError,
    Region,
    Store,
    read_fully,
    sync,
    sync_path,
    write_fully,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Journal", "Updates", "journal_of", "left_behind"]

_PAGE = 4096
_FORMAT = "actreg-journal 1"


def journal_of(gradients: str | os.PathLike[str]) -> Path:
    """Return where the journal of ``gradients`` lies while they are partly updated."""
    real = Path(gradients).resolve()  # or a symbolic link would hide it
    return real.with_name(real.name + ".actreg-journal")


class Journal:
    """An open, locked journal.

    Attributes
    ----------
    about : dict
        What is applied to what, as it was given to :meth:`create`.
    """

    def __init__(self, path: Path, file: Any, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self._file = file
        self._stride = _PAGE + int(about["slot bytes"])

    @classmethod
    def create(cls, path: Path, about: dict[str, Any]) -> Journal:
        """Make a new journal, with all the room on disk that it will ever need.

        ``about`` is any JSON, with the size of the largest block as ``"slot bytes"``.

        Raises
        ------
        FilesError
            If there is one already, or it cannot be written; then none is left behind.
        """
        try:
            file = path.open("x+b", buffering=0)
        except FileExistsError:
            raise FilesError(left_behind(path)) from None
        except OSError as error:
            raise FilesError(_not_written(path, error)) from None
        try:
            _lock(file, path)
        except BaseException:
            file.close()
            raise
        try:  # from here on the file is this run's own
            journal = cls(path, file, about)
            size = _PAGE + 2 * journal._stride
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would come too late
            else:
                file.truncate(size)
            write_fully(file, 0, _page(about | {"format": _FORMAT}))
            sync(file.fileno())
            sync_path(path.parent)
        except BaseException as error:
            path.unlink(missing_ok=True)
            file.close()
            if isinstance(error, OSError):
                raise FilesError(_not_written(path, error)) from None
            raise
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal | None:
        """Open the journal that an interrupted run left; None if it did not come to write it.

        Raises
        ------
        FilesError
            If there is none, it is not a journal, or the run is still under way.
        """
        try:
            file: Any = open(path, "r+b", buffering=0, opener=_open_itself)  # noqa: SIM115
        except FileNotFoundError:
            raise FilesError(
                f"there is no {path}, so nothing to resume; leave --resume out to apply anew"
            ) from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise FilesError(_not_ours(path, "is a symbolic link")) from None
        try:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FilesError(_not_ours(path, "is no regular file"))
            _lock(file, path)
            page = read_fully(file, 0, min(_PAGE, os.fstat(file.fileno()).st_size))
            if not page.any():  # stopped while it was made
                path.unlink()
                file.close()
                return None
            about = _description_on(page)
            sizes = ("block bytes", "slot bytes")
            if (
                about is None
                or about.pop("format", None) != _FORMAT
                or not all(_is_count(about.get(size)) for size in sizes)
            ):
                raise FilesError(
                    f"{path} is no complete journal of actreg; if the power failed while one was "
                    f"made, the gradients are untouched: delete it and leave --resume out"
                )
            return cls(path, file, about)
        except BaseException:
            file.close()
            raise

    def check_same(self, about: dict[str, Any], store: Store, regions: Sequence[Region]) -> None:
        """Refuse to go on with another update of ``store`` than the one that was begun.

        Raises
        ------
        FilesError
            If it was; the message says in what they differ. Or if a slot holds no block of the
            ``regions``.
        """
        for key, now in about.items():
            then = self.about.get(key)
            if then != now:
                raise FilesError(
                    f"{self.path} is of an update with {key} {then}, not {now}; "
                    f"resume it with the arguments and files that it was begun with"
                )
        for slot in filter(None, map(self._described, range(2))):
            index: Any = slot.get("block")
            known = _is_count(index) and index < len(regions)
            size = elements_of(regions[index]) * store.dtype.itemsize if known else None
            if size is None or slot.get("bytes") != size:
                raise FilesError(
                    f"{self.path} has a block that {store.path} have not; it was not written by "
                    f"actreg: put all gradients back from a copy, and delete it"
                )

    def record(self, index: int, old: np.ndarray[Any, Any]) -> None:
        """Put the ``old`` values of block ``index`` on disk; only then may it be overwritten."""
        values = old.reshape(-1).view(np.uint8).data
        description = {"block": index, "bytes": len(values), "crc32": zlib.crc32(values)}
        place = _PAGE + index % 2 * self._stride
        write_fully(self._file, place + _PAGE, values)
        write_fully(self._file, place, _page(description))
        sync(self._file.fileno())

    def last(self) -> tuple[int, np.ndarray[Any, Any]] | None:
        """Return the block that was under way and the bytes of its old values; None if none was."""
        slots = [slot for slot in map(self._slot, range(2)) if slot is not None]
        if not slots:
            return None
        index, place, size = max(slots)
        return index, read_fully(self._file, place, size)

    def _slot(self, number: int) -> tuple[int, int, int] | None:
        """Return a slot's block, and where and how long its old values are; None if it is torn."""
        description = self._described(number)
        if description is None:
            return None
        place, size = _PAGE + number * self._stride + _PAGE, description["bytes"]
        if zlib.crc32(read_fully(self._file, place, size).data) != description.get("crc32"):
            return None
        return description["block"], place, size

    def _described(self, number: int) -> dict[str, Any] | None:
        """Return what a slot says of its block; None if it is torn."""
        return _description_on(read_fully(self._file, _PAGE + number * self._stride, _PAGE))

    def remove(self) -> None:
        """Delete the journal: the update is complete."""
        if fcntl is None:  # Windows does not delete an open file
            self._file.close()
        self.path.unlink()
        sync_path(self.path.parent)
        self._file.close()

    def close(self) -> None:
        """Leave the journal for another run."""
        self._file.close()


class Updates:
    """The gradients that are being updated: from which block on, and by way of the journal."""

    def __init__(self, store: Store, journal: Journal, regions: Sequence[Region]) -> None:
        self.regions, self._store, self._journal, self._first = regions, store, journal, 0
        last = journal.last()
        if last is not None:
            self._first, old = last
            region = regions[self._first]
            shape = [part.stop - part.start for part in region]
            native = store.dtype.newbyteorder("=")
            store.write(region, old.view(native).reshape(shape))

    def load(self, index: int, region: Region) -> np.ndarray[Any, Any] | None:
        """Return a block, to be changed and written; None if a former run has written it."""
        if index < self._first:
            return None
        values = self._store.load(region)
        self._journal.record(index, values)
        return values

    def write(self, region: Region, values: np.ndarray[Any, Any]) -> None:
        """Write a block that :meth:`load` returned."""
        self._store.write(region, values)


def left_behind(path: Path) -> str:
    """Return what is to be said where a journal must not be."""
    return (
        f"{path} exists: an update of these gradients is under way or was interrupted; "
        f"go on with it by the same command and --resume (or delete the journal, if you have put "
        f"all gradients back from a copy)"
    )


def _open_itself(path: str, flags: int) -> int:
    """Open a file, but not what it is a symbolic link to, and without waiting for a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _not_ours(path: Path, reason: str) -> str:
    return f"{path} {reason}, so it is no journal of actreg; see who put it there, and delete it"


def _not_written(path: Path, error: OSError) -> str:
    return (
        f"the journal {path} cannot be written: {error.strerror}; it takes two blocks beside the "
        f"gradients, which are untouched"
    )


def _lock(file: Any, path: Path) -> None:
    """Keep other runs away while this one lives."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FilesError(f"{path} is in use: wait for the run that updates them") from None
    if fcntl is not None and os.fstat(file.fileno()).st_nlink == 0:
        raise FilesError(f"{path} was removed just now: that run is complete")


def _page(description: dict[str, Any]) -> bytes:
    """Return a page of JSON with its own checksum."""
    text = json.dumps(description)
    page = json.dumps({"crc32": zlib.crc32(text.encode()), "of": text}).encode()
    if len(page) >= _PAGE:
        raise FilesError("the names of the files are too long for the journal; use shorter ones")
    return page.ljust(_PAGE - 1) + b"\n"


def _description_on(page: Any) -> dict[str, Any] | None:
    """Return what :func:`_page` was given, or None if it is torn."""
    try:
        outer = json.loads(bytes(page))
        description = json.loads(outer["of"])
        intact = zlib.crc32(outer["of"].encode()) == outer["crc32"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return description if intact and isinstance(description, dict) else None
