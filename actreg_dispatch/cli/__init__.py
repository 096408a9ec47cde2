"""The command line: ``actreg``, or ``python -m actreg_dispatch``.

Here are the options; each command is a module, which is imported when the command runs.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actreg_dispatch import BackendError, __version__
from actreg_dispatch.cli.options import natural, positive, reduction, why_not_writable
from actreg_dispatch.norms import NORMS
from actreg_dispatch.registry import AUTO, check_name, requested, usable

__all__ = ["main"]

_BENCH = (
    "actreg: bench is not a command any more; in a clone of the repository, run: "
    "python -m benchmarks\n"
)
_COMPILES = "The first run for a norm and a dtype compiles, for some seconds."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # λ on a terminal that cannot show it
    parser = _parser()
    if (sys.argv[1:] if arguments is None else arguments)[:1] == ["bench"]:
        parser.exit(2, _BENCH)
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BackendError as error:
        parser.exit(2, f"actreg: {error}\n")
    except KeyboardInterrupt:
        print("actreg: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # what reads the output has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing to flush at exit
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="actreg",
        description="Activity regularization: penalties on the size of activations.",
        epilog="actreg COMMAND --help describes a command and its options.",
    )
    parser.add_argument("--version", action="version", version=f"actreg_dispatch {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train sparse autoencoders of handwritten digits and show what λ does",
        description="Train 16 autoencoders of handwritten digits, without a penalty and with three "
        "norms at five strengths λ each. Print a table of how sparse and how good they are, and "
        "draw a picture of it.",
    )
    _add_backend(demo)
    demo.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the picture, a PNG (default: actreg-demo.png, or actreg-demo-2.png and so on if "
        "that exists)",
    )
    demo.add_argument(
        "--overwrite", action="store_true", help="replace the file that --out names, if it exists"
    )
    demo.add_argument(
        "--epochs",
        type=positive,
        default=40,
        metavar="N",
        help="passes over the digits (default: 40)",
    )
    demo.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="of the random numbers: which digits are held out, and the first weights (default: 0)",
    )
    demo.set_defaults(run=_demo)

    _add_files(commands)

    doctor = commands.add_parser(
        "doctor",
        help="say which backends and libraries can be used here, and test the backends",
        description="Compare each backend with exact arithmetic, say what can be used on this "
        "machine and what to install for the rest, and which backend computes NumPy arrays. The "
        "exit status is 1 if a backend fails or ACTREG_BACKEND names none that can be used.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _add_backend(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--backend",
        metavar="NAME",
        help="what computes: numba, numpy, cupy, or auto, which goes by the kind of array "
        "(default: the environment variable ACTREG_BACKEND, or else auto)",
    )


def _add_files(commands: Any) -> None:
    penalty = commands.add_parser(
        "penalty",
        help="print the penalty of activations in a .npy file or a Zarr array",
        description="Print the penalty of the activations in a file, as it is for the same array "
        "in memory. The file is read in pieces of at most 256 MiB, so it may be larger than "
        f"memory. {_COMPILES}",
    )
    apply = commands.add_parser(
        "apply",
        help="the same, and add the gradient to a file of gradients, in place",
        description="Print the penalty, and add its gradient to a file of gradients, in place, "
        "block by block. An update that was interrupted, by Ctrl-C or by a power failure, can be "
        "resumed: meanwhile the old values of the current block are in GRADIENTS.actreg-journal, "
        f"of up to 128 MiB. {_COMPILES}",
    )
    guarded = ", ".join(norm.name for norm in NORMS.values() if norm.has_guard)
    for command in (penalty, apply):
        command.add_argument(
            "activations", type=Path, metavar="ACTIVATIONS", help="a .npy file or a Zarr array"
        )
        if command is apply:
            command.add_argument(
                "gradients",
                type=Path,
                metavar="GRADIENTS",
                help="another of the same format, shape, dtype and order, which is updated; it "
                "must exist",
            )
        command.add_argument(
            "--norm", choices=list(NORMS), default="l1", help="what is penalized (default: l1)"
        )
        command.add_argument(
            "--lam",
            type=_strength,
            required=True,
            help="the strength λ, >= 0, such as 1e-3; for l1_l2_squared one for both parts, or "
            "two, as in 1e-3,1e-4",
        )
        command.add_argument(
            "--epsilon",
            type=float,
            help=f"for {guarded} alone: where the sum of squares is at most that, there is no "
            "gradient (default: the machine epsilon of the dtype)",
        )
        command.add_argument(
            "--reduction",
            type=reduction,
            default="sum",
            metavar="HOW",
            help="what λ is divided by. sum: nothing; mean: the number of elements; batch: the "
            "length of the first axis; axes, such as 0,1: their lengths (default: sum)",
        )
        command.add_argument(
            "--weights",
            type=Path,
            metavar="FILE",
            help="weights >= 0 of the elements, or a bool mask of those that count: a file like "
            "ACTIVATIONS, whose shape broadcasts to theirs",
        )
        if command is apply:
            command.add_argument(
                "--scale",
                type=float,
                default=1.0,
                help="a factor of the gradient, not of the penalty (default: 1)",
            )
        command.add_argument(
            "--dtype",
            choices=("bfloat16",),
            help="read elements as bfloat16: a .npy file knows them only as two bytes (V2)",
        )
        _add_backend(command)
        command.add_argument(
            "--json",
            action="store_true",
            help="print one JSON object; in it a penalty that is not finite is null, and "
            "penalty_hex says nan or inf",
        )
        command.set_defaults(run=_files, gradients=None)
    apply.add_argument(
        "--resume",
        action="store_true",
        help="go on with an update that was interrupted; give the same arguments again",
    )


def _strength(text: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or several of them") from None
    return numbers[0] if len(numbers) == 1 else numbers


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
