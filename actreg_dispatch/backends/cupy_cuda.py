"""The CUDA backend: CuPy kernels that read the activations once and never make the host wait.

L1 and squared L2 take two launches. The first, an ``ElementwiseKernel`` over raw arrays, owns its
loop: every thread walks the arrays with the stride of the whole grid, updates the gradient, and
carries the double-double sum of its terms; the threads of a block add theirs up in a tree in
shared memory. The second, a ``ReductionKernel`` over the partial sums of the blocks, evaluates the
penalty on the device. L2 needs the norm before the gradient, so a third launch updates it.

The grid depends on the number of elements alone, so the tree of the sum, and with it every bit, is
the same on every device. The result is rounded from the double-doubles, without a test whether they
decide it: an exact sum to turn to would need the host.

``--fmad=false`` keeps multiplications and additions apart. CuPy also compiles with ``-ftz=true``,
which would flush subnormal float32 numbers to zero and which no option undoes, so the arithmetic on
float32 is stated in PTX.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from actreg_dispatch.layout import collapse
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import (
    FLOAT32,
    FLOAT64,
    LIMB,
    PartialSum,
    degree_of,
    limbs_of,
    units_of,
)

name = "cupy"
dtypes = frozenset({FLOAT32, FLOAT64})

_THREADS = 256  # of a block, as in the preamble
_MAX_BLOCKS = 1024
_ELEMENTS_PER_THREAD = 8  # at least, so that the partial sums weigh little beside the data
_OPTIONS = ("--fmad=false",)

PREAMBLE = r"""
// float32 with subnormal numbers; float64 has them anyway.
__device__ inline double widen(double x) { return x; }
__device__ inline double widen(float x) {
    double y;
    asm("cvt.f64.f32 %0, %1;" : "=d"(y) : "f"(x));
    return y;
}
__device__ inline void narrow(double x, double& y) { y = x; }
__device__ inline void narrow(double x, float& y) {
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(y) : "d"(x));
}
__device__ inline double add(double x, double y) { return x + y; }
__device__ inline double multiply(double x, double y) { return x * y; }
__device__ inline double divide(double x, double y) { return x / y; }
__device__ inline float add(float x, float y) {
    float z;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ inline float multiply(float x, float y) {
    float z;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ inline float divide(float x, float y) {
    float z;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// A sum of terms >= 0 as an unevaluated pair of binary64 numbers.
struct partial_sum { double hi, lo; };

// (a.hi + a.lo) + (b.hi + b.lo), normalized; a sum that is not finite is its hi.
__device__ inline partial_sum merge(const partial_sum& a, const partial_sum& b) {
    const double s = a.hi + b.hi;
    if (!isfinite(s)) return {s, 0.0};
    const double b_rounded = s - a.hi;
    const double e = ((a.hi - (s - b_rounded)) + (b.hi - b_rounded)) + (a.lo + b.lo);
    const double hi = s + e;
    return {hi, e - (hi - s)};
}

// |x| and x * x without a rounding error.
__device__ inline partial_sum absolute(double x) { return {fabs(x), 0.0}; }
__device__ inline partial_sum square(double x) {
    const double p = x * x;
    return {p, fma(x, x, -p)};
}

// Add to a counter that all threads share.
__device__ inline void count(long long* counter, long long amount) {
    atomicAdd(reinterpret_cast<unsigned long long*>(counter), (unsigned long long)amount);
}

// The gradient at x, rounded after every operation.
template <typename T> __device__ inline T signed_strength(T x, T lam) {
    const double wide = widen(x);
    return multiply(lam, T((wide > 0.0) - (wide < 0.0)));
}
template <typename T> __device__ inline T scaled(T x, T lam) {
    return multiply(multiply(lam, T(2)), x);
}

// The sum over the 256 threads of a block, in thread 0.
__device__ inline partial_sum block_sum(partial_sum mine) {
    __shared__ double hi[256], lo[256];
    const int t = threadIdx.x;
    hi[t] = mine.hi;
    lo[t] = mine.lo;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) {
            mine = merge(mine, {hi[t + half], lo[t + half]});
            hi[t] = mine.hi;
            lo[t] = mine.lo;
        }
    }
    return mine;
}
"""


def _pass_kernel(kernel_name: str, term: str, update: str) -> cupy.ElementwiseKernel:
    """Return the kernel that sums ``term`` of every x and adds ``update`` to every gradient.

    It is launched with one index ``i`` a thread, whole blocks of them, and leaves a partial sum a
    block in ``hi`` and ``lo``.
    """
    inputs = "raw T x, int64 count, T lam"
    outputs = "raw float64 hi, raw float64 lo"
    return cupy.ElementwiseKernel(
        inputs,
        f"{outputs}, raw T g" if update else outputs,
        f"""
        partial_sum mine = {{0.0, 0.0}};
        for (ptrdiff_t j = i; j < count; j += _ind.size()) {{
            const T value = x[j];
            mine = merge(mine, {term}(widen(value)));
            {f"g[j] = add(g[j], {update}(value, lam));" if update else ""}
        }}
        mine = block_sum(mine);
        if (threadIdx.x == 0) {{
            hi[blockIdx.x] = mine.hi;
            lo[blockIdx.x] = mine.lo;
        }}
        """,
        kernel_name,
        preamble=PREAMBLE,
        options=_OPTIONS,
        no_return=True,
    )


def _finish_kernel(kernel_name: str, size: str) -> cupy.ReductionKernel:
    """Return the kernel that merges partial sums and rounds λ·``size`` to T, once."""
    return cupy.ReductionKernel(
        "float64 hi, float64 lo, float64 lam",
        "float64 total, T penalty",
        "partial_sum{hi, lo}",
        "merge(a, b)",
        f"total = a.hi, narrow(lam * {size}, penalty)",
        "partial_sum{0.0, 0.0}",
        kernel_name,
        reduce_type="partial_sum",
        preamble=PREAMBLE,
        options=_OPTIONS,
    )


_SUM_ABS = _pass_kernel("actreg_sum_abs", "absolute", "")
_SUM_SQUARES = _pass_kernel("actreg_sum_squares", "square", "")
_APPLY_L1 = _pass_kernel("actreg_apply_l1", "absolute", "signed_strength")
_APPLY_L2_SQUARED = _pass_kernel("actreg_apply_l2_squared", "square", "scaled")
_FINISH = _finish_kernel("actreg_finish", "a.hi")
_FINISH_L2 = _finish_kernel("actreg_finish_l2", "sqrt(a.hi)")

_UPDATE_L2 = cupy.ElementwiseKernel(
    "T x, raw float64 total, T lam, float64 epsilon",
    "T g",
    "if (above) g = add(g, divide(multiply(lam, x), size))",
    "actreg_update_l2",
    preamble=PREAMBLE,
    loop_prep="const bool above = !(total[0] <= epsilon); T size; narrow(sqrt(total[0]), size)",
    options=_OPTIONS,
    no_return=True,
)

# The exact sum: the limbs of every element, or of its square, go to the bin of its exponent.
_TALLY = cupy.ElementwiseKernel(
    "T x, int64 degree",
    "raw int64 bins",
    f"""
    const long long bits = __double_as_longlong(fabs(widen(x)));
    const long long exponent = bits >> 52, mask = (1LL << {LIMB}) - 1;
    long long significand = bits & ((1LL << 52) - 1);
    if (exponent == 2047) {{
        count(&bins[2 * degree * 2046 + (significand != 0)], 1);
    }} else if (bits) {{
        significand |= (long long)(exponent > 0) << 52;  // implied, but in subnormal numbers
        const long long first = 2 * degree * max(exponent - 1, 0LL);
        const long long low = significand & mask, high = significand >> {LIMB};
        if (degree == 1) {{
            count(&bins[first], low);
            count(&bins[first + 1], high);
        }} else {{
            const long long ends = low * low, middle = 2 * low * high, top = high * high;
            count(&bins[first], ends & mask);
            count(&bins[first + 1], (ends >> {LIMB}) + (middle & mask));
            count(&bins[first + 2], (middle >> {LIMB}) + (top & mask));
            count(&bins[first + 3], top >> {LIMB});
        }}
    }}
    """,
    "actreg_tally",
    preamble=PREAMBLE,
    options=_OPTIONS,
    no_return=True,
)


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


def partial_sum(activations: cupy.ndarray, norm: ActivityNorm) -> PartialSum:
    """Return Σ|x| for ``L1``, Σx² for the others, exactly; waits for the device."""
    degree = degree_of(norm)
    with activations.device:
        bins = cupy.zeros((2047, limbs_of(degree)), np.int64)  # the last for infinity and NaN
        if activations.size:
            _TALLY(collapse(activations)[0], degree, bins)
        found = bins.get()
    infinite, nan = found[2046, :2].tolist()
    special = float("nan") if nan else float("inf") if infinite else 0.0
    return PartialSum(degree, activations.dtype, units_of(found[:2046], degree), special)


def penalty(activations: cupy.ndarray, norm: ActivityNorm, lam: float) -> cupy.ndarray:
    """Return the penalty, a 0-d array on the device of ``activations``."""
    with activations.device:
        hi, lo = _pass(_sum_kernel(norm), activations, lam)
        return _finish(norm, hi, lo, lam, activations.dtype)[1]


def apply(
    activations: cupy.ndarray,
    gradients: cupy.ndarray,
    norm: ActivityNorm,
    lam: float,
    epsilon: float,
) -> cupy.ndarray:
    """Add the gradient to ``gradients`` in place and return the penalty, a 0-d array."""
    if activations.device != gradients.device:
        raise ValueError(
            f"gradients are on {gradients.device} but activations on {activations.device}; "
            f"move one of them, no data is moved unasked"
        )
    with activations.device:
        if norm is ActivityNorm.L2:
            hi, lo = _pass(_SUM_SQUARES, activations, lam)
        else:
            kernel = _APPLY_L1 if norm is ActivityNorm.L1 else _APPLY_L2_SQUARED
            hi, lo = _pass(kernel, activations, lam, gradients)
        total, result = _finish(norm, hi, lo, lam, activations.dtype)
        if norm is ActivityNorm.L2:
            _UPDATE_L2(activations, total, lam, epsilon, gradients)
        return result


def _sum_kernel(norm: ActivityNorm) -> cupy.ElementwiseKernel:
    return _SUM_ABS if norm is ActivityNorm.L1 else _SUM_SQUARES


def _pass(
    kernel: cupy.ElementwiseKernel, x: cupy.ndarray, lam: float, *gradients: cupy.ndarray
) -> cupy.ndarray:
    """Launch ``kernel`` over all elements; return the blocks' partial sums, as rows hi and lo."""
    count = x.size
    blocks = min(_MAX_BLOCKS, -(-count // (_THREADS * _ELEMENTS_PER_THREAD)))
    sums = cupy.empty((2, blocks), FLOAT64)
    if count:
        x, *g = collapse(x, *gradients)
        kernel(x, count, lam, sums[0], sums[1], *g, size=blocks * _THREADS, block_size=_THREADS)
    return sums


def _finish(
    norm: ActivityNorm, hi: cupy.ndarray, lo: cupy.ndarray, lam: float, dtype: np.dtype[Any]
) -> tuple[cupy.ndarray, cupy.ndarray]:
    """Return the rounded sum, in binary64, and the penalty, both 0-d arrays."""
    total, result = cupy.empty((), FLOAT64), cupy.empty((), dtype)
    kernel = _FINISH_L2 if norm is ActivityNorm.L2 else _FINISH
    kernel(hi, lo, lam, total, result)
    return total, result
