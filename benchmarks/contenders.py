"""What is timed: the machine's limits, our backends, and the same two lines in other libraries.

A contender is a function from a :class:`Task` to a :class:`Run`, or to None where it does not take
the task. Importing a library is its contender's own business, at the first task. Here are those of
the processor; those of a GPU are in ``cuda.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np

from actreg_dispatch.norms import ActivityNorm, named_norm
from actreg_dispatch.regularization import ActivityRegularization

__all__ = [
    "BARE_CALL",
    "CONTENDERS",
    "FAST",
    "LAM",
    "LAYOUTS",
    "NORMS",
    "Case",
    "Contender",
    "Run",
    "Task",
    "load_dtype",
    "run_backend",
    "run_expressions",
    "run_torch",
    "run_torch_compile",
    "run_two_lines",
    "slope_of",
]

LAM = 0.125  # exact in every dtype, so that all peers add the same
_REFERENCE_UP_TO = 100_000  # elements; the reference backend is not there to be fast
_PEERS_UP_TO = 20_000_000  # elements; beyond, their temporaries may not fit
FAST = ("numba", "cupy")  # our backends that are there to be fast, one a device
BARE_CALL = 1000  # elements up to which the limit is a compiled call that does nothing


class Case(NamedTuple):
    """One line of the benchmark."""

    operation: str  # "apply" or "penalty"
    norm: ActivityNorm
    dtype: str
    size: int
    layout: str = "contiguous"

    @property
    def passes(self) -> int:
        """How often an array goes through memory: reads of x and g and writes of g."""
        if self.operation == "penalty":
            return 1
        return 3 + named_norm(self.norm).two_pass

    def bytes_moved(self) -> int:
        """Return how many bytes the work moves, if it moves nothing twice."""
        return self.passes * self.size * load_dtype(self.dtype).itemsize


@dataclass
class Task:
    """A case and its arrays, which every contender uses that can share their memory."""

    case: Case
    activations: Any
    gradients: Any


class Run(NamedTuple):
    """How to do a task once, and where the gradients are then."""

    step: Callable[[], Any]
    gradients: Callable[[], Any] = lambda: None


class Contender(NamedTuple):
    """Something to time."""

    name: str
    kind: str  # "limit", "ours" or "peer"
    modules: tuple[str, ...]  # what has to be installed
    prepare: Callable[[Task], Run | None]

    def is_installed(self) -> bool:
        """Return whether its libraries are there; does not import them."""
        return all(importlib.util.find_spec(module) for module in self.modules)

    def run(self, task: Task) -> Run | None:
        """Return how to do the task, or None if it is not for this contender."""
        if self.kind == "peer" and task.case.size > _PEERS_UP_TO:
            return None
        return self.prepare(task)


def load_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of that name; bfloat16 is that of ``ml_dtypes``."""
    if name == "bfloat16":
        importlib.import_module("ml_dtypes")  # which makes the name known to NumPy
    return np.dtype(name)


