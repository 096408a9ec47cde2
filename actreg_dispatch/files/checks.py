"""What is checked of files and options before anything is written, and what a journal is told."""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actreg_dispatch.files.stores import FilesError, Region, Store, check_layout, open_store
from actreg_dispatch.norms import ActivityNorm, Norm
from actreg_dispatch.options import Options
from actreg_dispatch.regularization import check_regularization

__all__ = [
    "about_update",
    "check_options",
    "check_pair",
    "check_two",
    "elements_of",
    "open_activations",
    "path_of",
]


def open_activations(
    opened: contextlib.ExitStack, activations: Any, weights: Any, dtype: str | None
) -> tuple[Store, Store | None]:
    """Return the activations, and the weights, if there are any, to be closed with ``opened``."""
    paths = (
        path_of("activations", activations),
        None if weights is None else path_of("weights", weights),
    )
    x, w = open_store("activations", paths[0], dtype), None
    opened.callback(x.close)
    if paths[1] is not None:
        w = open_store("weights", paths[1], dtype, weighs=True)
        opened.callback(w.close)
    return x, w


def check_options(reg: Any) -> None:
    """Refuse what is no regularization, or one of rows, which blocks may cut."""
    check_regularization(reg)
    if reg.axis is not None:
        raise ValueError(
            f"reg={reg!r} is a norm of rows, but a file is read in blocks that may cut them; map "
            f"the file with numpy.load(path, mmap_mode='r'), or use Dask"
        )


def path_of(name: str, value: Any) -> str:
    """Return ``value`` as the path of a file, which errors call ``name``."""
    try:
        path = os.fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str):
        raise TypeError(
            f"{name} are a {type(value).__name__}; pass the path of a .npy file or a Zarr store"
        )
    return str.__str__(path)  # of a subclass the characters, whatever it is printed as


def check_pair(x: Store, g: Store) -> None:
    """Refuse two files that do not belong together."""
    check_two("activations", x, g)
    if x.dtype.newbyteorder("=") != g.dtype.newbyteorder("="):
        raise FilesError(
            f"gradients {g.path} have dtype {g.dtype} but activations {x.dtype}; "
            f"give both one dtype"
        )
    if x.shape != g.shape:
        raise FilesError(
            f"gradients {g.path} have shape {g.shape} but activations {x.shape}; "
            f"shapes must be equal, nothing is broadcast"
        )
    check_layout("gradients", g, x)


def check_two(name: str, read: Store, g: Store) -> None:
    """Refuse gradients in the file of something that is read."""
    if Path(read.path).samefile(g.path):
        raise FilesError(
            f"{name} {read.path} and gradients {g.path} are one file; the update would change "
            f"its own input: pass a copy of one of them"
        )


def _defined(norm: Norm) -> str:
    """Return the name of a norm, and a checksum of one whose formulas may be edited."""
    if norm.name in set(ActivityNorm):
        return norm.name
    return f"{norm.name} {zlib.crc32(norm.source.encode()):08x}"


def about_update(
    options: Options,
    x: Store,
    w: Store | None,
    g: Store,
    scale: float,
    block_bytes: int,
    regions: Sequence[Region],
) -> dict[str, Any]:
    """Return what is applied to what, for the journal."""
    largest = max((elements_of(region) for region in regions), default=0)
    return {
        "norm": _defined(options.norm),
        "lam": repr(options.lam if options.norm.n_lams > 1 else options.lam[0]),
        "epsilon": repr(options.epsilon),
        "reduction": repr(options.reduction),
        "scale": repr(float(scale)),
        "dtype": str(x.dtype),
        "shape": list(x.shape),
        "activations": x.identity(content=True),
        "weights": None if w is None else w.identity(content=True),
        "gradients": g.identity(content=False),
        "block bytes": block_bytes,
        "slot bytes": largest * g.dtype.itemsize,
    }


def elements_of(region: Region) -> int:
    """Return the number of elements of a region."""
    return math.prod(part.stop - part.start for part in region)
