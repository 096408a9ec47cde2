"""What Dask arrays take, beside the same expressions in Dask's own functions.

``python -m benchmarks.dask_arrays`` prints two tables in Markdown. The first is of an array in
memory, computed by threads. The second is of an array in a Zarr store on disk, computed by two
processes of one thread each; in its last column, one of the two is killed on the way. The cells are
times, and their ratios to the plain expression, medians of interleaved rounds. Gradients are summed
in both, so that they need not be kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import distributed
import numpy as np
import zarr

from actreg_dispatch import ActivityRegularization

LAM = 0.1
NORMS: dict[str, tuple[ActivityRegularization, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "L1": (
        ActivityRegularization.l1(LAM),
        lambda x: (LAM * abs(x)).sum(),
        lambda x: LAM * da.sign(x),
    ),
    "squares": (
        ActivityRegularization.l2_squared(LAM),
        lambda x: LAM * (x * x).sum(),
        lambda x: 2 * LAM * x,
    ),
    "L2": (
        ActivityRegularization.l2(LAM),
        lambda x: LAM * da.sqrt((x * x).sum()),
        lambda x: LAM * x / da.sqrt((x * x).sum()),
    ),
}


def pairs_of(name: str, x: da.Array) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return what is computed, by us and by the plain expression."""
    reg, plain, plain_gradient = NORMS[name]

    def ours() -> Any:
        penalty, gradient = reg.penalty_and_gradient(x)
        return dask.compute(penalty, gradient.sum())

    return {
        "penalty": (lambda: reg.penalty(x).compute(), lambda: plain(x).compute()),
        "with gradient": (ours, lambda: dask.compute(plain(x), plain_gradient(x).sum())),
    }


def measured(ours: Callable[[], Any], plain: Callable[[], Any], repeats: int) -> str:
    """Return the time and its ratio, once both have been computed."""
    times: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for step, series in zip((ours, plain), times, strict=True):
            before = time.perf_counter()
            step()
            if turn:
                series.append(time.perf_counter() - before)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return f"{statistics.median(times[0]):.3g} s; {ratio:.2f}"


def surviving(cluster: distributed.LocalCluster, step: Callable[[], Any], seconds: float) -> str:
    """Return how long it takes if a process is killed when half of the time has passed."""
    expected = step()
    pid = next(iter(cluster.workers.values())).pid
    timer = threading.Timer(seconds / 2, os.kill, (pid, signal.SIGKILL))
    timer.start()
    before = time.perf_counter()
    found = step()
    taken = time.perf_counter() - before
    timer.join()
    same = np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    return f"{taken:.3g} s; {'the same bits' if same else 'other bits'}"


def in_memory(size: int, repeats: int) -> None:
    """Print the table of an array in memory."""
    print("| in memory, threads | float32 | float64 |\n| --- | ---: | ---: |")
    for name in ("L1", "squares", "L2"):
        for what in ("penalty", "with gradient"):
            print(f"| {name}, {what} ", end="", flush=True)
            for dtype in (np.float32, np.float64):
                values = np.random.default_rng(0).standard_normal(size).astype(dtype)
                x = da.from_array(values, chunks=-(-size // 10), name=False)
                print(f"| {measured(*pairs_of(name, x)[what], repeats)} ", end="", flush=True)
            print("|")


def on_disk(size: int, repeats: int, folder: str) -> None:
    """Print the table of an array in a Zarr store."""
    path = Path(folder, "activations.zarr")
    chunk = -(-size // 50)
    store = zarr.open_array(path, mode="w", shape=(size,), chunks=(chunk,), dtype="float32")
    rng = np.random.default_rng(0)
    for start in range(0, size, chunk):
        count = min(chunk, size - start)
        store[start : start + count] = np.maximum(rng.standard_normal(count, np.float32), 0)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        x = da.from_zarr(path)
        print("\n| on disk, two processes | float32 | one is killed |\n| --- | ---: | ---: |")
        for name in ("L1", "squares", "L2"):
            for what, (ours, plain) in pairs_of(name, x).items():
                client.wait_for_workers(2)
                print(f"| {name}, {what} ", end="", flush=True)
                cell = measured(ours, plain, repeats)
                seconds = float(cell.split()[0])
                print(f"| {cell} | {surviving(cluster, ours, seconds)} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=50_000_000, help="elements in memory")
    parser.add_argument("--on-disk", type=int, default=500_000_000, help="elements on disk, or 0")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    options = parser.parse_args()
    in_memory(options.size, options.repeats)
    if options.on_disk:
        with tempfile.TemporaryDirectory() as folder:
            on_disk(options.on_disk, options.repeats, folder)


if __name__ == "__main__":
    main()
