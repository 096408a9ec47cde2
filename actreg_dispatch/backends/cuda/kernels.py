"""The CUDA kernels of a norm, made of its formulas when it is first used.

Three kinds of kernel share the device functions of ``arithmetic.cuh`` and ``exact_sum.cuh``:

* A *pass*, an ``ElementwiseKernel`` over raw arrays, owns its loop over the elements: it adds up
  powers of |x|, or adds the gradient, or both. Every thread carries its sums as expansions, several
  binary64 numbers that add up to them without a rounding error; the threads of a block add theirs
  up in a tree in shared memory, and the blocks in global memory, by atomic additions to the words
  of one long integer, a superaccumulator.
* The *finish*, a ``ReductionKernel`` over those words, finds the range of those in use. The thread
  that knows it rounds the integer they make to 53 bits and evaluates penalty and coefficients.
* An *update* is a pass that adds a gradient whose coefficients another kernel has computed.

There are two of each: for one array, and for the layers of a model, which a table on the device
describes. They differ in where arrays, λ and superaccumulators are found, and in nothing else.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import cupy

from actreg_dispatch.norms import Norm

__all__ = [
    "COUNTERS",
    "MAX_BLOCKS",
    "OPTIONS",
    "PREAMBLE",
    "THREADS",
    "WORDS",
    "WORD_BITS",
    "Kernels",
    "blocks_for",
    "columns_of",
    "kernels_of",
]

THREADS = 256  # of a block
MAX_BLOCKS = 1024
_ELEMENTS_PER_THREAD = 8  # at least, so that the sums cost little compared with the data
WORDS, WORD_BITS = 168, 26  # 2 * 2046 + 106 bits of the largest square, and room for carries
COUNTERS = WORDS + 2  # of infinities and NaN

_CONSTANTS = {
    "THREADS": THREADS,
    "LOADS": 4,  # by a thread before it uses the first: more of them are under way
    "PARTS": 6,  # numbers of an expansion: holds numbers 80 decades apart, or squares of 30
    "WORDS": WORDS,
    "WORD_BITS": WORD_BITS,
}
PREAMBLE = "".join(f"constexpr int {key} = {value};\n" for key, value in _CONSTANTS.items()) + (
    "".join(
        Path(__file__).with_name(f"{part}.cuh").read_text(encoding="utf-8")
        for part in ("arithmetic", "exact_sum")
    )
)
OPTIONS = ("--fmad=false",)


class Kernels(NamedTuple):
    """The kernels of a norm; None where it takes no such one."""

    sum: Any
    apply: Any  # sums and updates; None of a norm of two passes
    finish: Any
    update: Any
    batch_sum: Any  # None of a norm of one pass
    batch_apply: Any  # None of a norm of two passes
    batch_finish: Any
    batch_update: Any  # None of a norm of one pass


@functools.cache
def kernels_of(norm: Norm) -> Kernels:
    """Return the kernels of a norm, which CuPy compiles at their first launch for a dtype."""

    def kernel(what: str, terms: tuple[int, ...], updated: Norm | None, batch: Norm | None) -> Any:
        return _pass_kernel(f"{what}_{norm.name}", terms, updated, batch)

    one, two, terms = not norm.two_pass, norm.two_pass, norm.terms
    return Kernels(
        sum=_sum_kernel(terms),
        apply=kernel("apply", terms, norm, None) if one else None,
        finish=_finish_kernel(norm, None),
        update=kernel("update", (), norm, None),
        batch_sum=kernel("batch_sum", terms, None, norm) if two else None,
        batch_apply=kernel("batch_apply", terms, norm, norm) if one else None,
        batch_finish=_finish_kernel(norm, norm),
        batch_update=kernel("batch_update", (), norm, norm) if two else None,
    )


@functools.cache
def _sum_kernel(terms: tuple[int, ...]) -> cupy.ElementwiseKernel:
    return _pass_kernel("sum_" + "_".join(map(str, terms)), terms, None, None)  # of any norm


def blocks_for(size: int) -> int:
    """Return the size of the grid, which depends on the number of elements alone."""
    return min(MAX_BLOCKS, -(-size // (THREADS * _ELEMENTS_PER_THREAD)))


# The loop, and what one array and a batch have different before it.

# ``start`` is the number of the thread, ``step`` that of all, ``count`` that of the elements.
_GRID_STRIDE_LOOP = """
    for (ptrdiff_t first = start; first < count; first += LOADS * step) {{
        C value[LOADS], old[LOADS];
        #pragma unroll
        for (int k = 0; k < LOADS; ++k) {{
            const ptrdiff_t j = first + k * step;
            if (j < count) {{ value[k] = C(activations[j]); {load} }}
        }}
        #pragma unroll
        for (int k = 0; k < LOADS; ++k) {{
            const ptrdiff_t j = first + k * step;
            if (j < count) {{ const C x = value[k]; {use} }}
        }}
    }}"""

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


def columns_of(norm: Norm) -> tuple[str, ...]:
    """Return the columns of the table that has a row for each layer; λ are bits of binary64."""
    lams = [f"{name}{k}" for name in ("LAM", "GRADIENT_LAM") for k in range(norm.n_lams)]
    return ("ACTIVATIONS", "GRADIENTS", "SIZE", "FIRST_BLOCK", "BLOCKS", *lams)


def _kernel_name(name: str) -> str:
    return "actreg_" + re.sub(r"\W", "_", name, flags=re.ASCII)  # as CuPy takes it


def _preamble(batch: Norm | None) -> str:
    columns = f"enum columns {{ {', '.join(columns_of(batch))}, COLUMNS }};\n" if batch else ""
    return PREAMBLE + columns


def _each(template: str, count: int, separator: str = " ") -> str:
    """Return the text for k = 0, 1 and so on."""
    return separator.join(template.format(k=k) for k in range(count))


def _pass_kernel(
    name: str, terms: tuple[int, ...], updated: Norm | None, batch: Norm | None
) -> cupy.ElementwiseKernel:
    """Return the kernel that sums powers of every x, or adds the gradient, or both.

    Parameters
    ----------
    name : str
        The kernel's, without what all begin with.
    terms : tuple of int
        The powers that are summed, if any.
    updated : Norm or None
        The norm whose gradient is added, if any.
    batch : Norm or None
        The norm that a batch of layers have in common; None if the kernel is for one array.
    """
    lams, coefficients = (updated.n_lams, updated.n_coefficients) if updated else (0, 0)
    wide = "__longlong_as_double(row[GRADIENT_LAM{k}])" if batch else "gradient_lam{k}"
    own = f"&words[(layer * {len(terms)} + {{k}}) * COUNTERS]"
    use = "".join(f"sum{k}.{_ADDERS[term]}(x, {own.format(k=k)}); " for k, term in enumerate(terms))
    text, extra = [_LAYER if batch else _ONE_ARRAY, "using C = typename compute<T>::type;"], []
    text += [_each(f"C lam{{k}}; narrow({wide}, lam{{k}});", lams)]
    if updated:
        use += f"gradients[j] = T(add(old[k], {updated.cuda.gradient}));"
        if updated.two_pass:
            extra = [f"raw C coefficient{k}" for k in range(coefficients)]
            extra += ["raw bool has_gradient"]
            text += [
                _LOAD_COEFFICIENTS.format(
                    count=coefficients,
                    load=_each("shared[{k}] = coefficient{k}[layer];", coefficients),
                    name=_each("const C c{k} = shared[{k}];", coefficients),
                )
            ]
    text += [_each("expansion sum{k};", len(terms))]
    text += [_GRID_STRIDE_LOOP.format(load="old[k] = C(gradients[j]);" * bool(updated), use=use)]
    text += [_each(f"accumulate_block(sum{{k}}, {own});", len(terms))]
    if batch:
        inputs = ["raw int64 table", "int64 layers", "raw T like", *extra]  # like says what T is
        outputs = ["raw int64 words"]
    else:
        inputs = ["raw T activations", "int64 count", "int64 step"]
        inputs += [*(f"float64 gradient_lam{k}" for k in range(lams)), *extra]
        outputs = ["raw int64 words"] * bool(terms) + ["raw T gradients"] * bool(updated)
    return cupy.ElementwiseKernel(
        ", ".join(inputs),
        ", ".join(outputs),
        "\n".join(text),
        _kernel_name(name),
        preamble=_preamble(batch),
        options=OPTIONS,
        no_return=True,
    )


_ADDERS = {1: "add_absolute", 2: "add_square"}


# The end: what a norm makes of its sums, as sums/exact.py has it for the host.

_FINISH = """
template <typename C> __device__ inline void finish(
    const nonzero_range& range, const long long* words, {lams}, double epsilon, {results}) {{
    {sums}
    const bool any_nan = {any_nan};
    const auto evaluate = [&]({variables}, auto epsilon) {{
        {evaluate}
    }};
    if ({all_zero}) {{
        {zero}
    }} else if ({all_fit}) {{
        evaluate({doubles}, epsilon);
    }} else {{
        evaluate({extendeds}, extended(epsilon));
    }}
}}
"""


def _finish_kernel(norm: Norm, batch: Norm | None) -> cupy.ReductionKernel:
    """Return the kernel that writes the penalty and, after one pass of two, what the next needs."""
    sums = len(norm.terms)
    lams = [f"{name}{k}" for name in ("lam", "gradient_lam") for k in range(norm.n_lams)]
    results = {"penalty": norm.cuda.penalty}
    results |= {f"coefficient{k}": each for k, each in enumerate(norm.cuda.coefficients)}
    writes = [f"narrow({formula}, {name});" for name, formula in results.items()]
    zeros = [f"{name} = C(0);" for name in results]
    parameters = [f"C {name}" for name in results]
    if norm.two_pass:
        writes += [f"has_gradient = any_nan || {norm.cuda.guard};"]
        zeros += ["has_gradient = false;"]
        parameters += ["bool has_gradient"]
    function = _FINISH.format(
        lams=", ".join(f"double {lam}" for lam in lams),
        results=", ".join(parameter.replace(" ", "& ") for parameter in parameters),
        sums=_each("const extended sum{k} = rounded_sum(words + {k} * COUNTERS, range);", sums),
        any_nan=_each("isnan(sum{k})", sums, " || "),
        variables=", ".join([_each("auto s{k}", sums, ", "), *(f"auto {lam}" for lam in lams)]),
        evaluate=" ".join(writes),
        all_zero=_each("sum{k}.m == 0", sums, " && "),
        zero=" ".join(zeros),
        all_fit=_each("sum{k}.fits_double()", sums, " && "),
        doubles=", ".join([_each("double(sum{k})", sums, ", "), *lams]),
        extendeds=", ".join([_each("sum{k}", sums, ", "), *(f"extended({lam})" for lam in lams)]),
    )
    given = ["raw int64 table"] if batch else [f"float64 {lam}" for lam in lams]
    if batch:
        lams = [f"__longlong_as_double(table[_i * COLUMNS + {lam.upper()}])" for lam in lams]
    arguments = [f"&words[_i * {sums} * COUNTERS]", *lams, "epsilon", *results]
    arguments += ["has_gradient"] * norm.two_pass
    return cupy.ReductionKernel(
        # With more than one input CuPy does not turn to CUB, whose kernels have no _i and _J,
        # the numbers of the row and of the word in it; its own argmax uses _J.
        ", ".join(["int64 word", "raw int64 words", *given, "float64 epsilon"]),
        ", ".join(parameters),
        "range_of(word, _J)",
        "joined(a, b)",
        f"finish(a, {', '.join(arguments)})",
        "range_of(0, 0)",
        _kernel_name(f"{'batch_' if batch else ''}finish_{norm.name}"),
        reduce_type="nonzero_range",
        preamble=_preamble(batch) + function,
        options=OPTIONS,
    )
