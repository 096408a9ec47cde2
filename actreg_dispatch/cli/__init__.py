"""The command line: ``actreg``, or ``python -m actreg_dispatch``.

Here are the options; each command is a module, which is imported when the command runs.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actreg_dispatch import BackendError, __version__
from actreg_dispatch.cli.options import natural, positive, reduction, why_not_writable
from actreg_dispatch.norms import NORMS
from actreg_dispatch.registry import AUTO, check_name, requested, usable

__all__ = ["main"]


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

    _add_files(commands)

    doctor = commands.add_parser("doctor", help="say what is usable, what is chosen, and test it")
    doctor.set_defaults(run=_doctor)
    return parser


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
                help="another of the same format, shape and dtype, which is updated",
            )
        command.add_argument("--norm", choices=list(NORMS), default="l1", help="(default: l1)")
        command.add_argument(
            "--lam",
            type=_strength,
            required=True,
            help="the strength λ; several for norms that take several, such as l1_l2_squared, as "
            "in 1e-3,1e-4",
        )
        command.add_argument(
            "--epsilon",
            type=float,
            help=f"{guarded}: the sum of squares up to which there is no gradient",
        )
        command.add_argument(
            "--reduction",
            type=reduction,
            default="sum",
            metavar="{sum,mean,batch} or AXIS,...",
            help="what λ is divided by: nothing, elements, or lengths of axes (default: sum)",
        )
        command.add_argument(
            "--weights",
            type=Path,
            metavar="FILE",
            help="what the elements weigh, >= 0, or a mask: a file of the same format and shape, "
            "or of one that broadcasts",
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
