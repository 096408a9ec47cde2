"""Our backends against the limits of the machine and against other libraries."""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import sys
from typing import Any

import numba
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actreg_dispatch.norms import ActivityNorm
from benchmarks import report
from benchmarks.contenders import BARE_CALL, LAYOUTS, Case
from benchmarks.report import BadFileError
from benchmarks.timing import CPU, Device, first_calls, machine, measure, slope

__all__ = ["BadFileError", "main"]

_STRIDED_SIZE = 2_000_000


def main(options: argparse.Namespace) -> int:
    """Measure, or take ``--from-json``, and show; return the exit status.

    Raises
    ------
    BadFileError
        If a file that is to be read is not what it should be; before anything is measured.
    """
    console = Console()
    if options.readme is not None:
        report.split_readme(options.readme, options.device)  # or it is told before the work
    if options.brief is not None:
        report.split_readme(options.brief, "brief", "--brief")
    if options.from_json is not None:
        results = report.load(options.from_json)
    else:
        results = report.rounded(_measured(options, console))
    report.print_table(results["records"], console)
    if options.json is not None:
        report.save(results, options.json)
    if options.png is not None:
        report.draw(results, options.png)
    if options.readme is not None:
        report.update_readme(results, options.readme, options.device)
    if options.brief is not None:
        report.write_between(options.brief, "brief", report.brief(results), "--brief")
    wrong = [r for r in results["records"] if r["kind"] == "ours" and not r["agrees"]]
    return 1 if wrong else 0


def _measured(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    threads = None
    if options.device == "cuda":
        device: Device = importlib.import_module("benchmarks.cuda").CUDA
    else:
        device, threads = CPU, _limit_threads(options.threads)
    if device.caveat():
        console.print(device.caveat(), style="bold")
    contenders = [
        contender
        for contender in device.contenders
        if contender.is_installed()
        and (contender.kind != "peer" or options.peers is None or contender.name in options.peers)
    ]
    foreign = {*(options.peers or ())} - {contender.name for contender in device.contenders}
    if foreign:
        console.print(f"Left out, not on {options.device}: {', '.join(sorted(foreign))}")
    cases = [
        Case(operation, norm, dtype, size)
        for dtype, norm, operation, size in itertools.product(
            options.dtypes, options.norms, options.operations, options.sizes
        )
    ]
    if options.strided:
        layouts = [layout for layout in LAYOUTS if layout != "contiguous"]
        cases += [
            Case("apply", ActivityNorm.L1, dtype, _STRIDED_SIZE, layout)
            for dtype in options.dtypes
            for layout in layouts
            if dtype in ("float32", "float64")
        ]
    records = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(cases))

        def show(case: Case) -> None:
            described = f"{case.operation} {case.norm.value} {case.dtype} {case.size:,}"
            progress.update(bar, description=described)

        for found in measure(cases, contenders, options.repeats, show, device):
            records += found
            progress.advance(bar)
        if options.first_calls:
            progress.update(bar, description="first calls")
    return {
        "machine": machine(device, contenders, threads),
        "settings": {"repeats": options.repeats, "bare_call": BARE_CALL},
        "records": records,
        "first_calls": first_calls() if options.first_calls else None,
        "slopes": slope(records),
    }


def _limit_threads(threads: int | None) -> int:
    """Let this process, every library in it included, use so many processors; return how many."""
    if threads is not None and hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, allowed)
        threads = len(allowed)
    threads = min(threads or numba.config.NUMBA_NUM_THREADS, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    if "torch" in sys.modules:  # it read the number of processors when it was imported
        sys.modules["torch"].set_num_threads(threads)
    return threads
