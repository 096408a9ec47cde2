"""The command line: ``actreg``, or ``python -m actreg_dispatch``.

Here are the options; each command is a module, which is imported when the command runs.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actreg_dispatch import ActivityNorm, BackendError, __version__
from actreg_dispatch.cli.options import natural, positive, why_not_writable
from actreg_dispatch.registry import AUTO, check_name, requested, usable

__all__ = ["main"]

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
    """Run one command and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # λ on a terminal that cannot show it
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except BackendError as error:
        parser.exit(2, f"actreg: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="actreg", description="Activity regularization for NumPy and CuPy arrays."
    )
    parser.add_argument("--version", action="version", version=f"actreg_dispatch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train sparse autoencoders of handwritten digits and show what λ does",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--backend", help="the backend that computes (default: ACTREG_BACKEND, auto)")
    demo.add_argument(
        "--out", type=Path, help="the picture, a PNG (default: actreg-demo.png, or a free name)"
    )
    demo.add_argument("--overwrite", action="store_true", help="replace the file --out names")
    demo.add_argument("--epochs", type=positive, default=40, help="passes over the digits")
    demo.add_argument("--seed", type=natural, default=0, help="of the split and the weights")
    demo.set_defaults(run=_demo)

    _add_bench(commands)
    _add_files(commands)

    doctor = commands.add_parser("doctor", help="say what is usable, what is chosen, and test it")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the backends against the machine's limits and against other libraries",
    )

    def several(name: str, default: list[Any], explanation: str, **options: Any) -> None:
        bench.add_argument(
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
    bench.add_argument(
        "--peers",
        nargs="*",
        metavar="PEER",
        choices=PEERS,
        help=f"of {', '.join(PEERS)} (default: all of the device that are installed)",
    )
    bench.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the arrays are: NumPy's on the processor or CuPy's on a GPU (default: cpu)",
    )
    bench.add_argument("--strided", action="store_true", help="add strided arrays")
    bench.add_argument("--first-calls", action="store_true", help="add fresh processes (cpu)")
    bench.add_argument("--repeats", type=positive, default=11, help="rounds (default: 11)")
    bench.add_argument("--threads", type=positive, help="processors to use (cpu; default: all)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    bench.add_argument("--png", type=Path, metavar="FILE", help="draw throughput against size here")
    bench.add_argument("--overwrite", action="store_true", help="replace the files they name")
    bench.add_argument(
        "--readme", type=Path, metavar="FILE", help="put the tables in this Markdown"
    )
    bench.add_argument("--from-json", type=Path, metavar="FILE", help="show a former run")
    bench.set_defaults(run=_bench)


def _add_files(commands: Any) -> None:
    penalty = commands.add_parser(
        "penalty",
        help="the penalty of activations in a file, .npy or Zarr, larger than memory",
        description="Print the penalty of the activations in a file, as it is for the same array "
        "in memory. The file is read in pieces of at most 256 MiB.",
    )
    apply = commands.add_parser(
        "apply",
        help="the same, and add its gradient to a file of gradients, in place",
        description="Add the gradient of the penalty to a file of gradients, in place, block by "
        "block. What is interrupted, by Ctrl-C or by a power failure, can be resumed: the old "
        "values of the block under way lie in GRADIENTS.actreg-journal, which takes up to 128 MiB.",
    )
    for command in (penalty, apply):
        command.add_argument(
            "activations", type=Path, metavar="ACTIVATIONS", help="a .npy file or a Zarr array"
        )
        if command is apply:
            command.add_argument(
                "gradients",
                type=Path,
                metavar="GRADIENTS",
                help="another of the same kind, shape and dtype, which is updated",
            )
        norms = [norm.value for norm in ActivityNorm]
        command.add_argument("--norm", choices=norms, default="l1", help="(default: l1)")
        command.add_argument(
            "--lam",
            type=_strength,
            required=True,
            help="the strength λ; for l1_l2_squared two, as in 1e-3,1e-4",
        )
        command.add_argument(
            "--epsilon", type=float, help="l2: the sum of squares up to which there is no gradient"
        )
        command.add_argument(
            "--reduction",
            choices=("sum", "mean", "batch"),
            default="sum",
            help="what λ is divided by: nothing, elements, or length of axis 0 (default: sum)",
        )
        if command is apply:
            command.add_argument(
                "--scale", type=float, default=1.0, help="multiplies the gradient (default: 1)"
            )
        command.add_argument(
            "--dtype",
            choices=("bfloat16",),
            help="what the elements are if the file does not name it (V2)",
        )
        command.add_argument(
            "--backend", help="the backend that computes (default: ACTREG_BACKEND, auto)"
        )
        command.add_argument(
            "--json",
            action="store_true",
            help="print one JSON object; a penalty that is not finite is null there, and named "
            "in penalty_hex",
        )
        command.set_defaults(run=_files, gradients=None)
    apply.add_argument(
        "--resume",
        action="store_true",
        help="go on with an update that was interrupted, with the same arguments",
    )


def _strength(text: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or two of them") from None
    return numbers[0] if len(numbers) == 1 else numbers


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


def _demo(options: argparse.Namespace) -> int:
    if options.backend is None:
        name, source = requested()
    else:
        source = f"--backend {options.backend}"
        name = options.backend = check_name(options.backend, source)
    if name != AUTO:
        usable(name, source)  # or it is told before the work
    out = options.out or _free_name("actreg-demo", ".png")
    problem = why_not_writable("--out", out, ".png", options.overwrite)
    if problem:
        return _fail(problem)
    try:
        from actreg_dispatch.cli import demo
    except ImportError as error:
        return _fail(
            f"the demo needs {error.name}; install what it needs with: "
            f"python -m pip install matplotlib rich scikit-learn"
        )
    demo.main(demo.Settings(epochs=options.epochs, seed=options.seed, backend=options.backend), out)
    return 0


def _bench(options: argparse.Namespace) -> int:
    if options.device == "cuda":
        if options.threads or options.first_calls:
            return _fail("--threads and --first-calls are for --device cpu; leave them out")
        if options.from_json is None:
            usable("cupy", "--device cuda")
    try:
        from actreg_dispatch import bench

        if options.png is not None:
            importlib.import_module("matplotlib")
        if "bfloat16" in options.dtypes:
            importlib.import_module("ml_dtypes")
    except ImportError as error:
        return _fail(
            f"the benchmark needs {error.name}; install it and all peers with: "
            f"python -m pip install 'actreg-dispatch[bench]'"
        )
    for option, path, suffix in (("--json", options.json, ".json"), ("--png", options.png, ".png")):
        problem = path and why_not_writable(option, path, suffix, options.overwrite)
        if problem:
            return _fail(problem)
    try:
        return bench.main(options)
    except bench.BadFileError as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"there is not enough memory for these --sizes: {error}; ask for smaller ones")


def _files(options: argparse.Namespace) -> int:
    from actreg_dispatch.cli.files import main as run

    return run(options)


def _free_name(stem: str, suffix: str) -> Path:
    names = itertools.chain([stem + suffix], (f"{stem}-{n}{suffix}" for n in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())


def _fail(message: str) -> int:
    print(f"actreg: {message}", file=sys.stderr)
    return 2


def _doctor(options: argparse.Namespace) -> int:
    from actreg_dispatch.cli.doctor import examine

    return examine()
