"""Arrays in files, read and written block by block: .npy files and Zarr arrays.

A store has a shape, a dtype and *regions*, tuples of slices, which together are all of it. It reads
a region as a NumPy array, in native byte order and aligned, and writes one back.
"""

from __future__ import annotations

import errno
import io
import itertools
import math
import mmap
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actreg_dispatch.dtypes import compute_dtype
from actreg_dispatch.runtime.threads import lock_over_fork

__all__ = [
    "FilesError",
    "Region",
    "Store",
    "check_layout",
    "open_store",
    "read_fully",
    "sync",
    "sync_path",
    "write_fully",
]

Array = np.ndarray[Any, Any]
Region = tuple[slice, ...]

_NPY = b"\x93NUMPY"
_START = 1 << 12  # bytes that are read to find the header
_OPENING = threading.Lock()  # held while a setting of Zarr is another
lock_over_fork(_OPENING)
_LONGEST = 1 << 16  # bytes of a header that are read; NumPy refuses more than 10,000 characters


class FilesError(ValueError):
    """Files that cannot be used as they were asked for; nothing has been written."""


class Store(Protocol):
    """An array in a file or folder."""

    format: str
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # as it is stored
    order: str  # in which it is walked: "C" or "F"
    mapped: bool  # whether reading copies nothing

    def regions(self, block_bytes: int) -> Sequence[Region]:
        """Return the regions to walk through, of ``block_bytes`` at most if that can be."""

    def read(self, region: Region) -> Array:
        """Return values that are only to be read."""

    def load(self, region: Region) -> Array:
        """Return a copy of the values."""

    def whole(self) -> Array:
        """Return a copy of all values, in their shape."""

    def write(self, region: Region, values: Array) -> None:
        """Overwrite the values, and return once they are on disk."""

    def identity(self, *, content: bool) -> dict[str, Any]:
        """Return by what the store is known again; with ``content`` to tell a later change."""

    def close(self) -> None:
        """Close the file."""


def open_store(
    name: str, path: str, dtype: str | None, *, writes: bool = False, weighs: bool = False
) -> Store:
    """Open the file or folder that is passed as ``name``.

    ``dtype`` may be ``"bfloat16"``, for two bytes an element that the file does not name. Of an
    array that ``weighs`` it concerns only these, and it may be a mask, too.

    Raises
    ------
    FilesError
        If it is not a sound array of a supported dtype, or is to be written but read-only.
    OSError
        If it cannot be opened.
    """
    try:
        # Where data fill the processor's caches, pathlib takes some 50 µs of a call.
        found = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        remedy = "; gradients to begin with are numpy.zeros_like(activations)" if writes else ""
        raise FilesError(
            f"{name} {path!r} do not exist; name a .npy file or a Zarr store{remedy}"
        ) from None
    if writes and not (found.st_mode & 0o222 and os.access(path, os.W_OK)):
        raise FilesError(f"{name} {path} are read-only; make them writable, or pass a copy")
    if stat.S_ISDIR(found.st_mode):
        return ZarrArray(name, path, dtype, writes, weighs)
    if not stat.S_ISREG(found.st_mode):
        raise FilesError(f"{name} {path} are not a regular file; name a .npy file or a Zarr store")
    return NpyFile(name, path, dtype, writes, weighs)


def check_layout(name: str, store: Store, activations: Store) -> None:
    """Refuse a store, called ``name``, that is not read by the regions of the activations.

    Raises
    ------
    FilesError
        If format or order differ.
    """
    if store.format != activations.format:
        raise FilesError(
            f"activations {activations.path} are a {activations.format} but {name} {store.path} "
            f"a {store.format}; convert one of them"
        )
    if store.order != activations.order:
        raise FilesError(
            f"{name} {store.path} are stored in {store.order} order but activations in "
            f"{activations.order} order; save what is in F order again, as "
            f"numpy.ascontiguousarray returns it"
        )


def _element(
    name: str, path: str, stored: np.dtype[Any], asked: str | None, weighs: bool
) -> np.dtype[Any]:
    """Return the dtype of the elements, or refuse."""
    if (asked is None or weighs) and compute_dtype(stored) is not None:
        return stored
    if weighs and stored.kind == "b":
        return stored
    if stored.hasobject:
        raise FilesError(
            f"{name} {path} hold pickled Python objects, which are never loaded; save an array of "
            f"numbers, such as array.astype(numpy.float32)"
        )
    plain_bytes = stored.str[1:] == "V2" and stored.names is None and stored.subdtype is None
    if asked is not None:
        if asked != "bfloat16" or not plain_bytes:
            raise FilesError(
                f"{name} {path} hold {stored}; dtype={asked!r} is for two bytes without a name "
                f"(V2), as bfloat16 is stored: leave it out"
            )
        try:
            import ml_dtypes
        except ImportError:
            raise FilesError(
                "bfloat16 needs ml_dtypes; install it with: python -m pip install ml_dtypes"
            ) from None
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    remedy = f"convert them to {'bool, ' if weighs else ''}float16, float32 or float64"
    if plain_bytes:
        remedy = "pass dtype='bfloat16' (--dtype bfloat16) if that is what they are"
    raise FilesError(f"{name} {path} have dtype {stored}; {remedy}")


