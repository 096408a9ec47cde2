"""Timing: everything on the same arrays, taken in turns, medians over the rounds.

A machine is rarely quiet for long. Contenders take turns within a round, so that a disturbance
hits all of them, and each sleeps before its turn, so that the threads of the one before, which
spin for a while, are out of the way.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np

from actreg_dispatch import __version__
from actreg_dispatch.regularization import ActivityRegularization
from benchmarks.contenders import (
    CONTENDERS,
    FAST,
    LAM,
    LAYOUTS,
    Case,
    Contender,
    Run,
    Task,
    load_dtype,
)

__all__ = ["CPU", "Device", "first_calls", "machine", "measure", "slope", "take_turns"]

_BATCH = 2e-3  # seconds that a turn takes at least; shorter work is repeated within it
_REST = 2e-3  # seconds before a turn

Record = dict[str, Any]
Clock = Callable[[Callable[[], Any], int], float]  # seconds that a step takes, of so many
Name = TypeVar("Name", bound=Hashable)


class Device(NamedTuple):
    """Where the arrays are, and what belongs to that."""

    arrays: Any  # the module that makes them
    contenders: tuple[Contender, ...]
    clock: Clock
    processor: Callable[[], str]
    caveat: Callable[[], str]  # what a reader of the times must know, if anything
    libraries: tuple[str, ...]  # whose versions matter even if they are no contender's


def machine(device: Device, contenders: Iterable[Contender], threads: int | None = None) -> Record:
    """Return what the figures depend on: processor, threads, versions."""
    names = [*device.libraries]
    names += [module for c in contenders if c.is_installed() for module in c.modules]
    versions = {}
    for name in dict.fromkeys(names):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # the distribution has another name
            versions[name] = getattr(sys.modules.get(name), "__version__", "unknown")
    return {
        "processor": device.processor(),
        "caveat": device.caveat(),
        "cores": os.cpu_count(),
        "threads": threads,
        "threading_layer": numba.threading_layer() if threads else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "actreg_dispatch": __version__,
        "versions": versions,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def measure(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    repeats: int,
    progress: Callable[[Case], None] = lambda case: None,
    device: Device | None = None,
) -> Iterator[list[Record]]:
    """Time ``contenders`` at each case; yield the records of a case, one a contender."""
    for case in cases:
        progress(case)
        yield _measure_case(case, contenders, repeats, device or CPU)


def _measure_case(
    case: Case, contenders: Sequence[Contender], repeats: int, device: Device
) -> list[Record]:
    task, start = _task(case, device)
    runs: dict[Contender, Run] = {}
    agrees: dict[Contender, bool] = {}
    for contender in contenders:
        task.gradients[...] = start
        try:
            run = contender.run(task)
            right = run is None or contender.kind == "limit" or _agrees(task, start, run)
        except Exception as error:  # a peer's failure is no reason to lose what was measured
            if contender.kind != "peer":
                raise
            warnings.warn(f"{contender.name} failed at {case}: {error!r}", stacklevel=2)
            continue
        if run is not None:
            runs[contender], agrees[contender] = run, right
    steps = {contender: run.step for contender, run in runs.items()}
    times = take_turns(steps, repeats, device.clock)
    seconds = {contender: statistics.median(times[contender]) for contender in runs}
    rivals = {
        kind: min(
            (c for c in runs if c.kind == kind and agrees[c]), key=seconds.__getitem__, default=None
        )
        for kind in ("limit", "peer")
    }

    def ratio(contender: Contender, kind: str) -> float | None:
        """Return the median of the ratios of the rounds, which a slower minute does not move."""
        rival = rivals[kind]
        if rival is None:
            return None
        pairs = zip(times[contender], times[rival], strict=True)
        return statistics.median(own / other for own, other in pairs)

    return [
        {
            "operation": case.operation,
            "norm": case.norm.value,
            "dtype": case.dtype,
            "size": task.activations.size,
            "layout": case.layout,
            "contender": contender.name,
            "kind": contender.kind,
            "agrees": agrees[contender],
            "seconds": seconds[contender],
            "fastest": min(times[contender]),
            "gigabytes_per_second": case.bytes_moved() / seconds[contender] / 1e9,
            "ratio_to_limit": ratio(contender, "limit"),
            "ratio_to_best_peer": ratio(contender, "peer"),
            "best_peer": rivals["peer"] and rivals["peer"].name,
        }
        for contender in runs
    ]


def _task(case: Case, device: Device) -> tuple[Task, Any]:
    """Return the arrays of a case, half of the activations zero, and the gradients' start."""
    dtype, rng = load_dtype(case.dtype), np.random.default_rng(0)
    shape, view = LAYOUTS[case.layout]
    activations, gradients = (view(device.arrays.zeros(shape(case.size), dtype)) for _ in range(2))
    values = rng.standard_normal(activations.shape, np.float32)
    activations[...] = device.arrays.asarray(np.maximum(values, 0).astype(dtype))
    start = rng.standard_normal(activations.shape, np.float32).astype(dtype)
    return Task(case, activations, gradients), device.arrays.asarray(start)


