"""Norms of rows against the norm of the whole, ``"l2"``, of the same array.

``python -m benchmarks.row_norms`` prints a table in Markdown: milliseconds of calls of ``"l2"``,
and the ratio to these of ``l2(axis=-1)`` for rows of several lengths; medians of interleaved
rounds. An update of ``"l2"`` reads the activations twice, one of rows once from memory.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np

from actreg_dispatch import ActivityRegularization
from benchmarks.timing import take_turns

LENGTHS = (16, 64, 256, 2048, 65536)
WHOLE, ROWS = ActivityRegularization.l2(1e-3), ActivityRegularization.l2(1e-3, axis=-1)


def row_of(x: Any, writes: bool, lengths: list[int], repeats: int) -> list[str]:
    """Return the cells of one kind of call."""
    g = np.zeros_like(x)

    def step(reg: ActivityRegularization, length: int) -> Any:
        whole = x.size // length * length
        xs, gs = x[:whole].reshape(-1, length), g[:whole].reshape(-1, length)
        return lambda: reg.apply(xs, gs) if writes else reg.penalty(xs)

    steps = {length: step(ROWS, length) for length in lengths}
    times = take_turns({0: step(WHOLE, 1), **steps}, repeats)
    cells = [f"{statistics.median(times[0]) * 1e3:.1f}"]
    for length in lengths:
        pairs = zip(times[length], times[0], strict=True)
        cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
    return cells


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=20_000_000, help="elements")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of rows")
    parser.add_argument("--repeats", type=int, default=11, help="rounds (default: 11)")
    options = parser.parse_args()
    print(f"| rows of | ms of l2 | {' | '.join(f'{length:,}' for length in options.lengths)} |")
    print(f"| --- |{' ---: |' * (1 + len(options.lengths))}")
    for dtype in (np.float32, np.float64):
        x = np.random.default_rng(1).standard_normal(options.size, np.float32).astype(dtype)
        for writes in (False, True):
            cells = " | ".join(row_of(x, writes, options.lengths, options.repeats))
            print(
                f"| {np.dtype(dtype)}, {'apply' if writes else 'penalty'} | {cells} |", flush=True
            )


if __name__ == "__main__":
    main()
