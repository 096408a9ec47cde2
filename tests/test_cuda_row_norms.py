"""Norms of rows on a CUDA device: every way that a row can take, and what a call costs."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from actreg_dispatch import ActivityRegularization
from actreg_dispatch.oracle import exact_row_result

pytestmark = pytest.mark.cuda


def check(cupy, x, g=None, *, columns=False, epsilon=None, weights=None):
    """Compare with rational arithmetic, to the bit; rows may be columns in memory."""
    g = np.linspace(-1, 1, x.size).reshape(x.shape).astype(x.dtype) if g is None else g
    expected = exact_row_result(x, g, 0.3, (-1,), epsilon=epsilon, weights=weights)
    there, gradients = (
        cupy.asarray(np.ascontiguousarray(each.T)).T if columns else cupy.asarray(each)
        for each in (x, g)
    )
    reg = ActivityRegularization.l2(0.3, axis=-1, epsilon=epsilon)
    given = {} if weights is None else {"weights": cupy.asarray(weights)}
    penalty = reg.apply(there, gradients, **given)
    assert_array_equal(gradients.get(), expected[1])
    assert penalty.get().tobytes() == expected[0].tobytes()
    assert reg.penalty(there, **given).get().tobytes() == expected[0].tobytes()


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(300, 3), (40, 33), (2, 1100)])
def test_teams_of_any_size(cupy, dtype, shape, columns):
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    check(cupy, x, columns=columns)
    check(cupy, x, columns=columns, weights=np.abs(x[0]))


def half_way(rows, below=0.0):
    """Return rows of 9 whose norm lies half way between two numbers of float32, or nearly so."""
    norm = Fraction(1) + Fraction(1, 2**24)
    rest, row = norm**2 - 1, [1.0]
    while rest > Fraction(1, 2**100) and len(row) < 8:  # greedily
        part = np.float32(math.sqrt(rest))
        if Fraction(float(part)) ** 2 > rest:
            part = np.nextafter(part, np.float32(0))
        row.append(float(part))
        rest -= Fraction(float(part)) ** 2
    return np.array([[*row, *[0.0] * (8 - len(row)), below]] * rows, np.float32)


@pytest.mark.parametrize("below", [0.0, 2.0**-40, 2.0**-20])
def test_rows_that_are_nearly_ties_are_summed_exactly(cupy, listed, below):
    x = np.random.default_rng(1).normal(size=(20, 9)).astype(np.float32)
    x[3:6] = half_way(3, below)
    check(cupy, x)
    assert listed[0] >= (3 if below < 2.0**-30 else 0)


def test_few_rows_of_many_need_an_exact_sum(cupy, listed):
    x = np.random.default_rng(2).normal(size=(200, 8)).astype(np.float32)
    check(cupy, x)
    assert listed[0] <= 2


@pytest.mark.parametrize("columns", [False, True])
def test_rows_beyond_what_is_certified(cupy, listed, columns):
    x = np.random.default_rng(3).normal(size=(9, 20))
    x[1], x[2], x[3], x[4] = x[1] * 1e200, x[2] * 1e-200, 0.0, 5e-324
    check(cupy, x, columns=columns, epsilon=0.0)
    assert listed[0] >= 4
    check(cupy, x, columns=columns)  # zeros and what is tiny have no gradient
    assert listed[1] == 1


@pytest.fixture
def listed(cupy, monkeypatch):
    """Return how many rows were left to the exact pass, in each call that updates."""
    from actreg_dispatch.backends.cuda import row_norms

    counts = []
    kernels_of = row_norms.row_kernels_of

    def watched(norm, *, weighted):
        kernels = kernels_of(norm, weighted=weighted)

        def apply(*arguments, **options):
            counts.append(int(arguments[-3].get()[0]))
            kernels.apply(*arguments, **options)

        return kernels._replace(apply=apply)

    monkeypatch.setattr(row_norms, "row_kernels_of", watched)
    return counts


PROFILE = """
import cupy, numpy as np
from actreg_dispatch import ActivityRegularization
rng, reg = np.random.default_rng(0), ActivityRegularization.l2(0.1, axis=-1)
for rows in (2, 2000):
    x = cupy.asarray(rng.normal(size=(rows, 64)).astype(np.float32))
    for layout, y in (("rows", x), ("columns", cupy.ascontiguousarray(x.T).T)):
        g = cupy.zeros_like(y)
        assert g.strides == y.strides
        record(f"apply {layout} {rows}", lambda: reg.apply(y, g))
        record(f"penalty {layout} {rows}", lambda: reg.penalty(y))
"""


@pytest.fixture(scope="module")
def profile(profiled):
    return profiled(PROFILE)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("operation", ["apply", "penalty"])
def test_a_call_is_four_launches_and_one_look_at_memory(profile, operation, layout):
    few, many = (profile[f"{operation} {layout} {rows}"] for rows in (2, 2000))
    assert [each["launch"] for each in few] == [each["launch"] for each in many]
    assert len(many) == 4  # no copy, and the host does not wait
    moved = sum(event["loaded"] + event["stored"] for event in many)
    accesses = {"penalty": 1, "apply": 3}[operation]
    assert accesses <= moved / (2000 * 64 * 4) <= 1.06 * accesses
    first = many[0]
    assert (first["loaded"] + first["stored"]) / (32 * first["sectors"]) >= 0.9
