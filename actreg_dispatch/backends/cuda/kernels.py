"""The CUDA kernels of a norm, made of its formulas when it is first used, and the grid they run on.

There are three of most: for one array, for one with weights, and for the layers of a model, which a
table on the device describes. The last differ in where arrays, λ and sums are found, and in nothing
else.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import cupy

from actreg_dispatch.backends.cuda.passes import pass_kernel
from actreg_dispatch.backends.cuda.results import certifying_kernel, finish_kernel
from actreg_dispatch.backends.cuda.source import THREADS
from actreg_dispatch.layout import collapse
from actreg_dispatch.norms import Norm

__all__ = [
    "FEW_BLOCKS",
    "MAX_BLOCKS",
    "Kernels",
    "blocks_for",
    "differ_by_vectors",
    "grid",
    "kernels_of",
    "launch",
    "variant",
]

FEW_BLOCKS, MAX_BLOCKS = 128, 1024
_FEW_ELEMENTS, _ELEMENTS = 16, 64  # of a thread


class Kernels(NamedTuple):
    """The kernels of a norm for one array, or for a batch; None where it takes no such one.

    A pass has the name of what it does. ``_certified`` sums within a bound, for the certificate to
    judge; ``_vectors`` takes contiguous arrays without weights, 16 bytes at a time.
    """

    sum: Any
    sum_certified: Any
    sum_certified_vectors: Any
    apply: Any  # sums and updates; None of a norm of two passes
    apply_certified: Any
    apply_certified_vectors: Any
    update: Any  # None of a batch of a norm of one pass
    update_vectors: Any
    certify: Any
    finish: Any


@functools.cache
def kernels_of(norm: Norm, *, batch: bool = False, weighted: bool = False) -> Kernels:
    """Return the kernels of a norm, which CuPy compiles at their first launch for a dtype."""
    together = norm if batch else None

    def kernel(what: str, kind: str, terms: tuple[int, ...], updated: Norm | None) -> Any:
        if weighted and "vectors" in kind:
            return None
        return pass_kernel(what, kind, terms, updated, together, weighted=weighted)

    def total(kind: str = "") -> Any:
        return kernel("sum", kind, norm.terms, None)

    def apply(kind: str = "") -> Any:
        return None if norm.two_pass else kernel("apply", kind, norm.terms, norm)

    def update(kind: str = "") -> Any:
        never = batch and not norm.two_pass
        return None if never else kernel("update", kind, (), norm)

    return Kernels(
        sum=total(),
        sum_certified=total("certified"),
        sum_certified_vectors=total("certified_vectors"),
        apply=apply(),
        apply_certified=apply("certified"),
        apply_certified_vectors=apply("certified_vectors"),
        update=update(),
        update_vectors=update("vectors"),
        certify=certifying_kernel(norm, batch, weighted),
        finish=finish_kernel(norm, batch, weighted),
    )


def blocks_for(size: int) -> int:
    """Return the size of the grid, which depends on the number of elements alone.

    A few blocks keep a GPU busy, so small arrays are spread over those; larger ones give each
    thread so much to do that what is done once a block costs little.
    """
    spread = min(FEW_BLOCKS, -(-size // (THREADS * _FEW_ELEMENTS)))
    return min(MAX_BLOCKS, max(spread, -(-size // (THREADS * _ELEMENTS))))


def launch(
    kernels: Any,
    name: str,
    *known: Any,
    arrays: Sequence[cupy.ndarray],
    weights: cupy.ndarray | None = None,
) -> None:
    """Launch a pass over all elements of the activations, and the gradients if there are any."""
    count = arrays[0].size
    if count:
        blocks = blocks_for(count)
        if weights is None:
            x, *gradients = collapse(*arrays)
            plain = all(
                each.ndim == 1 and each.strides[0] == each.itemsize for each in (x, *gradients)
            )
            kernel = variant(kernels, name, vectors=plain and differ_by_vectors(x, *gradients))
        else:
            weights, x, *gradients = collapse(weights, *arrays)
            kernel, known = getattr(kernels, name), (weights, *known)
        kernel(x, count, blocks * THREADS, *known, *gradients, **grid(blocks))


def differ_by_vectors(x: cupy.ndarray, g: cupy.ndarray | None = None) -> bool:
    """Return whether the addresses of two arrays differ by a multiple of what is loaded at once."""
    return g is None or (x.data.ptr - g.data.ptr) % 16 == 0


def variant(kernels: Any, name: str, *, vectors: bool) -> Any:
    """Return a kernel, by vectors if it can and there is one that does."""
    kernel = getattr(kernels, name)
    return getattr(kernels, f"{name}_vectors", kernel) if vectors else kernel


def grid(blocks: int) -> dict[str, int]:
    """Return what tells CuPy the size of the grid."""
    return {"size": blocks * THREADS, "block_size": THREADS}
