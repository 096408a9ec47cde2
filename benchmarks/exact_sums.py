"""Exact sums against the serial penalty and libraries that sum exactly.

``python -m benchmarks.exact_sums`` prints tables in Markdown: nanoseconds an element of
``partial_sum`` on one thread, of arrays in the cache, and their ratios to what the column names,
medians of interleaved rounds. xsum (large superaccumulator) and uniaccurate are given |x|, not x.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from actreg_dispatch import ActivityRegularization
from actreg_dispatch.runtime.threads import serially
from benchmarks.timing import take_turns

REGS = {
    "\\|x\\|": ActivityRegularization.l1(1e-3),
    "x²": ActivityRegularization.l2_squared(1e-3),
    "both": ActivityRegularization.l1_l2(1e-3, 1e-3),
}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16} | {
    name: np.dtype(name) for name in ("float32", "float64")
}
PEERS = [peer for peer in ("xsum", "uniaccurate") if importlib.util.find_spec(peer)]


def normal(size: int) -> np.ndarray:
    """Return numbers of which nearly all tiles are summed by extraction."""
    return np.random.default_rng(0).standard_normal(size)


def wide(size: int) -> np.ndarray:
    """Return numbers that span so many exponents that a tile takes several rounds."""
    rng = np.random.default_rng(0)
    return np.ldexp(1 + rng.random(size), rng.integers(-60, 60, size))


def by_xsum(x: np.ndarray, degree: int) -> Callable[[], float]:
    """Return what sums by xsum, which rounds each square and sums these exactly."""
    import xsum

    def total() -> float:
        accumulator = xsum.xsum_large()
        (accumulator.add if degree == 1 else accumulator.add_sqnorm)(x)
        return float(accumulator.round())

    return total


def by_uniaccurate(x: np.ndarray, degree: int) -> Callable[[], float]:
    """Return what sums by uniaccurate."""
    import uniaccurate

    if degree == 1:
        return lambda: float(uniaccurate.exact_sum(x))
    return lambda: float(uniaccurate.exact_dot(x, x))


def row_of(reg: ActivityRegularization, x: np.ndarray, repeats: int) -> list[str]:
    """Return the cells of one kind of sum."""
    steps: dict[str, Callable[[], Any]] = {
        "ours": lambda: reg.partial_sum(x),
        "penalty": lambda: reg.penalty(x),
    }
    total, *others = reg.partial_sum(x).parts
    if x.dtype == np.float64 and not others:
        magnitudes = abs(x)
        for name in PEERS:
            peer = {"xsum": by_xsum, "uniaccurate": by_uniaccurate}[name]
            steps[name] = peer(magnitudes, total.degree)
            rounded = name == "xsum" and total.degree == 2  # each square, before they are summed
            exact = REGS["\\|x\\|"].partial_sum(x * x).parts[0] if rounded else total
            assert steps[name]() == float(exact), name
    times = take_turns(steps, repeats)
    ours = times["ours"]
    cells = [f"{statistics.median(ours) / x.size * 1e9:.2f}"]
    for name in ("penalty", *PEERS):
        other = times.get(name)
        pairs = zip(ours, other, strict=True) if other else ()
        cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}" if other else "")
    return cells


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=400_000, help="elements")
    parser.add_argument("--repeats", type=int, default=21, help="rounds (default: 21)")
    options = parser.parse_args()
    with serially():
        for title, values in (("normal numbers", normal), ("120 binades", wide)):
            print(f"| {' | '.join([title, 'ns', 'penalty', *PEERS])} |")
            print(f"| --- | {'---: | ' * (2 + len(PEERS))}".rstrip())
            for name, dtype in DTYPES.items():
                if values is wide and np.dtype(dtype).itemsize == 2 and name == "float16":
                    continue  # whose exponents do not span as much
                x = values(options.size).astype(dtype)
                for kind, reg in REGS.items():
                    cells = " | ".join(row_of(reg, x, options.repeats))
                    print(f"| {name}, {kind} | {cells} |", flush=True)
            print()


if __name__ == "__main__":
    main()
