"""The CUDA kernels of a norm, made of its formulas when it is first used.

Four kinds of kernel share the device functions of the ``.cuh`` files:

* A *pass*, an ``ElementwiseKernel`` over raw arrays, owns its loop over the elements: it adds up
  powers of |x|, or adds the gradient, or both. What it adds up is certified or exact.
  A certified sum (``certified_sum.cuh``) costs a few operations an element in the dtype that is
  computed in, and leaves a pair of numbers for each block. An exact sum (``exact_sum.cuh``) costs
  more, in binary64: every thread carries it as an expansion, several numbers that add up to it
  without a rounding error; the threads of a block add theirs up in a tree in shared memory, and the
  blocks in global memory, by atomic additions to the words of one long integer, a
  superaccumulator.
* The *certificate* adds up the pairs of the blocks, and evaluates penalty and coefficients if they
  are certain. If so, it says so where the kernels that follow, an exact pass and its finish, look
  first; then they return at once.
* The *finish*, a ``ReductionKernel`` over the words of an exact sum, finds the range of those in
  use. The thread that knows it rounds the integer they make to 53 bits and evaluates penalty and
  coefficients.
* An *update* is a pass that adds a gradient whose coefficients another kernel has computed.

There are two of each: for one array, and for the layers of a model, which a table on the device
describes. They differ in where arrays, λ and sums are found, and in nothing else.
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
    "FEW_BLOCKS",
    "LOADS",
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
FEW_BLOCKS, MAX_BLOCKS = 128, 1024
_FEW_ELEMENTS, _ELEMENTS = 16, 64  # of a thread
LOADS = 4  # by a thread of each array before it uses the first
WORDS, WORD_BITS = 168, 26  # 2 * 2046 + 106 bits of the largest square, and room for carries
COUNTERS = WORDS + 3  # of infinities, of NaN, and whether the results are certain without the words

_CONSTANTS = {
    "THREADS": THREADS,
    "PARTS": 6,  # numbers of an expansion: holds numbers 80 decades apart, or squares of 30
    "WORDS": WORDS,
    "WORD_BITS": WORD_BITS,
}
PREAMBLE = "".join(f"constexpr int {key} = {value};\n" for key, value in _CONSTANTS.items()) + (
    "".join(
        Path(__file__).with_name(f"{part}.cuh").read_text(encoding="utf-8")
        for part in ("arithmetic", "exact_sum", "certified_sum")
    )
)
OPTIONS = ("--fmad=false",)


class Kernels(NamedTuple):
    """The kernels of a norm for one array, or for a batch.

    A pass has the name of what it does; ``_vectors`` takes contiguous arrays, by 16 bytes at a
    time, ``_certified`` sums without certainty. None where the norm takes no such one.
    """

    sum: Any
    sum_certified: Any
    sum_certified_vectors: Any
    apply: Any  # sums and updates; None of a norm of two passes
    apply_certified: Any
    apply_certified_vectors: Any
    update: Any  # None of a batch of a norm of one pass
    update_vectors: Any
    certify: Any
    finish: Any


@functools.cache
def kernels_of(norm: Norm, *, batch: bool = False) -> Kernels:
    """Return the kernels of a norm, which CuPy compiles at their first launch for a dtype."""
    together = norm if batch else None

    def total(kind: str = "") -> Any:
        return _pass_kernel("sum", kind, norm.terms, None, together)

    def apply(kind: str = "") -> Any:
        return None if norm.two_pass else _pass_kernel("apply", kind, norm.terms, norm, together)

    def update(kind: str = "") -> Any:
        never = batch and not norm.two_pass
        return None if never else _pass_kernel("update", kind, (), norm, together)

    return Kernels(
        sum=total(),
        sum_certified=total("certified"),
        sum_certified_vectors=total("certified_vectors"),
        apply=apply(),
        apply_certified=apply("certified"),
        apply_certified_vectors=apply("certified_vectors"),
        update=update(),
        update_vectors=update("vectors"),
        certify=_certifying_kernel(norm, batch),
        finish=_finish_kernel(norm, batch),
    )


def blocks_for(size: int) -> int:
    """Return the size of the grid, which depends on the number of elements alone.

    A few blocks keep a GPU busy, so small arrays are spread over those; larger ones give each
    thread so much to do that what is done once a block costs little.
    """
    spread = min(FEW_BLOCKS, -(-size // (THREADS * _FEW_ELEMENTS)))
    return min(MAX_BLOCKS, max(spread, -(-size // (THREADS * _ELEMENTS))))


# The loops, and what one array and a batch have different before them.

# ``start`` is the number of the thread, ``step`` that of all, ``count`` that of the elements;
# ``use(x, g)`` does what is to be done with an element, and UPDATES says whether g changes. LOADS
# are under way at once.
_GRID_STRIDE_LOOP = """
    for (ptrdiff_t first = start; first < count; first += LOADS * step) {
        C value[LOADS], old[LOADS];
        #pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const ptrdiff_t j = first + k * step;
            if (j < count) {
                value[k] = C(activations[j]);
                if (UPDATES) old[k] = C(gradients[j]);
            }
        }
        #pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const ptrdiff_t j = first + k * step;
            if (j < count) {
                use(value[k], old[k]);
                if (UPDATES) gradients[j] = T(old[k]);
            }
        }
        end_batch();
    }"""

# For contiguous arrays whose addresses differ by a multiple of 16 bytes. What comes before the
# first such address and after the last is for the first threads.
_VECTOR_LOOP = """
    constexpr int PER_VECTOR = 16 / sizeof(T);
    static_assert(LOADS * PER_VECTOR <= 64 / sizeof(T), "the bound takes a batch of 64 bytes");
    const T* const xs = &activations[0];
    T* const gs = &gradients[0];
    const ptrdiff_t before = min(ptrdiff_t(count), ptrdiff_t(-size_t(xs) % 16 / sizeof(T)));
    const ptrdiff_t vectors = (count - before) / PER_VECTOR;
    if (start < count - vectors * PER_VECTOR) {
        const ptrdiff_t j = start < before ? start : start + vectors * PER_VECTOR;
        C old = UPDATES ? C(gs[j]) : C(0);
        use(C(xs[j]), old);
        if (UPDATES) gs[j] = T(old);
        end_batch();
    }
    const auto use_vector = [&](const uint4& x_vector, uint4& g_vector) {
        const T* const x = reinterpret_cast<const T*>(&x_vector);
        T* const g = reinterpret_cast<T*>(&g_vector);
        #pragma unroll
        for (int k = 0; k < PER_VECTOR; ++k) {
            C old = UPDATES ? C(g[k]) : C(0);
            use(C(x[k]), old);
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
        end_batch();
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
    end_batch();"""

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


@functools.cache
def _pass_kernel(
    what: str, kind: str, terms: tuple[int, ...], updated: Norm | None, batch: Norm | None
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
    """
    lams, coefficients = (updated.n_lams, updated.n_coefficients) if updated else (0, 0)
    wide = "__longlong_as_double(row[GRADIENT_LAM{k}])" if batch else "gradient_lam{k}"
    sums = _certified_sums(terms) if "certified" in kind else _exact_sums(terms)
    text, extra = [_LAYER if batch else _ONE_ARRAY, "using C = typename compute<T>::type;"], []
    if what == "sum" and not kind:
        text += [_RETURN_IF_CERTAIN.format(sums=len(terms))]
    text += [_each(f"C lam{{k}}; narrow({wide}, lam{{k}});", lams)]
    if updated and updated.two_pass:
        extra = [f"raw C coefficient{k}" for k in range(coefficients)]
        extra += ["raw bool has_gradient"]
        text += [
            _LOAD_COEFFICIENTS.format(
                count=coefficients,
                load=_each("shared[{k}] = coefficient{k}[layer];", coefficients),
                name=_each("const C c{k} = shared[{k}];", coefficients),
            )
        ]
    added = f"old = add(old, {updated.cuda.gradient});" if updated else ""
    # A division, or what a batch adds to two sums, takes the registers of two vectors.
    needs_registers = updated and (not terms or (batch and len(terms) > 1))
    text += [
        sums.declare,
        f"const auto use = [&](const C x, C& old) {{ {sums.add} {added} }};",
        f"const auto end_batch = [&] {{ {sums.end_batch} }};",
        f"constexpr bool UPDATES = {str(updated is not None).lower()};",
        f"constexpr int LOADS = {LOADS // 2 if needs_registers else LOADS};",
        "" if updated or batch else "T* const gradients = nullptr;",
        _VECTOR_LOOP if "vectors" in kind else _GRID_STRIDE_LOOP,
        sums.finish,
    ]
    if batch:
        inputs = ["raw int64 table", "int64 layers", "raw T like", *extra]  # like says what T is
        outputs = [sums.output]
    else:
        inputs = ["raw T activations", "int64 count", "int64 step"]
        inputs += [*(f"float64 gradient_lam{k}" for k in range(lams)), *extra]
        outputs = [sums.output] * bool(terms) + ["raw T gradients"] * bool(updated)
    of = updated.name if updated else "_".join(map(str, terms))
    return cupy.ElementwiseKernel(
        ", ".join(inputs),
        ", ".join(outputs),
        "\n".join(text),
        _kernel_name("_".join(filter(None, ("batch" if batch else "", what, kind, of)))),
        preamble=_preamble(batch),
        options=OPTIONS,
        no_return=True,
    )


class _Sums(NamedTuple):
    """How a pass sums, as code."""

    output: str  # the parameter that takes the sums
    declare: str
    add: str  # the magnitudes of an element x
    end_batch: str
    finish: str


def _exact_sums(terms: tuple[int, ...]) -> _Sums:
    own = [f"&words[(layer * {len(terms)} + {k}) * COUNTERS]" for k in range(len(terms))]
    return _Sums(
        "raw int64 words",
        _each("expansion sum{k};", len(terms)),
        " ".join(f"sum{k}.{_ADDERS[term]}(x, {own[k]});" for k, term in enumerate(terms)),
        "",
        " ".join(f"accumulate_block(sum{k}, {each});" for k, each in enumerate(own)),
    )


def _certified_sums(terms: tuple[int, ...]) -> _Sums:
    own = f"&partials[2 * ({len(terms)} * blockIdx.x + {{k}})]"
    return _Sums(
        "raw float64 partials",
        _each("lane<C> sum{k};", len(terms)),
        " ".join(f"sum{k}.{_ADDERS[term]}(x, sizeof(T) == 2);" for k, term in enumerate(terms)),
        _each("sum{k}.end_batch();", len(terms)),
        _each(f"join_block(sum{{k}}); store(sum{{k}}, {own});", len(terms)),
    )


_ADDERS = {1: "add_absolute", 2: "add_square"}


# The end: what a norm makes of its sums, as sums/exact.py has it for the host.

_EVALUATE = """
template <typename C> struct outcome {{
    {fields}
    __device__ inline bool operator==(const outcome& other) const {{ return {equal}; }}
}};
template <typename C, typename N> __device__ inline outcome<C> evaluate({numbers}, N epsilon) {{
    outcome<C> found;
    {evaluate}
    return found;
}}
"""

_FINISH = """
template <typename C> __device__ inline void finish(
    const nonzero_range& range, const long long* words, {lams}, double epsilon, {results}) {{
    if (words[CERTAIN] != 0) return;
    {sums}
    outcome<C> found = {{}};
    if ({all_zero}) {{
    }} else if ({all_fit}) {{
        found = evaluate<C, double>({doubles}, epsilon);
    }} else {{
        found = evaluate<C, extended>({extendeds}, extended(epsilon));
    }}
    {write}
}}
"""

_CERTIFY = """
    const ptrdiff_t layer = blockIdx.x;
    {where}
    {lanes}
    for (ptrdiff_t b = first + threadIdx.x; b < first + blocks; b += THREADS) {{ {join} }}
    {join_blocks}
    if (threadIdx.x == 0) {{
        {brackets}
        bool is_certain = {holds};
        outcome<C> found = {{}};
        if (is_certain && !({all_zero})) {{
            const auto results = [&]({sides}) {{ return evaluate<C, double>({arguments}); }};
            found = results({below});
            is_certain = {same};
        }}
        if (is_certain) {{
            {write}
            words[layer * {sums} * COUNTERS + CERTAIN] = 1;
        }}
    }}"""


class _Results(NamedTuple):
    """What a norm makes of its sums, as code."""

    functions: str  # the structure ``outcome`` and the function ``evaluate``
    lams: list[str]
    parameters: list[str]  # where the results go


def _results_of(norm: Norm) -> _Results:
    sums = len(norm.terms)
    lams = [f"{name}{k}" for name in ("lam", "gradient_lam") for k in range(norm.n_lams)]
    formulas = {"penalty": norm.cuda.penalty}
    formulas |= {f"coefficient{k}": each for k, each in enumerate(norm.cuda.coefficients)}
    evaluate = [f"narrow({formula}, found.{name});" for name, formula in formulas.items()]
    parameters = [f"C {name}" for name in formulas]
    if norm.two_pass:
        evaluate += [f"found.has_gradient = {norm.cuda.guard};"]
        parameters += ["bool has_gradient"]
    names = [parameter.split()[1] for parameter in parameters]
    numbers = [*(f"s{k}" for k in range(sums)), *lams]
    functions = _EVALUATE.format(
        fields=" ".join(f"{parameter};" for parameter in parameters),
        # In binary64, since a comparison of float32 would take all subnormal numbers for 0.
        equal=" && ".join(f"widen({name}) == widen(other.{name})" for name in names),
        numbers=", ".join(f"N {number}" for number in numbers),
        evaluate=" ".join(evaluate),
    )
    return _Results(functions, lams, parameters)


def _certifying_kernel(norm: Norm, batch: bool) -> cupy.ElementwiseKernel:
    """Return the kernel that writes the results, and that they are certain, if they are."""
    results, terms = _results_of(norm), norm.terms
    sums, lams = len(terms), results.lams
    where = "constexpr ptrdiff_t first = 0;"
    inputs = ["raw float64 partials", "int64 blocks", "int64 count"]
    inputs += [f"float64 {lam}" for lam in lams]
    if batch:
        where = "const auto row = &table[layer * COLUMNS];" + " ".join(
            f"const ptrdiff_t {name} = row[{column}];"
            for name, column in {
                "first": "FIRST_BLOCK",
                "blocks": "BLOCKS",
                "count": "SIZE",
            }.items()
        )
        inputs = ["raw float64 partials", "raw int64 table"]
        lams = [f"__longlong_as_double(row[{lam.upper()}])" for lam in lams]
    corners = ["below", "above"] if sums == 1 else ["below below", "above above", "below above"]
    corners += ["above below"] * (sums == 2)
    at = [", ".join(f"b{k}.{side}" for k, side in enumerate(each.split())) for each in corners]
    text = _CERTIFY.format(
        where=where,
        lanes=_each("lane<C> sum{k};", sums),
        join=_each(
            f"sum{{k}}.join(partials[2 * ({sums} * b + {{k}})], "
            f"partials[2 * ({sums} * b + {{k}}) + 1]);",
            sums,
        ),
        join_blocks=_each("join_block(sum{k});", sums),
        brackets=" ".join(
            f"const bracket b{k} = bracket_of(sum{k}, double(count), {term});"
            for k, term in enumerate(terms)
        ),
        holds=_each("b{k}.holds", sums, " && "),
        all_zero=_each("sum{k}.hi == 0.0", sums, " && "),
        sides=_each("double s{k}", sums, ", "),
        arguments=", ".join([_each("s{k}", sums, ", "), *lams, "epsilon"]),
        below=at[0],
        same=" && ".join(f"found == results({each})" for each in at[1:]),
        write=_written(results, "{name}[layer]"),
        sums=sums,
    )
    return cupy.ElementwiseKernel(
        ", ".join([*inputs, "float64 epsilon"]),
        ", ".join(["raw int64 words", *(f"raw {each}" for each in results.parameters)]),
        text,
        _kernel_name(f"{'batch_' * batch}certify_{norm.name}"),
        preamble=_preamble(norm if batch else None) + results.functions,
        options=OPTIONS,
        no_return=True,
    )


def _written(results: _Results, there: str) -> str:
    """Return the code that writes what was found."""
    names = [parameter.split()[1] for parameter in results.parameters]
    return " ".join(f"{there.format(name=name)} = found.{name};" for name in names)


def _finish_kernel(norm: Norm, batch: bool) -> cupy.ReductionKernel:
    """Return the kernel that writes the results of exact sums, unless they are certain already."""
    results, sums = _results_of(norm), len(norm.terms)
    lams, parameters = results.lams, results.parameters
    write = _written(results, "{name}")
    if norm.two_pass:
        write += f" has_gradient = has_gradient || {_each('isnan(sum{k})', sums, ' || ')};"
    function = _FINISH.format(
        lams=", ".join(f"double {lam}" for lam in lams),
        results=", ".join(parameter.replace(" ", "& ") for parameter in parameters),
        sums=_each("const extended sum{k} = rounded_sum(words + {k} * COUNTERS, range);", sums),
        all_zero=_each("sum{k}.m == 0", sums, " && "),
        all_fit=_each("sum{k}.fits_double()", sums, " && "),
        doubles=", ".join([_each("double(sum{k})", sums, ", "), *lams]),
        extendeds=", ".join([_each("sum{k}", sums, ", "), *(f"extended({lam})" for lam in lams)]),
        write=write,
    )
    given = ["raw int64 table"] if batch else [f"float64 {lam}" for lam in lams]
    if batch:
        lams = [f"__longlong_as_double(table[_i * COLUMNS + {lam.upper()}])" for lam in lams]
    names = [parameter.split()[1] for parameter in parameters]
    arguments = [f"&words[_i * {sums} * COUNTERS]", *lams, "epsilon", *names]
    return cupy.ReductionKernel(
        # With more than one input CuPy does not turn to CUB, whose kernels have no _i and _J,
        # the numbers of the row and of the word in it; its own argmax uses _J.
        ", ".join(["int64 word", "raw int64 words", *given, "float64 epsilon"]),
        ", ".join(parameters),
        "range_of(word, _J)",
        "joined(a, b)",
        f"finish(a, {', '.join(arguments)})",
        "range_of(0, 0)",
        _kernel_name(f"{'batch_' * batch}finish_{norm.name}"),
        reduce_type="nonzero_range",
        preamble=_preamble(norm if batch else None) + results.functions + function,
        options=OPTIONS,
    )
