"""What a call costs on a GPU: bytes, launches, copies, waits, and what the warps issue.

All of it is counted by a software CUDA device (``SOFTGPU``) that executes the kernels' PTX; a GPU
would need its maker's profiler.
"""

from __future__ import annotations

import numpy as np
import pytest

from actreg_dispatch.norms import NORMS

pytestmark = pytest.mark.xdist_group("profile")  # which takes a minute to make
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=lambda norm: norm.name)
dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])

SIZE = 100_000
PROFILE = """
import cupy, numpy as np, ml_dtypes
from actreg_dispatch import ActivationStatistics, ActivityRegularization
from actreg_dispatch.backends.cuda import kernels
from actreg_dispatch.norms import NORMS

usual = kernels.FEW_BLOCKS
rng = np.random.default_rng(0)
for dtype in ("float16", "bfloat16", "float32", "float64"):
    room = cupy.asarray(rng.normal(size=(200, 250, 4)).astype(dtype))
    views = {
        "few": room.ravel()[: 5 * 16_384],  # blocks
        "many": room.ravel()[: 10 * 16_384],
        "contiguous": room.ravel()[: SIZE],
        "channels": room[..., 1:3],
        "transposed": room[:, :, :2].transpose(1, 2, 0),
    }
    for layout, x in views.items():
        # Blocks of few and many have as much to do as those of large arrays.
        kernels.FEW_BLOCKS = 1 if layout in ("few", "many") else usual
        g = cupy.zeros(room.shape, dtype)
        if x.ndim == 1:
            g = g.ravel()[: x.size]
        if layout == "channels":
            g = g[..., 1:3]
        elif layout == "transposed":
            g = g[:, :, :2].transpose(1, 2, 0)
        assert x.shape == g.shape
        for norm in NORMS:
            reg = ActivityRegularization(0.1, norm)
            record(f"apply {norm} {dtype} {layout}", lambda: reg.apply(x, g))
            record(f"penalty {norm} {dtype} {layout}", lambda: reg.penalty(x))
        for units in (False, True):
            reg, statistics = ActivityRegularization(0.1), ActivationStatistics(per_feature=units)
            counted = x.reshape(-1, 32) if x.ndim == 1 else x
            reg.penalty(counted, statistics=statistics)  # makes the counters
            record(
                f"statistics{' of units' * units} {dtype} {layout}",
                lambda: reg.penalty(counted, statistics=statistics),
            )
for norm in NORMS:
    xs, gs = ([cupy.ones(n, np.float32) for n in (3, 70_000)] for _ in range(2))
    record(f"apply_all {norm}", lambda: ActivityRegularization(0.1, norm).apply_all(xs, gs))
"""


@pytest.fixture(scope="module")
def profile(profiled):
    return profiled(f"SIZE = {SIZE}\n{PROFILE}")


@norms
@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels", "transposed"])
@pytest.mark.parametrize("operation", ["apply", "penalty"])
def test_memory_is_passed_once_and_the_host_never_waits(profile, operation, norm, dtype, layout):
    events = profile[f"{operation} {norm.name} {dtype} {layout}"]
    assert [event for event in events if "launch" not in event] == []  # no copy, no wait
    twice = operation == "apply" and norm.two_pass
    assert len(events) == 4 + twice  # two that certify, two that stand by, and the update of two
    moved = sum(event["loaded"] + event["stored"] for event in events)
    accesses = {"penalty": 1, "apply": 3}[operation] + twice
    itemsize = 8 if dtype == "float64" else 4 if dtype == "float32" else 2
    sums = len(norm.terms)
    assert accesses <= moved / (SIZE * itemsize) <= (1.01 + 0.01 * sums) * accesses
    assert sum(event["atomic"] for event in events) <= 0.01 * sums * moved
    if layout == "contiguous":
        assert moved / (32 * sum(event["sectors"] for event in events)) >= 1 - 0.02 * sums


