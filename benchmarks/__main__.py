"""Options of the comparison, and what is checked before its work: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actreg_dispatch import ActivityNorm, BackendError
from actreg_dispatch.cli.options import positive, why_not_writable
from actreg_dispatch.registry import usable

__all__ = ["PEERS", "main"]

PEERS = (
    "NumPy",
    "numexpr",
    "PyTorch eager",
    "PyTorch autograd",
    "torch.compile",
    "JAX jit",
    "Keras",
    "CuPy",
    "cupy.fuse",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # × on a terminal that cannot show it
    options = _parser().parse_args(arguments)
    try:
        return _compare(options)
    except BackendError as error:
        return _fail(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time the backends against the machine's limits and against other libraries.",
    )

    def several(name: str, default: list[Any], explanation: str, **options: Any) -> None:
        parser.add_argument(
            name,
            nargs="+",
            metavar=name[2:-1].upper(),
            default=default,
            help=explanation,
            **options,
        )

    several(
        "--sizes",
        [1, 1000, 100_000, 1_000_000, 20_000_000, 100_000_000],
        "numbers of elements (default: 1 1000 1e5 1e6 2e7 1e8, which take some 8 GB)",
        type=_size,
    )
    several(
        "--dtypes",
        ["float32", "float64"],
        "of float16, bfloat16, float32, float64 (default: float32 float64)",
        choices=("float16", "bfloat16", "float32", "float64"),
    )
    norms = [ActivityNorm.L1, ActivityNorm.L2, ActivityNorm.L2_SQUARED]
    explanation = "of l1, l2, l2_squared (default: all)"
    several("--norms", norms, explanation, type=_norm)
    operations = ["apply", "penalty"]
    several("--operations", operations, "apply or penalty (default: both)", choices=operations)
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="PEER",
        choices=PEERS,
        help=f"of {', '.join(PEERS)} (default: all of the device that are installed)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the arrays are: NumPy's on the processor or CuPy's on a GPU (default: cpu)",
    )
    parser.add_argument("--strided", action="store_true", help="add strided arrays")
    parser.add_argument("--first-calls", action="store_true", help="add fresh processes (cpu)")
    parser.add_argument("--repeats", type=positive, default=11, help="rounds (default: 11)")
    parser.add_argument("--threads", type=positive, help="processors to use (cpu; default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="draw throughput against size here"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files they name")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="put the tables in this Markdown"
    )
    parser.add_argument(
        "--brief", type=Path, metavar="FILE", help="put a small table in this Markdown (cpu)"
    )
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="show a former run")
    return parser


def _norm(text: str) -> ActivityNorm:
    """Return a norm that the benchmark has peers for."""
    known = [norm.value for norm in ActivityNorm if norm is not ActivityNorm.L1_L2_SQUARED]
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is none of: {', '.join(known)}")
    return ActivityNorm(text)


def _size(text: str) -> int:
    try:
        size = float(text.replace("_", ""))
    except ValueError:
        size = 0.5
    if size < 1 or not size.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(size)


def _compare(options: argparse.Namespace) -> int:
    if options.device == "cuda":
        if options.threads or options.first_calls or options.brief:
            return _fail(
                "--threads, --first-calls and --brief are for --device cpu; leave them out"
            )
        if options.from_json is None:
            usable("cupy", "--device cuda")
    try:
        from benchmarks import comparison

        if options.png is not None:
            importlib.import_module("matplotlib")
        if "bfloat16" in options.dtypes:
            importlib.import_module("ml_dtypes")
    except ImportError as error:
        return _fail(
            f"the benchmark needs {error.name}; install it and all peers with: "
            f"python -m pip install '.[bench]'"
        )
    for option, path, suffix in (("--json", options.json, ".json"), ("--png", options.png, ".png")):
        problem = path and why_not_writable(option, path, suffix, options.overwrite)
        if problem:
            return _fail(problem)
    try:
        return comparison.main(options)
    except comparison.BadFileError as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"there is not enough memory for these --sizes: {error}; ask for smaller ones")


def _fail(message: str) -> int:
    print(f"benchmarks: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