def _native(values: Array) -> Array:
    """Return ``values`` aligned and in native byte order, as the compiled kernels take them."""
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return np.require(native, requirements="A")


class NpyFile:
    """An array in a .npy file of format 1, 2 or 3, walked in the order in which it is stored."""

    format = ".npy file"

    def __init__(self, name: str, path: str, dtype: str | None, writes: bool, weighs: bool) -> None:
        self.path = path
        self._file: Any = io.FileIO(path, "r+b" if writes else "rb")
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self.shape, fortran, stored, self._offset = self._header(name)
            self.dtype = _element(name, path, stored, dtype, weighs)
            axes = sum(length > 1 for length in self.shape)
            self.order = "F" if fortran and axes > 1 else "C"
            self.mapped = self.dtype.isnative and self._offset % self.dtype.itemsize == 0
            end = self._offset + math.prod(self.shape) * self.dtype.itemsize
            if end > self._size:
                raise FilesError(
                    f"{name} {path} have {self._size} bytes, but their header promises {end}: "
                    f"they were cut off; write them anew"
                )
        except BaseException:
            self._file.close()
            raise

    def regions(self, block_bytes: int) -> Sequence[Region]:
        size, step = math.prod(self.shape), max(1, block_bytes // self.dtype.itemsize)
        return [(slice(start, min(start + step, size)),) for start in range(0, size, step)]

    def read(self, region: Region) -> Array:
        # A mapping of the page cache, which is released with the array. Beside the time that a sum
        # in memory takes, large windows take 1.05 to 1.4, whether they are mapped ahead, populated
        # or neither, and buffers that are read into 1.4 to 3.
        place, size = self._bytes(region)
        start = place - place % mmap.ALLOCATIONGRANULARITY
        window = mmap.mmap(
            self._file.fileno(), place + size - start, access=mmap.ACCESS_READ, offset=start
        )
        count = size // self.dtype.itemsize
        return _native(np.frombuffer(window, self.dtype, count, place - start))

    def load(self, region: Region) -> Array:
        # A copy, written by calls: a mapping would end the process where the disk is full.
        place, size = self._bytes(region)
        return _native(read_fully(self._file, place, size).view(self.dtype))

    def whole(self) -> Array:
        values = self.load((slice(0, math.prod(self.shape)),))
        return values.reshape(self.shape, order="F" if self.order == "F" else "C")

    def write(self, region: Region, values: Array) -> None:
        stored = values.astype(self.dtype, copy=False)
        write_fully(self._file, self._bytes(region)[0], stored.view(np.uint8).data)
        sync(self._file.fileno())

    def identity(self, *, content: bool) -> dict[str, Any]:
        found = os.fstat(self._file.fileno())
        known = {"inode": found.st_ino, "size": found.st_size}
        return known | ({"modified": found.st_mtime_ns} if content else {})

    def close(self) -> None:
        self._file.close()

    def _header(self, name: str) -> tuple[Any, bool, np.dtype[Any], int]:
        """Return what :func:`_parsed` makes of the header, and of that alone."""
        start = read_fully(self._file, 0, min(_START, self._size)).tobytes()
        if start[: len(_NPY)] != _NPY:
            raise FilesError(f"{name} {self.path} are not a .npy file; write one with numpy.save")
        digits = 2 if start[6:7] == b"\1" else 4  # bytes of the length of what comes after it
        end = 8 + digits + int.from_bytes(start[8 : 8 + digits], "little")
        if end > len(start):
            start = read_fully(self._file, 0, min(end, _LONGEST, self._size)).tobytes()
        try:
            return _parsed(start[:end])
        except Exception as error:  # whatever the parser makes of arbitrary bytes
            reason = str(error).partition("\n")[0]
            raise FilesError(f"{name} {self.path} have a broken .npy header: {reason}") from None

    def _bytes(self, region: Region) -> tuple[int, int]:
        """Return where in the file a region is, and its size."""
        (part,) = region
        itemsize = self.dtype.itemsize
        return self._offset + part.start * itemsize, (part.stop - part.start) * itemsize


@lru_cache  # for files of one shape and dtype: a header takes as long to parse as a file to open
def _parsed(header: bytes) -> tuple[Any, bool, np.dtype[Any], int]:
    """Return shape, Fortran order, dtype and length of a header of a .npy file."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"its format {version} is unknown")
    # Format 3 is format 2 with names of fields in UTF-8, and arrays with fields are refused.
    one, two = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    shape, fortran, dtype = (one if version == (1, 0) else two)(stream)
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape {shape} is negative")
    if len(shape) > 32 or math.prod(n or 1 for n in shape) * dtype.itemsize >= 1 << 63:
        np.broadcast_to(np.empty((), dtype), shape)  # which complains
    return shape, fortran, dtype, stream.tell()


class ZarrArray:
    """A Zarr array of format 2 or 3 in a folder, walked by groups of chunks, or of shards."""

    format = "Zarr store"
    order = "C"
    mapped = False

    def __init__(self, name: str, path: str, dtype: str | None, writes: bool, weighs: bool) -> None:
        try:
            import zarr
        except ImportError:
            raise FilesError(
                f"{name} {path} are a folder; if it is a Zarr store, install what that needs "
                f"with: python -m pip install 'actreg-dispatch[files]'"
            ) from None
        self.path, self._folder = path, Path(path).resolve()
        link = _link_in(self._folder)
        if link is not None:
            raise FilesError(
                f"{name} {path} have a symbolic link, {link}, which is not followed; "
                f"put what it leads to in its place"
            )
        metadata = [self._folder / file for file in ("zarr.json", ".zarray")]
        known = [file for file in metadata if file.is_file()]
        if not known:
            raise FilesError(f"{name} {path} are a folder without a Zarr array; name the array's")
        self._metadata = known[0]
        try:
            # A chunk that holds nothing but the fill value is written like any other.
            # That setting is the process's: of two threads, the later would restore the other's.
            with _OPENING, zarr.config.set({"array.write_empty_chunks": True}):
                self._array: Any = zarr.open_array(self._folder, mode="r+" if writes else "r")
            self.shape = tuple(self._array.shape)
            self._stored = np.dtype(self._array.dtype)
            self._unit = tuple((writes and self._array.shards) or self._array.chunks)
        except Exception as error:  # whatever the parser makes of arbitrary metadata
            reason = str(error).partition("\n")[0]
            raise FilesError(f"{name} {path} cannot be read as a Zarr array: {reason}") from None
        self.dtype = _element(name, path, self._stored, dtype, weighs)

    def regions(self, block_bytes: int) -> Sequence[Region]:
        steps = list(self._unit)
        room = block_bytes // max(1, math.prod(steps) * self.dtype.itemsize)  # in units
        for axis in reversed(range(len(steps))):
            units = -(-self.shape[axis] // steps[axis])
            steps[axis] *= max(1, min(units, room))
            room //= max(1, units)
        return list(_grid(self.shape, steps))

    def read(self, region: Region) -> Array:
        values = np.asarray(self._array[region], order="C")
        return _native(values.view(self.dtype))

    def load(self, region: Region) -> Array:
        values = self.read(region)
        return values if values.flags.writeable else values.copy()

    def whole(self) -> Array:
        return self.load(tuple(slice(0, length) for length in self.shape))

    def write(self, region: Region, values: Array) -> None:
        self._array[region] = values.astype(self.dtype, copy=False).view(self._stored)
        places = itertools.product(
            *(
                range(part.start // unit, -(-part.stop // unit))
                for part, unit in zip(region, self._unit, strict=True)
            )
        )
        files = {self._folder / self._array.metadata.encode_chunk_key(place) for place in places}
        for path in files | {file.parent for file in files}:
            sync_path(path)

    def identity(self, *, content: bool) -> dict[str, Any]:
        found = self._metadata.stat()
        return {"inode": found.st_ino, "modified": found.st_mtime_ns}

    def close(self) -> None:
        pass


def _link_in(folder: Path) -> str | None:
    """Return a symbolic link anywhere in a folder, which could lead out of it; None if none is."""
    folders = [os.fspath(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    return entry.path
                if entry.is_dir():
                    folders.append(entry.path)
    return None


def _grid(shape: Sequence[int], steps: Sequence[int]) -> Iterator[Region]:
    """Yield the cells of a grid over ``shape``, the last axis first; those at the edges are cut."""
    cuts = [
        [slice(start, min(start + step, length)) for start in range(0, length, step)]
        for length, step in zip(shape, steps, strict=True)
    ]
    return itertools.product(*cuts)


def read_fully(file: Any, place: int, size: int) -> Array:
    """Return ``size`` bytes of an unbuffered file from ``place`` on."""
    values = np.empty(size, np.uint8)
    done = 0
    while done < size:
        file.seek(place + done)
        got = file.readinto(values.data[done:])
        if not got:
            raise OSError(f"{file.name} became shorter while it was read")
        done += got
    return values


def write_fully(file: Any, place: int, values: Any) -> None:
    """Write bytes to an unbuffered file from ``place`` on."""
    rest = memoryview(values)
    while rest:
        file.seek(place)
        done = file.write(rest)
        place, rest = place + done, rest[done:]


def sync(number: int) -> None:
    """Return once all that was written to an open file is on disk."""
    getattr(os, "fdatasync", os.fsync)(number)  # which leaves the time of change behind


def sync_path(path: Path) -> None:
    """Return once a file, or which files are in a folder, is on disk, where the system can tell."""
    if os.name == "nt":  # which neither opens folders nor syncs what is open for reading
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of folders on some file systems
            raise
    finally:
        os.close(number)
