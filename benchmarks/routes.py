"""What the other routes to the kernels take: many layers, files, Dask, PyTorch and JAX.

``python -m benchmarks.routes`` prints a table in Markdown. Each route takes turns with the call for
NumPy arrays that does the same work, and with the same expression in the library's own functions.
L1, float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actreg_dispatch import ActivityRegularization, files
from benchmarks.timing import take_turns

LAM = 0.1
REG = ActivityRegularization.l1(LAM)
LAYERS = CHUNKS = 100

Steps = dict[str, Callable[[], Any]]  # "route", "numpy", and "own" if the library has its own


def arrays(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Return activations, half of them zero, and gradients."""
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    return np.maximum(values, 0), np.zeros_like(values)


def many_layers(size: int, folder: Path) -> Steps:
    """Put many layers beside a loop over them."""
    xs, gs = (list(array) for array in arrays(LAYERS, size // LAYERS))
    return {
        "route": lambda: REG.apply_all(xs, gs),
        "numpy": lambda: [REG.apply(x, g) for x, g in zip(xs, gs, strict=True)],
    }


def file_penalty(size: int, folder: Path) -> Steps:
    """Put a file in the page cache beside the array in memory."""
    x, _ = arrays(size)
    path = folder / f"{size}.npy"
    np.save(path, x)
    return {
        "route": lambda: files.penalty(REG, path),
        "numpy": lambda: REG.penalty(x),
        "own": lambda: LAM * np.abs(np.load(path, mmap_mode="r")).sum(),
    }


def dask_penalty(size: int, folder: Path) -> Steps:
    """Put a Dask array beside the NumPy array that it is made of."""
    import dask.array as da

    x, _ = arrays(size)
    lazy = da.from_array(x, chunks=-(-size // CHUNKS))
    return {
        "route": lambda: REG.penalty(lazy).compute(),
        "numpy": lambda: REG.penalty(x),
        "own": lambda: (LAM * abs(lazy).sum()).compute(),
    }


def torch_apply(size: int, folder: Path) -> Steps:
    """Put tensors beside arrays."""
    import torch

    x, g = arrays(size)
    tensor, gradients = map(torch.from_numpy, (x, g))

    def own() -> Any:
        gradients.add_(torch.sign(tensor), alpha=LAM)
        return LAM * tensor.abs().sum()

    return {
        "route": lambda: REG.apply(tensor, gradients),
        "numpy": lambda: REG.apply(x, g),
        "own": own,
    }


def torch_backward(size: int, folder: Path) -> Steps:
    """Put a penalty that autograd differentiates beside one call."""
    import torch

    from actreg_dispatch.torch import penalty

    x, g = arrays(size)
    tensor = torch.from_numpy(x).requires_grad_()
    tensor.grad = torch.from_numpy(g)
    return {
        "route": lambda: penalty(REG, tensor).backward(),
        "numpy": lambda: REG.apply(x, g),
        "own": lambda: (LAM * tensor.abs().sum()).backward(),
    }


def jax_gradient(size: int, folder: Path) -> Steps:
    """Put what JAX differentiates beside one call."""
    import jax

    from actreg_dispatch.jax import penalty

    x, _ = arrays(size)
    ours, own = (
        jax.jit(jax.value_and_grad(function))
        for function in (lambda x: penalty(REG, x), lambda x: LAM * abs(x).sum())
    )
    array = jax.numpy.asarray(x)
    return {
        "route": lambda: jax.block_until_ready(ours(array)),
        "numpy": lambda: REG.penalty_and_gradient(x),
        "own": lambda: jax.block_until_ready(own(array)),
    }


# With the library that each needs; in an order in which no library's threads wait beside those that
# do without it.
ROUTES = {
    f"`apply_all`, {LAYERS} layers / a loop of `apply`": ("numpy", many_layers),
    "`.npy` in the page cache, `penalty`": ("numpy", file_penalty),
    f"Dask, {CHUNKS} chunks, `penalty`": ("dask", dask_penalty),
    "PyTorch tensors, `apply`": ("torch", torch_apply),
    "PyTorch, `penalty` and `backward`": ("torch", torch_backward),
    "JAX, jitted `value_and_grad`": ("jax", jax_gradient),
}


def seconds(value: float) -> str:
    """Return a time in microseconds or milliseconds."""
    return f"{value * 1e6:,.3g} µs" if value < 1e-3 else f"{value * 1e3:,.3g} ms"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = [10_000, 100_000, 1_000_000, 20_000_000]
    parser.add_argument("--sizes", nargs="+", type=int, default=sizes, help="numbers of elements")
    parser.add_argument("--repeats", type=int, default=11, help="rounds (default: 11)")
    parser.add_argument("--only", default="", help="the routes with this in their names")
    options = parser.parse_args()
    print(f"| elements | {' | '.join(f'{size:,}' for size in options.sizes)} |")
    print(f"| --- {'| ---: ' * len(options.sizes)}|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (library, prepare) in ROUTES.items():
            if options.only not in name or importlib.util.find_spec(library) is None:
                continue
            print(f"| {name} ", end="", flush=True)
            for size in options.sizes:
                times = take_turns(prepare(size, Path(folder)), options.repeats)
                own = times.pop("route")
                ratios = (
                    statistics.median(a / b for a, b in zip(own, other, strict=True))
                    for other in times.values()
                )
                cell = " / ".join(f"{ratio:,.{2 if ratio < 10 else 0}f}" for ratio in ratios)
                print(f"| {seconds(statistics.median(own))}; {cell} ", end="", flush=True)
            print("|")


if __name__ == "__main__":
    main()
