"""Weights in a file, read along with the blocks of the activations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from actreg_dispatch.files.stores import Array, FilesError, Region, Store, check_layout
from actreg_dispatch.options import Reduction, divided_axes
from actreg_dispatch.weights import first_bad, kept_of

__all__ = ["Weights"]


class Weights:
    """What weighs the activations in a store, block by block.

    Weights of the full shape are read by the regions of the activations, so they must be stored as
    these are. Others are read once, as a whole, and broadcast without being expanded.

    A block of a .npy file is a range of what is stored, be it half a row and the start of the next.
    So it is taken in *pieces*, each of which is a *box* of the array, as are its weights. Axes are
    in the order of storage: in Fortran order from the last to the first.

    Attributes
    ----------
    is_mask : bool
        Whether they are of bool.
    is_full : bool
        Whether they are of the full shape, and not yet read.
    """

    def __init__(self, store: Store, activations: Store) -> None:
        shape = activations.shape
        try:
            fits = np.broadcast_shapes(store.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise FilesError(
                f"weights {store.path} have shape {store.shape}, which does not broadcast to "
                f"{shape}, that of activations; give an axis that all of them share the length 1"
            )
        self.is_mask, self.is_full = store.dtype.kind == "b", store.shape == shape
        self._store, self._backwards = store, activations.order == "F"
        self._in_ranges = activations.format == ".npy file"
        self._shape = shape[::-1] if self._backwards else shape
        if self._in_ranges and not shape:
            self._shape = (1,)
        if self.is_full:
            check_layout("weights", store, activations)
            self._values: Any = None
        else:
            values = np.broadcast_to(store.whole(), shape)
            self._values = values.T if self._backwards else values
            self.refuse_bad((slice(0, 0),) * len(shape), self._values)

    def pieces(self, region: Region) -> Iterator[tuple[Any, Region, Array]]:
        """Yield which parts of a block, as it is read, are which boxes, and their weights."""
        block = self._store.read(region) if self.is_full else None
        if not self._in_ranges:
            yield ..., region, self._values[(*region, ...)] if block is None else block
            return
        start = region[0].start
        for span, box in _boxes(self._shape, start, region[0].stop):
            part = slice(span.start - start, span.stop - start)
            lengths = [each.stop - each.start for each in box]
            yield part, box, self._values[box] if block is None else block[part].reshape(lengths)

    def bytes_of(self, elements: int) -> int:
        """Return how many bytes are read of them for a block of so many elements."""
        return elements * self._store.dtype.itemsize if self.is_full else 0

    def kept(self, reduction: Reduction, pieces: Iterable[tuple[Region, Array]]) -> int:
        """Return what λ is divided by, as a mask keeps it; ``pieces`` are all if it is full."""
        if not self.is_full:
            return kept_of(reduction, self._values.T if self._backwards else self._values)
        ndim = len(self._shape)
        axes = divided_axes(reduction, ndim)
        if self._backwards:
            axes = tuple(ndim - 1 - axis for axis in axes)
        if len(axes) == ndim:  # rather than to remember each element
            return max(1, sum(int(np.count_nonzero(mask)) for _, mask in pieces))
        counted = sorted(axes)
        others = tuple(axis for axis in range(ndim) if axis not in counted)
        kept = np.zeros([self._shape[axis] for axis in counted], bool)
        for box, mask in pieces:
            kept[tuple(box[axis] for axis in counted)] |= mask.any(axis=others)
        return max(1, int(np.count_nonzero(kept)))

    def refuse_bad(self, box: Region, values: Array) -> None:
        """Refuse weights that are negative or not finite.

        Raises
        ------
        FilesError
            If there is one; the message says where in the file.
        """
        place = first_bad(values)
        if place is not None:
            at = [here + each.start for here, each in zip(place, box, strict=True)]
            at = (at[::-1] if self._backwards else at)[len(at) - len(self._store.shape) :]
            raise FilesError(
                f"weights {self._store.path} have {values[place]} at {tuple(at)}, but must be "
                f"finite and >= 0; use 0 to leave an element out"
            )


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[slice, Region]]:
    """Yield the boxes of an array in C order that a range of it consists of, and their ranges.

    There are fewer than two for each axis: of whole rows, and of what is left of the first and last
    ones.
    """
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    while start < stop:
        axis = next(k for k, n in enumerate(steps) if start % n == 0 and n <= stop - start)
        first = [start // step % length for step, length in zip(steps, shape, strict=True)]
        count = min(shape[axis] - first[axis], (stop - start) // steps[axis])
        box = [slice(at, at + 1) for at in first[:axis]]
        box.append(slice(first[axis], first[axis] + count))
        box += [slice(0, length) for length in shape[axis + 1 :]]
        end = start + count * steps[axis]
        yield slice(start, end), tuple(box)
        start = end
