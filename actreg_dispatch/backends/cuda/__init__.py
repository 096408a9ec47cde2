"""The CUDA backend: CuPy kernels that read the activations once and never make the host wait.

Sums are certified: a fast pass, which also updates the gradients of a norm of one pass, leaves sums
that are off by no more than a bound, and a second kernel evaluates the penalty if that is close
enough to tell it. Two more stand by: they sum exactly and round, or, nearly always, return at once.
So the bits depend neither on the order of the additions nor on the size of the grid. Small arrays
are summed exactly from the first, which saves two launches. A norm of two passes needs its
coefficients before the gradient, so its sums come first, and one more launch updates. The layers of
a model take as many launches together as one array.

With weights a call takes as many launches, of kernels of their own. Only the device can tell a
weight that is negative, infinite or NaN: it makes the sums NaN.

Statistics take one launch more, and stay on the device until somebody reads them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.backends.cuda import row_norms
from actreg_dispatch.backends.cuda.counting import Counter
from actreg_dispatch.backends.cuda.kernels import (
    blocks_for,
    differ_by_vectors,
    grid,
    kernels_of,
    launch,
    variant,
)
from actreg_dispatch.backends.cuda.source import columns_of, counters_of
from actreg_dispatch.dtypes import COMPUTE_DTYPES, FLOAT16, FLOAT32, FLOAT64, NATIVE_DTYPES
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.row_norms import RowNorm
from actreg_dispatch.statistics import ActivationStatistics
from actreg_dispatch.sums.exact import Total, sum_of_words, total_of

__all__ = ["BACKEND", "CudaBackend"]

CERTIFIED_FROM = 1 << 16
"""Elements from which on sums are certified; fewer are summed exactly, in two launches less."""
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

    def partial_sum(
        self, activations: cupy.ndarray, norm: Norm, weights: cupy.ndarray | None = None
    ) -> Total:
        """Return the sum, or both, that the norm takes, exactly; waits for the device."""
        dtype = COMPUTE_DTYPES[activations.dtype]
        kernels = kernels_of(norm, weighted=weights is not None)
        with activations.device:
            words = _words(norm, weighted=weights is not None)
            launch(kernels, "sum", words, arrays=(activations,), weights=weights)
            rows = words.get().reshape(len(norm.terms), -1)
        return total_of(
            [sum_of_words(row, degree, dtype) for row, degree in zip(rows, norm.terms, strict=True)]
        )

    def penalty(
        self,
        activations: cupy.ndarray,
        norm: Norm,
        constants: Constants,
        weights: cupy.ndarray | None = None,
        statistics: ActivationStatistics | None = None,
    ) -> cupy.ndarray:
        """Return the penalty, a 0-d array on the device of ``activations``."""
        counter = _counter_of(statistics, activations)
        results = self._summed(activations, None, norm, constants, weights)
        _count(counter, activations, weights)
        return results[0]

    def apply(
        self,
        activations: cupy.ndarray,
        gradients: cupy.ndarray,
        norm: Norm,
        constants: Constants,
        weights: cupy.ndarray | None = None,
        statistics: ActivationStatistics | None = None,
    ) -> cupy.ndarray:
        """Add the gradient to ``gradients`` in place and return the penalty, a 0-d array."""
        counter = _counter_of(statistics, activations)
        results = self._summed(activations, gradients, norm, constants, weights)
        if norm.two_pass:
            kernels, both = kernels_of(norm, weighted=weights is not None), (activations, gradients)
            with activations.device:
                known = *constants.gradient_lam, *results[1:]
                launch(kernels, "update", *known, arrays=both, weights=weights)
        _count(counter, activations, weights)
        return results[0]

    def _summed(
        self,
        x: cupy.ndarray,
        gradients: cupy.ndarray | None,
        norm: Norm,
        constants: Constants,
        weights: cupy.ndarray | None,
    ) -> list[cupy.ndarray]:
        """Return the results; update any gradients if the norm takes one pass."""
        kernels, numbers = kernels_of(norm, weighted=weights is not None), _flat(constants)
        lam: tuple[float, ...] = ()
        what, arrays = "sum", [x]
        if gradients is not None and not norm.two_pass:
            what, lam, arrays = "apply", constants.gradient_lam, [x, gradients]
        with x.device:
            words = _words(norm, weighted=weights is not None)
            results = _results(norm, x.dtype)  # before any update
            if x.size < CERTIFIED_FROM:
                launch(kernels, what, *lam, words, arrays=arrays, weights=weights)
            else:
                blocks = blocks_for(x.size)
                partials = _partials(norm, blocks)
                fast = f"{what}_certified"
                launch(kernels, fast, *lam, partials, arrays=arrays, weights=weights)
                kernels.certify(partials, blocks, x.size, *numbers, words, *results, **grid(1))
                launch(kernels, "sum", words, arrays=(x,), weights=weights)
            kernels.finish(words, words, *numbers, *results)
            return results

    def add_gradient(
        self,
        activations: cupy.ndarray,
        gradients: cupy.ndarray,
        norm: Norm,
        constants: Constants,
        coefficients: tuple[float, ...],
        weights: cupy.ndarray | None = None,
    ) -> None:
        """Add the gradient to ``gradients`` in place."""
        compute = COMPUTE_DTYPES[activations.dtype]
        with activations.device:
            # Of T already: CuPy's kernel would flush what a conversion makes subnormal.
            known = [cupy.full((), compute.type(value), compute) for value in coefficients]
            known += [cupy.ones((), bool)] * norm.two_pass  # that there is a gradient
            kernels, both = kernels_of(norm, weighted=weights is not None), (activations, gradients)
            launch(kernels, "update", *constants.gradient_lam, *known, arrays=both, weights=weights)

    def apply_to_rows(
        self,
        activations: cupy.ndarray,
        gradients: cupy.ndarray | None,
        norm: RowNorm,
        constants: Constants,
        weights: cupy.ndarray | None = None,
    ) -> cupy.ndarray:
        """Return the penalty of many rows, and add their gradient to any gradients."""
        with activations.device:
            return row_norms.apply_to_rows(activations, gradients, norm, constants, weights)

    def sum_of_rows(
        self, activations: cupy.ndarray, norm: RowNorm, weights: cupy.ndarray | None = None
    ) -> Total:
        """Return the exact sum of the sizes of many rows; waits for the device."""
        with activations.device:
            return row_norms.sum_of_rows(activations, norm, weights)

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
        kernels = kernels_of(norm, batch=True)
        table = np.zeros((layers, len(columns_of(norm))), np.int64)
        blocks = np.array([blocks_for(x.size) for x in activations])
        table[:, 0] = [x.data.ptr for x in activations]
        table[:, 1] = [g.data.ptr for g in gradients]
        table[:, 2] = [x.size for x in activations]
        table[:, 3], table[:, 4] = np.cumsum(blocks) - blocks, blocks
        table.view(np.float64)[:, 5:] = [_flat(each)[:-1] for each in constants]
        size, all_blocks = sum(x.size for x in activations), grid(int(blocks.sum()))
        vectors = all(
            differ_by_vectors(*both)
            for both in zip(activations, gradients, strict=True)
            if both[0].size
        )
        epsilon = constants[0].epsilon
        with first.device:
            words, results = _words(norm, layers), _results(norm, first.dtype, layers)
            there = cupy.asarray(table)

            def run(name: str, *known: Any) -> None:
                if size:
                    kernel = variant(kernels, name, vectors=vectors)
                    kernel(there, layers, first, *known, **all_blocks)

            what = "sum" if norm.two_pass else "apply"
            if size < CERTIFIED_FROM:
                run(what, words)
            else:
                partials = _partials(norm, int(blocks.sum()))
                run(f"{what}_certified", partials)
                kernels.certify(partials, there, epsilon, words, *results, **grid(layers))
                run("sum", words)
            rows = words.reshape(layers, -1).T  # raw arrays bar CuPy from moving the axis itself
            kernels.finish(rows, words, there, epsilon, *results, axis=0)
            if norm.two_pass:
                run("update", *results[1:], words)
            return list(results[0])


def _counter_of(statistics: ActivationStatistics | None, x: cupy.ndarray) -> Counter | None:
    """Return what counts on the device of x for the statistics, if there are any.

    There is one for each stream: what zeroes it comes before what it counts.

    Raises
    ------
    ValueError
        If the call is being captured.
    """
    if statistics is None:
        return None
    units = x.shape[-1] if statistics.per_feature else None
    with x.device:
        stream = cupy.cuda.get_current_stream()
        if stream.is_capturing():
            raise ValueError(
                "statistics cannot be counted in a CUDA graph, which may outlive them; capture the "
                "call without statistics"
            )
        place = x.device.id, stream.ptr, threading.get_ident()  # of the stream per thread
        return statistics.counter(place, lambda: Counter(units))


def _count(counter: Counter | None, x: cupy.ndarray, weights: cupy.ndarray | None) -> None:
    """Count, after everything that a call writes."""
    if counter is not None:
        with x.device:
            counter.add(x, weights)


def _partials(norm: Norm, blocks: int) -> cupy.ndarray:
    """Return room for the pair of each sum of each block."""
    return cupy.empty(2 * len(norm.terms) * blocks, np.float64)


def _flat(constants: Constants) -> tuple[float, ...]:
    """Return λ of the penalty, of the gradient, and epsilon."""
    return *constants.lam, *constants.gradient_lam, constants.epsilon


def _words(norm: Norm, layers: int = 1, *, weighted: bool = False) -> cupy.ndarray:
    """Return empty superaccumulators, as many as there are sums."""
    return cupy.zeros(layers * len(norm.terms) * counters_of(weighted=weighted), np.int64)


def _results(norm: Norm, dtype: np.dtype[Any], layers: int | None = None) -> list[cupy.ndarray]:
    """Return room for the penalty and, of two passes, what the second needs to know of the sums.

    That is the coefficients, and whether there is a gradient.
    """
    shape, compute = () if layers is None else (layers,), COMPUTE_DTYPES[dtype]
    dtypes = [compute] * (1 + norm.n_coefficients) + [np.dtype(bool)] * norm.two_pass
    return [cupy.empty(shape, each) for each in dtypes]


BACKEND = CudaBackend()
