"""The CPU backend: one fused pass over memory in Numba, serial or parallel.

A call on contiguous arrays is one call of compiled code, before anything is checked in Python, so
that a small array costs little more than such a call. What that does not take, having written
nothing, is checked here, described by a :class:`~actreg_dispatch.backends.numba.addresses.Call`,
and done by the same functions in another call of compiled code. No interrupt is heard meanwhile, so
the gradients are never left half updated. Where the rounding test fails, the sum, and the sum only,
is done again exactly.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.backends.numba import drivers, functions, row_norms
from actreg_dispatch.backends.numba.addresses import BAD, LARGE, Call, Plan
from actreg_dispatch.backends.numba.bits import bits_of
from actreg_dispatch.backends.numba.calls import call_of, is_parallel, run
from actreg_dispatch.backends.numba.compiling import kernel_of
from actreg_dispatch.backends.numba.drivers import EXACT_SHARES, PARALLEL_FROM
from actreg_dispatch.backends.numba.exact import MOST_TERMS
from actreg_dispatch.backends.numba.plans import fused_kernel_of, plan_of, summing, updating
from actreg_dispatch.dtypes import COMPUTE_DTYPES, FLOAT64, NATIVE_DTYPES
from actreg_dispatch.layout import each_once
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants, Options, Reduction, count_of, divided_axes
from actreg_dispatch.row_norms import RowNorm
from actreg_dispatch.runtime.threads import may_use_threads
from actreg_dispatch.statistics import ActivationStatistics
from actreg_dispatch.sums.exact import COUNTERS, Total, outcome_of, sum_of_words, total_of
from actreg_dispatch.weights import check_weight_values

__all__ = ["BACKEND", "PARALLEL_FROM", "NumbaBackend"]

Array = np.ndarray[Any, Any]


class NumbaBackend(Backend):
    """NumPy arrays in native byte order, aligned."""

    name = "numba"
    dtypes = NATIVE_DTYPES
    unavailable_because = (
        "NUMBA_DISABLE_JIT is set, which keeps Numba from compiling"
        if numba.config.DISABLE_JIT
        else ""
    )

    def partial_sum(self, activations: Array, norm: Norm, weights: Array | None = None) -> Total:
        """Return the sum, or both, that the norm takes, exactly."""
        x, w, terms = activations, weights, norm.terms
        _check_values(w)
        if x.size > MOST_TERMS:
            axis = int(np.argmax(x.shape))
            one, other = np.array_split(x, 2, axis)
            its, others = (None, None) if w is None else np.array_split(w, 2, axis)
            return self.partial_sum(one, norm, its) + self.partial_sum(other, norm, others)
        call = call_of(x, x, w)
        parallel, compute = is_parallel(call), COMPUTE_DTYPES[x.dtype]
        shares = min(call.blocks, EXACT_SHARES) if parallel else 1
        words = np.zeros((shares, len(terms) * COUNTERS), np.int64)
        if w is None:
            function = kernel_of(functions.exact_function, terms, x.dtype)
        else:
            function = kernel_of(functions.weighted_exact_function, terms, x.dtype)
        kernel_of(drivers.exact_kernel, parallel)(function.address, ctypes.addressof(call), words)
        sums = (words.sum(axis=0) if parallel else words[0]).reshape(-1, COUNTERS)
        return total_of([sum_of_words(*each, compute) for each in zip(sums, terms, strict=True)])

    def penalty(
        self,
        activations: Array,
        norm: Norm,
        constants: Constants,
        weights: Array | None = None,
        statistics: ActivationStatistics | None = None,
    ) -> Any:
        """Return the penalty, a NumPy scalar."""
        given = activations, activations, norm, constants, weights, statistics
        return _whole(*given, writes=False)

    def apply(
        self,
        activations: Array,
        gradients: Array,
        norm: Norm,
        constants: Constants,
        weights: Array | None = None,
        statistics: ActivationStatistics | None = None,
    ) -> Any:
        """Add the gradient to ``gradients`` in place and return the penalty."""
        given = activations, gradients, norm, constants, weights, statistics
        return _whole(*given, writes=True)

    def add_gradient(
        self,
        activations: Array,
        gradients: Array,
        norm: Norm,
        constants: Constants,
        coefficients: tuple[float, ...],
        weights: Array | None = None,
    ) -> None:
        """Add the gradient to ``gradients`` in place."""
        given = activations, gradients, norm, constants, coefficients, weights
        _update(*given, overwrites=False)

    def quick_sum(
        self,
        activations: Array,
        norm: Norm,
        gradients: Array | None = None,
        constants: Constants | None = None,
        weights: Array | None = None,
    ) -> tuple[float, ...]:
        """Return the sums as pairs, and add the gradient of a norm of one pass to any gradients.

        Bad weights are not refused, but then the sums are NaN.
        """
        weighted = weights is not None
        is_undecided = _needs_care(activations, weights)
        if gradients is None:
            call = call_of(activations, activations, weights)
            function = summing(norm, activations.dtype, call.dense, weighted)
        else:
            assert constants is not None
            assert not norm.two_pass
            call = call_of(activations, gradients, weights, norm, constants)
            function = updating(norm, activations.dtype, call.dense, weighted=weighted)
        found = run(call, function)[: 2 * len(norm.terms)]
        return (math.nan,) * len(found) if is_undecided else found

    def overwrite(
        self,
        activations: Array,
        gradients: Array,
        norm: Norm,
        constants: Constants,
        weights: Array | None = None,
    ) -> Any:
        """Do :meth:`apply` as if ``gradients`` were 0, whatever they hold."""
        given = activations, gradients, norm, constants, weights
        if norm.two_pass:  # and so may have no gradient
            return super().overwrite(*given)
        return _whole(*given, None, writes=True, overwrites=True)

    def set_gradient(
        self,
        activations: Array,
        gradients: Array,
        norm: Norm,
        constants: Constants,
        coefficients: tuple[float, ...],
        weights: Array | None = None,
    ) -> None:
        """Do :meth:`add_gradient` as if ``gradients`` were 0, whatever they hold."""
        given = activations, gradients, norm, constants, coefficients, weights
        _update(*given, overwrites=True)

    def apply_to_rows(
        self,
        activations: Array,
        gradients: Array | None,
        norm: RowNorm,
        constants: Constants,
        weights: Array | None = None,
    ) -> Any:
        """Return the penalty of many rows, and add the gradient to any gradients."""
        if _needs_care(activations, weights):
            return None
        return row_norms.apply_to_rows(self, activations, gradients, norm, constants, weights)

    def sum_of_rows(
        self, activations: Array, norm: RowNorm, weights: Array | None = None
    ) -> Total | None:
        """Return the exact sum of the sizes of many rows."""
        if _needs_care(activations, weights):
            return None
        return row_norms.sum_of_rows(self, activations, norm, weights)

    def fused_kernel(
        self, norm: Norm, reduction: Reduction, activations: Array, *, writes: bool
    ) -> Callable[..., float] | None:
        """Return the fused kernel.

        There is none where so many elements are for threads but threads may not be used.
        """
        x, parallel = activations, activations.size >= PARALLEL_FROM
        if parallel and not may_use_threads():
            return None
        return kernel_of(  # type: ignore[no-any-return]
            fused_kernel_of, norm, _divides(reduction, x.ndim), x.dtype, x.ndim, writes, parallel
        )

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
        bits = bits_of(dtype)
        calls, size = (Call * layers)(), 0
        address = ctypes.addressof(calls)
        describe: dict[int, Any] = {}
        try:
            for layer, (x, g) in enumerate(zip(activations, gradients, strict=True)):
                if not (type(x) is np.ndarray is type(g) and x.dtype is dtype is g.dtype):
                    return None
                if bits is not dtype:
                    x, g = x.view(bits), g.view(bits)
                axes = x.ndim
                if axes == g.ndim == 0 and options.reduction in ("sum", "mean"):
                    x, g, axes = x.reshape(1), g.reshape(1), 1
                if axes not in describe:
                    if not axes:
                        return None
                    kernel = kernel_of(drivers.describing_kernel, bits, axes, True)
                    describe[axes] = kernel, _divides(options.reduction, axes)
                kernel, divides = describe[axes]
                found = kernel(x, g, divides, address, layer)
                if found < 0:
                    return None
                size += found
        except (TypeError, ValueError):  # not contiguous, read-only, or without the axes it takes
            return None
        if not kernel_of(drivers.apartness_kernel)(address, layers):
            return None
        return _batch(calls, size, plan_of(options.norm, dtype, writes=True), options, scale)

    def fused_rows(
        self, activations: Array, gradients: Array | None, options: Options, scale: float
    ) -> Array | None:
        """Do a whole call for each part along the first axis of contiguous arrays."""
        norm, bits, rows = options.norm, bits_of(activations.dtype), len(activations)
        overwrites = gradients is not None and not norm.two_pass
        if gradients is not None and not overwrites:  # there may be no gradient
            gradients[...] = 0
        calls = (Call * rows)()
        shape = rows, activations.size // max(1, rows)
        x, g = (
            array.view(bits).reshape(shape)
            for array in (activations, activations if gradients is None else gradients)
        )
        count = count_of(options.reduction, activations.shape[1:])
        kernel_of(drivers.rows_kernel, bits)(x, g, count, ctypes.addressof(calls))
        plan = plan_of(norm, activations.dtype, writes=gradients is not None, overwrites=overwrites)
        return _batch(calls, x.size, plan, options, scale)


def _divides(reduction: Reduction, axes: int) -> int:
    """Return the axes whose lengths divide λ as bits."""
    return sum(1 << axis for axis in divided_axes(reduction, axes))


def _batch(calls: Any, size: int, plan: Plan, options: Options, scale: float) -> Array | None:
    """Do calls of so many elements in all, and return their penalties, or None."""
    norm, parallel = options.norm, size >= PARALLEL_FROM and may_use_threads()
    kernel = kernel_of(drivers.batch_kernel, norm.n_lams, parallel)
    lam = options.lam if norm.n_lams > 1 else options.lam[0]
    epsilon = math.nan if options.epsilon is None else options.epsilon
    penalties = np.empty(len(calls))
    taken = kernel(
        *(ctypes.addressof(plan), ctypes.addressof(calls), len(calls)),
        *(lam, scale, epsilon, penalties),
    )
    return penalties if taken else None


def _update(
    x: Array,
    g: Array,
    norm: Norm,
    constants: Constants,
    coefficients: tuple[float, ...],
    weights: Array | None,
    *,
    overwrites: bool,
) -> None:
    _check_values(weights)
    call = call_of(x, g, weights, norm, constants)
    call.coefficients[: norm.n_coefficients] = coefficients
    run(call, updating(norm, x.dtype, call.dense, overwrites, weights is not None))


def _check_values(weights: Array | None) -> bool:
    """Refuse weights that are negative or not finite, for all that follows takes it for granted.

    Return whether some are too large for squares in binary64.
    """
    bad, large = _bad_and_large(weights)
    if bad:
        check_weight_values(weights)
    return large


def _bad_and_large(weights: Array | None) -> tuple[bool, bool]:
    """Return whether some weights are bad, and whether some are too large for squares."""
    if weights is None or weights.dtype.kind == "b" or not weights.size:
        return False, False
    w = each_once(weights)
    found = run(call_of(w, w, w), kernel_of(functions.checking_function, w.dtype))
    return bool(found[BAD]), bool(found[LARGE])


def _needs_care(activations: Array, weights: Array | None) -> bool:
    """Return whether some weights are bad, or such that quick sums decide nothing."""
    bad, large = _bad_and_large(weights)
    return bad or (large and activations.dtype == FLOAT64)


def _whole(
    x: Array,
    g: Array,
    norm: Norm,
    constants: Constants,
    weights: Array | None,
    statistics: ActivationStatistics | None,
    *,
    writes: bool,
    overwrites: bool = False,
) -> Any:
    """Do a whole call, with an exact sum if it takes one, and return the penalty."""
    call = call_of(x, g, weights, norm, constants)
    writes_first = writes and not norm.two_pass
    if writes_first or weights is None or each_once(weights).size < x.size:
        call.large_weights = _check_values(weights)
    elif weights.dtype.kind != "b":  # as many as elements: read once, and checked on the way
        call.check_weights = kernel_of(functions.checking_function, weights.dtype).address
    if statistics is not None:
        counting = kernel_of(functions.counting_function, x.dtype, weights is not None)
        call.count_elements = counting.address
    parallel = is_parallel(call)
    plan = plan_of(
        norm,
        x.dtype,
        weights is not None,
        writes=writes,
        overwrites=overwrites,
        dense=call.dense,
        parallel=parallel,
    )
    whole = kernel_of(drivers.whole_function, parallel).ctypes
    penalty = whole(ctypes.addressof(plan), ctypes.addressof(call))
    if penalty < 0.0:
        if call.total[BAD]:
            check_weight_values(weights)
        found = outcome_of(BACKEND.partial_sum(x, norm, weights), norm, constants)
        penalty = found.penalty
        if writes and norm.two_pass and found.has_gradient:
            BACKEND.add_gradient(x, g, norm, constants, found.coefficients, weights)
    if statistics is not None:
        elements, nonzero, largest, *_ = call.counts
        active = _active(x, weights) if statistics.per_feature else None
        statistics.add(int(elements), int(nonzero), largest, active)
    return COMPUTE_DTYPES[x.dtype].type(penalty)


def _active(x: Array, weights: Array | None) -> Array:
    """Return how many elements of each place along the last axis are not 0 and are not left out."""
    features = x.shape[-1]
    if not x.size:
        return np.zeros(features, np.int64)
    bits = bits_of(x.dtype)
    rows = x.view(bits).reshape(-1, features)
    kept = rows
    if weights is not None:
        kept = np.broadcast_to(each_once(weights) != 0, x.shape).reshape(-1, features)
    shares = min(EXACT_SHARES, len(rows)) if x.size >= PARALLEL_FROM and may_use_threads() else 1
    counts = np.zeros((shares, features), np.int64)
    dense = rows.flags.c_contiguous and kept.flags.c_contiguous
    kernel = kernel_of(drivers.active_kernel, bits, weights is not None, dense, shares > 1)
    kernel(rows, kept, counts)
    total: Array = counts.sum(axis=0)
    return total


BACKEND = NumbaBackend()
