"""Weights and statistics against the same call without them.

``python -m benchmarks.weights`` prints a table in Markdown: milliseconds of calls without weights,
and the ratio to these of calls with weights of each feature, of each token, of each element, with a
mask of tokens, and with statistics; medians of interleaved rounds. Weights of each element are read
once more, twice in an update of one pass, which checks them first; "memory" is how many bytes that
takes, over those of the call without.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np

from actreg_dispatch import ActivationStatistics, ActivityRegularization
from benchmarks.timing import take_turns

REGS = {
    "L1": ActivityRegularization.l1(1e-3),
    "squared L2": ActivityRegularization.l2_squared(1e-3),
    "L2": ActivityRegularization.l2(1e-3),
}
WITH = ("features", "tokens", "mask of tokens", "elements", "statistics", "per feature")


def row_of(reg: ActivityRegularization, x: Any, writes: bool, repeats: int) -> list[str]:
    """Return the cells of one kind of call."""
    rng, dtype = np.random.default_rng(0), x.dtype
    tokens, features = x.shape
    g = np.zeros_like(x)
    given: dict[str, dict[str, Any]] = {
        "without": {},
        "features": {"weights": rng.random(features).astype(dtype)},
        "tokens": {"weights": rng.random((tokens, 1)).astype(dtype)},
        "mask of tokens": {"weights": rng.random((tokens, 1)) < 0.8},
        "elements": {"weights": rng.random(x.shape, np.float32).astype(dtype)},
        "statistics": {"statistics": ActivationStatistics()},
        "per feature": {"statistics": ActivationStatistics(per_feature=True)},
    }

    def step(options: dict[str, Any]) -> Any:
        return lambda: reg.apply(x, g, **options) if writes else reg.penalty(x, **options)

    times = take_turns({name: step(options) for name, options in given.items()}, repeats)
    without = times["without"]
    cells = [f"{statistics.median(without) * 1e3:.1f}"]
    for name in WITH:
        pairs = zip(times[name], without, strict=True)
        cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
    # Reads and writes of the arrays, and reads of weights.
    plain = 3 + reg.options.norm.two_pass if writes else 1
    weighted = plain + 1 + writes
    return [*cells, f"{weighted / plain:.2f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000, help="rows of the matrix")
    parser.add_argument("--features", type=int, default=2_000, help="columns of the matrix")
    parser.add_argument("--repeats", type=int, default=11, help="rounds (default: 11)")
    options = parser.parse_args()
    columns = ["tokens x features", "ms", *WITH, "memory, elements"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' + ' ---: |' * (len(columns) - 1)}")
    for dtype in (np.float32, np.float64):
        shape = options.tokens, options.features
        x = np.random.default_rng(1).standard_normal(shape, np.float32).astype(dtype)
        for name, reg in REGS.items():
            for writes in (False, True):
                cells = " | ".join(row_of(reg, x, writes, options.repeats))
                what = "apply" if writes else "penalty"
                print(f"| {np.dtype(dtype)}, {name}, {what} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
