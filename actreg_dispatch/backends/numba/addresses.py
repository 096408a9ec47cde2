"""Memory and functions by their addresses, for compiled code.

The functions that know the norm and the dtype are C functions. Their signatures name neither, so
what drives them is the same for all. What a call is about lies in a :class:`Call`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from actreg_dispatch.norms import MOST_COEFFICIENTS, MOST_LAMS
from actreg_dispatch.sums.certified import PLAIN_TERMS

__all__ = [
    "BAD",
    "BLOCK",
    "BLOCK_SIGNATURE",
    "CALL_SIGNATURE",
    "LARGE",
    "ROWS",
    "SUMS",
    "TOTALS",
    "WHOLE_SIGNATURE",
    "Call",
    "Plan",
    "address_of",
    "call_at",
    "call_block",
    "call_function",
    "call_whole",
    "dense_row",
    "new_block",
    "new_call",
    "new_rows",
    "new_total",
    "new_totals",
    "plan_at",
    "strided_row",
]

_LAMS = ctypes.c_double * MOST_LAMS
SUMS = 4  # numbers that sums take: a pair (hi, lo) for each
# Then how many elements were counted, how many were not 0, and the largest; and how many weights
# are bad, and how many are too large for quick sums of squares in binary64.
BAD, LARGE, TOTALS = SUMS + 3, SUMS + 4, SUMS + 5
BLOCK = PLAIN_TERMS  # elements that one thread does at a time
ROWS = 128  # in a block at most, where a norm is one of rows
SHARES = 256  # of a call, which threads take in turn


class Call(ctypes.Structure):
    """What a call is about: arrays of one shape, the options, what is found on the way.

    The arrays are rows of evenly spaced elements, cut into pieces of at most ``BLOCK`` elements. A
    block, what a thread does at a time, is one piece or several. Addresses and steps are in bytes.
    """

    axes_in_use: Any = None  # what lies at ``axes``
    dense = True  # whether the elements of a row are next to each other

    _fields_ = (
        ("activations", ctypes.c_int64),  # addresses of the first elements
        ("gradients", ctypes.c_int64),
        ("weights", ctypes.c_int64),  # if there are any, and what gathers them
        ("gather", ctypes.c_int64),
        ("large_weights", ctypes.c_int64),  # whether some are too large, as a check has found
        ("check_weights", ctypes.c_int64),  # what checks a block of them, if they are not yet
        ("count_elements", ctypes.c_int64),  # what counts for statistics, if it is wanted
        ("sizes", ctypes.c_int64),  # of rows, if they are wanted
        ("undecided", ctypes.c_int64),  # rows, which are marked
        ("size", ctypes.c_int64),
        ("length", ctypes.c_int64),  # of a row
        ("x_step", ctypes.c_int64),
        ("g_step", ctypes.c_int64),
        ("w_step", ctypes.c_int64),
        ("n_axes", ctypes.c_int64),  # along which rows lie
        ("axes", ctypes.c_int64),  # address of their lengths, and of the steps of all arrays
        ("pieces", ctypes.c_int64),  # of a row
        ("all_pieces", ctypes.c_int64),
        ("pieces_per_block", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("count", ctypes.c_double),  # what λ is divided by
        ("scale", ctypes.c_double),  # what λ is multiplied by for the gradient
        ("epsilon", ctypes.c_double),  # NaN for the default
        ("lam", _LAMS),  # rounded to T, once prepared
        ("gradient_lam", _LAMS),
        ("total", ctypes.c_double * TOTALS),
        ("counts", ctypes.c_double * (TOTALS - SUMS)),
        ("coefficients", ctypes.c_double * MOST_COEFFICIENTS),
        ("penalty", ctypes.c_double),
    )


class Plan(ctypes.Structure):
    """How calls of one kind are done: the addresses of functions, and what a fused kernel asks."""

    _fields_ = (
        ("whole", ctypes.c_int64),  # the driver
        ("first", ctypes.c_int64),  # the pass that sums, and updates if the norm needs no other
        ("second", ctypes.c_int64),  # the pass that updates, of a norm of two; else 0
        ("prepare", ctypes.c_int64),
        ("finish", ctypes.c_int64),
        ("parallel", ctypes.c_int64),  # whether the driver is
        ("divides", ctypes.c_int64),  # bit k: whether the length of axis k divides λ
    )


CALL_SIGNATURE = types.int64(types.int64)
BLOCK_SIGNATURE = types.int64(types.int64, types.int64, types.int64)
WHOLE_SIGNATURE = types.float64(types.int64, types.int64)


def _function(signature: Any) -> Any:
    """Return what calls the C function at an address, with a tuple of arguments."""
    count = len(signature.args)
    words = [ir.IntType(64)] * count
    result = ir.DoubleType() if signature.return_type == types.float64 else ir.IntType(64)
    native = ir.FunctionType(result, words)

    @intrinsic
    def call(typingctx, address, arguments):  # type: ignore[no-untyped-def]
        def generate(context, builder, _signature, values):  # type: ignore[no-untyped-def]
            function = builder.inttoptr(values[0], native.as_pointer())
            return builder.call(function, cgutils.unpack_tuple(builder, values[1], count))

        return signature.return_type(types.int64, types.UniTuple(types.int64, count)), generate

    return call


call_function, call_block = _function(CALL_SIGNATURE), _function(BLOCK_SIGNATURE)
call_whole = _function(WHOLE_SIGNATURE)


def _structure(structure: type[ctypes.Structure]) -> Any:
    """Return what takes an address for that of a structure."""
    record = numba.from_dtype(np.dtype(structure))

    @intrinsic
    def at(typingctx, address):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            return builder.inttoptr(values[0], context.get_value_type(record))

        return record(types.int64), generate

    return at


call_at, plan_at = _structure(Call), _structure(Plan)


def _on_the_stack(size: int, zeros: bool = True) -> Any:
    """Return what reserves so many words on the stack, and returns their address.

    Filling them with zeros takes LLVM seconds to compile for a block.
    """

    @intrinsic
    def new(typingctx):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            if zeros:
                words = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), size))
            else:
                with builder.goto_entry_block():
                    words = builder.alloca(ir.IntType(64), size)
            return builder.ptrtoint(words, ir.IntType(64))

        return types.int64(), generate

    return new


new_call, new_total = _on_the_stack(ctypes.sizeof(Call) // 8), _on_the_stack(TOTALS)
new_totals, new_block = _on_the_stack(SHARES * TOTALS), _on_the_stack(BLOCK, zeros=False)
new_rows = _on_the_stack(4 * ROWS, zeros=False)


@intrinsic
def address_of(typingctx, array):  # type: ignore[no-untyped-def]
    """Return where the first element of ``array`` is, an int64."""

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(array)(context, builder, arguments[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), cast


def _row(layout: str) -> Any:
    """Return what makes an array of one axis, which holds no reference, of what lies in memory.

    It has ``length`` elements of a NumPy type from an address on, ``step`` bytes apart.
    """

    @intrinsic
    def row(typingctx, element, address, length, step):  # type: ignore[no-untyped-def]
        array = types.Array(element.instance_type, 1, layout)

        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            made = context.make_array(array)(context, builder)
            populate_array(
                made,
                data=builder.inttoptr(values[1], made.data.type),
                shape=[values[2]],
                strides=[values[3]],
                itemsize=context.get_constant(types.intp, element.instance_type.bitwidth // 8),
                meminfo=None,
            )
            return made._getvalue()

        return array(element, types.int64, types.int64, types.int64), generate

    return row


dense_row, strided_row = _row("C"), _row("A")
