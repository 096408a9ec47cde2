"""The CPU backend: one fused pass over memory in Numba, serial or parallel.

What a pass does is put together from three small functions: a *magnitude*, |x| or x², a *sum* of
the magnitudes along a row, plain or anchored (see :mod:`actreg_dispatch.rounding`), and an *update*
of the gradient. Sums stay in vector registers. Two kinds of kernel are built of them:

* *flat* kernels take one-dimensional contiguous arrays and do the whole call: they check what a
  caller may get wrong, sum, test the rounding, update. The API calls them before anything else, so
  that a small array costs little more than the call of compiled code. What they do not take they
  refuse, having written nothing.
* *strided* kernels take arrays of any strides, after validation, and return the sum. A pass over an
  array is one call of compiled code, during which no interrupt is heard, so the gradients are never
  left half updated.

Where the rounding test fails, the sum, and the sum only, is done again in integers.

Numba knows no 16-bit floats on the CPU. The kernels get the bits, float16 as uint16 and bfloat16 as
int16, and the type of the bits says how :func:`_widen` and :func:`_narrow` convert them.

The functions that kernels are made of are plain Python, so that what a kernel closes over can be
looked up by name, which Numba's cache on disk depends on.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import threading
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from actreg_dispatch import rounding
from actreg_dispatch.layout import collapse
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import (
    ANCHORED_TERMS,
    COMPUTE_DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LIMB,
    NATIVE_DTYPES,
    PLAIN_BOUND,
    PLAIN_TERMS,
    REFUSED,
    UNDECIDED,
    Outcome,
    PairedSum,
    PartialSum,
    anchored_bound,
    certified,
    certified_both,
    decided,
    degree_of,
    largest_lam,
    limbs_of,
    merge_pairs,
    results_of,
    two_sum,
    units_of,
)
from actreg_dispatch.threads import interrupts_wait, lock_over_fork, may_use_threads

name = "numba"
dtypes = NATIVE_DTYPES
unavailable_because = (
    "NUMBA_DISABLE_JIT is set, which keeps Numba from compiling" if numba.config.DISABLE_JIT else ""
)

# Elements from which on the threads are woken. Measured on two cores, L1, µs serial and parallel:
# float32 3.0 and 3.7 at 24,000, 3.7 and 3.7 at 30,000, 5.4 and 4.6 at 45,000; float64 5.3 and 6.4
# at 16,000, 9.1 and 6.6 at 30,000.
PARALLEL_FROM = 30_000

_CACHING = {"": True, "0": False, "1": True}.get(os.environ.get("ACTREG_CACHE", "").strip())
if _CACHING is None:
    raise ValueError(
        f"the environment variable ACTREG_CACHE={os.environ['ACTREG_CACHE']!r} must be 0 or 1"
    )

_NOT_IN_THE_CODE = {"NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER"}

_BLOCK = PLAIN_TERMS  # elements that one thread does at a time
_PAGES = 1 << 18  # bytes that one thread clears at a time
_LOW = (1 << LIMB) - 1  # the bits of a limb
_AXES = types.Array(types.int64, 2, "C")

# Compiled code calls the shared arithmetic by its own name.
for _function in (anchored_bound, two_sum, merge_pairs, results_of, certified, certified_both):
    register_jitable(_function)


def is_available() -> bool:
    """Return whether Numba compiles; it is here, since this module could be imported."""
    return not unavailable_because


def partial_sum(activations: np.ndarray[Any, Any], norm: ActivityNorm) -> PartialSum | PairedSum:
    """Return the sum, or the two sums, that ``norm`` takes, exactly."""
    if norm is ActivityNorm.L1_L2_SQUARED:
        return PairedSum.of(activations, partial_sum)
    degree, compute = degree_of(norm), COMPUTE_DTYPES[activations.dtype]
    bins = np.zeros((2046, limbs_of(degree)), np.int64)
    special = 0.0
    if activations.size:
        x, _, axes = _rows(activations, activations)
        special = _kernel(_tally, degree, x.dtype)(x, axes, bins)
    return PartialSum(degree, compute, units_of(bins, degree), special)


def penalty(activations: np.ndarray[Any, Any], norm: ActivityNorm, lam: Any) -> Any:
    """Return the penalty, a NumPy scalar."""
    compute = COMPUTE_DTYPES[activations.dtype]
    return compute.type(_outcome(activations, norm, lam, 0.0).penalty)


def apply(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: Any,
    strength: Any,
    epsilon: float,
) -> Any:
    """Add the gradient to ``gradients`` in place and return the penalty."""
    if norm is ActivityNorm.L2:  # the divisor is a sum over all elements, hence two passes
        found = _outcome(activations, norm, lam, epsilon)
        if found.has_gradient:
            add_gradient(activations, gradients, norm, strength, found.divisor)
    else:
        found = _outcome(activations, norm, lam, epsilon, gradients, strength)
    return COMPUTE_DTYPES[activations.dtype].type(found.penalty)


def add_gradient(
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any],
    norm: ActivityNorm,
    strength: Any,
    divisor: float,
) -> None:
    """Add the gradient to ``gradients`` in place, dividing by ``divisor`` for L2."""
    _run(None, _UPDATES[norm], activations, gradients, strength, divisor)


def clear(gradients: np.ndarray[Any, Any]) -> None:
    """Fill contiguous gradients with zeros, by all threads if they are large.

    If their memory is new, the system makes each page when it is first written, which takes far
    longer than the zeros.
    """
    if gradients.size < PARALLEL_FROM or not may_use_threads():
        gradients[...] = 0
    else:
        _kernel(_clearing)(gradients.reshape(-1).view(np.uint8))


def express(
    norm: ActivityNorm, dtype: np.dtype[Any], size: int, *, writes: bool
) -> Callable[[Any, Any, Any, Any, float], float] | None:
    """Return the flat kernel for ``size`` elements; see :func:`_flat` for what it takes.

    There is none where so many elements are for threads but threads may not be used.
    """
    parallel = size >= PARALLEL_FROM
    if parallel and not may_use_threads():
        return None
    factory = _flat if dtype.itemsize > 2 else _flat_on_bits
    return _kernel(factory, norm, dtype, writes, parallel)  # type: ignore[no-any-return]


def express_all(*arguments: Any) -> np.ndarray[Any, Any] | None:
    """Do :func:`~actreg_dispatch.backends.many_arrays.express_all`, loaded when it is needed."""
    from actreg_dispatch.backends import many_arrays

    return many_arrays.express_all(*arguments)


def quick_sum(
    activations: np.ndarray[Any, Any],
    norm: ActivityNorm,
    gradients: Any = None,
    strength: Any = None,
) -> tuple[float, ...]:
    """Return the sum as a pair, or both as two, for :func:`~actreg_dispatch.rounding.decided`.

    The same pass updates the gradients of a norm other than L2, if they are given.
    """
    if gradients is None:
        return _run(norm, _leave, activations, activations)
    return _run(norm, _UPDATES[norm], activations, gradients, strength)


def _outcome(
    x: np.ndarray[Any, Any],
    norm: ActivityNorm,
    lam: Any,
    epsilon: float,
    gradients: Any = None,
    strength: Any = None,
) -> Outcome:
    """Sum, as quickly as will do, and update the gradients if there are any."""
    total = quick_sum(x, norm, gradients, strength)
    found = decided(total, x.size, COMPUTE_DTYPES[x.dtype], norm, lam, epsilon)
    return found or partial_sum(x, norm).outcome(norm, lam, epsilon)


# Numbers as bits.


@intrinsic
def _widen(typingctx, value):  # type: ignore[no-untyped-def]
    """Return ``value`` in the compute dtype, exactly; a float is itself."""

    def float16(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        half = builder.bitcast(arguments[0], ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    def bfloat16(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(32)  # a float32 whose lower half is cut off
        bits = builder.shl(builder.zext(arguments[0], word), word(16))
        return builder.bitcast(bits, ir.FloatType())

    def same(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return arguments[0]

    if isinstance(value, types.Float):
        return value(value), same
    return types.float32(value), float16 if value == types.uint16 else bfloat16


@intrinsic
def _narrow(typingctx, like, value):  # type: ignore[no-untyped-def]
    """Return ``value`` rounded to nearest-even in the type of ``like``; NaN stays quiet NaN."""

    def float16(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        half = builder.fptrunc(arguments[1], ir.HalfType())
        return builder.bitcast(half, ir.IntType(16))

    def bfloat16(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word, short = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(arguments[1], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        even = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
        sign = builder.and_(builder.lshr(bits, word(16)), word(0x8000))
        quiet = builder.or_(sign, word(0x7FC0))  # as ml_dtypes has it: the payload is not kept
        is_nan = builder.fcmp_unordered("uno", arguments[1], arguments[1])
        return builder.trunc(builder.select(is_nan, quiet, even), short)

    def same(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return arguments[1]

    if isinstance(like, types.Float):
        return like(like, like), same
    return like(like, types.float32), float16 if like == types.uint16 else bfloat16


@intrinsic
def _bits(typingctx, value):  # type: ignore[no-untyped-def]
    """Return the bits of a float64 as an int64."""

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), cast


@intrinsic
def _float(typingctx, bits):  # type: ignore[no-untyped-def]
    """Return the float64 that has these bits, an int64."""

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), cast


@intrinsic
def _multiply_add(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """Return ``a * b + c`` of float64 rounded once: an instruction, or the C library's ``fma``."""

    def fused(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return types.float64(types.float64, types.float64, types.float64), fused


@intrinsic
def _address(typingctx, array):  # type: ignore[no-untyped-def]
    """Return where the first element of ``array`` is, an int64."""

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(array)(context, builder, arguments[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), cast


def _row(layout: str) -> Any:
    """Return the function that makes an array of one axis and ``layout`` out of ``first``.

    It has ``length`` elements, lies ``offset`` bytes behind ``first``, and holds no reference.
    """

    @intrinsic
    def row(typingctx, first, offset, length):  # type: ignore[no-untyped-def]
        def move(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            array = context.make_array(first)(context, builder, arguments[0])
            start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
            array.data = builder.bitcast(builder.gep(start, [arguments[1]]), array.data.type)
            array.shape = builder.insert_value(array.shape, arguments[2], 0)
            array.nitems = arguments[2]
            array.meminfo = ir.Constant(array.meminfo.type, None)
            return array._getvalue()

        return first.copy(layout=layout)(first, types.int64, types.int64), move

    return row


_strided_row, _dense_row = _row("A"), _row("C")


# Magnitudes: |x| or x² in binary64, less the second result, which is what the square lost.


@register_jitable
def _absolute(value):  # type: ignore[no-untyped-def]
    return abs(value), 0.0


@register_jitable
def _square(value):  # type: ignore[no-untyped-def]
    square = value * value
    return square, -_multiply_add(value, value, -square)


# Updates: add the gradient at x[j] to g[j], rounding after every operation in the compute dtype.


@register_jitable
def _leave(g, j, x, strength, divisor):  # type: ignore[no-untyped-def]
    pass


@register_jitable
def _signed(x, strength):  # type: ignore[no-untyped-def]
    real = type(x)
    return real(strength) * math.copysign(real(1.0), x) if abs(x) > 0 else real(0.0)


@register_jitable
def _add_signed(g, j, x, strength, divisor):  # type: ignore[no-untyped-def]
    g[j] = _narrow(g[j], _widen(g[j]) + _signed(x, strength))


@register_jitable
def _add_scaled(g, j, x, strength, divisor):  # type: ignore[no-untyped-def]
    real = type(x)
    g[j] = _narrow(g[j], _widen(g[j]) + (real(strength) * real(2)) * x)


@register_jitable
def _add_both(g, j, x, strength, divisor):  # type: ignore[no-untyped-def]
    real = type(x)
    added = _signed(x, strength[0]) + (real(strength[1]) * real(2)) * x
    g[j] = _narrow(g[j], _widen(g[j]) + added)


@register_jitable
def _add_quotient(g, j, x, strength, divisor):  # type: ignore[no-untyped-def]
    real = type(x)
    g[j] = _narrow(g[j], _widen(g[j]) + (real(strength) * x) / real(divisor))


_UPDATES = {
    ActivityNorm.L1: _add_signed,
    ActivityNorm.L2: _add_quotient,
    ActivityNorm.L2_SQUARED: _add_scaled,
    ActivityNorm.L1_L2_SQUARED: _add_both,
}


# Rows: update the gradients along one axis and add the magnitudes to the total, which is a sum in
# a pair (hi, lo), or two sums.


@register_jitable(fastmath={"reassoc"})
def _plus(total, term):  # type: ignore[no-untyped-def]
    """Add, in an order that the compiler may change: what makes a sum of vectors of it."""
    return total + term


@register_jitable
def _sum_plain(x, g, total, magnitude, update, strength, divisor):  # type: ignore[no-untyped-def]
    hi, lo = total
    for j in range(x.size):
        value = _widen(x[j])
        hi = _plus(hi, magnitude(np.float64(value))[0])
        update(g, j, value, strength, divisor)
    return hi, lo


@register_jitable
def _sum_plain_both(x, g, total, magnitude, update, strength, divisor):  # type: ignore[no-untyped-def]
    absolute, absolute_lo, squares, squares_lo = total
    for j in range(x.size):
        value = _widen(x[j])
        wide = np.float64(value)
        absolute = _plus(absolute, abs(wide))
        squares = _plus(squares, wide * wide)
        update(g, j, value, strength, divisor)
    return absolute, absolute_lo, squares, squares_lo


@register_jitable
def _sum_anchored(x, g, total, magnitude, update, strength, divisor):  # type: ignore[no-untyped-def]
    for start in range(0, x.size, ANCHORED_TERMS):
        # Slices indexed from 0 need no check for negative indices, which would not vectorize.
        xs, gs = x[start : start + ANCHORED_TERMS], g[start : start + ANCHORED_TERMS]
        total = _merge(total, _sum_tile(xs, gs, magnitude, update, strength, divisor))
    return total


@register_jitable
def _sum_anchored_both(x, g, total, magnitude, update, strength, divisor):  # type: ignore[no-untyped-def]
    for start in range(0, x.size, ANCHORED_TERMS):  # the second look at a tile is in the cache
        xs, gs = x[start : start + ANCHORED_TERMS], g[start : start + ANCHORED_TERMS]
        absolute = _sum_tile(xs, gs, _absolute, _leave, strength, divisor)
        squares = _sum_tile(xs, gs, _square, update, strength, divisor)
        total = _merge_both(total, (*absolute, *squares))
    return total


@register_jitable
def _sum_tile(xs, gs, magnitude, update, strength, divisor):  # type: ignore[no-untyped-def]
    largest = 0
    for j in range(xs.size):  # the bits of magnitudes are in the order of the magnitudes
        largest = max(largest, _bits(abs(xs[j])))
    exponent = _bits(magnitude(_float(largest))[0]) >> 52  # biased by 1023
    anchor = _float((exponent + 10) << 52)
    total, rest = 0.0, 0.0
    for j in range(xs.size):
        term, excess = magnitude(xs[j])
        high = (term + anchor) - anchor
        total = _plus(total, high)
        rest = _plus(rest, (term - high) - excess)
        update(gs, j, xs[j], strength, divisor)
    if largest == 0 or 123 <= exponent <= 2036:
        return two_sum(total, rest)
    return math.inf, 0.0


@register_jitable
def _sum_nothing(x, g, total, magnitude, update, strength, divisor):  # type: ignore[no-untyped-def]
    for j in range(x.size):
        update(g, j, _widen(x[j]), strength, divisor)
    return total


@register_jitable
def _merge(a, b):  # type: ignore[no-untyped-def]
    return merge_pairs(a[0], a[1], b[0], b[1])


@register_jitable
def _merge_both(a, b):  # type: ignore[no-untyped-def]
    first, second = merge_pairs(a[0], a[1], b[0], b[1]), merge_pairs(a[2], a[3], b[2], b[3])
    return first[0], first[1], second[0], second[1]


@register_jitable
def _merge_blocks(totals, column):  # type: ignore[no-untyped-def]
    hi, lo = 0.0, 0.0
    for b in range(totals.shape[0]):
        hi, lo = merge_pairs(hi, lo, totals[b, column], totals[b, column + 1])
    return hi, lo


@register_jitable
def _merged(totals):  # type: ignore[no-untyped-def]
    return _merge_blocks(totals, 0)


@register_jitable
def _merged_both(totals):  # type: ignore[no-untyped-def]
    first, second = _merge_blocks(totals, 0), _merge_blocks(totals, 2)
    return first[0], first[1], second[0], second[1]


# λ, or both of a pair.


@register_jitable
def _rounded(lam, real):  # type: ignore[no-untyped-def]
    return np.float64(real(lam))


@register_jitable
def _rounded_both(lam, real):  # type: ignore[no-untyped-def]
    return np.float64(real(lam[0])), np.float64(real(lam[1]))


@register_jitable
def _largest(lam):  # type: ignore[no-untyped-def]
    return lam


@register_jitable
def _largest_of_both(lam):  # type: ignore[no-untyped-def]
    return max(lam[0] / 2, lam[1])  # the limit is that of λ₂, which the gradient doubles


@register_jitable
def _certified(total, bound, lam, epsilon, root, real):  # type: ignore[no-untyped-def]
    return certified(total[0], total[1], bound, lam, epsilon, root, real)


@register_jitable
def _certified_both(total, bound, lam, epsilon, root, real):  # type: ignore[no-untyped-def]
    penalty, certain = certified_both(total, bound, lam, real)
    return penalty, real(0.0), True, certain


class _Summing(NamedTuple):
    """How a norm is summed: what a kernel closes over."""

    row: Any
    zero: tuple[float, ...]
    merge: Any
    merged: Any
    magnitude: Any = _absolute
    numbers: Any = types.float64  # the type of λ
    rounded: Any = _rounded
    largest: Any = _largest
    certified: Any = _certified


def _summing(norm: ActivityNorm | None, dtype: np.dtype[Any]) -> _Summing:
    """Return how ``norm`` is summed; None sums nothing."""
    anchored = dtype == FLOAT64
    if norm is None:
        return _Summing(_sum_nothing, (0.0, 0.0), _merge, _merged)
    if norm is ActivityNorm.L1_L2_SQUARED:
        return _Summing(
            _sum_anchored_both if anchored else _sum_plain_both,
            (0.0,) * 4,
            _merge_both,
            _merged_both,
            numbers=types.UniTuple(types.float64, 2),
            rounded=_rounded_both,
            largest=_largest_of_both,
            certified=_certified_both,
        )
    row = _sum_anchored if anchored else _sum_plain
    magnitude = _absolute if norm is ActivityNorm.L1 else _square
    return _Summing(row, (0.0, 0.0), _merge, _merged, magnitude)


@register_jitable
def _tally_row(row, bins, squares):  # type: ignore[no-untyped-def]
    """Add the limbs of every element, or of its square, to the bin of its exponent.

    Returns infinity or NaN once met, else 0. A limb is below 2²⁸, so a bin holds 2³⁵ of them.
    """
    special = 0.0
    for j in range(row.size):
        magnitude = abs(np.float64(_widen(row[j])))
        bits = _bits(magnitude)
        exponent = bits >> 52
        if exponent == 2047:
            special += magnitude
            continue
        significand = bits & ((1 << 52) - 1)
        if exponent > 0:
            significand |= 1 << 52  # implied, but in subnormal numbers
            exponent -= 1
        low, high = significand & _LOW, significand >> LIMB
        if squares:
            ends, middle, top = low * low, 2 * low * high, high * high
            bins[exponent, 0] += ends & _LOW
            bins[exponent, 1] += (ends >> LIMB) + (middle & _LOW)
            bins[exponent, 2] += (middle >> LIMB) + (top & _LOW)
            bins[exponent, 3] += top >> LIMB
        else:
            bins[exponent, 0] += low
            bins[exponent, 1] += high
    return special


@register_jitable
def _offsets(axes, row):  # type: ignore[no-untyped-def]
    """Return by how many bytes a row lies behind the first, in both arrays."""
    x_offset, g_offset = 0, 0
    for axis in range(axes.shape[1] - 1, -1, -1):
        row, place = divmod(row, axes[0, axis])
        x_offset += place * axes[1, axis]
        g_offset += place * axes[2, axis]
    return x_offset, g_offset


# Kernels.

_KERNELS: dict[tuple[Any, ...], Any] = {}
_COMPILING = threading.RLock()
lock_over_fork(_COMPILING)


def _kernel(factory: Callable[..., Any], *key: Any) -> Any:
    """Return the kernel that ``factory`` makes of ``key``; compile it once."""
    name = factory, *key
    kernel = _KERNELS.get(name)
    if kernel is None:
        with _COMPILING:  # other threads wait for the first rather than compile the same
            kernel = _KERNELS.get(name)
            if kernel is None:
                with interrupts_wait():
                    kernel = _KERNELS[name] = factory(*key)
    return kernel


def _compiled(kernel: Any, signature: Any, parallel: bool = False, **options: Any) -> Any:
    """Compile ``kernel``, or load it from Numba's cache on disk.

    Loading takes 4 to 9 ms where compiling takes 0.2 to 3 s. Numba puts whole files in place, so
    processes may race. Where the cache cannot be read or written, it is done without.
    """
    compiler: Any = numba.njit
    options = {"parallel": parallel, "nogil": True, "error_model": "numpy"} | options
    if _CACHING:
        with contextlib.suppress(Exception):
            return compiler(signature, cache=True, **options)(kernel)
    return compiler(signature, **options)(kernel)


def _edition(*modules: Any) -> int:
    """Return a number for what else the code of a kernel depends on.

    That is ``modules``, the arithmetic of :mod:`~actreg_dispatch.rounding` and Numba's environment
    variables, such as ``NUMBA_BOUNDSCHECK``. Kernels close over the number, which makes it part of
    the key of Numba's cache; Numba itself notices only that the file of the kernel has changed.
    """
    try:
        sources = "".join(map(inspect.getsource, (rounding, *modules)))
    except OSError:  # then there is no cache either
        sources = ""
    options = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith("NUMBA_") and name not in _NOT_IN_THE_CODE
    )
    return zlib.crc32("\n".join([sources, *options]).encode())


def _bits_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that a kernel knows ``dtype`` by."""
    if dtype.itemsize > 2:
        return dtype
    return np.dtype(np.uint16 if dtype == FLOAT16 else np.int16)


def _flat(norm: ActivityNorm, dtype: np.dtype[Any], writes: bool, parallel: bool) -> Any:
    """Compile the kernel that does a whole call on contiguous arrays of one axis.

    It takes activations, gradients, λ of the penalty, λ of the gradient, and epsilon (NaN for the
    default), and returns the penalty, or ``REFUSED`` or ``UNDECIDED``. Without ``writes`` the
    gradients are the activations again. The signature is explicit: arrays of another dtype, layout
    or writability are a TypeError.
    """
    summing = _summing(norm, dtype)
    sum_row, zero, merge, merged, magnitude, numbers, rounded, largest_of, certified_of = summing
    compute = FLOAT64 if dtype == FLOAT64 else FLOAT32
    anchored, root, real = dtype == FLOAT64, norm is ActivityNorm.L2, compute.type
    update = _UPDATES[norm] if writes and not root else _leave
    largest = largest_lam(norm, compute)
    default = float(np.finfo(compute).eps)
    divides, columns = root and writes, len(zero)
    edition = _edition()

    def kernel(x, g, lam, strength, epsilon):  # type: ignore[no-untyped-def]
        _ = edition
        size, reach = x.size, x.size * x.itemsize
        apart = abs(_address(x) - _address(g)) >= reach or not writes
        aligned = (_address(x) | _address(g)) % x.itemsize == 0  # which Numba takes for granted
        lam, strength = rounded(lam, real), rounded(strength, real)
        taken = apart and aligned and size == g.size and largest_of(lam) <= largest
        if not taken or (size >= PARALLEL_FROM) != parallel:
            return REFUSED
        blocks = -(-size // _BLOCK)
        if parallel:
            totals = np.empty((blocks, columns))
            for b in numba.prange(blocks):
                xs, gs = x[b * _BLOCK : (b + 1) * _BLOCK], g[b * _BLOCK : (b + 1) * _BLOCK]
                totals[b] = sum_row(xs, gs, zero, magnitude, update, strength, 0.0)
            total = merged(totals)
        else:
            total = zero
            for b in range(blocks):
                xs, gs = x[b * _BLOCK : (b + 1) * _BLOCK], g[b * _BLOCK : (b + 1) * _BLOCK]
                block = sum_row(xs, gs, zero, magnitude, update, strength, 0.0)
                total = merge(total, block)
        bound = anchored_bound(size) if anchored else PLAIN_BOUND
        floor = default if math.isnan(epsilon) else epsilon
        penalty, divisor, has_gradient, certain = certified_of(total, bound, lam, floor, root, real)
        if not certain:
            return REFUSED if divides else UNDECIDED
        if divides and has_gradient:
            for b in numba.prange(blocks):
                xs, gs = x[b * _BLOCK : (b + 1) * _BLOCK], g[b * _BLOCK : (b + 1) * _BLOCK]
                _sum_nothing(xs, gs, zero, magnitude, _add_quotient, strength, divisor)
        return np.float64(penalty)

    element = numba.from_dtype(dtype)
    x = types.Array(element, 1, "C", readonly=True)
    g = types.Array(element, 1, "C", readonly=not writes)
    # Without Numba's reference counts, which it has no use for, a serial call takes 50 ns less.
    signature = types.float64(x, g, numbers, numbers, types.float64)
    compiled = _compiled(kernel, signature, parallel, _nrt=parallel)
    if not parallel:
        return compiled

    def guarded(x, g, lam, strength, epsilon):  # type: ignore[no-untyped-def]
        return compiled(x, g, lam, strength, epsilon) if may_use_threads() else REFUSED

    return guarded


def _flat_on_bits(*key: Any) -> Any:
    """Return the function that does the same for 16-bit floats."""
    norm, dtype, *rest = key
    bits = _bits_of(dtype)
    kernel = _flat(norm, bits, *rest)
    return lambda x, g, *options: kernel(x.view(bits), g.view(bits), *options)


def _strided(norm: ActivityNorm | None, update: Any, dtype: np.dtype[Any], parallel: bool) -> Any:
    """Compile one pass over what :func:`_rows` returns, which returns the total."""
    summing = _summing(norm, dtype)
    sum_row, zero, magnitude, merged = summing.row, summing.zero, summing.magnitude, summing.merged
    columns = len(zero)
    edition = _edition(), parallel  # or one twin would be taken from the cache for the other

    def kernel(x, g, axes, strength, divisor):  # type: ignore[no-untyped-def]
        _ = edition
        length = x.size
        dense = x.strides[0] == x.itemsize and g.strides[0] == g.itemsize
        pieces = -(-length // _BLOCK)  # of a row
        units = axes[0].prod() * pieces
        units_per_block = max(1, _BLOCK // length)
        blocks = -(-units // units_per_block)
        totals = np.empty((blocks, columns))
        for b in numba.prange(blocks):
            total = zero
            for unit in range(b * units_per_block, min((b + 1) * units_per_block, units)):
                row, piece = divmod(unit, pieces)
                start = piece * _BLOCK
                count = min(_BLOCK, length - start)
                x_offset, g_offset = _offsets(axes, row)
                x_offset += start * x.strides[0]
                g_offset += start * g.strides[0]
                if dense:
                    xs, gs = _dense_row(x, x_offset, count), _dense_row(g, g_offset, count)
                    total = sum_row(xs, gs, total, magnitude, update, strength, divisor)
                else:
                    xs, gs = _strided_row(x, x_offset, count), _strided_row(g, g_offset, count)
                    total = sum_row(xs, gs, total, magnitude, update, strength, divisor)
            totals[b] = total
        return merged(totals)

    element = numba.from_dtype(dtype)
    x = types.Array(element, 1, "A", readonly=True)
    g = types.Array(element, 1, "A", readonly=update is _leave)
    numbers = types.UniTuple(types.float64, 2) if update is _add_both else types.float64
    total = types.UniTuple(types.float64, columns)
    return _compiled(kernel, total(x, g, _AXES, numbers, types.float64), parallel)


def _tally(degree: int, dtype: np.dtype[Any]) -> Any:
    """Compile the exact sum over what :func:`_rows` returns."""
    squares = degree == 2
    edition = _edition()

    def kernel(x, axes, bins):  # type: ignore[no-untyped-def]
        _ = edition
        special = 0.0
        for row in range(axes[0].prod()):
            offset, _ = _offsets(axes, row)
            special += _tally_row(_strided_row(x, offset, x.size), bins, squares)
        return special

    x = types.Array(numba.from_dtype(dtype), 1, "A", readonly=True)
    bins = types.Array(types.int64, 2, "C")
    return _compiled(kernel, types.float64(x, _AXES, bins))


def _clearing() -> Any:
    """Compile what fills bytes with zeros in parallel."""

    def kernel(g):  # type: ignore[no-untyped-def]
        for b in numba.prange(-(-g.size // _PAGES)):
            g[b * _PAGES : (b + 1) * _PAGES] = 0

    return _compiled(kernel, types.void(types.Array(types.uint8, 1, "C")), parallel=True)


def _run(
    norm: ActivityNorm | None,
    update: Any,
    x: Any,
    g: Any,
    strength: Any = 0.0,
    divisor: float = 0.0,
) -> tuple[float, ...]:
    """Run one pass over all elements and return the total that ``norm`` takes."""
    if x.size == 0:
        return _summing(norm, x.dtype).zero
    parallel = x.size >= PARALLEL_FROM and may_use_threads()
    x, g, axes = _rows(x, g)
    kernel = _kernel(_strided, norm, update, x.dtype, parallel)
    return kernel(x, g, axes, strength, divisor)  # type: ignore[no-any-return]


def _rows(x: Any, g: Any) -> tuple[Any, Any, np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the bits of the first rows of ``x`` and ``g``, and where the others are.

    A row is the last axis that :func:`collapse` leaves. The others come as three lists, of their
    lengths and of the bytes that ``x`` and ``g`` step along them.
    """
    bits = _bits_of(x.dtype)
    x, g = collapse(x.view(bits), g.view(bits))
    axes = np.array([x.shape[:-1], x.strides[:-1], g.strides[:-1]], np.int64)
    first = (0,) * (x.ndim - 1)
    return x[first], g[first], axes
