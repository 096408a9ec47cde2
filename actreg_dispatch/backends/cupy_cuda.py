"""The CUDA backend: CuPy kernels that read the activations once and never make the host wait.

L1 and squared L2 take two launches. The first, an ``ElementwiseKernel`` over raw arrays, owns its
loop: every thread walks the arrays with the stride of the whole grid, updates the gradients, and
carries the sum of its terms as an expansion, several binary64 numbers that add up to it without a
rounding error. The threads of a block add theirs up in a tree in shared memory, and the blocks in
global memory, by atomic additions to the digits of one long integer. The second launch, a
``ReductionKernel`` over the digits, finds those in use, rounds the integer they make to 53 bits and
evaluates the penalty. L2 needs the norm before the gradient, so a third launch updates it.

Nothing but that last step rounds, so the bits depend neither on the order of the additions nor on
the size of the grid, and there is nothing to certify or repeat. The device functions, and why they
are exact, are in ``exact_sum.cuh``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cupy
import numpy as np

from actreg_dispatch.layout import collapse
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import (
    COMPUTE_DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    NATIVE_DTYPES,
    PairedSum,
    PartialSum,
    degree_of,
)

name = "cupy"
_HAS_BFLOAT16 = int(cupy.__version__.partition(".")[0]) >= 14
dtypes = NATIVE_DTYPES if _HAS_BFLOAT16 else {FLOAT16, FLOAT32, FLOAT64}

THREADS = 256  # of a block
MAX_BLOCKS = 1024
ELEMENTS_PER_THREAD = 8  # at least, so that the sums weigh little beside the data
_BATCH = 4  # elements that a thread loads before it uses the first: more of them are under way
_PARTS = 6  # numbers of an expansion: holds numbers 80 decades apart, or squares of 30
PLACES, _DIGIT_BITS = 168, 26  # 2 * 2046 + 106 bits of the largest square, and room for carries

_CONSTANTS = {"THREADS": THREADS, "BATCH": _BATCH, "PARTS": _PARTS, "PLACES": PLACES}
_CONSTANTS["DIGIT_BITS"] = _DIGIT_BITS
PREAMBLE = "".join(f"constexpr int {key} = {value};\n" for key, value in _CONSTANTS.items())
PREAMBLE += Path(__file__).with_name("exact_sum.cuh").read_text(encoding="utf-8")
OPTIONS = ("--fmad=false",)


def walk(use: str, *, updates: bool) -> str:
    """Return the loop of a thread that does ``use`` with ``value[b]`` (and ``old[b]``) of each j.

    ``start`` is the number of the thread, ``step`` that of all, ``count`` that of the elements.
    """
    each = """
            #pragma unroll
            for (int b = 0; b < BATCH; ++b) {{
                const ptrdiff_t j = first + b * step;
                if (j < count) {{ {} }}
            }}"""
    load = "value[b] = C(x[j]);" + (" old[b] = C(g[j]);" if updates else "")
    return f"""
        for (ptrdiff_t first = start; first < count; first += BATCH * step) {{
            C value[BATCH], old[BATCH];{each.format(load)}{each.format(use)}
        }}"""


_STRENGTHS = """
        const ptrdiff_t start = i;
        using C = typename compute<T>::type;
        C strength, second_strength;
        narrow(wide_strength, strength);
        narrow(wide_second_strength, second_strength);"""
_LOOP = "raw T x, int64 count, int64 step, float64 wide_strength, float64 wide_second_strength"


def _pass_kernel(kernel_name: str, *terms: str, added: str = "") -> cupy.ElementwiseKernel:
    """Return the kernel that adds the ``terms`` of every x to the digits, and to the gradient."""
    names = [f"sum{k}" for k in range(len(terms))]
    use = " ".join(
        f"{name}.add_{term}(value[b], &digits[{k} * (PLACES + 2)]);"
        for k, (name, term) in enumerate(zip(names, terms, strict=True))
    )
    if added:
        use += f" g[j] = T(add(old[b], {added}));"
    ends = " ".join(
        f"count_block({name}, &digits[{k} * (PLACES + 2)]);" for k, name in enumerate(names)
    )
    return cupy.ElementwiseKernel(
        _LOOP,
        "raw int64 digits, raw T g" if added else "raw int64 digits",
        f"""{_STRENGTHS}
        exact_sum {", ".join(names)};{walk(use, updates=bool(added))}
        {ends}
        """,
        kernel_name,
        preamble=PREAMBLE,
        options=OPTIONS,
        no_return=True,
    )


def _finish_kernel(kernel_name: str, inputs: str, outputs: str, end: str) -> cupy.ReductionKernel:
    """Return the kernel that finds the digits in use and calls ``end`` with them."""
    return cupy.ReductionKernel(
        f"int64 digit, raw int64 digits, {inputs}",
        outputs,
        # _j is the place of the digit, as CuPy's own first_nonzero has it; with more than one
        # input CuPy does not turn to CUB, whose kernels have no _j
        "digit != 0 ? places{int(_j), int(_j)} : places{PLACES + 2, -1}",
        "either(a, b)",
        end,
        "places{PLACES + 2, -1}",
        kernel_name,
        reduce_type="places",
        preamble=PREAMBLE,
        options=OPTIONS,
    )


ADDED = {  # to the gradient at x, value[b]
    ActivityNorm.L1: "signed_strength(value[b], strength)",
    ActivityNorm.L2: "divide(multiply(strength, value[b]), size)",
    ActivityNorm.L2_SQUARED: "scaled(value[b], strength)",
    ActivityNorm.L1_L2_SQUARED: "both(value[b], strength, second_strength)",
}
_SUM_ABSOLUTE = _pass_kernel("actreg_sum_absolute", "absolute")
_SUM_SQUARES = _pass_kernel("actreg_sum_squares", "square")
_SUM_BOTH = _pass_kernel("actreg_sum_both", "absolute", "square")
_APPLY_L1 = _pass_kernel("actreg_apply_l1", "absolute", added=ADDED[ActivityNorm.L1])
_APPLY_L2_SQUARED = _pass_kernel(
    "actreg_apply_l2_squared", "square", added=ADDED[ActivityNorm.L2_SQUARED]
)
_APPLY_BOTH = _pass_kernel(
    "actreg_apply_both", "absolute", "square", added=ADDED[ActivityNorm.L1_L2_SQUARED]
)
_SUMS = {
    ActivityNorm.L1: _SUM_ABSOLUTE,
    ActivityNorm.L2: _SUM_SQUARES,
    ActivityNorm.L2_SQUARED: _SUM_SQUARES,
    ActivityNorm.L1_L2_SQUARED: _SUM_BOTH,
}
_APPLIES = {
    ActivityNorm.L1: _APPLY_L1,
    ActivityNorm.L2_SQUARED: _APPLY_L2_SQUARED,
    ActivityNorm.L1_L2_SQUARED: _APPLY_BOTH,
}
_FINISH = _finish_kernel(
    "actreg_finish", "float64 lam", "C penalty", "finish(a, &digits[0], lam, penalty)"
)
_FINISH_BOTH = _finish_kernel(
    "actreg_finish_both",
    "float64 lam, float64 second_lam",
    "C penalty",
    "finish_both(a, &digits[0], lam, second_lam, penalty)",
)
_FINISH_L2 = _finish_kernel(
    "actreg_finish_l2",
    "float64 lam, float64 epsilon",
    "C penalty, C divisor",
    "finish_l2(a, &digits[0], lam, epsilon, penalty, divisor)",
)


def _update_kernel(kernel_name: str, added: str) -> cupy.ElementwiseKernel:
    """Return the kernel that adds ``added`` to every gradient, unless the divisor is 0."""
    return cupy.ElementwiseKernel(
        f"{_LOOP}, raw C divisor",
        "raw T g",
        f"""
        __shared__ C size;  // loaded once a block: a load a thread would weigh as much as x
        if (threadIdx.x == 0) size = divisor[0];
        __syncthreads();
        if (widen(size) == 0.0) return;{_STRENGTHS}{
            walk(f"g[j] = T(add(old[b], {added}));", updates=True)
        }
        """,
        kernel_name,
        preamble=PREAMBLE,
        options=OPTIONS,
        no_return=True,
    )


_UPDATE_L1 = _update_kernel("actreg_update_l1", ADDED[ActivityNorm.L1])
_UPDATE_L2 = _update_kernel("actreg_update_l2", ADDED[ActivityNorm.L2])
_UPDATE_L2_SQUARED = _update_kernel("actreg_update_l2_squared", ADDED[ActivityNorm.L2_SQUARED])
_UPDATE_BOTH = _update_kernel("actreg_update_both", ADDED[ActivityNorm.L1_L2_SQUARED])
_UPDATES = {
    ActivityNorm.L1: _UPDATE_L1,
    ActivityNorm.L2: _UPDATE_L2,
    ActivityNorm.L2_SQUARED: _UPDATE_L2_SQUARED,
    ActivityNorm.L1_L2_SQUARED: _UPDATE_BOTH,
}


def _probe() -> str:
    """Return why no GPU can be used; empty if one can."""
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # whatever a broken driver raises
        return f"CuPy {cupy.__version__} is installed but no CUDA device answers: {error}"
    return "" if count else f"CuPy {cupy.__version__} is installed but finds no CUDA device"


unavailable_because = _probe()


def is_available() -> bool:
    """Return whether a CUDA device answered when this module was loaded."""
    return not unavailable_because


def partial_sum(activations: cupy.ndarray, norm: ActivityNorm) -> PartialSum | PairedSum:
    """Return the sum, or the two sums, that ``norm`` takes, exactly; waits for the device."""
    dtype = COMPUTE_DTYPES[activations.dtype]
    with activations.device:
        rows = _digits(_SUMS[norm], 0.0, activations).get().reshape(-1, PLACES + 2).tolist()
    if norm is ActivityNorm.L1_L2_SQUARED:
        return PairedSum(_sum_of(rows[0], 1, dtype), _sum_of(rows[1], 2, dtype))
    return _sum_of(rows[0], degree_of(norm), dtype)


def penalty(activations: cupy.ndarray, norm: ActivityNorm, lam: Any) -> cupy.ndarray:
    """Return the penalty, a 0-d array on the device of ``activations``."""
    with activations.device:
        results = _results(norm, activations.dtype)
        digits = _digits(_SUMS[norm], 0.0, activations)
        _finish(norm, digits, lam, 0.0, results)
        return results[0]


def apply(
    activations: cupy.ndarray,
    gradients: cupy.ndarray,
    norm: ActivityNorm,
    lam: Any,
    strength: Any,
    epsilon: float,
) -> cupy.ndarray:
    """Add the gradient to ``gradients`` in place and return the penalty, a 0-d array."""
    with activations.device:
        results = _results(norm, activations.dtype)  # before anything is written
        if norm is ActivityNorm.L2:
            digits = _digits(_SUM_SQUARES, 0.0, activations)
        else:
            digits = _digits(_APPLIES[norm], strength, activations, gradients)
        _finish(norm, digits, lam, epsilon, results)
        if norm is ActivityNorm.L2:
            _launch(_UPDATE_L2, strength, results[1], arrays=(activations, gradients))
        return results[0]


def apply_many(*arguments: Any) -> list[cupy.ndarray] | None:
    """Do :func:`~actreg_dispatch.backends.many_cupy_arrays.apply_many`, loaded when needed."""
    from actreg_dispatch.backends import many_cupy_arrays

    return many_cupy_arrays.apply_many(*arguments)


def add_gradient(
    activations: cupy.ndarray,
    gradients: cupy.ndarray,
    norm: ActivityNorm,
    strength: Any,
    divisor: float,
) -> None:
    """Add the gradient to ``gradients`` in place, dividing by ``divisor`` for L2."""
    divides = norm is ActivityNorm.L2
    with activations.device:
        size = cupy.full((), divisor if divides else 1.0, COMPUTE_DTYPES[activations.dtype])
        _launch(_UPDATES[norm], strength, size, arrays=(activations, gradients))


def _digits(kernel: cupy.ElementwiseKernel, strength: Any, *arrays: cupy.ndarray) -> cupy.ndarray:
    """Return the digits of the sum that ``kernel`` takes, and behind them two more counters.

    Of two sums the first row is the first.
    """
    sums = 2 if kernel in (_SUM_BOTH, _APPLY_BOTH) else 1
    digits = cupy.zeros(sums * (PLACES + 2), np.int64)
    _launch(kernel, strength, digits, arrays=arrays)
    return digits


def _sum_of(row: list[int], degree: int, dtype: np.dtype[Any]) -> PartialSum:
    """Return what one row of :func:`_digits` stands for."""
    *digits, infinities, nans = row
    special = float("nan") if nans else float("inf") if infinities else 0.0
    units = sum(digit << _DIGIT_BITS * place for place, digit in enumerate(digits))
    return PartialSum(degree, dtype, units >> 1074 * (2 - degree), special)


def _launch(
    kernel: cupy.ElementwiseKernel, strength: Any, option: Any, *, arrays: tuple[cupy.ndarray, ...]
) -> None:
    """Launch ``kernel`` over all elements of the activations, and the gradients if there are any.

    The grid depends on their number alone.
    """
    count = arrays[0].size
    if count:
        blocks = min(MAX_BLOCKS, -(-count // (THREADS * ELEMENTS_PER_THREAD)))
        step = blocks * THREADS
        first, second = strength if isinstance(strength, tuple) else (strength, 0.0)
        x, *gradients = collapse(*arrays)
        kernel(x, count, step, first, second, option, *gradients, size=step, block_size=THREADS)


def _results(norm: ActivityNorm, dtype: np.dtype[Any]) -> list[cupy.ndarray]:
    """Return room for the penalty and, for L2, the divisor of the gradient: 0-d arrays."""
    return [cupy.empty((), COMPUTE_DTYPES[dtype]) for _ in range(1 + (norm is ActivityNorm.L2))]


def _finish(
    norm: ActivityNorm,
    digits: cupy.ndarray,
    lam: Any,
    epsilon: float,
    results: list[cupy.ndarray],
) -> None:
    """Write what :func:`_results` made room for."""
    if norm is ActivityNorm.L1_L2_SQUARED:
        _FINISH_BOTH(digits[: PLACES + 2], digits, *lam, *results)
    elif norm is ActivityNorm.L2:
        _FINISH_L2(digits, digits, lam, epsilon, *results)
    else:
        _FINISH(digits, digits, lam, *results)
