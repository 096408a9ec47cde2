"""Norms of rows on the device: as many launches for a million rows as for two, and no wait.

* The *certified pass* gives each row a team of threads, of a block that does some rows at once. The
  bracket of the row's sum makes a bracket of its size, and, where both ends agree, the gradient,
  which the team adds at once: of rows of up to ``LOADS`` elements a thread, the elements are still
  in registers. Other rows go on a list. A block leaves the sum of the sizes at the lower ends, a
  pair, and *doubt*, how much more the upper ends are.
* The *certificate* adds these up, and writes the penalty if that is certain.
* The *exact pass* sums each row on the list, and updates it. If the penalty is not certain, it sums
  all rows, and adds their sizes to the words of a superaccumulator, exactly. Mostly it has a few
  rows to do, or returns at once. A block does one row at a time, in words of its own.
* The finish is that of L1, of the sizes.

Rows and elements that are evenly spaced are read, and gradients written, where they are; arrays
that are not so are copied, and gradients written back.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import cupy
import numpy as np

from actreg_dispatch.backends.cuda.kernels import FEW_BLOCKS, MAX_BLOCKS, grid, kernels_of
from actreg_dispatch.backends.cuda.passes import ADDERS
from actreg_dispatch.backends.cuda.results import exact_outcome, results_of
from actreg_dispatch.backends.cuda.source import (
    OPTIONS,
    THREADS,
    counters_of,
    kernel_name,
    preamble,
    repeated,
)
from actreg_dispatch.dtypes import COMPUTE_DTYPES
from actreg_dispatch.layout import as_matrix
from actreg_dispatch.norms import L1, Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.row_norms import RowNorm
from actreg_dispatch.sums.exact import Total, sum_of_words

__all__ = ["RowKernels", "apply_to_rows", "row_kernels_of", "sum_of_rows"]

LOADS = 4  # by a thread before it uses the first, and a group of a certified sum
_TURNS = 4  # of a block, where there are many
_SECTOR = 32  # bytes, the least that memory is read by

_SUM_CERTIFIED = """
    __shared__ double his[THREADS], los[THREADS];
    const int t = threadIdx.x, at_once = THREADS / int(team);
    const int member = by_columns ? t / at_once : t % int(team);
    const int place = by_columns ? t % at_once : t / int(team);
    const ptrdiff_t chunk = LOADS * team;
    // A thread has a group in LOADS * team elements; the bound takes one in 2^19, and two elements.
    const double spread = 0x1p19 / double(team);
    lane<double> total;
    double doubt = 0.0;
    for (ptrdiff_t first = ptrdiff_t(blockIdx.x) * at_once; first < rows;
         first += ptrdiff_t(gridDim.x) * at_once) {{
        const ptrdiff_t row = first + place, count = row < rows ? length : 0;
        C value[LOADS], weight[LOADS];
        const auto load = [&](ptrdiff_t start) {{
            #pragma unroll
            for (int k = 0; k < LOADS; ++k) {{
                const ptrdiff_t j = start + k * team;
                if (j < count) {{
                    value[k] = C(xs[row * x_row + j * x_step]);
                    if (WEIGHTED) weight[k] = C(ws[row * w_row + j * w_step]);
                }}
            }}
        }};
        const auto is_used = [&](ptrdiff_t start, int k) {{
            return start + k * team < count && !(WEIGHTED && is_zero(weight[k]));
        }};
        lane<C> sum;
        for (ptrdiff_t start = last + member; start >= 0; start -= chunk) {{  // the first remain
            load(start);
            #pragma unroll
            for (int k = 0; k < LOADS; ++k) {{
                if (is_used(start, k)) sum.{adder}({element}, sizeof(T) == 2);
            }}
            sum.end_group();
        }}
        his[member * at_once + place] = sum.hi;
        los[member * at_once + place] = sum.lo;
        for (int half = int(team) / 2; half > 0; half /= 2) {{
            __syncthreads();
            if (member < half) {{
                const int other = (member + half) * at_once + place;
                sum.join(his[other], los[other]);
                his[member * at_once + place] = sum.hi;
                los[member * at_once + place] = sum.lo;
            }}
        }}
        __syncthreads();
        if (t < at_once && first + t < rows) {{
            lane<C> whole;
            whole.join(his[t], los[t]);
            const row_bracket<C> found = row_bracket_of(
                whole, double(length), TERM, WEIGHTED, spread, epsilon);
            total.add(found.size);
            doubt += found.doubt;
            {decide}
        }}
        __syncthreads();
        {update}
    }}
    lane<float> doubts;  // by additions alone
    doubts.join(doubt, 0.0);
    join_block(total);
    join_block(doubts);
    if (t == 0) {{
        partials[3 * blockIdx.x] = total.hi;
        partials[3 * blockIdx.x + 1] = total.lo;
        partials[3 * blockIdx.x + 2] = doubts.hi;
    }}"""

# A sum that is too small to be certified is between 0 and twice the least that is not: what it lost
# is far less. Such rows, all those of zeros among them, mostly have no gradient.
_BRACKET = """
template <typename C> struct row_bracket {{
    double size, doubt;  // the least that the size may be, and how much more
    bool is_certain, has_gradient;
    {coefficients}
}};
template <typename C> __device__ inline row_bracket<C> row_bracket_of(
    const lane<C>& sum, double length, int term, bool weighted, double spread, double epsilon) {{
    bracket ends = bracket_of(sum, length, term, weighted, spread);
    const bool is_finite = isfinite(ends.above), is_tiny = is_finite && !ends.holds;
    if (is_tiny) ends = {{0.0, 2.0 * lane<C>::least(length, term, weighted), true}};
    const outcome<double> one = evaluate<double, double>(ends.below, {ones}, epsilon);
    const outcome<double> other = evaluate<double, double>(ends.above, {ones}, epsilon);
    row_bracket<C> found;
    found.size = is_tiny ? 0.0 : other.penalty < one.penalty ? other.penalty : one.penalty;
    found.doubt = is_tiny ? one.penalty + other.penalty : fabs(other.penalty - one.penalty);
    found.has_gradient = one.has_gradient && other.has_gradient;
    bool agree = !is_tiny;
    {narrow}
    found.is_certain =
        is_finite && (found.has_gradient ? agree : !one.has_gradient && !other.has_gradient);
    return found;
}}
"""

_DECIDE = """
            is_updated[t] = found.is_certain && found.has_gradient;
            {share}
            if (!found.is_certain) {{
                integer* const next = reinterpret_cast<integer*>(&waiting[0]);
                listed[atomicAdd(next, 1ULL)] = first + t;
            }}"""

_UPDATE = """
        if (is_updated[place]) {{
            {coefficients}
            for (ptrdiff_t start = member; start < count; start += chunk) {{
                if (start != member) load(start);
                C old[LOADS];
                #pragma unroll
                for (int k = 0; k < LOADS; ++k) {{
                    const ptrdiff_t j = start + k * team;
                    if (is_used(start, k)) old[k] = C(gs[row * g_row + j * g_step]);
                }}
                #pragma unroll
                for (int k = 0; k < LOADS; ++k) {{
                    if (is_used(start, k)) {{
                        const C x = value[k], w = WEIGHTED ? weight[k] : C(1);
                        {lams}
                        const ptrdiff_t j = start + k * team;
                        gs[row * g_row + j * g_step] = T(add(old[k], {gradient}));
                    }}
                }}
            }}
        }}"""

_CERTIFY = """
    lane<double> total;
    lane<float> doubts;
    for (ptrdiff_t b = threadIdx.x; b < blocks; b += THREADS) {{
        total.join(partials[3 * b], partials[3 * b + 1]);
        doubts.join(partials[3 * b + 2], 0.0);
    }}
    join_block(total);
    join_block(doubts);
    if (threadIdx.x == 0) {{
        // A thread has the sizes of a few rows, or, of many, of one in MAX_BLOCKS.
        const bracket ends = bracket_of(total, double(rows), 1, false, 0x1p18 / {max_blocks});
        const double above = ends.above + 2.0 * doubts.hi;
        bool is_certain = ends.holds && isfinite(above);
        outcome<C> found = {{}};
        if (is_certain && above != 0.0) {{
            found = evaluate<C, double>(ends.below, {lams}, epsilon);
            is_certain = found == evaluate<C, double>(above, {lams}, epsilon);
        }}
        if (is_certain) {{
            penalty[0] = found.penalty;
            words[CERTAIN] = 1;
        }}
    }}"""

_SUM_EXACTLY = """
    __shared__ long long own[COUNTERS];
    __shared__ ptrdiff_t all, end;
    const int t = threadIdx.x;
    if (t == 0) {{
        all = words[CERTAIN] != 0 ? 0 : rows;
        end = all{waiting};
    }}
    __syncthreads();
    for (ptrdiff_t turn = blockIdx.x; turn < end; turn += gridDim.x) {{
        const bool is_listed = turn >= all;
        const ptrdiff_t row = {row};
        for (int k = t; k < COUNTERS; k += THREADS) own[k] = 0;
        __syncthreads();
        expansion sum;
        for (ptrdiff_t j = t; j < length; j += THREADS) {{
            const C x = C(xs[row * x_row + j * x_step]);
            const C w = WEIGHTED ? C(ws[row * w_row + j * w_step]) : C(1);
            if (!(WEIGHTED && is_zero(w))) sum.{adder}({element}, own);
        }}
        accumulate_block(sum, own);
        __syncthreads();
        if (t == 0) {{
            const extended whole = rounded_sum(own, nonzero_range{{0, WORDS - 1}});
            const outcome<double> found = outcome_of<double>(whole, {ones}, epsilon);
            if (!is_listed) accumulate_outlier(found.penalty, 1, &words[0]);
            {share}
        }}
        __syncthreads();
        {update}
    }}"""

_UPDATE_EXACTLY = """
        if (is_listed && is_updated) {{
            {coefficients}
            for (ptrdiff_t j = t; j < length; j += THREADS) {{
                const C x = C(xs[row * x_row + j * x_step]);
                const C w = WEIGHTED ? C(ws[row * w_row + j * w_step]) : C(1);
                if (WEIGHTED && is_zero(w)) continue;
                {lams}
                T& g = gs[row * g_row + j * g_step];
                g = T(add(C(g), {gradient}));
            }}
        }}"""


class RowKernels(NamedTuple):
    """The kernels of a norm of rows; ``apply`` updates gradients, too."""

    sum_certified: Any
    apply_certified: Any
    certify: Any
    sum: Any
    apply: Any
    finish: Any


@functools.cache
def row_kernels_of(norm: Norm, *, weighted: bool = False) -> RowKernels:
    """Return the kernels for rows whose norm is ``norm``."""

    def kernel(what: str, *, updates: bool) -> Any:
        return _pass_kernel(what, norm, updates=updates, weighted=weighted)

    return RowKernels(
        sum_certified=kernel("certified", updates=False),
        apply_certified=kernel("certified", updates=True),
        certify=_certifying_kernel(weighted=weighted),
        sum=kernel("", updates=False),
        apply=kernel("", updates=True),
        finish=kernels_of(L1, weighted=weighted).finish,
    )


def _name(*parts: str, weighted: bool) -> str:
    return kernel_name("_".join(filter(None, ("weighted" * weighted, "rows", *parts))))


def _pass_kernel(what: str, norm: Norm, *, updates: bool, weighted: bool) -> Any:
    """Return the certified pass, or the exact one."""
    (term,), count, certified = norm.terms, norm.n_coefficients, bool(what)
    results = results_of(norm)
    ones = ", ".join("1.0" for _ in results.lams)
    lam = "multiply(own_lam{k}, w)" if weighted else "own_lam{k}"
    values = {
        "adder": ADDERS[term],
        "lams": repeated(f"const C lam{{k}} = {lam};", norm.n_lams),
        "gradient": norm.cuda.gradient,
        "ones": ones,
    }
    if certified:
        shared = repeated("__shared__ C shared{k}[THREADS];", count)
        shared += "__shared__ bool is_updated[THREADS];"
        share = repeated("shared{k}[t] = found.coefficient{k};", count)
        values["element"] = "value[k], weight[k]" if weighted else "value[k]"
        values["decide"] = _DECIDE.format(share=share) * updates
        values["coefficients"] = repeated("const C c{k} = shared{k}[place];", count)
        values["update"] = _UPDATE.format(**values) * updates
        text = _SUM_CERTIFIED.format(**values)
        functions = _BRACKET.format(
            coefficients=repeated("C coefficient{k};", count),
            ones=ones,
            narrow=repeated(
                "{{ C end; narrow(one.coefficient{k}, found.coefficient{k}); "
                "narrow(other.coefficient{k}, end); "
                "agree = agree && same(widen(found.coefficient{k}), widen(end)); }}",
                count,
            ),
        )
    else:
        shared = repeated("__shared__ C shared{k};", count) + "__shared__ bool is_updated;"
        share = repeated("narrow(found.coefficient{k}, shared{k});", count)
        share += "is_updated = found.has_gradient;"
        values["element"] = "x, w" if weighted else "x"
        values["share"] = share * updates
        values["waiting"] = " + waiting[0]" * updates
        values["row"] = "is_listed ? listed[turn - all] : turn" if updates else "turn"
        values["coefficients"] = repeated("const C c{k} = shared{k};", count)
        values["update"] = _UPDATE_EXACTLY.format(**values) * updates
        text = _SUM_EXACTLY.format(**values)
        functions = exact_outcome(norm)
    declared = [
        "using C = typename compute<T>::type;",
        f"constexpr bool WEIGHTED = {str(weighted).lower()};",
        f"constexpr int LOADS = {LOADS}, TERM = {term};" * certified,
        repeated("C own_lam{k}; narrow(gradient_lam{k}, own_lam{k});", norm.n_lams) * updates,
        "const T* const xs = &activations[0];",
        "const auto* const ws = &weights[0];"
        if weighted
        else "const T* const ws = nullptr; const ptrdiff_t w_row = 0, w_step = 0;",
        f"T* const gs = &gradients[0]; {shared}" * updates,
    ]
    inputs = ["raw T activations", "int64 x_row", "int64 x_step", "int64 rows", "int64 length"]
    inputs += ["raw W weights", "int64 w_row", "int64 w_step"] * weighted
    inputs += ["int64 last", "int64 team", "bool by_columns"] * certified + ["float64 epsilon"]
    inputs += [f"float64 gradient_lam{k}" for k in range(norm.n_lams)] * updates
    inputs += ["int64 g_row", "int64 g_step"] * updates
    outputs = ["raw float64 partials" if certified else "raw int64 words"]
    outputs += ["raw int64 waiting", "raw int64 listed", "raw T gradients"] * updates
    return cupy.ElementwiseKernel(
        ", ".join(inputs),
        ", ".join(outputs),
        "\n".join([*declared, text]),
        _name("apply" if updates else "sum", what, norm.name, weighted=weighted),
        preamble=preamble(weighted=weighted) + results.functions + functions,
        options=OPTIONS,
        no_return=True,
    )


def _certifying_kernel(*, weighted: bool) -> Any:
    results = results_of(L1)
    inputs = ["raw float64 partials", "int64 blocks", "int64 rows"]
    inputs += [f"float64 {lam}" for lam in results.lams]
    return cupy.ElementwiseKernel(
        ", ".join([*inputs, "float64 epsilon"]),
        "raw int64 words, raw C penalty",
        _CERTIFY.format(max_blocks=f"{MAX_BLOCKS}.0", lams=", ".join(results.lams)),
        _name("certify", weighted=weighted),
        preamble=preamble(weighted=weighted) + results.functions,
        options=OPTIONS,
        no_return=True,
    )


class _Matrices(NamedTuple):
    """Activations, weights and gradients as matrices, and what tells the kernels where they lie."""

    x: cupy.ndarray
    weights: tuple[Any, ...]
    g: cupy.ndarray | None
    steps: tuple[int, int]
    g_steps: tuple[int, ...]

    @property
    def known(self) -> tuple[Any, ...]:
        """What all kernels are told first."""
        return self.x, *self.steps, *self.x.shape, *self.weights


def _matrices(x: Any, g: Any, w: Any, row_axes: int) -> _Matrices:
    x, g, w = (None if each is None else _matrix(each, row_axes) for each in (x, g, w))
    weights = () if w is None else (w, *_steps(w))
    return _Matrices(x, weights, g, _steps(x), () if g is None else _steps(g))


def _matrix(array: Any, row_axes: int) -> Any:
    """Return a matrix that is the array, or else a copy."""
    whole = all(step % array.itemsize == 0 for step in array.strides)
    matrix = as_matrix(array, row_axes) if whole else None
    return as_matrix(cupy.ascontiguousarray(array), row_axes) if matrix is None else matrix


def _steps(matrix: Any) -> tuple[int, int]:
    row, element = (step // matrix.itemsize for step in matrix.strides)
    return row, element


def apply_to_rows(
    x: cupy.ndarray,
    g: cupy.ndarray | None,
    norm: RowNorm,
    constants: Constants,
    w: cupy.ndarray | None,
) -> cupy.ndarray:
    """Return the penalty of rows, a 0-d array, and add the gradient to any gradients."""
    compute, of_row = COMPUTE_DTYPES[x.dtype], norm.of_row
    if not x.size:
        return cupy.zeros((), compute)
    kernels = row_kernels_of(of_row, weighted=w is not None)
    m = _matrices(x, g, w, len(norm.axis))
    rows, length = m.x.shape
    by_columns = abs(m.steps[0]) < abs(m.steps[1])
    most = THREADS * m.x.itemsize // _SECTOR if by_columns else THREADS
    team = min(most, 1 << (-(-length // LOADS) - 1).bit_length())
    last = (length - 1) // (LOADS * team) * (LOADS * team)
    turns = -(-rows * team // THREADS)  # of a block; some turns make up for what it does at its end
    blocks = min(MAX_BLOCKS, max(min(FEW_BLOCKS, turns), -(-turns // _TURNS)))
    words = cupy.zeros(counters_of(weighted=w is not None) + 1, np.int64)
    words, waiting = words[:-1], words[-1:]
    partials, penalty = cupy.empty(3 * blocks, np.float64), cupy.empty((), compute)
    numbers = *constants.lam, *constants.gradient_lam, constants.epsilon
    known: tuple[Any, ...] = ()
    written: tuple[Any, ...] = ()
    certified, exact = kernels.sum_certified, kernels.sum
    if m.g is not None:
        certified, exact = kernels.apply_certified, kernels.apply
        known = *constants.gradient_lam, *m.g_steps
        written = waiting, cupy.empty(rows, np.int64), m.g
    teams = last, team, by_columns
    certified(*m.known, *teams, constants.epsilon, *known, partials, *written, **grid(blocks))
    kernels.certify(partials, blocks, rows, *numbers, words, penalty, **grid(1))
    exact(*m.known, constants.epsilon, *known, words, *written, **grid(min(MAX_BLOCKS, rows)))
    kernels.finish(words, words, *numbers, penalty)
    if g is not None and m.g is not None and m.g.data.ptr != g.data.ptr:  # of a copy
        g[...] = m.g.reshape(g.shape)
    return penalty


def sum_of_rows(x: cupy.ndarray, norm: RowNorm, w: cupy.ndarray | None) -> Total:
    """Return the sum of the sizes of rows, exactly; waits for the device."""
    weighted = w is not None
    words = cupy.zeros(counters_of(weighted=weighted), np.int64)
    if x.size:
        m = _matrices(x, None, w, len(norm.axis))
        exact = row_kernels_of(norm.of_row, weighted=weighted).sum
        exact(*m.known, 0.0, words, **grid(min(MAX_BLOCKS, m.x.shape[0])))
    return sum_of_words(words.get(), 1, COMPUTE_DTYPES[x.dtype])
