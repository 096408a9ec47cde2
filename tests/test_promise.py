"""The numerical promise: the bits of the exact sum, in every dtype, layout and thread count.

The oracle is rational arithmetic (:mod:`actreg_dispatch.oracle`), never another kernel.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from actreg_dispatch import ActivityNorm, ActivityRegularization, PairedSum, get_backend
from actreg_dispatch.dtypes import round_to
from actreg_dispatch.norms import Norm, named_norm, signed, sqrt
from actreg_dispatch.oracle import binary64, exact_result, exact_sum, root_of, rounded
from actreg_dispatch.sums.certified import PLAIN_BOUND, anchored_bound, certified_one, certified_two
from actreg_dispatch.sums.extended import Extended

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), FLOAT32, FLOAT64]

norms = pytest.mark.parametrize("norm", ActivityNorm, ids=lambda norm: norm.value)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def decades(low, high):
    return lambda rng, size: rng.normal(size=size) * 10.0 ** rng.uniform(low, high, size)


DATA = {
    "normal": lambda rng, size: rng.normal(size=size),
    "relu": lambda rng, size: np.maximum(rng.normal(size=size), 0),
    "ones": lambda rng, size: np.ones(size),
    "small integers": lambda rng, size: rng.integers(-5, 6, size),
    "zeros of both signs": lambda rng, size: rng.choice([0.0, -0.0], size),
    "four decades": decades(-2, 2),
    "24 decades": decades(-12, 12),
    "280 decades": decades(-140, 140),
    "subnormal in float16": decades(-8, -6),
    "subnormal in float32": decades(-45, -38),
    "subnormal in float64": decades(-324, -308),
    "squares about to overflow": decades(140, 160),
    "squares about to underflow": decades(-165, -140),
    "squares overflow": decades(160, 300),
    "squares underflow": decades(-300, -170),
    "tiny, medium and huge": lambda rng, size: (
        rng.normal(size=size) * 10.0 ** rng.choice([-200, 0, 200], size)
    ),
    "on a tie of float64": lambda rng, size: np.r_[2.0**53, 1, np.zeros(size - 2)],
    "above a tie of float64": lambda rng, size: np.r_[2.0**53, 1, 2.0**-500, np.zeros(size - 3)],
    "just above a tie": lambda rng, size: np.r_[2.0**53, 1, 2.0**-20, np.zeros(size - 3)],
    "higher above a tie": lambda rng, size: np.r_[2.0**53, 1, 2.0**-48, np.zeros(size - 3)],
    "with an error of its own": lambda rng, size: np.full(size, 2.0**-500 * (1 + 2.0**-52)),
    "near the largest": lambda rng, size: np.r_[1e308, np.zeros(size - 1)],
    "the smallest": lambda rng, size: np.r_[5e-324, 5e-324, np.zeros(size - 2)],
    "squares that add up to more than the largest": lambda rng, size: np.full(size, 1e153),
    "on a tie of float32": lambda rng, size: np.r_[1, 2.0**-24, np.zeros(size - 2)],
    "above a tie of float32": lambda rng, size: np.r_[1, 2.0**-24, 2.0**-40, np.zeros(size - 3)],
}


def spread_out(values, module=np):
    """Return a strided view of the same values."""
    room = module.zeros((*values.shape, 2), values.dtype)
    room[..., 0] = values
    return room[..., 0]


def assert_exact(backend, values, norm, lam=0.1, epsilon=None, view=lambda array: array):
    rng = np.random.default_rng(9)
    start = rng.normal(size=values.shape).astype(values.dtype)
    penalty, updated = exact_result(view(values), view(start), norm, lam, epsilon)
    reg = backend.regularization(lam, norm, epsilon=epsilon)
    dense = backend.array(values), backend.array(start.copy())
    strided = spread_out(dense[0], backend.module), spread_out(dense[1], backend.module)
    for x, g in (dense, strided):
        for result in (reg.apply(view(x), view(g)), reg.penalty(view(x))):
            found = backend.host(result)
            assert found.dtype == penalty.dtype
            assert found.tobytes() == penalty.tobytes(), (found, penalty)
        assert backend.host(view(g)).tobytes() == updated.tobytes()


@norms
@dtypes
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_every_bit_is_that_of_the_exact_sum(backend, norm, dtype, data):
    with np.errstate(all="ignore"):
        values = data(np.random.default_rng(5), 517).astype(dtype)
    values = np.where(np.isfinite(values), values, np.zeros_like(values))
    for lam in (0.1, 1.0):
        assert_exact(backend, values, norm, lam)
    if norm is ActivityNorm.L2:
        assert_exact(backend, values, norm, epsilon=0.0)
    total = backend.regularization(1.0, norm).partial_sum(backend.array(values))
    for each in (total.absolute, total.squares) if isinstance(total, PairedSum) else (total,):
        power = ActivityNorm.L1 if each.degree == 1 else ActivityNorm.L2
        assert Fraction(each.units, 2**3222) == exact_sum(values, power)


@pytest.mark.parametrize("extra", [0.0, 2.0**-1000])
def test_bits_far_below_decide_a_tie(backend, extra):
    """Terms of 53 bits each whose sum is one bit, once all their carries are through."""
    steps = [2.0 ** (847 - 52 * i) for i in range(33)]
    terms = [high - low for high, low in itertools.pairwise(steps)]
    values = np.array([2.0**900, *terms, steps[-1], extra])
    assert exact_sum(values, ActivityNorm.L1) == 2**900 + 2**847 + Fraction(extra)
    for order in (slice(None), slice(None, None, -1)):
        assert_exact(backend, values[order].copy(), ActivityNorm.L1, 1.0)


@norms
@dtypes
@pytest.mark.parametrize("size", [2047, 8193, 29_999, 30_000, 41_001])
def test_blocks_and_threads_do_not_show(backend, norm, dtype, size):
    if backend.name == "cupy" and size > 8193:
        size //= 5  # a software device takes its time
    values = np.random.default_rng(size).normal(size=size).astype(dtype)
    for view in (
        lambda array: array,
        lambda array: array[::-1],
        lambda array: array[: size // 6 * 6].reshape(6, -1).T,
        lambda array: array[::3],
    ):
        assert_exact(backend, values, norm, view=view)


def test_the_norm_may_be_too_large_for_binary64_where_the_penalty_is_not(backend):
    values = np.full(5, 1.7e308)
    found = backend.regularization(0.1, "l2").penalty(backend.array(values))
    expected, _ = exact_result(values, np.zeros(5), ActivityNorm.L2, 0.1)
    assert backend.host(found) == expected < math.inf


@norms
@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_in_every_position(backend, norm, dtype, bad):
    size = 5
    for position in range(size):
        activations = np.arange(1.0, size + 1).astype(dtype)
        activations[position] = bad
        device = backend.array(np.zeros(size, dtype))
        penalty = backend.regularization(0.5, norm).apply(backend.array(activations), device)
        gradients = backend.host(device)
        ratio = norm is ActivityNorm.HOYER  # of two infinite sums, which is NaN
        np.testing.assert_equal(float(penalty), math.nan if ratio else abs(bad))
        x = activations.astype(np.float64)
        with np.errstate(invalid="ignore"):
            expected = {
                ActivityNorm.L1: 0.5 * ((x > 0).astype(float) - (x < 0)),
                ActivityNorm.L2: 0.5 * x / abs(bad),
                ActivityNorm.L2_SQUARED: 2 * 0.5 * x,
                ActivityNorm.L1_L2_SQUARED: 0.5 * ((x > 0).astype(float) - (x < 0)) + 2 * 0.5 * x,
                ActivityNorm.HOYER: np.full(size, math.nan),
            }[norm]
        assert_array_equal(gradients.astype(np.float64), expected)


@dtypes
def test_every_nan_in_the_gradients_becomes_the_same_quiet_nan(dtype):
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    ones = np.array(np.inf, dtype).view(bits)
    sign = bits(1) << bits(8 * dtype.itemsize - 1)
    nans = np.concatenate([ones + bits([1, 7, 0]), sign + ones + bits([1, 7, 0])]).view(dtype)
    results = []
    for name in ("numpy", "numba"):
        gradients = nans.copy()
        ActivityRegularization(0.5, backend=name).apply(np.ones(6, dtype), gradients)
        ActivityRegularization(0.5, backend=name).penalty(nans)
        results.append(gradients.tobytes())
    assert results[0] == results[1]


def test_a_nan_outweighs_an_infinity(backend):
    for order in ([math.inf, math.nan], [math.nan, math.inf]):
        assert math.isnan(backend.regularization(1.0, "l2").penalty(backend.array(order)))


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_more_ones_than_float32_can_count(name):
    ones = np.broadcast_to(np.float32(1), (2**24 + 1,))
    for norm in ("l1", "l2_squared"):  # 2**24 + 1 lies on a tie, and goes to the even neighbour
        assert ActivityRegularization(1.0, norm, backend=name).penalty(ones) == 2**24
    assert ActivityRegularization(1.0, "l2", backend=name).penalty(ones) == 2**12


def test_l2_keeps_in_range(backend):
    for scale in (1e200, 1e-200, 5e-324):
        activations, device = np.array([3 * scale, -4 * scale]), backend.array(np.zeros(2))
        reg = backend.regularization(0.5, "l2", epsilon=0.0)
        size = math.hypot(3 * scale, 4 * scale)
        assert reg.apply(backend.array(activations), device) == 0.5 * size
        assert_array_equal(backend.host(device), (0.5 * activations) / size)


def test_squared_l2_is_infinite_only_where_the_truth_is(backend):
    def penalty(lam, *values):
        return float(backend.regularization(lam, "l2_squared").penalty(backend.array(values)))

    assert penalty(1e-100, 1e200) == 1e-100 * 1e200 * 1e200 or math.isfinite(penalty(1e-100, 1e200))
    assert penalty(1e-100, 1e200) == binary64(Fraction(1e-100) * rounded(Fraction(1e200) ** 2, 53))
    assert penalty(1.0, 1e200) == math.inf
    assert penalty(1e300, 1e-200) == binary64(Fraction(1e300) * rounded(Fraction(1e-200) ** 2, 53))
    assert penalty(0.0, 1e200) == 0.0


@pytest.mark.parametrize(
    ("values", "epsilon", "has_gradient"),
    [
        ([3.0, 4.0], 25.0, False),
        ([3.0, 4.0], math.nextafter(25.0, 0.0), True),
        ([1.0, 2.0**-27], 1.0, False),  # 1 + 2**-54 is rounded to 53 bits first
        ([2.0**-537], 5e-324, False),
        ([2.0**-537, 2.0**-550], 5e-324, True),  # which binary64 could not tell
        ([2.0**-537 * 0.9], 5e-324, False),
        ([2.0**-520, 2.0**-545], 2.0**-1040, True),
        ([1e-300], 0.0, True),
        ([1e-300], 5e-324, False),
        ([5e-324], 1.0, False),
        ([0.0], 0.0, False),
        ([1e300], 1e308, True),
        ([math.inf], 1e308, True),
        ([math.nan], 1e308, True),
    ],
)
def test_epsilon_is_compared_with_the_rounded_sum(backend, values, epsilon, has_gradient):
    gradients = backend.array(np.full(len(values), 7.0))
    backend.regularization(0.0, "l2", epsilon=epsilon).apply(backend.array(values), gradients)
    assert_array_equal(backend.host(gradients)[1:], 7.0)  # of lam = 0
    backend.regularization(1e300, "l2", epsilon=epsilon).apply(backend.array(values), gradients)
    assert (backend.host(gradients)[0] != 7.0) == has_gradient


def test_subnormal_results_are_rounded_once(backend):
    """With 52 bits, every fourth would differ if it were rounded to 53 before."""
    rng = np.random.default_rng(13)
    for _ in range(25):
        small = rng.uniform(0.5, 1.0, 2) * 2.0**-1022.5
        large, lam = rng.uniform(1.0, 2.0, 3), rng.uniform(0.5, 1.0) * 2.0**-1024
        for norm, values, strength in (
            (ActivityNorm.L2, small, 1.0),
            (ActivityNorm.L1, large, lam),
            (ActivityNorm.L2_SQUARED, large, lam / 2),
        ):
            expected = exact_result(values, values, norm, strength)[0]
            found = backend.regularization(strength, norm).penalty(backend.array(values))
            assert backend.host(found).tobytes() == expected.tobytes()


def test_lam_may_bring_a_sum_back_into_range(backend):
    for values, lam in (
        ([1.7e308, 1.7e308], 1e-300),
        ([2.0**600], 2.0**-1074),
        ([1e153] * 9, 1e-10),
        ([1e308], 2.0),
        ([2.0**600], 2.0**-1000 * 1.1),
        ([2.0**-600, 2.0**-620], 1.7e308),
        ([2.0**-537, 2.0**-537 * 1.5], 0.37),
        ([5e-324], 0.5),
        ([5e-324], 0.51),
        ([5e-324] * 3, 0.5),
    ):
        for norm in (ActivityNorm.L1, ActivityNorm.L2_SQUARED):
            assert_exact(backend, np.array(values), norm, lam / 2)


# Which path ran.


@pytest.fixture
def exact_sums(monkeypatch):
    """Record the sums that were done again in integers."""
    taken = []

    def partial_sum(x, *given):
        taken.append(x.size)
        return original(x, *given)

    backend = get_backend("numba")
    original = backend.partial_sum
    monkeypatch.setattr(backend, "partial_sum", partial_sum)
    return taken


@pytest.mark.parametrize("layout", [np.asarray, spread_out])
@pytest.mark.parametrize(
    ("values", "dtype", "certain", "result"),
    [
        ([1.0, 2.0**-20], np.float32, True, 1 + 2.0**-20),
        ([1.0, 2.0**-24, 2.0**-30], np.float32, True, 1 + 2.0**-23),
        ([1.0, 2.0**-24], np.float32, False, 1.0),
        ([1.0, 2.0**-24, 2.0**-45], np.float32, False, 1 + 2.0**-23),
        ([1.0, 2.0**-24, 2.0**-140], np.float32, False, 1.0),  # rounded to 53 bits first
        ([1.0, 2.0**-52], np.float64, True, 1 + 2.0**-52),
        ([1.0, 2.0**-53, 2.0**-60], np.float64, True, 1 + 2.0**-52),
        ([1.0, 2.0**-53], np.float64, False, 1.0),
        ([1.0, 2.0**-53, 2.0**-140], np.float64, False, 1 + 2.0**-52),
        ([1.0, 3 * 2.0**-53], np.float64, False, 1 + 2.0**-51),
    ],
)
def test_on_and_beside_a_rounding_boundary(exact_sums, layout, values, dtype, certain, result):
    values = layout(np.array(values, dtype))
    reg = ActivityRegularization(1.0, backend="numba")
    assert reg.penalty(values) == result
    assert exact_sums == ([] if certain else [values.size])
    for _ in range(2):
        gradients = layout(np.zeros(values.size, dtype))
        assert reg.apply(values, gradients) == result
        assert (gradients == 1).all()  # updated once, however often the sum is done again
    assert len(exact_sums) == (0 if certain else 3)


@pytest.mark.parametrize("size", [300, 40_000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_real_data_seldom_needs_a_second_sum(exact_sums, dtype, size):
    rng = np.random.default_rng(6)
    for norm in ActivityNorm:
        for _ in range(200 if size == 300 else 20):
            values = rng.normal(size=size).astype(dtype)
            ActivityRegularization(0.1, norm, backend="numba").penalty(values)
    assert len(exact_sums) <= 2


# The pieces.

magnitudes = st.floats(0, allow_nan=False, allow_infinity=False)


@given(
    values=st.lists(magnitudes, max_size=40),
    norm=st.sampled_from([ActivityNorm.L1, ActivityNorm.L2]),
)
@example(values=[2.0**-1022, 1.5 * 2.0**-1022, 2.0**-1021], norm=ActivityNorm.L1)
def test_integer_sums_are_exact(values, norm):
    array = np.array(values, np.float64)
    exact = exact_sum(array, norm)
    for name in ("numpy", "numba"):
        sum_of = get_backend(name).partial_sum
        total = sum(sum_of(piece, named_norm(norm)) for piece in np.array_split(array, 3))
        assert total.rounded() == rounded(exact, 53)
        assert float(total) == binary64(exact)


@given(value=st.fractions(min_value=Fraction(1, 10**700), max_value=10**640))
def test_the_root_of_a_fraction_is_rounded_once(value):
    assert float(sqrt(Extended(value))) == binary64(root_of(value))
    root = rounded(value, 26)
    assert float(sqrt(Extended(root * root))) == binary64(root)


@given(
    hi=st.floats(1e-30, 1e30),
    offset=st.floats(-1, 1),
    bound=st.sampled_from([PLAIN_BOUND, anchored_bound(10**6)]),
    lam=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
    root=st.booleans(),
    compute=st.sampled_from([FLOAT32, FLOAT64]),
    bits=st.sampled_from([24, 25, 53]),
)
def test_what_is_certified_is_right(hi, offset, bound, lam, root, compute, bits):
    """Whatever the truth within the bound, certain results are those of the truth."""
    truth = rounded(Fraction(hi), bits)  # few bits make ties likely
    computed = truth * (1 + Fraction(bound) * Fraction(offset))
    pair = float(computed), float(computed - Fraction(float(computed)))
    lams = (float(compute.type(lam)),)
    options = lams, lams, 1e-7, lambda value: round_to(compute, value)
    norm = named_norm("l2" if root else "l1")
    found, certain = certified_one(pair, bound, norm.evaluate, norm.agree, *options)
    if certain:
        assert found == norm.evaluate((float(truth),), *options)


@pytest.mark.parametrize("layout", [np.asarray, spread_out])
@pytest.mark.parametrize("norm", [ActivityNorm.L1, ActivityNorm.L2_SQUARED])
def test_anchored_sums_keep_within_their_bound(norm, layout):
    rng = np.random.default_rng(12)
    for size in (1, 5, 1023, 1024, 1025, 3000):
        for low, high in ((0, 0), (-8, 0), (-20, 20), (-130, 130)):
            values = rng.normal(size=size) * 10.0 ** rng.uniform(low, high, size)
            values[rng.integers(size)] = 2.0 ** rng.integers(-3, 3)
            hi, lo = get_backend("numba").quick_sum(layout(values), named_norm(norm))
            exact = exact_sum(values, norm)
            assert abs(Fraction(hi) + Fraction(lo) - exact) <= anchored_bound(size) * exact


def test_the_worst_tiles_keep_within_their_bound():
    """Terms as large as they may be next to the anchor, or that all lose as much as they can."""
    tiles = [np.random.default_rng(3).uniform(1.5, 2.0, 1024), np.full(1024, np.nextafter(2, 0))]
    for k in range(1, 60):
        tiles.append(np.r_[1.0, np.full(510, 2.0**-k), np.full(513, 2.0 ** -(k + 49))])
    for values in tiles:
        hi, lo = get_backend("numba").quick_sum(values, named_norm("l1"))
        exact = exact_sum(values, ActivityNorm.L1)
        assert abs(Fraction(hi) + Fraction(lo) - exact) <= anchored_bound(1024) * exact


def blocks_of(first, second):
    """Return blocks that are but two numbers; with threads if there are five."""
    blocks = np.zeros((5, 8192))
    blocks[:, 0], blocks[:, 1] = first, second
    return blocks


SUMMED_IN_PARTS = {
    "remainders of a tile that are rounded": (
        "l1",
        np.r_[1.0, 2.0**-53 - 2.0**-86, np.full(510, 2.0**-43), np.full(512, 2.0**-94)],
    ),
    "a plain tile that loses what it can": (
        "l1",
        np.r_[np.ones(64), 2.0**-18 - 2.0**-42, np.full(8000, 2.0**-54)].astype(np.float32),
    ),
    "lower halves of blocks": ("l1", blocks_of(1.0, 0.45 * 2.0**-52)[:3].ravel()),
    "lower halves of blocks and threads": ("l1", blocks_of(1.0, 0.45 * 2.0**-52).ravel()),
    "lower halves of squares": ("l2_squared", blocks_of(1.0, math.sqrt(0.45) * 2.0**-26).ravel()),
    "lower halves of the second sum": (
        "l1_l2_squared",
        blocks_of(1.0, math.sqrt(0.45) * 2.0**-26)[:3].ravel(),
    ),
} | {
    f"above a tie at 2^{exponent}": ("l1", 2.0 ** (exponent - np.array([0.0, 53.0, 120.0])))
    for exponent in (1014, 1015, 1016, 1020, 1022)
}


@pytest.mark.parametrize(("norm", "values"), SUMMED_IN_PARTS.values(), ids=SUMMED_IN_PARTS)
def test_what_parts_of_a_sum_leave_out_is_not_lost(backend, norm, values):
    lam = (0.0, 1.0) if norm == "l1_l2_squared" else 1.0
    start = np.zeros_like(values)
    expected, gradients = exact_result(values, start, ActivityNorm(norm), lam)
    reg = backend.regularization(lam, norm)
    penalty, updated = backend.updated(reg, values, start)
    assert penalty == backend.host(reg.penalty(backend.array(values))) == expected
    assert updated.tobytes() == gradients.tobytes()


# Threads and memory.


@pytest.mark.parametrize("corner", [*itertools.product([False, True], repeat=2)])
def test_every_corner_of_the_brackets_counts(corner):
    def evaluate(sums, *_):
        return tuple(each > 1.0 for each in sums) == corner

    one = (1.0, 0.0)
    options = operator.eq, (), (), 0.0, float
    assert not certified_two((*one, *one), PLAIN_BOUND, evaluate, *options)[1]
    assert not certified_one(one, PLAIN_BOUND, lambda s, *_: s[0] > 1.0, *options)[1]


def test_a_sum_that_may_overflow_when_rounded_is_not_certain():
    """It may round to 2**1024, whose root of a square is finite if nothing overflows on the way."""
    norm = Norm(
        "root",
        terms=(1,),
        penalty=lambda lam, s: lam[0] * sqrt(s[0] * s[0]),
        gradient=lambda x, lam, c: signed(lam[0], x),
    )
    options = anchored_bound(3), norm.evaluate, norm.agree, (0.25,), (0.25,), 0.0, np.float64
    largest = np.float64(np.finfo(np.float64).max)
    with np.errstate(over="ignore"):
        assert not certified_one((largest, np.nextafter(2.0**970, 0)), *options)[1]
        assert certified_one((largest, 0.0), *options)[1]  # infinite whatever it is


def test_a_zero_whose_sign_is_not_certain_is_not():
    norm = Norm(
        "difference",
        terms=(1, 2),
        penalty=lambda lam, s: lam[0] * s[0],
        coefficients=lambda lam, s: (lam[0] * (s[0] - s[1]),),
        gradient=lambda x, lam, c: c[0] * x,
    )
    one = (1.0, 0.0, 1.0, 0.0)
    options = norm.evaluate, norm.agree, (0.0,), (0.0,), 0.0, float
    assert certified_two(one, 0.0, *options) == ((0.0, (0.0,), True), True)
    assert not certified_two(one, PLAIN_BOUND, *options)[1]


SUMS = """
import hashlib, json
import numba, numpy as np
from actreg_dispatch import ActivityRegularization
rng = np.random.default_rng(8)
found = []
for norm in ("l1", "l2", "l2_squared"):
    for dtype in (np.float16, np.float32, np.float64):
        values = rng.normal(size=(2, 100_003)).astype(dtype)
        for view in (values[0], values.T):
            gradients = np.ones_like(view)
            penalty = ActivityRegularization(0.1, norm, backend=BACKEND).apply(view, gradients)
            found.append([float(penalty).hex(), hashlib.sha256(gradients.tobytes()).hexdigest()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def sums_of_the_reference():
    code = f"BACKEND = 'numpy'{SUMS}"
    return json.loads(subprocess.check_output([sys.executable, "-c", code]))


@pytest.mark.parametrize("layer", ["omp", "workqueue", "tbb"])
def test_thread_counts_and_layers_do_not_show(python, sums_of_the_reference, layer):
    variables = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "4"}
    variables["LD_LIBRARY_PATH"] = str(Path(sys.prefix, "lib"))  # where pip puts libtbb.so
    code = f"""
import numba
for threads in (1, 2, 4):
    numba.set_num_threads(threads)
    exec({f"BACKEND = 'numba'{SUMS}"!r})
    assert (numba.threading_layer(), numba.get_num_threads()) == ({layer!r}, threads)
"""
    done = python("-c", code, check=False, **variables)
    if "threading layer" in done.stderr.lower() and layer != "workqueue":
        pytest.skip(f"Numba has no threading layer {layer} here")  # workqueue is part of Numba
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [sums_of_the_reference] * 3, done.stderr


def test_no_memory_of_the_arrays_size_is_taken(python):
    code = """
import resource, sys, tracemalloc
import numpy as np
from actreg_dispatch import ActivityRegularization
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
values = np.ones((4000, 4000), np.float32)
gradients = np.zeros((4000, 8000), np.float32)[:, ::2]
gradients += 1
contiguous = gradients.copy()
for norm in ("l1", "l2", "l2_squared"):  # compile for both layouts
    reg = ActivityRegularization(0.1, norm)
    reg.apply(values[:200], gradients[:200])
    reg.apply(values[:200], gradients[:200].copy())
    reg.penalty(values[:200]), reg.penalty(values[:200].T)
before = peak()
tracemalloc.start()
for norm in ("l1", "l2", "l2_squared"):
    reg = ActivityRegularization(0.1, norm)
    reg.apply(values, gradients)
    reg.apply(values, contiguous)
    reg.penalty(values.T)
print((peak() - before) // 1024, tracemalloc.get_traced_memory()[1])
"""
    growth, traced = map(int, python("-c", code).stdout.split())
    assert growth <= 4  # MiB, of 61 that values take
    assert traced < 2**20  # bytes
