"""The benchmark on a GPU: the contenders there, and a clock that the GPU itself reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy

from actreg_dispatch.norms import ActivityNorm
from benchmarks.contenders import (
    LAM,
    NORMS,
    Contender,
    Run,
    Task,
    run_backend,
    run_expressions,
    run_torch,
    run_torch_compile,
    run_two_lines,
    slope_of,
)
from benchmarks.timing import Device

__all__ = ["CUDA"]

L1, L2, L2_SQUARED = NORMS


def _limit(task: Task) -> Run:
    """Copy within the device's memory so much that as many bytes are moved."""
    size = max(1, task.case.bytes_moved() // 2)
    source, target = cupy.zeros(size, "u1"), cupy.empty(size, "u1")
    stream = cupy.cuda.get_current_stream()
    return Run(lambda: target.data.copy_from_device_async(source.data, size, stream))


# What cupy.fuse makes of the two lines: a kernel for the sum, and one for the update.
_FUSED_SUMS: dict[ActivityNorm, Any] = {
    L1: cupy.fuse(kernel_name="l1")(lambda x: LAM * cupy.sum(cupy.abs(x))),
    L2: cupy.fuse(kernel_name="l2")(lambda x: LAM * cupy.sqrt(cupy.sum(x * x))),
    L2_SQUARED: cupy.fuse(kernel_name="l2_squared")(lambda x: LAM * cupy.sum(x * x)),
}
_FUSED_SIGN_UPDATE = cupy.fuse(kernel_name="signs")(
    lambda x, g, c: cupy.add(g, c * cupy.sign(x), g)
)
_FUSED_UPDATE = cupy.fuse(kernel_name="update")(lambda x, g, c: cupy.add(g, c * x, g))


def _fused(task: Task) -> Run | None:
    norm, x, g = task.case.norm, task.activations, task.gradients
    if x.itemsize == 2:
        return None  # it would sum in 16 bits

    def add_gradient(penalty: Any) -> None:
        if norm is L1:
            _FUSED_SIGN_UPDATE(x, g, x.dtype.type(LAM))
        else:
            slope = slope_of(norm, penalty)
            _FUSED_UPDATE(x, g, x.dtype.type(slope) if norm is L2_SQUARED else slope)

    return run_two_lines(task, lambda: _FUSED_SUMS[norm](x), add_gradient)


def _with_cuda(run: Callable[[Task], Run | None]) -> Callable[[Task], Run | None]:
    """Return ``run`` for a PyTorch that was built with CUDA; another has nothing to say here."""

    def prepare(task: Task) -> Run | None:
        import torch

        return run(task) if torch.cuda.is_available() else None

    return prepare


def _clock(step: Callable[[], Any], turns: int) -> float:
    """Return the seconds of a step between two events on the device."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    step()
    start.record()
    for _ in range(turns):
        step()
    end.record()
    end.synchronize()
    milliseconds: float = cupy.cuda.get_elapsed_time(start, end)
    return milliseconds / 1e3 / turns


def _name() -> str:
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    name: str = properties["name"].decode()
    return name


def _processor() -> str:
    driver = cupy.cuda.runtime.driverGetVersion()
    return f"{_name()}, CUDA {driver // 1000}.{driver % 1000 // 10}"


def _caveat() -> str:
    if "software" in _name():
        return f"The times mean nothing: a {_name()} runs the kernels on the processor."
    return ""


CUDA = Device(
    cupy,
    (
        Contender("limit", "limit", ("cupy",), _limit),
        Contender("cupy", "ours", ("cupy",), run_backend("cupy")),
        Contender("CuPy", "peer", ("cupy",), run_expressions),
        Contender("cupy.fuse", "peer", ("cupy",), _fused),
        Contender("PyTorch eager", "peer", ("torch",), _with_cuda(run_torch)),
        Contender("torch.compile", "peer", ("torch",), _with_cuda(run_torch_compile)),
    ),
    _clock,
    _processor,
    _caveat,
    ("numpy", "cupy"),
)
