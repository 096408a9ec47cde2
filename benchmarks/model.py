"""What calls cost on a GPU by a model: counted work over the figures of data sheets, no times.

A software CUDA device executes the kernels' PTX and counts bytes and instructions: where the
environment variable SOFTGPU_PROFILE names a file, it writes a line of JSON there for each launch.
``python -m benchmarks.model`` counts calls at two sizes; the difference is what an element costs,
ours, CuPy's and ``cupy.fuse``'s. Each resource of a GPU needs some time for that. The longest is
the least that the call can take, and is compared with the time for the bytes that every
implementation must move.

Here are the model, what is counted, and the options; ``contenders.py`` says what a case is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actreg_dispatch.cli.options import why_not_writable
from actreg_dispatch.errors import BackendError
from actreg_dispatch.norms import ActivityNorm, named_norm
from actreg_dispatch.registry import usable
from actreg_dispatch.regularization import ActivityRegularization
from benchmarks import report
from benchmarks.contenders import LAM, Case, Run, load_dtype

__all__ = ["CONTENDERS", "GPU", "GPUS", "Counts", "main", "marginal", "panels", "ratio", "summary"]

Record = dict[str, Any]

WARP = 32  # threads
ISSUE_SLOTS = 4 * WARP  # of a multiprocessor: each of 4 schedulers issues for a warp a clock
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
OUR_SIZES = (1 << 20, 1 << 21)  # the same grid; whole batches of 32 elements a thread, and 64
CUPY_SIZES = (1 << 18, 1 << 19)  # where each element costs the same already
OPERATIONS = ("penalty", "apply")
DTYPES = ("float32", "float16", "bfloat16", "float64")
DRAWN = {(norm, dtype) for norm in ("l1", "l2_squared") for dtype in ("float32", "float64")}

L1, L2, L2_SQUARED = ActivityNorm.L1, ActivityNorm.L2, ActivityNorm.L2_SQUARED
SHOWN = [("float32", norm) for norm in (L1, L2, L2_SQUARED)]
SHOWN += [(dtype, norm) for dtype in ("float16", "float64") for norm in (L1, L2_SQUARED)]


# The model.


class GPU(NamedTuple):
    """What its maker says of a GPU."""

    name: str
    bandwidth: float  # of the memory, bytes per second
    multiprocessors: int
    clock: float  # boost, Hz
    f32_lanes: int  # of a multiprocessor: results per clock
    f64_lanes: int
    source: str


# Lanes are those of the table "Throughput of Native Arithmetic Instructions" in NVIDIA's "CUDA C++
# Programming Guide", for the compute capabilities 7.5, 8.9, 8.6, 8.9, 8.0 and 9.0.
GPUS = (
    GPU("T4", 320e9, 40, 1.590e9, 64, 2, "T4 data sheet; Turing GPU Architecture white paper"),
    GPU("L4", 300e9, 58, 2.040e9, 128, 2, "L4 data sheet; Ada GPU Architecture white paper"),
    GPU("A10", 600e9, 72, 1.695e9, 128, 2, "A10 data sheet; Ampere GA102 white paper"),
    GPU("RTX 4090", 1008e9, 128, 2.520e9, 128, 2, "Ada GPU Architecture white paper"),
    GPU("A100 SXM 80 GB", 2039e9, 108, 1.410e9, 64, 32, "A100 data sheet and white paper"),
    GPU("H100 SXM", 3350e9, 132, 1.980e9, 128, 64, "H100 data sheet and white paper"),
)


class Counts(NamedTuple):
    """What an element costs: bytes from and to memory, and instructions, of a thread, by unit."""

    bytes: float
    f64: float
    f32: float
    int: float
    memory: float
    other: float

    @property
    def all(self) -> float:
        """All instructions."""
        return self.f64 + self.f32 + self.int + self.memory + self.other


def ratio(counts: Counts, gpu: GPU, least_bytes: float) -> float:
    """Return how many times as long as the memory limit a GPU needs, at best.

    Parameters
    ----------
    counts : Counts
        What an element costs.
    gpu : GPU
        The GPU.
    least_bytes : float
        What every implementation must move for an element.

    Returns
    -------
    float
        The longest of the times for the bytes, for binary64, for binary32 and for issuing all
        instructions, over the time for ``least_bytes``.
    """
    clocks = gpu.multiprocessors * gpu.clock
    seconds = (
        counts.bytes / gpu.bandwidth,
        counts.f64 / (clocks * gpu.f64_lanes),
        counts.f32 / (clocks * gpu.f32_lanes),
        counts.all / (clocks * ISSUE_SLOTS),
    )
    return max(seconds) * gpu.bandwidth / least_bytes


def marginal(fewer: Sequence[Record], more: Sequence[Record], elements: int) -> Counts:
    """Return what an element costs, from the launches of two calls.

    Parameters
    ----------
    fewer, more : sequence of dict
        The launches of both calls, as the device counts them.
    elements : int
        How many more elements the second call had.

    Raises
    ------
    ValueError
        If they did not launch the same kernels.
    """
    if [launch["launch"] for launch in fewer] != [launch["launch"] for launch in more]:
        raise ValueError("the two sizes launch different kernels; give sizes of one path")

    def difference(amount: Callable[[Record], float]) -> float:
        return (sum(map(amount, more)) - sum(map(amount, fewer))) / elements

    def issued(unit: str) -> float:
        return WARP * difference(lambda launch: launch["issues"][unit])

    moved = difference(lambda launch: launch["loaded"] + launch["stored"])
    return Counts(moved, *map(issued, Counts._fields[1:]))


# What is counted: our calls, and the same in CuPy's functions.


class _Formula(NamedTuple):
    """A norm as a user of CuPy writes it, of Σ|x|, Σx² or both, all widened."""

    penalty: Callable[..., Any]  # of the sums
    coefficients: Callable[..., tuple[Any, ...]]  # of the penalty, and of the sums if two
    update: str  # how the coefficients make the gradient: of the signs of x, as a multiple, both


def _hoyer_coefficients(penalty: Any, absolute: Any, squares: Any) -> tuple[Any, ...]:
    r = absolute / squares
    return 2 * LAM * r, -2 * LAM * r * r


_FORMULAS = {
    L1: _Formula(lambda a: LAM * a, lambda p, *_: (LAM,), "signs"),
    L2: _Formula(lambda s: LAM * s**0.5, lambda p, *_: (LAM * LAM / p,), "multiple"),
    L2_SQUARED: _Formula(lambda s: LAM * s, lambda p, *_: (2 * LAM,), "multiple"),
    ActivityNorm.L1_L2_SQUARED: _Formula(
        lambda a, s: LAM * a + LAM * s, lambda p, *_: (LAM, 2 * LAM), "both"
    ),
    ActivityNorm.HOYER: _Formula(lambda a, s: LAM * a * a / s, _hoyer_coefficients, "both"),
}


def _cupy(case: Case, x: Any, g: Any, *, fused: bool = False) -> Run:
    """Return the call in CuPy's functions, by ``cupy.fuse`` if so wished.

    ``contenders.py`` has the like for three norms, without bfloat16, and fused without float16.
    """
    import cupy

    formula, wide = _FORMULAS[case.norm], np.float64 if x.itemsize == 8 else np.float32
    terms = named_norm(case.norm).terms

    def fuse(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return cupy.fuse(kernel_name=name)(function) if fused else function

    sums: dict[int, Callable[[Any], Any]] = {
        1: lambda x: cupy.sum(cupy.abs(x), dtype=wide),
        2: lambda x: cupy.sum(x * x, dtype=wide),
    }
    if fused:  # where dtype= would not widen what is summed
        sums = {
            1: lambda x: cupy.sum(cupy.abs(x.astype(wide))),
            2: lambda x: cupy.sum(cupy.square(x.astype(wide))),
        }
    updates: dict[str, Callable[..., Any]] = {
        "signs": lambda x, g, c: cupy.add(g, c * cupy.sign(x), g),
        "multiple": lambda x, g, c: cupy.add(g, c * x, g),
        "both": lambda x, g, c, d: cupy.add(g, c * cupy.sign(x) + d * x, g),
    }
    update = fuse(updates[formula.update], f"add_{formula.update}")
    penalty_of_one = fuse(lambda x: formula.penalty(sums[terms[0]](x)), "penalty")
    add_ups = [fuse(sums[term], f"sum_{term}") for term in terms]

    def narrow(coefficient: Any) -> Any:
        if isinstance(coefficient, float):
            return x.dtype.type(coefficient)
        return coefficient.astype(x.dtype, copy=False)

    def step() -> Any:
        totals: tuple[Any, ...] = ()
        if len(terms) == 1:
            found = penalty_of_one(x)
        else:
            totals = tuple(add_up(x) for add_up in add_ups)
            found = formula.penalty(*totals)
        if case.operation == "apply":
            known = formula.coefficients(found, *totals)
            update(x, g, *map(narrow, known))
        return found

    return Run(step, lambda: g)


def _ours(case: Case, x: Any, g: Any) -> Run:
    lam = (LAM,) * named_norm(case.norm).n_lams
    reg = ActivityRegularization(lam if len(lam) > 1 else LAM, case.norm, backend="cupy")
    return Run((lambda: reg.penalty(x)) if case.operation == "penalty" else lambda: reg.apply(x, g))


CONTENDERS: dict[str, Callable[[Case, Any, Any], Run]] = {
    "ours": _ours,
    "CuPy": _cupy,
    "cupy.fuse": lambda case, x, g: _cupy(case, x, g, fused=True),
}


def count(case: Case, contender: str, profile: Path) -> list[Record]:
    """Return what the device counts in each launch of a call.

    Raises
    ------
    ValueError
        If nothing was counted.
    """
    import cupy

    dtype, rng = load_dtype(case.dtype), np.random.default_rng(0)
    values = np.maximum(rng.standard_normal(case.size, np.float32), 0)  # half of them zero
    x, g = cupy.asarray(values.astype(dtype)), cupy.zeros(case.size, dtype)
    run = CONTENDERS[contender](case, x, g)
    with profile.open(encoding="utf-8") as lines:
        lines.seek(0, os.SEEK_END)
        run.step()
        launches = [event for event in map(json.loads, lines) if "launch" in event]
    if not launches:
        raise ValueError(f"this device writes nothing to {profile}: {_NEEDED}")
    return launches


def _counted(cases: Iterable[Case], profile: Path) -> Record:
    import cupy

    profile.touch()
    records = []
    for case in cases:
        for contender in CONTENDERS:
            few, many = OUR_SIZES if contender == "ours" else CUPY_SIZES
            fewer, more = (
                count(case._replace(size=size), contender, profile) for size in (few, many)
            )
            counts = marginal(fewer, more, many - few)
            records.append(
                {
                    "operation": case.operation,
                    "norm": case.norm.value,
                    "dtype": case.dtype,
                    "contender": contender,
                    "launches": len(more),
                    **counts._asdict(),
                }
            )
            print(f"{_name(records[-1])}: {contender}", file=sys.stderr)
    nvrtc = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    capability = ".".join(cupy.cuda.Device().compute_capability)
    versions = f"CuPy {cupy.__version__}, NVRTC {nvrtc}, compute capability {capability}"
    return {"versions": versions, "records": records}


# What is shown.


def _name(record: Record) -> str:
    return f"`{record['operation']}` {record['norm']}, {record['dtype']}"


def _rows(records: Sequence[Record]) -> Iterable[tuple[str, list[Record]]]:
    """Yield the records of each call, in the order of the contenders."""
    for name in dict.fromkeys(map(_name, records)):
        yield name, [record for record in records if _name(record) == name]


def _ratio(record: Record, gpu: GPU) -> float:
    counts = Counts(**{field: record[field] for field in Counts._fields})
    case = Case(record["operation"], ActivityNorm(record["norm"]), record["dtype"], 1)
    return ratio(counts, gpu, case.bytes_moved())


def panels(results: Record) -> dict[str, dict[str, list[float]]]:
    """Return the figures of the picture: call -> limit or contender -> bytes a second by GPU."""
    found = {}
    for name, records in _rows(results["records"]):
        if (records[0]["norm"], records[0]["dtype"]) in DRAWN:
            found[name.replace("`", "")] = {"limit": [gpu.bandwidth for gpu in GPUS]} | {
                r["contender"]: [gpu.bandwidth / _ratio(r, gpu) for gpu in GPUS] for r in records
            }
    return found


def summary(results: Record) -> str:
    """Return the tables of docs/performance.md."""
    ours, cupy = (f"{few:,} and {many:,}" for few, many in (OUR_SIZES, CUPY_SIZES))
    heads = ["binary64", "instructions", "bytes", "launches", *(gpu.name for gpu in GPUS)]
    lines = [
        f"Counted by `python -m benchmarks.model` ({results['versions']}) as the difference of two "
        f"sizes, {ours} elements for ours, {cupy} for CuPy's; then by the model, the least time "
        f"over the memory limit. In each cell: {' / '.join(CONTENDERS)}.",
        "",
        f"| an element | {' | '.join(heads)} |",
        f"| --- {'| ---: ' * len(heads)}|",
    ]
    for name, records in _rows(results["records"]):
        counts = [Counts(**{field: r[field] for field in Counts._fields}) for r in records]
        cells = [
            [f"{c.f64:.2f}" for c in counts],
            [f"{c.all:.0f}" for c in counts],
            [f"{c.bytes:.1f}" for c in counts],
            [str(record["launches"]) for record in records],
            *([f"{_ratio(record, gpu):.2f}" for record in records] for gpu in GPUS),
        ]
        lines.append(f"| {name} | {' | '.join(' / '.join(cell) for cell in cells)} |")
    lines += [
        "",
        "| GPU | GB/s | multiprocessors | boost, MHz | binary32, binary64 lanes each | source |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for gpu in GPUS:
        figures = f"{gpu.bandwidth / 1e9:.0f} | {gpu.multiprocessors} | {gpu.clock / 1e6:.0f}"
        lanes = f"{gpu.f32_lanes}, {gpu.f64_lanes}"
        lines.append(f"| {gpu.name} | {figures} | {lanes} | NVIDIA {gpu.source} |")
    return "\n".join(lines)


# The command.

_NEEDED = (
    "the model needs a software CUDA device, which counts what kernels do; set SOFTGPU_PROFILE "
    "to the file that it writes to, or show a former run with --from-json"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, or take ``--from-json``, and show; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.write is not None:  # told before the work
            report.split_readme(options.write, "model", "--write")
        if options.png is not None:
            _check_picture(options.png)
        results = _load(options.from_json) if options.from_json else _results(options)
        print(summary(results))  # before what may fail
        if options.json is not None:
            report.save(results, options.json)
        if options.png is not None:
            report.draw_model(panels(results), [gpu.name for gpu in GPUS], options.png)
        if options.write is not None:
            report.write_between(options.write, "model", summary(results), "--write")
    except (BackendError, OSError, ValueError) as error:
        print(f"benchmarks.model: {error}", file=sys.stderr)
        return 2
    return 0


def _check_picture(path: Path) -> None:
    problem = why_not_writable("--png", path, ".png", overwrite=True)
    if problem or find_spec("matplotlib") is None:
        raise ValueError(
            problem or "--png needs matplotlib; install it with: python -m pip install '.[bench]'"
        )


def _results(options: argparse.Namespace) -> Record:
    profile = os.environ.get("SOFTGPU_PROFILE")
    if not profile:
        raise ValueError(_NEEDED)
    usable("cupy", "the model")
    kinds = SHOWN
    if options.dtypes or options.norms:
        norms = map(ActivityNorm, options.norms or ActivityNorm)
        kinds = list(itertools.product(options.dtypes or DTYPES, norms))
    cases = [
        Case(operation, norm, dtype, 1) for dtype, norm in kinds for operation in options.operations
    ]
    results: Record = report.rounded(_counted(cases, Path(profile)))
    return results


def _load(path: Path) -> Record:
    results: Record = json.loads(path.read_text(encoding="utf-8"))
    if not {"versions", "records"} <= set(results):
        raise report.BadFileError(f"--from-json {path} was not written by benchmarks.model")
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    norms = [norm.value for norm in ActivityNorm]
    parser.add_argument("--norms", nargs="+", choices=norms, help="all dtypes of these norms")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="all norms of these dtypes")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="show a former run")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the model's figures here")
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=PAGE,
        metavar="FILE",
        help="put the tables in this Markdown (docs/performance.md if none is named)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