def _host(array: Any) -> np.ndarray[Any, Any]:
    """Return an array of NumPy or CuPy as one of NumPy."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def _agrees(task: Task, start: Any, run: Run) -> bool:
    """Return whether one step leads to our results, but for rounding."""
    case = task.case
    reg, gradients = ActivityRegularization(LAM, case.norm), start.copy()
    penalty = reg.apply(task.activations, gradients)
    found = run.step()
    tolerance = {2: 2e-2, 4: 1e-4, 8: 1e-9}[start.itemsize]
    if not np.isclose(float(found), float(penalty), rtol=min(tolerance, 1e-4)):
        return False
    if case.operation == "penalty":
        return True
    updated, expected = (_host(a).astype(np.float64) for a in (run.gradients(), gradients))
    return bool(np.allclose(updated, expected, rtol=tolerance, atol=tolerance))


def take_turns(
    steps: Mapping[Name, Callable[[], Any]], repeats: int, clock: Clock | None = None
) -> dict[Name, list[float]]:
    """Return how many seconds each of ``steps`` took in each round."""
    clock = clock or _time
    batches = {name: _batch(step, clock) for name, step in steps.items()}
    times: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(clock(step, batches[name]))
    return times


def _batch(step: Callable[[], Any], clock: Clock) -> int:
    """Return how many steps take long enough to be timed."""
    turns = 1
    while (seconds := clock(step, turns) * turns) < _BATCH / 2:
        turns = max(2 * turns, min(int(_BATCH / max(seconds / turns, 1e-9)), 100 * turns))
    return turns


def _time(step: Callable[[], Any], turns: int) -> float:
    time.sleep(_REST)
    step()  # wakes what sleeps, fills the caches
    before = time.perf_counter()
    for _ in range(turns):
        step()
    return (time.perf_counter() - before) / turns


CPU = Device(np, CONTENDERS, _time, _processor, str, ("numpy", "numba", "llvmlite"))


def slope(records: Iterable[Record], minimum: int = 100_000) -> dict[str, float]:
    """Return the exponent p of a fit of time to sizeᵖ, from ``minimum`` elements up, a series."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if (
            record["contender"] in FAST
            and record["size"] >= minimum
            and record["layout"] == "contiguous"
        ):
            name = f"{record['operation']} {record['norm']} {record['dtype']}"
            series.setdefault(name, []).append((record["size"], record["seconds"]))
    exponents = {}
    for name, points in series.items():
        if len(points) > 1:
            sizes, seconds = np.log(np.array(points).T)
            exponents[name] = float(np.polyfit(sizes, seconds, 1)[0])
    return exponents


_FIRST_CALL = """
import time
start = time.perf_counter()
import numpy
numpy_imported = time.perf_counter()
import actreg_dispatch
imported = time.perf_counter()
calls = []
for size in (1, 1_000_000):
    x, g = numpy.ones(size, numpy.float32), numpy.zeros(size, numpy.float32)
    reg = actreg_dispatch.ActivityRegularization.l1(0.1)
    for _ in range(3):
        before = time.perf_counter()
        reg.apply(x, g)
        calls.append(time.perf_counter() - before)
print(numpy_imported - start, imported - numpy_imported, calls[0], calls[2], calls[3], calls[5])
"""


def first_calls() -> dict[str, dict[str, float]]:
    """Return what a fresh process waits for, with Numba's cache on disk empty and full."""
    names = (
        "import numpy",
        "import actreg_dispatch",
        "first call, serial (imports Numba)",
        "later call, serial",
        "first call, parallel",
        "later call, parallel",
    )
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache, "ACTREG_CACHE": "1"}
        for state in ("empty cache", "full cache"):
            printed = subprocess.run(
                [sys.executable, "-c", _FIRST_CALL],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            found[state] = dict(zip(names, map(float, printed.split()), strict=True))
    return found
