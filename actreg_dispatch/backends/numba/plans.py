"""Plans: which compiled functions do the calls of one kind."""

from __future__ import annotations

import ctypes
from types import MethodType
from typing import Any

import numpy as np

from actreg_dispatch.backends.numba import drivers, functions
from actreg_dispatch.backends.numba.addresses import Plan
from actreg_dispatch.backends.numba.bits import bits_of
from actreg_dispatch.backends.numba.compiling import kernel_of
from actreg_dispatch.dtypes import COMPUTE_DTYPES
from actreg_dispatch.norms import Norm
from actreg_dispatch.runtime.threads import may_use_threads
from actreg_dispatch.sums.certified import NOT_HANDLED

__all__ = ["fused_kernel_of", "plan_of", "summing", "updating"]


def summing(norm: Norm, dtype: np.dtype[Any], dense: bool, weighted: bool = False) -> Any:
    """Return the block function that sums, whatever the norm."""
    return kernel_of(functions.block_function, norm.terms, None, dtype, dense, False, weighted)


def updating(
    norm: Norm,
    dtype: np.dtype[Any],
    dense: bool,
    overwrites: bool = False,
    weighted: bool = False,
) -> Any:
    """Return the block function that updates, and sums, if that is all in one pass.

    Where only the update is needed, the sum costs nothing once memory is the limit.
    """
    terms = () if norm.two_pass else norm.terms
    return kernel_of(functions.block_function, terms, norm, dtype, dense, overwrites, weighted)


def plan_of(
    norm: Norm,
    dtype: np.dtype[Any],
    weighted: bool = False,
    *,
    writes: bool,
    overwrites: bool = False,
    dense: bool = True,
    parallel: bool = False,
    divides: int = 0,
) -> Plan:
    """Return how such calls are done."""
    key = norm, dtype, weighted, writes, overwrites, dense, parallel, divides
    return kernel_of(_compiled_plan, *key)  # type: ignore[no-any-return]


def _compiled_plan(
    norm: Norm,
    dtype: np.dtype[Any],
    weighted: bool,
    writes: bool,
    overwrites: bool,
    dense: bool,
    parallel: bool,
    divides: int,
) -> Plan:
    compute = COMPUTE_DTYPES[dtype]
    sums_first = norm.two_pass or not writes
    passes = [summing(norm, dtype, dense, weighted)] if sums_first else []
    passes += [updating(norm, dtype, dense, overwrites, weighted)] if writes else []
    whole = kernel_of(drivers.whole_function, parallel)
    first, second = (*passes, None)[:2]
    prepare = kernel_of(functions.prepare_function, norm, compute)
    finish = kernel_of(functions.finish_function, norm, compute)
    used = whole, first, second, prepare, finish
    addresses = [function.address if function else 0 for function in used]
    plan = Plan(*addresses, parallel, divides)
    _IN_USE.append((plan, *used))
    return plan


# What compiled code knows by address, so that it must not be freed while the process lives.
_IN_USE: list[Any] = []


def fused_kernel_of(
    norm: Norm, divides: int, dtype: np.dtype[Any], axes: int, writes: bool, parallel: bool
) -> Any:
    """Return the fused kernel, ready for what the caller has: 16-bit floats, forked processes."""
    bits = bits_of(dtype)
    plan = plan_of(norm, dtype, writes=writes, parallel=parallel, divides=divides)
    kernel: Any = kernel_of(drivers.fused_kernel, bits, axes, norm.n_lams, writes)
    # A bound method is called as quickly as its function.
    kernel = MethodType(kernel, float(ctypes.addressof(plan)))
    if parallel:
        with_threads = kernel

        def kernel(*arguments):  # type: ignore[no-untyped-def]
            return with_threads(*arguments) if may_use_threads() else NOT_HANDLED

    if bits is dtype:
        return kernel
    if writes:
        return lambda x, g, *others: kernel(x.view(bits), g.view(bits), *others)
    return lambda x, *others: kernel(x.view(bits), *others)
