"""The CUDA backend: CuPy kernels that read the activations once and never make the host wait.

A norm of one pass takes two launches. The first sums and updates the gradients: the sums are exact,
so the bits depend neither on the order of the additions nor on the size of the grid, and there is
nothing to certify or repeat. The second rounds them and evaluates the penalty. A norm of two passes
needs its coefficients before the gradient, so its first launch only sums, and a third updates. The
layers of a model take as many launches together as one array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.backends.cuda.kernels import (
    COUNTERS,
    THREADS,
    WORD_BITS,
    blocks_for,
    columns_of,
    kernels_of,
)
from actreg_dispatch.dtypes import COMPUTE_DTYPES, FLOAT16, FLOAT32, FLOAT64, NATIVE_DTYPES
from actreg_dispatch.layout import collapse
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.sums.exact import PartialSum, Total, total_of

__all__ = ["BACKEND", "CudaBackend"]

_HAS_BFLOAT16 = int(cupy.__version__.partition(".")[0]) >= 14


class CudaBackend(Backend):
    """CuPy arrays, on whichever device they are."""

    name = "cupy"
    dtypes = NATIVE_DTYPES if _HAS_BFLOAT16 else {FLOAT16, FLOAT32, FLOAT64}

    def __init__(self) -> None:
        try:
            count = cupy.cuda.runtime.getDeviceCount()
            reason = "" if count else "finds no CUDA device"
        except Exception as error:  # whatever a broken driver raises
            reason = f"no CUDA device answers: {error}"
        if reason:
            self.unavailable_because = f"CuPy {cupy.__version__} is installed but {reason}"

    def partial_sum(self, activations: cupy.ndarray, norm: Norm) -> Total:
        """Return the sum, or both, that the norm takes, exactly; waits for the device."""
        dtype = COMPUTE_DTYPES[activations.dtype]
        with activations.device:
            words = _words(norm)
            launch(kernels_of(norm).sum, words, arrays=(activations,))
            rows = words.get().reshape(-1, COUNTERS).tolist()
        return total_of(
            [_partial_sum(row, degree, dtype) for row, degree in zip(rows, norm.terms, strict=True)]
        )

    def penalty(self, activations: cupy.ndarray, norm: Norm, constants: Constants) -> cupy.ndarray:
        """Return the penalty, a 0-d array on the device of ``activations``."""
        kernels, numbers = kernels_of(norm), _flat(constants)
        with activations.device:
            words, results = _words(norm), _results(norm, activations.dtype)
            launch(kernels.sum, words, arrays=(activations,))
            kernels.finish(words, words, *numbers, *results)
            return results[0]

    def apply(
        self,
        activations: cupy.ndarray,
        gradients: cupy.ndarray,
        norm: Norm,
        constants: Constants,
    ) -> cupy.ndarray:
        """Add the gradient to ``gradients`` in place and return the penalty, a 0-d array."""
        kernels, both, lam = kernels_of(norm), (activations, gradients), constants.gradient_lam
        with activations.device:
            words, results = _words(norm), _results(norm, activations.dtype)  # before any update
            if norm.two_pass:
                launch(kernels.sum, words, arrays=(activations,))
            else:
                launch(kernels.apply, *lam, words, arrays=both)
            kernels.finish(words, words, *_flat(constants), *results)
            if norm.two_pass:
                launch(kernels.update, *lam, *results[1:], arrays=both)
            return results[0]

    def add_gradient(
        self,
        activations: cupy.ndarray,
        gradients: cupy.ndarray,
        norm: Norm,
        constants: Constants,
        coefficients: tuple[float, ...],
    ) -> None:
        """Add the gradient to ``gradients`` in place."""
        compute = COMPUTE_DTYPES[activations.dtype]
        with activations.device:
            # Of T already: CuPy's kernel would flush what a conversion makes subnormal.
            known = [cupy.full((), compute.type(value), compute) for value in coefficients]
            known += [cupy.ones((), bool)] * norm.two_pass  # that there is a gradient
            lam, both = constants.gradient_lam, (activations, gradients)
            launch(kernels_of(norm).update, *lam, *known, arrays=both)

    def apply_batch(
        self,
        activations: Sequence[cupy.ndarray],
        gradients: Sequence[cupy.ndarray],
        norm: Norm,
        constants: Sequence[Constants],
    ) -> list[cupy.ndarray] | None:
        """Do :meth:`apply` for many layers in as many launches as for one, or None.

        What is done is contiguous, of one dtype and on one device.
        """
        first, layers = activations[0], len(activations)
        for array in (*activations, *gradients):
            plain = array.flags.c_contiguous and array.dtype == first.dtype
            if not plain or array.device != first.device:
                return None
        kernels = kernels_of(norm)
        table = np.zeros((layers, len(columns_of(norm))), np.int64)
        blocks = np.array([blocks_for(x.size) for x in activations])
        table[:, 0] = [x.data.ptr for x in activations]
        table[:, 1] = [g.data.ptr for g in gradients]
        table[:, 2] = [x.size for x in activations]
        table[:, 3], table[:, 4] = np.cumsum(blocks) - blocks, blocks
        table.view(np.float64)[:, 5:] = [_flat(each)[:-1] for each in constants]
        size = int(blocks.sum()) * THREADS
        with first.device:
            words, results = _words(norm, layers), _results(norm, first.dtype, layers)
            there = cupy.asarray(table)
            if size:
                launch_options = {"size": size, "block_size": THREADS}
                total = kernels.batch_sum or kernels.batch_apply
                total(there, layers, first, words, **launch_options)
            rows = words.reshape(layers, -1).T  # raw arrays bar CuPy from moving the axis itself
            kernels.batch_finish(rows, words, there, constants[0].epsilon, *results, axis=0)
            if size and norm.two_pass:
                kernels.batch_update(there, layers, first, *results[1:], words, **launch_options)
            return list(results[0])


def launch(kernel: cupy.ElementwiseKernel, *options: Any, arrays: tuple[cupy.ndarray, ...]) -> None:
    """Launch a pass over all elements of the activations, and the gradients if there are any."""
    count = arrays[0].size
    if count:
        step = blocks_for(count) * THREADS
        x, *gradients = collapse(*arrays)
        kernel(x, count, step, *options, *gradients, size=step, block_size=THREADS)


def _flat(constants: Constants) -> tuple[float, ...]:
    """Return λ of the penalty, of the gradient, and epsilon."""
    return *constants.lam, *constants.gradient_lam, constants.epsilon


def _words(norm: Norm, layers: int = 1) -> cupy.ndarray:
    """Return empty superaccumulators, as many as there are sums."""
    return cupy.zeros(layers * len(norm.terms) * COUNTERS, np.int64)


def _results(norm: Norm, dtype: np.dtype[Any], layers: int | None = None) -> list[cupy.ndarray]:
    """Return room for the penalty and, of two passes, what the second needs to know of the sums.

    That is the coefficients, and whether there is a gradient.
    """
    shape, compute = () if layers is None else (layers,), COMPUTE_DTYPES[dtype]
    dtypes = [compute] * (1 + norm.n_coefficients) + [np.dtype(bool)] * norm.two_pass
    return [cupy.empty(shape, each) for each in dtypes]


def _partial_sum(row: list[int], degree: int, dtype: np.dtype[Any]) -> PartialSum:
    """Return what the words of a superaccumulator, and its two counters, stand for."""
    *words, infinities, nans = row
    special = float("nan") if nans else float("inf") if infinities else 0.0
    units = sum(word << WORD_BITS * k for k, word in enumerate(words))
    return PartialSum(degree, dtype, units >> 1074 * (2 - degree), special)


BACKEND = CudaBackend()
