"""IEEE 754 arithmetic in threads that flush subnormal numbers to zero.

XLA sets the processor's control register so in the threads in which it runs callbacks, and a thread
that is started there inherits it. The register belongs to the thread, hence to all that it
computes, be it in Numba's code, NumPy's or Python's.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from actreg_dispatch.runtime.threads import interrupts_wait

__all__ = ["subnormals_kept"]

_INTEL = platform.machine().lower() in ("x86_64", "amd64")
_ARM = platform.machine().lower() in ("aarch64", "arm64")
# MXCSR: flush results, take subnormal operands for zero. FPCR: FZ, and FZ16 for half precision.
_FLUSHING = 1 << 15 | 1 << 6 if _INTEL else 1 << 24 | 1 << 19 if _ARM else 0


@contextlib.contextmanager
def subnormals_kept() -> Iterator[None]:
    """Compute with subnormal numbers inside a ``with`` block, in this thread.

    Does nothing on processors other than x86-64 and AArch64.
    """
    found = _control() if _FLUSHING else 0
    if not found & _FLUSHING:
        yield
        return
    _set_control(found & ~_FLUSHING)
    try:
        yield
    finally:
        _set_control(found)


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call the function of LLVM that is an instruction of the processor."""
    prototype = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, prototype, name), arguments)


@intrinsic
def _read(typingctx):  # type: ignore[no-untyped-def]
    """Return the control register of this thread's floating-point unit, a uint64."""

    def intel(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        slot = cgutils.alloca_once(builder, ir.IntType(32))
        pointer = builder.bitcast(slot, ir.IntType(8).as_pointer())
        _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), pointer)
        return builder.zext(builder.load(slot), ir.IntType(64))

    def arm(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return _call(builder, "llvm.aarch64.get.fpcr", ir.IntType(64))

    return types.uint64(), intel if _INTEL else arm


@intrinsic
def _write(typingctx, value):  # type: ignore[no-untyped-def]
    """Overwrite that register."""

    def intel(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        slot = cgutils.alloca_once(builder, ir.IntType(32))
        builder.store(builder.trunc(arguments[0], ir.IntType(32)), slot)
        pointer = builder.bitcast(slot, ir.IntType(8).as_pointer())
        _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), pointer)
        return context.get_dummy_value()

    def arm(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), arguments[0])
        return context.get_dummy_value()

    return types.void(types.uint64), intel if _INTEL else arm


@numba.njit
def _control() -> int:
    return _read()  # type: ignore[no-any-return]


@numba.njit
def _set_control(value: int) -> None:
    _write(value)


if _FLUSHING:  # compile here, since a callback is no place to
    with interrupts_wait():
        _control.compile("uint64()")
        _set_control.compile("void(uint64)")