# What warps may issue for an element of contiguous arrays: to the units of binary64, and in all.
BUDGETS = {
    ("penalty", "float32"): {"l1": (0.6, 13), "l2": (0.6, 16), "l2_squared": (0.6, 16)},
    ("apply", "float32"): {"l1": (0.6, 19), "l2": (1.2, 40), "l2_squared": (0.6, 19)},
    ("penalty", "float16"): {"l1": (0.6, 15), "l2": (0.6, 18), "l2_squared": (0.6, 18)},
    ("apply", "float16"): {"l1": (0.6, 24), "l2": (1.2, 40), "l2_squared": (0.6, 24)},
    ("penalty", "float64"): {"l1": (8.5, 14), "l2": (12.5, 18), "l2_squared": (12.5, 18)},
    ("apply", "float64"): {"l1": (10.5, 22), "l2": (14.5, 26), "l2_squared": (13.5, 22)},
}
BUDGETS |= {
    (operation, "bfloat16"): BUDGETS[operation, "float16"] for operation in ("penalty", "apply")
}
# Strided arrays, whose indices take a division for each axis, cost this much more at most.
STRIDED = {"channels": (2, 50), "transposed": (2, 50)}


def issues_of(events):
    """Return how many instructions warps issued to binary64 units, and in all."""
    binary64 = sum(event["issues"]["f64"] for event in events)
    return np.array([binary64, sum(sum(event["issues"].values()) for event in events)])


@norms
@dtypes
@pytest.mark.parametrize("operation", ["apply", "penalty"])
def test_an_element_costs_no_more_than_its_budget(profile, operation, norm, dtype):
    def cost(name):
        few, many = (issues_of(profile[f"{operation} {name} {dtype} {n}"]) for n in ("few", "many"))
        return 32 * (many - few) / (5 * 16_384)

    budgets = BUDGETS[operation, dtype]
    if norm.name in budgets:
        assert (cost(norm.name) <= budgets[norm.name]).all(), cost(norm.name)
    else:  # of two sums: at most what both cost apart, and what a thread makes of λ at first
        squares, thread = "l2" if norm.two_pass else "l2_squared", 64  # elements
        assert (cost(norm.name) <= cost("l1") + cost(squares) + 1 / thread).all(), cost(norm.name)


@norms
@dtypes
@pytest.mark.parametrize("layout", STRIDED)
def test_strided_arrays_cost_a_bounded_amount_more(profile, layout, norm, dtype):
    for operation in ("apply", "penalty"):
        plain, strided = (
            32 * issues_of(profile[f"{operation} {norm.name} {dtype} {each}"]) / SIZE
            for each in ("contiguous", layout)
        )
        assert (strided - plain <= STRIDED[layout]).all(), strided - plain


# What counting adds to an element of contiguous arrays; where units are counted, too, it has no
# vectors.
COUNTING = {"statistics": (0.1, 12), "statistics of units": (0.1, 20)}
counts = pytest.mark.parametrize("what", COUNTING)


@counts
@dtypes
@pytest.mark.parametrize(
    ("layout", "units"), [("contiguous", 32), ("channels", 2), ("transposed", 200)]
)
def test_counting_reads_once_more_and_the_host_never_waits(profile, what, dtype, layout, units):
    plain, events = profile[f"penalty l1 {dtype} {layout}"], profile[f"{what} {dtype} {layout}"]
    assert [event for event in events if "launch" not in event] == []
    *others, counting = events
    assert [event["launch"] for event in others] == [event["launch"] for event in plain]
    moved = counting["loaded"] + counting["stored"]
    itemsize = 8 if dtype == "float64" else 4 if dtype == "float32" else 2
    assert 1 <= moved / (SIZE * itemsize) <= 1.02
    blocks = -(-SIZE // 4096)  # each adds a number for every counter, once
    assert counting["atomic"] <= 8 * blocks * (3 + units * ("units" in what))
    few, many = (issues_of(profile[f"{what} {dtype} {n}"][-1:]) for n in ("few", "many"))
    cost = 32 * (many - few) / (5 * 16_384)
    assert (cost <= COUNTING[what]).all(), cost
    if layout in STRIDED:
        more = 32 * issues_of([counting]) / SIZE - cost
        assert (more <= STRIDED[layout]).all(), more


@norms
def test_layers_take_one_copy_to_the_device_and_no_wait(profile, norm):
    events = profile[f"apply_all {norm.name}"]
    others = [event for event in events if "launch" not in event]
    assert [event["copy"] for event in others] == ["host to device"]  # of the table of layers
