"""The passes over the elements: they sum powers of |x|, or add the gradient, or both.

A pass is an ``ElementwiseKernel`` over raw arrays, which owns its loop. What it sums is certified
or exact. A certified sum (``certified_sum.cuh``) costs a few operations an element in the dtype
that is computed in, and leaves a pair of numbers for each block. An exact sum (``exact_sum.cuh``)
costs more, in binary64: every thread carries it as an expansion, several numbers that add up to it
without a rounding error; the threads of a block add theirs up in a tree in shared memory, and the
blocks in global memory, by atomic additions to the words of one long integer, a superaccumulator.

A pass may have weights, which are read by their strides, never expanded, and of their own dtype. An
element whose weight is 0 is left alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import cupy

from actreg_dispatch.backends.cuda.source import OPTIONS, kernel_name, preamble, repeated
from actreg_dispatch.norms import Norm

__all__ = ["ADDERS", "GRID_STRIDE_LOOP", "LOADS", "VECTOR_LOOP", "pass_kernel"]

LOADS = 4  # by a thread of each array before it uses the first

# The loops, and what one array and a batch have different before them.

# ``start`` is the number of the thread, ``step`` that of all, ``count`` that of the elements;
# ``use(x, w, g)`` does what is to be done with an element, UPDATES says whether g changes, and
# WEIGHTED whether there is a weight w. LOADS are under way at once.
GRID_STRIDE_LOOP = """
    for (ptrdiff_t first = start; first < count; first += LOADS * step) {
        C value[LOADS], weight[LOADS], old[LOADS];
        #pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const ptrdiff_t j = first + k * step;
            if (j < count) {
                value[k] = C(activations[j]);
                if (WEIGHTED) weight[k] = C(weights[j]);
                if (UPDATES) old[k] = C(gradients[j]);
            }
        }
        #pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const ptrdiff_t j = first + k * step;
            if (j < count && !(WEIGHTED && is_zero(weight[k]))) {
                use(value[k], weight[k], old[k]);
                if (UPDATES) gradients[j] = T(old[k]);
            }
        }
        end_group();
    }"""

# For contiguous arrays without weights whose addresses differ by a multiple of 16 bytes. What comes
# before the first such address and after the last is for the first threads.
VECTOR_LOOP = """
    constexpr int PER_VECTOR = 16 / sizeof(T);
    static_assert(LOADS * PER_VECTOR <= 64 / sizeof(T), "the bound takes a group of 64 bytes");
    const T* const xs = &activations[0];
    T* const gs = &gradients[0];
    const ptrdiff_t before = min(ptrdiff_t(count), ptrdiff_t(-size_t(xs) % 16 / sizeof(T)));
    const ptrdiff_t vectors = (count - before) / PER_VECTOR;
    if (start < count - vectors * PER_VECTOR) {
        const ptrdiff_t j = start < before ? start : start + vectors * PER_VECTOR;
        C old = UPDATES ? C(gs[j]) : C(0);
        use(C(xs[j]), C(1), old);
        if (UPDATES) gs[j] = T(old);
        end_group();
    }
    const auto use_vector = [&](const uint4& x_vector, uint4& g_vector) {
        const T* const x = reinterpret_cast<const T*>(&x_vector);
        T* const g = reinterpret_cast<T*>(&g_vector);
        #pragma unroll
        for (int k = 0; k < PER_VECTOR; ++k) {
            C old = UPDATES ? C(g[k]) : C(0);
            use(C(x[k]), C(1), old);
            if (UPDATES) g[k] = T(old);
        }
    };
    const uint4* x_vectors = reinterpret_cast<const uint4*>(xs + before) + start;
    uint4* g_vectors = reinterpret_cast<uint4*>(gs + before) + start;
    ptrdiff_t left = vectors - start;
    for (; left > (LOADS - 1) * step; left -= LOADS * step) {
        uint4 x[LOADS], g[LOADS];
        #pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            x[k] = x_vectors[k * step];
            if (UPDATES) g[k] = g_vectors[k * step];
        }
        #pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            use_vector(x[k], g[k]);
            if (UPDATES) g_vectors[k * step] = g[k];
        }
        end_group();
        x_vectors += LOADS * step;
        g_vectors += LOADS * step;
    }
    for (; left > 0; left -= step) {
        const uint4 x = *x_vectors;
        uint4 g;
        if (UPDATES) g = *g_vectors;
        use_vector(x, g);
        if (UPDATES) *g_vectors = g;
        x_vectors += step;
        g_vectors += step;
    }
    end_group();"""

_ONE_ARRAY = "const ptrdiff_t layer = 0, start = i;"

# Finds the layer of a block, and names what are parameters of a kernel for one array.
_LAYER = """
    ptrdiff_t layer = 0;
    for (ptrdiff_t last = layers - 1; layer < last;) {
        const ptrdiff_t middle = (layer + last + 1) / 2;
        if (table[middle * COLUMNS + FIRST_BLOCK] <= blockIdx.x) layer = middle;
        else last = middle - 1;
    }
    const auto row = &table[layer * COLUMNS];
    const T* const activations = reinterpret_cast<const T*>(row[ACTIVATIONS]);
    T* const gradients = reinterpret_cast<T*>(row[GRADIENTS]);
    const ptrdiff_t count = row[SIZE], step = row[BLOCKS] * THREADS;
    const ptrdiff_t start = (blockIdx.x - row[FIRST_BLOCK]) * THREADS + threadIdx.x;"""

# Whether a certificate has made an exact sum needless; asked by one thread of each block.
_RETURN_IF_CERTAIN = """
    __shared__ bool is_certain;
    if (threadIdx.x == 0) is_certain = words[layer * {sums} * COUNTERS + CERTAIN] != 0;
    __syncthreads();
    if (is_certain) return;"""

# A load of these by every thread would weigh as much as one of x.
_LOAD_COEFFICIENTS = """
    __shared__ C shared[{count} + 1];
    __shared__ bool is_updated;
    if (threadIdx.x == 0) {{
        is_updated = has_gradient[layer];
        {load}
    }}
    __syncthreads();
    if (!is_updated) return;
    {name}"""


@functools.cache
def pass_kernel(
    what: str,
    kind: str,
    terms: tuple[int, ...],
    updated: Norm | None,
    batch: Norm | None,
    *,
    weighted: bool = False,
) -> cupy.ElementwiseKernel:
    """Return the kernel that sums powers of every x, or adds the gradient, or both.

    Parameters
    ----------
    what : str
        What the kernel does, for its name.
    kind : str
        Whether sums are certified, and arrays loaded by vectors.
    terms : tuple of int
        The powers that are summed, if any.
    updated : Norm or None
        The norm whose gradient is added, if any.
    batch : Norm or None
        The norm that a batch of layers have in common; None if the kernel is for one array.
    weighted : bool
        Whether each x has a weight; not of a batch, and not by vectors.
    """
    lams, coefficients = (updated.n_lams, updated.n_coefficients) if updated else (0, 0)
    wide = "__longlong_as_double(row[GRADIENT_LAM{k}])" if batch else "gradient_lam{k}"
    sums = (_certified_sums if "certified" in kind else _exact_sums)(terms, weighted)
    text, extra = [_LAYER if batch else _ONE_ARRAY, "using C = typename compute<T>::type;"], []
    if what == "sum" and not kind:
        text += [_RETURN_IF_CERTAIN.format(sums=len(terms))]
    own = "own_lam" if weighted else "lam"  # not yet times the weight
    text += [repeated(f"C {own}{{k}}; narrow({wide}, {own}{{k}});", lams)]
    if updated and updated.two_pass:
        extra = [f"raw C coefficient{k}" for k in range(coefficients)]
        extra += ["raw bool has_gradient"]
        text += [
            _LOAD_COEFFICIENTS.format(
                count=coefficients,
                load=repeated("shared[{k}] = coefficient{k}[layer];", coefficients),
                name=repeated("const C c{k} = shared[{k}];", coefficients),
            )
        ]
    added = f"old = add(old, {updated.cuda.gradient});" if updated else ""
    if weighted:
        added = repeated("const C lam{k} = multiply(own_lam{k}, w);", lams) + added
    # A division, or what the layers of a batch add to two sums, takes the registers of two vectors.
    needs_registers = updated and (not terms or (batch and len(terms) > 1))
    loads = str(LOADS // 2 if needs_registers else LOADS)
    if weighted and updated and terms:  # three arrays, as many bytes of float64 as of float32
        loads = f"{LOADS} * sizeof(float) / sizeof(C)"
    text += [
        sums.declare,
        f"const auto use = [&](const C x, const C w, C& old) {{ {sums.add} {added} }};",
        f"const auto end_group = [&] {{ {sums.end_group} }};",
        f"constexpr bool UPDATES = {str(updated is not None).lower()};",
        f"constexpr bool WEIGHTED = {str(weighted).lower()};",
        f"constexpr int LOADS = {loads};",
        "" if updated or batch else "T* const gradients = nullptr;",
        "" if weighted else "const T* const weights = nullptr;",
        VECTOR_LOOP if "vectors" in kind else GRID_STRIDE_LOOP,
        sums.finish,
    ]
    if batch:
        inputs = ["raw int64 table", "int64 layers", "raw T like", *extra]  # like says what T is
        outputs = [sums.output]
    else:
        inputs = ["raw T activations", "int64 count", "int64 step"] + ["raw W weights"] * weighted
        inputs += [*(f"float64 gradient_lam{k}" for k in range(lams)), *extra]
        outputs = [sums.output] * bool(terms) + ["raw T gradients"] * bool(updated)
    of = updated.name if updated else "_".join(map(str, terms))
    whose = "batch" if batch else "weighted" if weighted else ""
    return cupy.ElementwiseKernel(
        ", ".join(inputs),
        ", ".join(outputs),
        "\n".join(text),
        kernel_name("_".join(filter(None, (whose, what, kind, of)))),
        preamble=preamble(batch, weighted=weighted),
        options=OPTIONS,
        no_return=True,
    )


class _Sums(NamedTuple):
    """How a pass sums, as code."""

    output: str  # the parameter that takes the sums
    declare: str
    add: str  # the magnitudes of an element x, times w if there are weights
    end_group: str
    finish: str


def _exact_sums(terms: tuple[int, ...], weighted: bool) -> _Sums:
    own = [f"&words[(layer * {len(terms)} + {k}) * COUNTERS]" for k in range(len(terms))]
    x = _element(weighted)
    return _Sums(
        "raw int64 words",
        repeated("expansion sum{k};", len(terms)),
        " ".join(f"sum{k}.{ADDERS[term]}({x}, {own[k]});" for k, term in enumerate(terms)),
        "",
        " ".join(f"accumulate_block(sum{k}, {each});" for k, each in enumerate(own)),
    )


def _certified_sums(terms: tuple[int, ...], weighted: bool) -> _Sums:
    own = f"&partials[2 * ({len(terms)} * blockIdx.x + {{k}})]"
    x = _element(weighted)
    return _Sums(
        "raw float64 partials",
        repeated("lane<C> sum{k};", len(terms)),
        " ".join(f"sum{k}.{ADDERS[term]}({x}, sizeof(T) == 2);" for k, term in enumerate(terms)),
        repeated("sum{k}.end_group();", len(terms)),
        repeated(f"join_block(sum{{k}}); store(sum{{k}}, {own});", len(terms)),
    )


def _element(weighted: bool) -> str:
    return "x, w" if weighted else "x"


ADDERS = {1: "add_absolute", 2: "add_square"}
