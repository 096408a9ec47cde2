"""Calls: what they are about, in a structure that compiled code reads, and how they are run."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from actreg_dispatch.backends.numba import drivers, functions
from actreg_dispatch.backends.numba.addresses import BLOCK, Call
from actreg_dispatch.backends.numba.bits import bits_of
from actreg_dispatch.backends.numba.compiling import kernel_of
from actreg_dispatch.backends.numba.drivers import PARALLEL_FROM
from actreg_dispatch.dtypes import COMPUTE_DTYPES
from actreg_dispatch.layout import collapse
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.runtime.threads import may_use_threads

__all__ = ["call_of", "is_parallel", "run"]

Array = np.ndarray[Any, Any]


def call_of(
    x: Array,
    g: Array,
    weights: Array | None = None,
    norm: Norm | None = None,
    constants: Constants | None = None,
) -> Call:
    """Return a call on arrays of any strides, which have been checked, and what it is told."""
    if weights is None and x.flags.c_contiguous and g.flags.c_contiguous:
        call, bits = Call(), bits_of(x.dtype)
        if not x.ndim:
            x, g = x.reshape(1), g.reshape(1)
        describe = kernel_of(drivers.describing_kernel, bits, x.ndim, g.flags.writeable)
        describe(x.view(bits), g.view(bits), 0, ctypes.addressof(call), 0)
    else:
        call = _rows_of(x, g, weights) if x.size else Call()  # of no blocks
    if norm is not None and constants is not None:
        call.lam[: norm.n_lams] = constants.lam
        call.gradient_lam[: norm.n_lams] = constants.gradient_lam
        call.epsilon = constants.epsilon
    return call


def _rows_of(x: Array, g: Array, weights: Array | None) -> Call:
    """Return a call on the rows that the arrays are made of, in the order of memory."""
    if weights is None:
        x, g = collapse(x, g)
        w_start, gather, w_strides = 0, 0, (0,) * x.ndim
    else:
        x, w, g = collapse(x, weights, g)
        gathering = kernel_of(functions.gathering_function, w.dtype, COMPUTE_DTYPES[x.dtype])
        w_start, gather, w_strides = w.ctypes.data, gathering.address, w.strides
    *lengths, length = x.shape
    *x_steps, x_step = x.strides
    *g_steps, g_step = g.strides
    *w_steps, w_step = w_strides
    pieces = -(-length // BLOCK)
    all_pieces, per_block = math.prod(lengths) * pieces, max(1, BLOCK // length)
    steps = zip(lengths, x_steps, g_steps, w_steps, strict=True)
    axes = np.array([*steps], np.int64) if lengths else None
    call = Call(
        activations=x.ctypes.data,
        gradients=g.ctypes.data,
        weights=w_start,
        gather=gather,
        size=x.size,
        length=length,
        x_step=x_step,
        g_step=g_step,
        w_step=w_step,
        n_axes=len(lengths),
        axes=0 if axes is None else axes.ctypes.data,
        pieces=pieces,
        all_pieces=all_pieces,
        pieces_per_block=per_block,
        blocks=-(-all_pieces // per_block),
    )
    call.axes_in_use, call.dense = axes, x_step == g_step == x.itemsize
    return call


def run(call: Call, function: Any) -> tuple[float, ...]:
    """Run a pass and return its total."""
    kernel_of(drivers.pass_kernel, is_parallel(call))(function.address, ctypes.addressof(call))
    return tuple(call.total)


def is_parallel(call: Call) -> bool:
    """Return whether threads do the call."""
    return call.size >= PARALLEL_FROM and may_use_threads()
