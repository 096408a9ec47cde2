"""Many small CuPy arrays at once: as many launches for all layers of a model as for one.

A table on the device says where the layers lie and which blocks of threads are theirs.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from actreg_dispatch.backends.cupy_cuda import (
    ADDED,
    ELEMENTS_PER_THREAD,
    MAX_BLOCKS,
    OPTIONS,
    PLACES,
    PREAMBLE,
    THREADS,
    walk,
)
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.rounding import COMPUTE_DTYPES

__all__ = ["apply_many"]

_COUNTERS = PLACES + 2

# What the columns of the table are for: addresses, elements, blocks before and of the layer, and
# as the bits of binary64 numbers λ of the penalty and of the gradient, each for two sums.
_COLUMNS = ("X", "G", "SIZE", "BEFORE", "BLOCKS", "LAM", "LAM2", "STRENGTH", "STRENGTH2")
_PREAMBLE = (
    PREAMBLE
    + f"""
enum columns {{ {", ".join(_COLUMNS)}, COLUMNS }};
"""
)

# Finds the layer of a block, and names what walk takes.
_LAYER = """
    ptrdiff_t layer = 0;
    for (ptrdiff_t last = layers - 1; layer < last;) {
        const ptrdiff_t middle = (layer + last + 1) / 2;
        if (table[middle * COLUMNS + BEFORE] <= blockIdx.x) layer = middle; else last = middle - 1;
    }
    using C = typename compute<T>::type;
    const auto row = &table[layer * COLUMNS];
    const T* const x = reinterpret_cast<const T*>(row[X]);
    T* const g = reinterpret_cast<T*>(row[G]);
    const ptrdiff_t count = row[SIZE], step = row[BLOCKS] * THREADS;
    const ptrdiff_t start = (blockIdx.x - row[BEFORE]) * THREADS + threadIdx.x;
    C strength, second_strength;
    narrow(__longlong_as_double(row[STRENGTH]), strength);
    narrow(__longlong_as_double(row[STRENGTH2]), second_strength);"""


def _pass_kernel(norm: ActivityNorm, *terms: str) -> cupy.ElementwiseKernel:
    """Return the kernel that sums every layer and, but for L2, updates its gradients."""
    names = [f"sum{k}" for k in range(len(terms))]
    places = [f"&digits[(layer * {len(terms)} + {k}) * {_COUNTERS}]" for k in range(len(terms))]
    updates = norm is not ActivityNorm.L2
    use = " ".join(
        f"{name}.add_{term}(value[b], {place});"
        for name, term, place in zip(names, terms, places, strict=True)
    )
    if updates:
        use += f" g[j] = T(add(old[b], {ADDED[norm]}));"
    ends = " ".join(
        f"count_block({name}, {place});" for name, place in zip(names, places, strict=True)
    )
    return cupy.ElementwiseKernel(
        "raw int64 table, int64 layers, raw T like",
        "raw int64 digits",
        f"{_LAYER}\n exact_sum {', '.join(names)};{walk(use, updates=updates)}\n {ends}",
        f"actreg_many_{norm.value}",
        preamble=_PREAMBLE,
        options=OPTIONS,
        no_return=True,
    )


_PASSES = {
    ActivityNorm.L1: _pass_kernel(ActivityNorm.L1, "absolute"),
    ActivityNorm.L2: _pass_kernel(ActivityNorm.L2, "square"),
    ActivityNorm.L2_SQUARED: _pass_kernel(ActivityNorm.L2_SQUARED, "square"),
    ActivityNorm.L1_L2_SQUARED: _pass_kernel(ActivityNorm.L1_L2_SQUARED, "absolute", "square"),
}


def _finish_kernel(norm: ActivityNorm) -> cupy.ElementwiseKernel:
    """Return the kernel of which one thread writes the penalty, and the divisor, of one layer."""
    sums = 2 if norm is ActivityNorm.L1_L2_SQUARED else 1
    end = {
        ActivityNorm.L2: "finish_l2(used, own, lam, epsilon, penalty, divisor)",
        ActivityNorm.L1_L2_SQUARED: "finish_both(used, own, lam, second_lam, penalty)",
    }.get(norm, "finish(used, own, lam, penalty)")
    return cupy.ElementwiseKernel(
        "raw int64 table, raw int64 digits, float64 epsilon",
        "C penalty, C divisor",
        f"""
        const double lam = __longlong_as_double(table[i * COLUMNS + LAM]);
        const double second_lam = __longlong_as_double(table[i * COLUMNS + LAM2]);
        const long long* const own = &digits[i * {sums * _COUNTERS}];
        const places used = places_of(own);
        {end};
        """,
        f"actreg_many_finish_{norm.value}",
        preamble=_PREAMBLE,
        options=OPTIONS,
    )


_FINISHES = {norm: _finish_kernel(norm) for norm in ActivityNorm}
_UPDATE_L2 = cupy.ElementwiseKernel(
    "raw int64 table, int64 layers, raw C divisors",
    "raw T like",
    f"""{_LAYER}
    __shared__ C size;
    if (threadIdx.x == 0) size = divisors[layer];
    __syncthreads();
    if (widen(size) == 0.0) return;{
        walk(f"g[j] = T(add(old[b], {ADDED[ActivityNorm.L2]}));", updates=True)
    }
    """,
    "actreg_many_update_l2",
    preamble=_PREAMBLE,
    options=OPTIONS,
    no_return=True,
)


def apply_many(
    activations: list[cupy.ndarray],
    gradients: list[cupy.ndarray],
    norm: ActivityNorm,
    constants: list[tuple[Any, Any, float]],
) -> list[cupy.ndarray] | None:
    """Update all gradients and return the penalties, or None, having written nothing.

    The arrays have been checked; ``constants`` are λ of the penalty and of the gradient, and
    epsilon, for each layer. What is taken is contiguous, of one dtype and on one device.
    """
    first, layers = activations[0], len(activations)
    for array in (*activations, *gradients):
        plain = array.flags.c_contiguous and array.dtype == first.dtype
        if not plain or array.device != first.device:
            return None
    table = np.zeros((layers, len(_COLUMNS)), np.int64)
    sizes = np.array([x.size for x in activations], np.int64)
    blocks = np.minimum(MAX_BLOCKS, -(-sizes // (THREADS * ELEMENTS_PER_THREAD)))
    table[:, 0] = [x.data.ptr for x in activations]
    table[:, 1] = [g.data.ptr for g in gradients]
    table[:, 2], table[:, 3], table[:, 4] = sizes, np.cumsum(blocks) - blocks, blocks
    numbers = table.view(np.float64)
    for row, (lam, strength, _) in zip(numbers, constants, strict=True):
        row[5:7], row[7:9] = lam, strength  # one of them for both, where there is one
    epsilon, threads = constants[0][2], int(blocks.sum()) * THREADS
    sums = 2 if norm is ActivityNorm.L1_L2_SQUARED else 1
    compute = COMPUTE_DTYPES[first.dtype]
    with first.device:
        digits = cupy.zeros(layers * sums * _COUNTERS, np.int64)
        penalties, divisors = (cupy.empty(layers, compute) for _ in range(2))
        there = cupy.asarray(table)
        launch = {"size": threads, "block_size": THREADS}
        if threads:
            _PASSES[norm](there, layers, first, digits, **launch)
        _FINISHES[norm](there, digits, epsilon, penalties, divisors)
        if threads and norm is ActivityNorm.L2:
            _UPDATE_L2(there, layers, divisors, gradients[0], **launch)
        return list(penalties)
