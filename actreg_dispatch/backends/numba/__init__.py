"""The CPU backend: one fused pass over memory in Numba, serial or parallel.

A call on contiguous arrays is one call of a fused kernel, before anything is checked in Python, so
that a small array costs little more than the call of compiled code. What a fused kernel does not
take, having written nothing, is checked and then done in passes. A pass is one call of compiled
code, during which no interrupt is heard, so the gradients are never left half updated. Where the
rounding test fails, the sum, and the sum only, is done again in integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.backends.numba import kernels
from actreg_dispatch.backends.numba.compiling import kernel_of
from actreg_dispatch.backends.numba.kernels import PARALLEL_FROM
from actreg_dispatch.backends.numba.rows import bits_of, summing_of
from actreg_dispatch.dtypes import COMPUTE_DTYPES, NATIVE_DTYPES
from actreg_dispatch.layout import collapse
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Options
from actreg_dispatch.runtime.huge_pages import ask_for_huge_pages
from actreg_dispatch.runtime.threads import may_use_threads
from actreg_dispatch.sums.certified import NOT_HANDLED, Outcome, round_if_certain
from actreg_dispatch.sums.exact import (
    PartialSum,
    Total,
    limbs_of,
    outcome_of,
    total_of,
    units_of,
)

__all__ = ["BACKEND", "PARALLEL_FROM", "NumbaBackend"]

Array = np.ndarray[Any, Any]

_MOST_AXES = 4  # of a layer in a batch; a kernel that describes it is compiled for each number


class NumbaBackend(Backend):
    """NumPy arrays in native byte order, aligned."""

    name = "numba"
    dtypes = NATIVE_DTYPES
    unavailable_because = (
        "NUMBA_DISABLE_JIT is set, which keeps Numba from compiling"
        if numba.config.DISABLE_JIT
        else ""
    )

    def partial_sum(self, activations: Array, norm: Norm) -> Total:
        """Return the sum, or both, that the norm takes, exactly."""
        return total_of([_exact_sum(activations, degree) for degree in norm.terms])

    def penalty(self, activations: Array, norm: Norm, lam: tuple[float, ...]) -> Any:
        """Return the penalty, a NumPy scalar."""
        found = self._outcome(activations, None, norm, lam, lam, 0.0)
        return COMPUTE_DTYPES[activations.dtype].type(found.penalty)

    def apply(
        self,
        activations: Array,
        gradients: Array,
        norm: Norm,
        lam: tuple[float, ...],
        gradient_lam: tuple[float, ...],
        epsilon: float,
    ) -> Any:
        """Add the gradient to ``gradients`` in place and return the penalty."""
        on_the_way = None if norm.two_pass else gradients
        found = self._outcome(activations, on_the_way, norm, lam, gradient_lam, epsilon)
        if norm.two_pass and found.has_gradient:
            self.add_gradient(activations, gradients, norm, gradient_lam, found.coefficients)
        return COMPUTE_DTYPES[activations.dtype].type(found.penalty)

    def add_gradient(
        self,
        activations: Array,
        gradients: Array,
        norm: Norm,
        gradient_lam: tuple[float, ...],
        coefficients: tuple[float, ...],
    ) -> None:
        """Add the gradient to ``gradients`` in place."""
        # A norm of one pass has a kernel that sums, too, at no cost once memory is the limit.
        terms = () if norm.two_pass else norm.terms
        _pass(terms, norm, activations, gradients, gradient_lam, coefficients)

    def quick_sum(
        self,
        activations: Array,
        norm: Norm,
        gradients: Array | None = None,
        gradient_lam: tuple[float, ...] = (),
    ) -> tuple[float, ...]:
        """Return the sums as pairs, and add the gradient of a norm of one pass to any gradients."""
        if gradients is None:
            return _pass(norm.terms, None, activations, activations)
        return _pass(norm.terms, norm, activations, gradients, gradient_lam)

    def clear(self, gradients: Array) -> None:
        """Fill contiguous gradients with zeros, large ones by all threads; best if they are new."""
        if gradients.size >= PARALLEL_FROM:
            ask_for_huge_pages(gradients.ctypes.data, gradients.nbytes)
            if may_use_threads():
                kernel_of(kernels.clearing)(gradients.reshape(-1).view(np.uint8))
                return
        gradients[...] = 0

    def fused_kernel(
        self, norm: Norm, dtype: np.dtype[Any], size: int, *, writes: bool
    ) -> Callable[..., float] | None:
        """Return the fused kernel for ``size`` elements.

        There is none where so many elements are for threads but threads may not be used.
        """
        parallel = size >= PARALLEL_FROM
        if parallel and not may_use_threads():
            return None
        return kernel_of(_fused, norm, dtype, writes, parallel)  # type: ignore[no-any-return]

    def fused_batch(
        self,
        activations: tuple[Any, ...],
        gradients: tuple[Any, ...],
        options: Options,
        scale: float,
    ) -> np.ndarray[Any, Any] | None:
        """Update all gradients and return the penalties, or None, having written nothing."""
        dtype, layers = activations[0].dtype, len(activations)
        if dtype not in NATIVE_DTYPES:
            return None
        column = {"sum": 0, "mean": 2, "batch": 3}[options.reduction]
        bits = bits_of(dtype)
        table, size = np.empty((layers, 4), np.int64), 0
        describe: dict[int, Any] = {}
        try:
            for layer, (x, g) in enumerate(zip(activations, gradients, strict=True)):
                if not (type(x) is np.ndarray is type(g) and x.dtype is dtype is g.dtype):
                    return None
                if bits is not dtype:
                    x, g = x.view(bits), g.view(bits)
                axes = x.ndim
                if axes == g.ndim == 0 and options.reduction != "batch":
                    x, g, axes = x.reshape(1), g.reshape(1), 1
                if axes not in describe:
                    if not 0 < axes <= _MOST_AXES:
                        return None
                    describe[axes] = kernel_of(kernels.describing, bits, axes)
                found = describe[axes](x, g, table, layer)
                if found < 0:
                    return None
                size += found
        except TypeError:  # not contiguous, or read-only
            return None
        if not kernel_of(kernels.apartness)(table, dtype.itemsize):
            return None
        parallel = size >= PARALLEL_FROM and may_use_threads()
        kernel = kernel_of(kernels.batch_kernel, options.norm, dtype, parallel)
        lam = options.lam if options.norm.n_lams > 1 else options.lam[0]
        epsilon = np.nan if options.epsilon is None else options.epsilon
        penalties = np.empty(layers)
        like = np.empty(0, bits)
        return penalties if kernel(table, like, lam, column, scale, epsilon, penalties) else None

    def _outcome(
        self,
        x: Array,
        g: Array | None,
        norm: Norm,
        lam: tuple[float, ...],
        gradient_lam: tuple[float, ...],
        epsilon: float,
    ) -> Outcome:
        """Sum, as quickly as will do, and update the gradients if there are any."""
        total = self.quick_sum(x, norm, g, gradient_lam)
        compute = COMPUTE_DTYPES[x.dtype]
        found = round_if_certain(total, x.size, compute, norm, lam, gradient_lam, epsilon)
        return found or outcome_of(self.partial_sum(x, norm), norm, lam, gradient_lam, epsilon)


def _fused(norm: Norm, dtype: np.dtype[Any], writes: bool, parallel: bool) -> Any:
    """Return the fused kernel, ready for what the caller has: 16-bit floats, forked processes."""
    kernel: Any = kernels.fused_kernel(norm, dtype, writes, parallel)
    if parallel:
        with_threads = kernel

        def kernel(*arguments):  # type: ignore[no-untyped-def]
            return with_threads(*arguments) if may_use_threads() else NOT_HANDLED

    bits = bits_of(dtype)
    if bits is dtype:
        return kernel
    return lambda x, g, *others: kernel(x.view(bits), g.view(bits), *others)


def _exact_sum(x: Array, degree: int) -> PartialSum:
    bins = np.zeros((2046, limbs_of(degree)), np.int64)
    special = 0.0
    if x.size:
        first, _, axes = _rows(x, x)
        special = kernel_of(kernels.accumulator, degree, x.dtype)(first, axes, bins)
    return PartialSum(degree, COMPUTE_DTYPES[x.dtype], units_of(bins, degree), special)


def _pass(
    terms: tuple[int, ...],
    norm: Norm | None,
    x: Array,
    g: Array,
    gradient_lam: tuple[float, ...] = (),
    coefficients: tuple[float, ...] = (),
) -> tuple[float, ...]:
    """Run one pass over all elements, which sums ``terms`` and adds the gradient of ``norm``."""
    if x.size == 0:
        return summing_of(terms, x.dtype).zero
    parallel = x.size >= PARALLEL_FROM and may_use_threads()
    kernel = kernel_of(kernels.pass_kernel, terms, norm, x.dtype, parallel)
    return kernel(*_rows(x, g), gradient_lam, coefficients)  # type: ignore[no-any-return]


def _rows(x: Array, g: Array) -> tuple[Array, Array, np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the bits of the first rows of ``x`` and ``g``, and where the others are.

    A row is the last axis that :func:`collapse` leaves. The others come as three lists, of their
    lengths and of the bytes that ``x`` and ``g`` step along them.
    """
    bits = bits_of(x.dtype)
    x, g = collapse(x.view(bits), g.view(bits))
    axes = np.array([x.shape[:-1], x.strides[:-1], g.strides[:-1]], np.int64)
    first = (0,) * (x.ndim - 1)
    return x[first], g[first], axes


BACKEND = NumbaBackend()