LAYOUTS: dict[str, tuple[Callable[[int], tuple[int, ...]], Callable[[Any], Any]]] = {
    "contiguous": (lambda n: (n,), lambda a: a),
    "every second column": (lambda n: (n // 1000, 2000), lambda a: a[:, ::2]),
    "transposed": (lambda n: (100, n // 10_000, 100), lambda a: a.transpose(2, 0, 1)),
    "channels first": (lambda n: (n // 20_000, 16, 2500), lambda a: a[:, 4:12]),
    "channels last": (lambda n: (n // 800, 100, 16), lambda a: a[..., 1:9]),
}
"""The shape of an array, and the view of it that has about ``n`` elements and lies like this."""


# Limits, in parallel Numba: what memory allows, or for small arrays the call itself.


@numba.njit(parallel=True)
def _stream3(x, g, c):  # type: ignore[no-untyped-def]
    for i in numba.prange(x.size):
        g[i] += c * x[i]


@numba.njit(parallel=True, fastmath={"reassoc"})
def _stream1(x):  # type: ignore[no-untyped-def]
    total = x.dtype.type(0)
    for i in numba.prange(x.size):
        total += x[i]
    return total


@numba.njit(nogil=True)
def _nothing(x, g):  # type: ignore[no-untyped-def]
    return 0.0


@numba.njit(parallel=True)
def _hand_written(x, g, lam):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in numba.prange(x.shape[0]):
        for j in range(x.shape[1]):
            for k in range(x.shape[2]):
                value = x[i, j, k]
                total += abs(value)
                if value > 0:
                    g[i, j, k] += lam
                elif value < 0:
                    g[i, j, k] -= lam
    return total


def _limit(task: Task) -> Run | None:
    case, x, g = task.case, task.activations, task.gradients
    if case.layout != "contiguous":
        if case.operation == "penalty" or case.norm is not ActivityNorm.L1:
            return None
        shape = x.shape if x.ndim == 3 else (1, *x.shape)
        xs, gs = (array.reshape(shape) if x.ndim < 3 else array for array in (x, g))
        lam = x.dtype.type(LAM)
        return Run(lambda: _hand_written(xs, gs, lam))
    if x.itemsize == 2:  # the same bytes, in arithmetic that Numba has
        x, g = x.view(np.int16), g.view(np.int16)
    if case.size <= BARE_CALL:
        return Run(lambda: _nothing(x, g))
    c = x.dtype.type(LAM)
    steps: dict[int, Callable[[], Any]] = {
        1: lambda: _stream1(x),
        3: lambda: _stream3(x, g, c),
        4: lambda: (_stream1(x), _stream3(x, g, c)),
    }
    return Run(steps[case.passes])


# Ours.


def run_backend(name: str) -> Callable[[Task], Run | None]:
    """Return how a backend of ours does a task."""

    def prepare(task: Task) -> Run | None:
        case, x, g = task.case, task.activations, task.gradients
        if name == "numpy" and case.size > _REFERENCE_UP_TO:
            return None
        reg = ActivityRegularization(LAM, case.norm, backend=name)
        if case.operation == "penalty":
            return Run(lambda: reg.penalty(x))
        return Run(lambda: reg.apply(x, g), lambda: g)

    return prepare


# Peers: two lines each, one for the penalty and one for the gradient, as their users write them.
# Sums of 16-bit floats are taken in float32, since they would overflow.

NORMS = L1, L2, L2_SQUARED = (ActivityNorm.L1, ActivityNorm.L2, ActivityNorm.L2_SQUARED)


def slope_of(norm: ActivityNorm, penalty: Any) -> Any:
    """Return what x is multiplied by in the gradient of a norm that is not L1."""
    return 2 * LAM if norm is L2_SQUARED else LAM * LAM / penalty


def run_two_lines(
    task: Task,
    penalty: Callable[[], Any],
    add_gradient: Callable[[Any], Any],
) -> Run:
    """Return the run of a library that updates the task's own gradients."""
    if task.case.operation == "penalty":
        return Run(penalty)

    def step() -> Any:
        found = penalty()
        add_gradient(found)
        return found

    return Run(step, lambda: task.gradients)


def run_expressions(task: Task) -> Run | None:
    """Return the two lines in NumPy's functions, which act on CuPy's arrays as well."""
    norm, x, g = task.case.norm, task.activations, task.gradients
    if task.case.dtype == "bfloat16":
        return None
    wide = np.float64 if x.itemsize == 8 else np.float32
    penalties: dict[ActivityNorm, Callable[[], Any]] = {
        L1: lambda: LAM * np.abs(x).sum(dtype=wide),
        L2: lambda: LAM * np.sqrt((x * x).sum(dtype=wide)),
        L2_SQUARED: lambda: LAM * (x * x).sum(dtype=wide),
    }

    def add_gradient(penalty: Any) -> None:
        if norm is L2:
            np.add(g, slope_of(norm, penalty).astype(x.dtype) * x, out=g)
        else:
            np.add(g, LAM * np.sign(x) if norm is L1 else slope_of(norm, penalty) * x, out=g)

    return run_two_lines(task, penalties[norm], add_gradient)


def _numexpr(task: Task) -> Run | None:
    import numexpr

    norm, x, g = task.case.norm, task.activations, task.gradients
    if x.itemsize == 2 or task.case.layout != "contiguous":
        return None

    def evaluate(expression: str, c: Any = None, out: Any = None) -> Any:
        return numexpr.evaluate(expression, {"x": x, "g": g, "c": c}, {}, out=out)

    penalties: dict[ActivityNorm, Callable[[], Any]] = {
        L1: lambda: LAM * evaluate("sum(abs(x))"),
        L2: lambda: LAM * np.sqrt(evaluate("sum(x * x)")),
        L2_SQUARED: lambda: LAM * evaluate("sum(x * x)"),
    }

    def add_gradient(penalty: Any) -> None:
        if norm is L1:
            evaluate("where(x > 0, g + c, where(x < 0, g - c, g))", x.dtype.type(LAM), g)
        else:
            evaluate("g + c * x", x.dtype.type(slope_of(norm, penalty)), g)

    return run_two_lines(task, penalties[norm], add_gradient)


def _tensors(task: Task) -> tuple[Any, Any] | None:
    """Return PyTorch tensors on the memory of the task's arrays."""
    import torch

    if task.case.layout != "contiguous":
        return None
    arrays = task.activations, task.gradients
    if task.case.dtype == "bfloat16":
        x, g = (torch.from_dlpack(a.view(np.int16)).view(torch.bfloat16) for a in arrays)
    else:
        x, g = map(torch.from_dlpack, arrays)
    return x, g


def _torch_penalty(case: Case) -> Callable[[Any], Any]:
    import torch

    wide = torch.float64 if case.dtype == "float64" else torch.float32
    penalties: dict[ActivityNorm, Callable[[Any], Any]] = {
        L1: lambda x: LAM * x.abs().sum(dtype=wide),
        L2: lambda x: LAM * x.to(wide).square().sum().sqrt(),
        L2_SQUARED: lambda x: LAM * x.to(wide).square().sum(),
    }
    return penalties[case.norm]


def run_torch(task: Task, compiled: bool = False) -> Run | None:
    """Return the two lines in PyTorch."""
    import torch

    tensors, norm, penalty = _tensors(task), task.case.norm, _torch_penalty(task.case)
    if tensors is None:
        return None
    x, g = tensors

    def two_lines(x: Any, g: Any) -> Any:
        found = penalty(x)
        if norm is L1:
            g.add_(torch.sign(x), alpha=LAM)
        elif norm is L2:
            g.add_(x * slope_of(norm, found).to(x.dtype))
        else:
            g.add_(x, alpha=slope_of(norm, found))
        return found

    function: Any = penalty if task.case.operation == "penalty" else two_lines
    arguments = (x,) if task.case.operation == "penalty" else (x, g)
    if compiled:
        torch._dynamo.reset()  # or it gives up after eight shapes
        function = torch.compile(function, dynamic=False)
    return Run(torch.no_grad()(lambda: function(*arguments)), lambda: task.gradients)


def run_torch_compile(task: Task) -> Run | None:
    """Return the two lines in PyTorch, compiled."""
    return run_torch(task, compiled=True)


def _through_autograd(task: Task, penalty: Callable[[Any], Any]) -> Run | None:
    tensors = _tensors(task)
    if tensors is None or task.case.operation == "penalty":
        return None
    x = tensors[0].requires_grad_()
    x.grad = tensors[1]

    def step() -> Any:
        found = penalty(x)
        found.backward()
        return found.detach()

    return Run(step, lambda: task.gradients)


def _torch_autograd(task: Task) -> Run | None:
    return _through_autograd(task, _torch_penalty(task.case))


def _keras(task: Task) -> Run | None:
    if task.case.norm is L2 or load_dtype(task.case.dtype).itemsize == 2:
        return None  # Keras has no norm L2, and would sum 16-bit floats in 16 bits
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    if keras.backend.backend() != "torch":
        return None
    kind = keras.regularizers.L1 if task.case.norm is L1 else keras.regularizers.L2
    return _through_autograd(task, kind(LAM))


def _jax(task: Task) -> Run | None:
    import jax
    import jax.numpy as jnp

    norm = task.case.norm
    if task.case.layout != "contiguous":
        return None
    jax.config.update("jax_enable_x64", True)
    wide = jnp.float64 if task.case.dtype == "float64" else jnp.float32
    penalties: dict[ActivityNorm, Callable[[Any], Any]] = {
        L1: lambda x: LAM * jnp.abs(x).sum(dtype=wide),
        L2: lambda x: LAM * jnp.sqrt(jnp.square(x.astype(wide)).sum()),
        L2_SQUARED: lambda x: LAM * jnp.square(x.astype(wide)).sum(),
    }
    penalty = penalties[norm]

    def two_lines(x: Any, g: Any) -> Any:
        found = penalty(x)
        slope = jnp.asarray(LAM if norm is L1 else slope_of(norm, found), x.dtype)
        return found, g + slope * (jnp.sign(x) if norm is L1 else x)

    x = jnp.asarray(task.activations)
    if task.case.operation == "penalty":
        only_penalty = jax.jit(penalty)
        return Run(lambda: only_penalty(x).block_until_ready())
    both, state = jax.jit(two_lines, donate_argnums=1), [jnp.array(task.gradients)]

    def step() -> Any:
        found, state[0] = both(x, state[0])
        state[0].block_until_ready()
        return found.block_until_ready()

    return Run(step, lambda: np.asarray(state[0]))


CONTENDERS = (
    Contender("limit", "limit", ("numba",), _limit),
    Contender("numba", "ours", ("numba",), run_backend("numba")),
    Contender("numpy", "ours", ("numpy",), run_backend("numpy")),
    Contender("NumPy", "peer", ("numpy",), run_expressions),
    Contender("numexpr", "peer", ("numexpr",), _numexpr),
    Contender("PyTorch eager", "peer", ("torch",), run_torch),
    Contender("PyTorch autograd", "peer", ("torch",), _torch_autograd),
    Contender("torch.compile", "peer", ("torch",), run_torch_compile),
    Contender("JAX jit", "peer", ("jax",), _jax),
    Contender("Keras", "peer", ("keras", "torch"), _keras),
)
