"""The ends: what a norm makes of its sums, as sums/exact.py has it for the host.

* The *certificate* adds up the pairs of the blocks, and evaluates penalty and coefficients if they
  are certain. If so, it says so where the kernels that follow, an exact pass and its finish, look
  first; then they return at once.
* The *finish*, a ``ReductionKernel`` over the words of an exact sum, finds the range of those in
  use. The thread that knows it rounds the integer they make to 53 bits and evaluates penalty and
  coefficients.
"""

from __future__ import annotations

from typing import NamedTuple

import cupy

from actreg_dispatch.backends.cuda.source import OPTIONS, kernel_name, preamble, repeated
from actreg_dispatch.norms import Norm

__all__ = ["Results", "certifying_kernel", "exact_outcome", "finish_kernel", "results_of"]

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

_OUTCOME = """
template <typename C> __device__ inline outcome<C> outcome_of({sums}, {lams}, double epsilon) {{
    outcome<C> found = {{}};
    if ({all_zero}) {{
    }} else if ({all_fit}) {{
        found = evaluate<C, double>({doubles}, epsilon);
    }} else {{
        found = evaluate<C, extended>({extendeds}, extended(epsilon));
    }}
    {or_nan}
    return found;
}}
"""

_FINISH = """
template <typename C> __device__ inline void finish(
    const nonzero_range& range, const long long* words, {lams}, double epsilon, {results}) {{
    if (words[CERTAIN] != 0) return;
    {sums}
    const outcome<C> found = outcome_of<C>({given}, epsilon);
    {write}
}}
"""

_CERTIFY = """
    const ptrdiff_t layer = blockIdx.x;
    constexpr bool WEIGHTED = {weighted};
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


class Results(NamedTuple):
    """What a norm makes of its sums, as code."""

    functions: str  # the structure ``outcome`` and the function ``evaluate``
    lams: list[str]
    parameters: list[str]  # where the results go


def results_of(norm: Norm) -> Results:
    """Return what the norm makes of its sums."""
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
        equal=" && ".join(f"same(widen({name}), widen(other.{name}))" for name in names),
        numbers=", ".join(f"N {number}" for number in numbers),
        evaluate=" ".join(evaluate),
    )
    return Results(functions, lams, parameters)


def exact_outcome(norm: Norm) -> str:
    """Return the function ``outcome_of``: what a norm makes of exact sums, rounded."""
    sums, lams = len(norm.terms), results_of(norm).lams
    return _OUTCOME.format(
        sums=repeated("const extended& sum{k}", sums, ", "),
        lams=", ".join(f"double {lam}" for lam in lams),
        all_zero=repeated("sum{k}.m == 0", sums, " && "),
        all_fit=repeated("sum{k}.fits_double()", sums, " && "),
        doubles=", ".join([repeated("double(sum{k})", sums, ", "), *lams]),
        extendeds=", ".join(
            [repeated("sum{k}", sums, ", "), *(f"extended({lam})" for lam in lams)]
        ),
        or_nan=f"if ({repeated('isnan(sum{k})', sums, ' || ')}) found.has_gradient = true;"
        * norm.two_pass,
    )


def certifying_kernel(norm: Norm, batch: bool, weighted: bool) -> cupy.ElementwiseKernel:
    """Return the kernel that writes the results, and that they are certain, if they are."""
    whose, together = _owner_of(norm, batch, weighted)
    results, terms = results_of(norm), norm.terms
    sums, lams = len(terms), results.lams
    where = "constexpr ptrdiff_t first = 0;"
    inputs = ["raw float64 partials", "int64 blocks", "int64 count"]
    inputs += [f"float64 {lam}" for lam in lams]
    if batch:
        where = (
            "const auto row = &table[layer * COLUMNS]; const ptrdiff_t "
            "first = row[FIRST_BLOCK], blocks = row[BLOCKS], count = row[SIZE];"
        )
        inputs = ["raw float64 partials", "raw int64 table"]
        lams = [f"__longlong_as_double(row[{lam.upper()}])" for lam in lams]
    corners = ["below", "above"] if sums == 1 else ["below below", "above above", "below above"]
    corners += ["above below"] * (sums == 2)
    at = [", ".join(f"b{k}.{side}" for k, side in enumerate(each.split())) for each in corners]
    text = _CERTIFY.format(
        where=where,
        weighted=str(weighted).lower(),
        lanes=repeated("lane<C> sum{k};", sums),
        join=repeated(
            f"sum{{k}}.join(partials[2 * ({sums} * b + {{k}})], "
            f"partials[2 * ({sums} * b + {{k}}) + 1]);",
            sums,
        ),
        join_blocks=repeated("join_block(sum{k});", sums),
        brackets=" ".join(
            f"const bracket b{k} = bracket_of(sum{k}, double(count), {term}, WEIGHTED);"
            for k, term in enumerate(terms)
        ),
        holds=repeated("b{k}.holds", sums, " && "),
        all_zero=repeated("sum{k}.hi == 0.0", sums, " && "),
        sides=repeated("double s{k}", sums, ", "),
        arguments=", ".join([repeated("s{k}", sums, ", "), *lams, "epsilon"]),
        below=at[0],
        same=" && ".join(f"found == results({each})" for each in at[1:]),
        write=_written(results, "{name}[layer]"),
        sums=sums,
    )
    return cupy.ElementwiseKernel(
        ", ".join([*inputs, "float64 epsilon"]),
        ", ".join(["raw int64 words", *(f"raw {each}" for each in results.parameters)]),
        text,
        kernel_name(f"{whose}certify_{norm.name}"),
        preamble=preamble(together, weighted=weighted) + results.functions,
        options=OPTIONS,
        no_return=True,
    )


def _owner_of(norm: Norm, batch: bool, weighted: bool) -> tuple[str, Norm | None]:
    """Return how the name of a kernel begins, and the norm that layers have in common, if any."""
    return ("batch_", norm) if batch else ("weighted_" if weighted else "", None)


def _written(results: Results, there: str) -> str:
    """Return the code that writes what was found."""
    names = [parameter.split()[1] for parameter in results.parameters]
    return " ".join(f"{there.format(name=name)} = found.{name};" for name in names)


def finish_kernel(norm: Norm, batch: bool, weighted: bool) -> cupy.ReductionKernel:
    """Return the kernel that writes the results of exact sums, unless they are certain already."""
    whose, together = _owner_of(norm, batch, weighted)
    results, sums = results_of(norm), len(norm.terms)
    lams, parameters = results.lams, results.parameters
    function = exact_outcome(norm) + _FINISH.format(
        lams=", ".join(f"double {lam}" for lam in lams),
        results=", ".join(parameter.replace(" ", "& ") for parameter in parameters),
        sums=repeated("const extended sum{k} = rounded_sum(words + {k} * COUNTERS, range);", sums),
        given=", ".join([repeated("sum{k}", sums, ", "), *lams]),
        write=_written(results, "{name}"),
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
        kernel_name(f"{whose}finish_{norm.name}"),
        reduce_type="nonzero_range",
        preamble=preamble(together, weighted=weighted) + results.functions + function,
        options=OPTIONS,
    )
