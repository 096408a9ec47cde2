"""Activations and gradients in files larger than memory: .npy files and Zarr arrays.

Files are walked block by block, and the results are, bit for bit, those of the same arrays in
memory: the penalty of :meth:`ActivityRegularization.penalty`, and in the file of gradients what
:meth:`ActivityRegularization.apply` makes of them. ``actreg penalty`` and ``actreg apply`` are this
on the command line.

**Memory.** Besides what Python and the libraries take, 256 MiB of address space: where a file is
only read, a window of :data:`WINDOW_BYTES` into the system's page cache, which is not memory of the
process; where gradients are updated, blocks of :data:`BLOCK_BYTES` (64 MiB), one of activations and
one of gradients, each twice if they are of foreign byte order or not aligned. The backend
``"numpy"`` makes temporaries of up to ten blocks more. Weights of the full shape take a block of
their own, of as many elements; those that are broadcast are kept as a whole. Of a Zarr array a
block is as many chunks as fit, but at least one (of the gradients one shard, if there are any, as
that is what can be written), and Zarr takes some of their size again to decode them.

**Passes.** Activations are read once; for :func:`apply` twice by norms whose gradient needs the
sums, as that of ``"l2"`` divides by ‖x‖. One more pass, an exact sum, is needed where the quick sum
leaves the rounding open, which is rare. Weights of the full shape are read as often as the
activations. They are read once more, alone and ahead, by :func:`apply` for norms of one pass, so
that bad ones are found before anything is written, and wherever ``reduction`` divides λ by what a
mask keeps, which has to be counted.

**Interruption.** Until the first gradient is written, the files are untouched. From then on the
old values of the block under way are kept in a journal next to the gradients,
``GRADIENTS.actreg-journal``, which takes the room of two blocks and is on disk before the block is
overwritten. Whatever stops the run (Ctrl-C, ``kill -9``, a full disk, a power failure), the journal
stays, and :func:`apply` with ``resume=True`` and the same arguments goes on, to the same bits.
Without ``resume`` it refuses. Do not touch the files in between.

The rest is beyond this module: a file that another program cuts short while it is mapped ends the
process, as it does with every mapping (what was written stays resumable); a journal does not know
that gradients were overwritten by hand; and one file of several hard links is to be resumed by the
name that it was begun with.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from actreg_dispatch.dispatch import checked_weights, resolve
from actreg_dispatch.dtypes import compute_dtype
from actreg_dispatch.files.checks import (
    about_update,
    check_options,
    check_pair,
    check_two,
    elements_of,
    open_activations,
    path_of,
)
from actreg_dispatch.files.journal import Journal, Updates, journal_of, left_behind
from actreg_dispatch.files.stores import Array, FilesError, Region, Store, open_store
from actreg_dispatch.files.weights import Weights
from actreg_dispatch.options import Options, constants_of
from actreg_dispatch.registry import NUMPY
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.sums.certified import Outcome, merge_totals, round_if_certain
from actreg_dispatch.sums.exact import outcome_of

__all__ = [
    "BLOCK_BYTES",
    "WINDOW_BYTES",
    "FilesError",
    "PartlyUpdatedError",
    "Result",
    "apply",
    "journal_of",
    "penalty",
]

BLOCK_BYTES = 64 << 20
"""Bytes of an array that are updated, or copied, at a time."""

WINDOW_BYTES = 256 << 20
"""Bytes of a file that are mapped at a time where it is only read."""

Progress = Callable[[str, int, int], None]
"""Called after every block with what is being done, and bytes of the arrays done and in all."""


class PartlyUpdatedError(RuntimeError):
    """The update failed on the way; the journal is there to go on from."""


@dataclass(frozen=True)
class Result:
    """What a run found, and what it took.

    The penalty is in the compute dtype T; dtype, shape and elements are those of the activations.
    """

    penalty: Any
    dtype: str
    shape: tuple[int, ...]
    elements: int
    backend: str  # the name of the backend that computed
    passes: int  # how often activations were read, in this run
    bytes: int  # of the arrays read and written in this run, the journal apart
    seconds: float  # wall-clock time of this run


def penalty(
    reg: ActivityRegularization,
    activations: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Return the penalty of the activations in a file, which is only read.

    Parameters
    ----------
    reg : ActivityRegularization
        The norm, λ, and the rest.
    activations : path
        A .npy file, in C or Fortran order, or the folder of a Zarr array; float16, float32 or
        float64 in any byte order, or bfloat16.
    weights : path, optional
        As for :meth:`ActivityRegularization.penalty`, in a file. Of the full shape, they are of the
        same format and order; chunked in any way. Others are read as a whole.
    dtype : {"bfloat16"}, optional
        What the elements are if the file does not name it: NumPy stores bfloat16 as ``V2``.
    progress : callable, optional
        Called after every block with what is being done, and how many bytes of the arrays are done
        and to be done. What it raises stops the run.

    Returns
    -------
    Result

    Raises
    ------
    FilesError, OSError
        If a file is not such an array, or cannot be read; or weights are negative or not finite.
    TypeError, ValueError, BackendError
        As for :meth:`ActivityRegularization.penalty`, or if an argument is of the wrong type.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from actreg_dispatch import ActivityRegularization
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "activations.npy")
    ...     np.save(path, np.array([1.0, -3.0]))
    ...     float(penalty(ActivityRegularization.l1(0.5), path).penalty)
    2.0
    """
    check_options(reg)
    with contextlib.ExitStack() as opened:
        x, w = open_activations(opened, activations, weights, dtype)
        run = _Run(reg.options, x, w, 1.0, progress)
        return run.result(run.sum())


