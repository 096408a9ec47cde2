"""``actreg penalty`` and ``actreg apply``: a bar while they run, a result or JSON afterwards."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from actreg_dispatch.files import (
    FilesError,
    PartlyUpdatedError,
    Progress,
    Result,
    apply,
    journal_of,
    penalty,
)
from actreg_dispatch.regularization import ActivityRegularization

__all__ = ["main"]


class _Stopped(KeyboardInterrupt):
    """A signal came, and the block that was under way is done."""


def main(options: argparse.Namespace) -> int:
    """Run the command and return the exit status: 2 for errors, 130 and 143 if interrupted."""
    writes = options.gradients is not None
    try:
        reg = ActivityRegularization(
            options.lam,
            options.norm,
            epsilon=options.epsilon,
            reduction=options.reduction,
            backend=options.backend,
        )
        with _signals() as check, _bar(check) as progress:
            common: dict[str, Any] = {
                "weights": options.weights,
                "dtype": options.dtype,
                "progress": progress,
            }
            if writes:
                common |= {"scale": options.scale, "resume": options.resume}
                result = apply(reg, options.activations, options.gradients, **common)
            else:
                result = penalty(reg, options.activations, **common)
    except KeyboardInterrupt as stop:
        between = isinstance(stop, _Stopped)  # two blocks, or else a second signal came
        state = f"; {_state(options.gradients, between)}" if writes else ""
        print(f"actreg: interrupted{state}", file=sys.stderr)
        return 128 + (stop.args[0] if between else signal.SIGINT)
    except (FilesError, PartlyUpdatedError, OSError, ValueError, TypeError, MemoryError) as error:
        print(f"actreg: {error or type(error).__name__}", file=sys.stderr)
        return 2
    print(_as_json(result, reg, options) if options.json else _as_text(result, reg, options))
    return 0


def _state(gradients: Path, between: bool) -> str:
    """Return what a run has left that was stopped, ``between`` two blocks or anywhere."""
    if journal_of(gradients).exists():
        return f"{gradients} are updated in part: go on by the same command and --resume"
    return f"{gradients} are {'untouched' if between else 'untouched, or updated as a whole'}"


def _as_json(result: Result, reg: ActivityRegularization, options: argparse.Namespace) -> str:
    """Return one JSON object; a penalty that JSON has no number for is null, its name in hex."""
    number = float(result.penalty)
    told = {
        "penalty": number if math.isfinite(number) else None,
        "penalty_hex": number.hex(),
        "norm": reg.options.norm.name,
        "lam": reg.lam,
        "epsilon": reg.epsilon,
        "reduction": reg.reduction,
    }
    if options.weights is not None:
        told["weights"] = str(options.weights)
    if options.gradients is not None:
        told["scale"] = options.scale if math.isfinite(options.scale) else repr(options.scale)
    told |= {k: v for k, v in dataclasses.asdict(result).items() if k != "penalty"}
    return json.dumps(told, allow_nan=False)


def _as_text(result: Result, reg: ActivityRegularization, options: argparse.Namespace) -> str:
    unit, name = next(
        (unit, name)
        for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
        if result.bytes >= unit or unit == 1
    )
    size = f"{result.bytes / unit:.3g} {name} in {result.seconds:.3g} s"
    where = "" if options.gradients is None else f", gradient added to {options.gradients}"
    weighed = "" if options.weights is None else f", weights {options.weights}"
    return (
        f"penalty {float(result.penalty)!r} ({reg.options.norm.name}, λ = {reg.lam!r}, "
        f"{result.elements} {result.dtype}{weighed}){where}\n"
        f"{size}, start-up included; backend {result.backend}"
    )


@contextlib.contextmanager
def _signals() -> Iterator[Progress]:
    """Let SIGINT and SIGTERM stop the run after the block that is under way.

    The same signal once more does what it does by default. Yields what is to be called after every
    block.
    """
    came: list[int] = []
    former: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, former[number])

    def check(step: str, done: int, whole: int) -> None:
        if came:
            raise _Stopped(came[0])

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield check
        return
    for wanted in (signal.SIGINT, signal.SIGTERM):
        former[wanted] = signal.signal(wanted, note)
    try:
        yield check
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _bar(after: Progress) -> Iterator[Progress]:
    """Show a bar on a terminal if rich is there; yields what also calls ``after``."""
    try:
        from rich import progress as rich
        from rich.console import Console
    except ImportError:
        yield after
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield after
        return
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    # No thread of its own: with the threading layer workqueue, kernels would run serially.
    with rich.Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        tasks: dict[str, Any] = {}
        start = bar.add_task("starting (compiles once)", total=None)
        bar.refresh()

        def show(step: str, done: int, whole: int) -> None:
            if step not in tasks:
                bar.update(start, visible=False)
                tasks[step] = bar.add_task(step, total=whole)
            bar.update(tasks[step], completed=done)
            bar.refresh()
            after(step, done, whole)

        yield show
