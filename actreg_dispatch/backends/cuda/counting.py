"""Statistics on the device: one more pass over the activations, and counters that stay there.

Counts are integers, so their sum does not depend on an order, and the largest |x| is the largest of
its bits, in which NaN is above infinity. A thread counts in registers, a block by shuffles, and
blocks by atomic additions to the counters, which only who asks for them waits for.

Where units are counted, too, a thread stays in one column: the threads step by whole rows. Then a
block adds up what it counted of a unit before it adds that to the unit's counter.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import cupy
import numpy as np

from actreg_dispatch.backends.cuda.kernels import blocks_for, grid, launch
from actreg_dispatch.backends.cuda.passes import GRID_STRIDE_LOOP, LOADS, VECTOR_LOOP
from actreg_dispatch.backends.cuda.source import OPTIONS, THREADS, kernel_name, preamble

__all__ = ["Counter", "Counting", "counting_kernels"]

_TALLY = """
// |x| as its bits.
__device__ inline unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ inline integer magnitude(double x) { return __double_as_longlong(x) & (LEADING - 1); }
__device__ inline integer in_binary64(unsigned bits) {
    return magnitude(widen(__uint_as_float(bits)));
}
__device__ inline integer in_binary64(integer bits) { return bits; }

// What one thread has met, which is far fewer than 2^32 elements: there are 2^17 threads or more
// where there are so many.
template <typename C> struct tally {
    unsigned elements = 0, nonzero = 0;
    decltype(magnitude(C())) largest = 0;

    __device__ inline void add(C x) {
        const auto bits = magnitude(x);
        elements += 1;
        nonzero += bits != 0;
        largest = max(largest, bits);
    }
};

// Add what the threads of a block have met: elements, those that are not 0, and the largest.
template <typename C> __device__ inline void add_block(const tally<C>& mine, integer* totals) {
    constexpr int WARPS = THREADS / 32;
    __shared__ integer of_warps[3][WARPS];
    integer elements = mine.elements, nonzero = mine.nonzero, largest = in_binary64(mine.largest);
    for (int distance = 16; distance > 0; distance /= 2) {
        elements += __shfl_down_sync(~0u, elements, distance);
        nonzero += __shfl_down_sync(~0u, nonzero, distance);
        largest = max(largest, __shfl_down_sync(~0u, largest, distance));
    }
    const int t = threadIdx.x;
    if (t % 32 == 0) {
        of_warps[0][t / 32] = elements;
        of_warps[1][t / 32] = nonzero;
        of_warps[2][t / 32] = largest;
    }
    __syncthreads();
    if (t < 3) {
        integer total = 0;
        for (int warp = 0; warp < WARPS; ++warp) {
            const integer other = of_warps[t][warp];
            total = t < 2 ? total + other : max(total, other);
        }
        if (t < 2) atomicAdd(&totals[t], total);
        else atomicMax(&totals[t], total);
    }
}

// Add how often the unit of each thread was not 0; the block's first thread has the unit `first`.
__device__ inline void add_units(
    unsigned mine, ptrdiff_t first, ptrdiff_t units, integer* active) {
    __shared__ unsigned of_threads[THREADS];
    const int t = threadIdx.x;
    of_threads[t] = mine;
    __syncthreads();
    if (t < units) {
        integer total = 0;
        for (ptrdiff_t other = t; other < THREADS; other += units) total += of_threads[other];
        if (total != 0) atomicAdd(&active[(first + t) % units], total);
    }
}
"""


class Counting(NamedTuple):
    """The kernels that count, without weights or with them; None where there is no such one."""

    count: Any
    count_vectors: Any
    count_units: Any


@functools.cache
def counting_kernels(*, weighted: bool) -> Counting:
    """Return the kernels that count."""
    vectors = None if weighted else _counting_kernel("count_vectors", weighted)
    count, units = (_counting_kernel(what, weighted) for what in ("count", "count_units"))
    return Counting(count, vectors, units)


def _counting_kernel(what: str, weighted: bool) -> cupy.ElementwiseKernel:
    units = what == "count_units"
    text = [
        "using C = typename compute<T>::type;",
        "tally<C> met;",
        "const auto use = [&](const C x, const C w, C& old) { met.add(x); };",
        "const auto end_group = [] {};",
        "constexpr bool UPDATES = false;",
        f"constexpr bool WEIGHTED = {str(weighted).lower()};",
        f"constexpr int LOADS = {LOADS};",
        "T* const gradients = nullptr;",
        "" if weighted else "const T* const weights = nullptr;",
        # Threads of the last block that are beyond the last row of a step have nothing to do.
        f"const ptrdiff_t start = {'i < step ? i : count' if units else 'i'};",
        VECTOR_LOOP if "vectors" in what else GRID_STRIDE_LOOP,
        "add_block(met, &totals[0]);",
    ]
    inputs = ["raw T activations", "int64 count", "int64 step"] + ["raw W weights"] * weighted
    outputs = ["raw uint64 totals"]
    if units:
        text += ["add_units(met.nonzero, i - threadIdx.x, units, &active[0]);"]
        inputs += ["int64 units"]
        outputs += ["raw uint64 active"]
    return cupy.ElementwiseKernel(
        ", ".join(inputs),
        ", ".join(outputs),
        "\n".join(text),
        kernel_name(f"{'weighted_' * weighted}{what}"),
        preamble=preamble(weighted=weighted) + _TALLY,
        options=OPTIONS,
        no_return=True,
    )


class Counter:
    """What was counted on the current device; made in the order of the stream that counts.

    Parameters
    ----------
    units : int or None
        How many units there are to be counted, if they are.
    """

    def __init__(self, units: int | None) -> None:
        self.units = units
        self._device = cupy.cuda.Device()
        self._totals = cupy.zeros(3, np.uint64)
        self._active = None if units is None else cupy.zeros(units, np.uint64)

    def add(self, x: cupy.ndarray, weights: cupy.ndarray | None) -> None:
        """Count the elements of x that are not left out, without waiting for it."""
        kernels = counting_kernels(weighted=weights is not None)
        if self._active is None:
            launch(kernels, "count", self._totals, arrays=(x,), weights=weights)
        elif x.size:
            step = max(1, blocks_for(x.size) * THREADS // x.shape[-1]) * x.shape[-1]
            given = () if weights is None else (weights,)
            known = *given, self.units, self._totals, self._active
            kernels.count_units(x, x.size, step, *known, **grid(-(-step // THREADS)))

    def read(self) -> tuple[int, int, float, np.ndarray[Any, Any] | None]:
        """Wait for the device, and return elements, those not 0, the largest, and of each unit."""
        with self._device:
            self._device.synchronize()
            totals = self._totals.get()
            active = None if self._active is None else self._active.get().astype(np.int64)
        return int(totals[0]), int(totals[1]), float(totals[2:].view(np.float64)[0]), active