def apply(
    reg: ActivityRegularization,
    activations: str | os.PathLike[str],
    gradients: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    weights: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Add the gradient of the penalty to the gradients in a file, in place.

    Parameters
    ----------
    reg, activations, weights, dtype, progress
        As for :func:`penalty`.
    gradients : path
        A file of the same format, shape, dtype and order, chunked in any way. A journal lies next
        to it while it is updated (see the module).
    scale : float, default 1.0
        Multiplies λ for the gradient alone.
    resume : bool, default False
        Whether to go on with an update that was interrupted; all else must be as it was.

    Returns
    -------
    Result

    Raises
    ------
    FilesError, TypeError, ValueError, BackendError
        If the arguments do not fit or the journal cannot be written, before anything else is.
    OSError
        If a file cannot be opened or read, before anything is written.
    PartlyUpdatedError
        If something failed later on. Mend it, and call again with ``resume=True``.
    """
    check_options(reg)
    path = path_of("gradients", gradients)
    with contextlib.ExitStack() as opened:
        x, w = open_activations(opened, activations, weights, dtype)
        g = open_store("gradients", path, dtype, writes=True)
        opened.callback(g.close)
        return _apply(reg.options, x, w, g, scale, resume, progress)


def _apply(
    options: Options,
    x: Store,
    w: Store | None,
    g: Store,
    scale: float,
    resume: bool,
    progress: Progress | None,
) -> Result:
    check_pair(x, g)
    if w is not None:
        check_two("weights", w, g)
    path, journal = journal_of(g.path), None
    if resume:
        journal = Journal.open(path)
    elif os.path.lexists(path):
        raise FilesError(left_behind(path))
    try:
        block_bytes = BLOCK_BYTES if journal is None else journal.about["block bytes"]
        regions = g.regions(block_bytes)
        run = _Run(options, x, w, scale, progress)
        about = about_update(options, x, w, g, scale, block_bytes, regions)
        if journal is not None:
            journal.check_same(about, g, regions)
        found = run.sum() if options.norm.two_pass or not regions else None
        if found is not None and not (regions and found.has_gradient):
            return run.result(found)
        if found is None:
            run.check_weights()
        if journal is None:
            journal = Journal.create(path, about)
        try:
            updates = Updates(g, journal, regions)
            if found is None:
                found = run.sum(updates)
            else:
                run.update(updates, found.coefficients)
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise PartlyUpdatedError(
                f"{reason}; {g.path} are updated in part: mend that, then go on by the same "
                f"command and --resume (resume=True)"
            ) from error
        journal.remove()
        return run.result(found)
    finally:
        if journal is not None:
            journal.close()


class _Run:
    """One regularization, one file of activations, and what has been done so far."""

    def __init__(
        self,
        options: Options,
        store: Store,
        weights: Store | None,
        scale: float,
        progress: Progress | None,
    ) -> None:
        if progress is not None and not callable(progress):
            raise TypeError(
                f"progress={progress!r} cannot be called; pass a function of a step, of the bytes "
                f"that are done, and of all bytes"
            )
        self._started = time.perf_counter()
        self._store, self._progress = store, progress
        self._size = math.prod(store.shape)
        self._nothing = np.empty(0, store.dtype.newbyteorder("="))
        self._compute: Any = compute_dtype(self._nothing.dtype)
        self._norm = options.norm
        self._backend, self._constants = resolve(options, self._nothing.dtype, store.shape, scale)
        self._passes = self._bytes = 0
        self._quick_start = self._backend.quick_sum(self._nothing, options.norm)
        self._weights: Weights | None = None
        if weights is None:
            return
        like = np.empty(0, weights.dtype.newbyteorder("="))
        checked_weights(options, self._nothing, like, NUMPY)
        self._weights = found = Weights(weights, store)
        if not found.is_full:
            self._bytes = math.prod(weights.shape) * like.itemsize
        if found.is_mask and options.reduction != "sum":
            count = found.kept(options.reduction, self._walked_weights(found))
            self._constants = constants_of(options, self._nothing.dtype, count, scale)

    def check_weights(self) -> None:
        """Refuse bad weights, if there are any, before the pass that writes."""
        weights = self._weights
        if weights is not None and weights.is_full and not weights.is_mask:
            for box, values in self._walked_weights(weights):
                weights.refuse_bad(box, values)

    def _walked_weights(self, weights: Weights) -> Iterator[tuple[Region, Array]]:
        """Yield each box of weights of the full shape, which are read alone."""
        done, whole = 0, weights.bytes_of(self._size)
        for region in self._store.regions(BLOCK_BYTES):
            for _, box, values in weights.pieces(region):
                yield box, values
            size = weights.bytes_of(elements_of(region))
            self._bytes += size
            done += size
            if self._progress is not None:
                self._progress("weights", done, whole)

    def sum(self, updates: Updates | None = None) -> Outcome:
        """Sum the activations, and update the gradients of a norm of one pass on the way."""
        backend, norm, constants = self._backend, self._norm, self._constants
        step = "sum" if updates is None else "update"
        totals: list[Any] = []

        def quickly(x: Any, g: Any, *weights: Any) -> None:
            totals.append(backend.quick_sum(x, norm, g, constants, *weights))

        def exactly(x: Any, g: Any, *weights: Any) -> None:
            totals.append(backend.partial_sum(x, norm, *weights))
            if g is not None:
                backend.add_gradient(x, g, norm, constants, (), *weights)

        if self._quick_start is not None:
            self._visit(step, quickly, updates)
            total = reduce(merge_totals, totals or [self._quick_start])
            found = round_if_certain(total, self._size, self._compute, norm, constants)
            if found is not None:
                return found
            totals.clear()
            step, updates = "exact sum", None
        self._visit(step, exactly, updates)
        exact = sum(totals, backend.partial_sum(self._nothing, norm))
        return outcome_of(exact, norm, constants)

    def update(self, updates: Updates, coefficients: tuple[float, ...]) -> None:
        """Add the gradient, whose coefficients are known."""

        def add(x: Any, g: Any, *weights: Any) -> None:
            if g is not None:
                given = x, g, self._norm, self._constants, coefficients, *weights
                self._backend.add_gradient(*given)

        self._visit("update", add, updates)

    def result(self, found: Outcome) -> Result:
        """Return what was found, once all is done."""
        return Result(
            self._compute.type(found.penalty),
            self._store.dtype.type.__name__,  # NumPy takes 30 µs to find the dtype's own name
            self._store.shape,
            self._size,
            self._backend.name,
            self._passes,
            self._bytes,
            time.perf_counter() - self._started,
        )

    def _visit(self, step: str, visit: Callable[..., None], updates: Updates | None = None) -> None:
        """Call ``visit`` with every block of the activations, and of the gradients if any.

        With weights, it is called with every piece of every block, and its weights.
        """
        self._passes += 1
        # Never copied, and without weights, which would take a window of their own.
        mapped = self._store.mapped and self._quick_start is not None and self._weights is None
        if updates is None:
            regions = self._store.regions(WINDOW_BYTES if mapped else BLOCK_BYTES)
        else:
            regions = updates.regions
        itemsize, times = self._store.dtype.itemsize, 1 if updates is None else 3
        done = 0
        for index, region in enumerate(regions):
            x = self._store.read(region)
            g = None if updates is None else updates.load(index, region)
            if self._weights is None:
                visit(x, g)
            else:
                self._visit_pieces(visit, region, x, g)
                self._bytes += self._weights.bytes_of(elements_of(region))
            del x  # before the next window is mapped
            size = elements_of(region) * itemsize
            if updates is not None and g is not None:
                updates.write(region, g)
                self._bytes += 2 * size
            del g
            self._bytes += size
            done += size * times
            if self._progress is not None:
                self._progress(step, done, self._size * itemsize * times)

    def _visit_pieces(self, visit: Callable[..., None], region: Region, x: Any, g: Any) -> None:
        """Call ``visit`` with the pieces of a block that have weights of one box."""
        assert self._weights is not None
        for part, box, weights in self._weights.pieces(region):
            pieces = [a if a is None else a[part].reshape(weights.shape) for a in (x, g)]
            try:
                visit(*pieces, weights)
            except ValueError:
                self._weights.refuse_bad(box, weights)  # which names the file and the place in it
                raise
