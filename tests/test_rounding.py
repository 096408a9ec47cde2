"""The arithmetic that the backends share, against rational arithmetic."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actreg_dispatch import ActivityNorm, ActivityRegularization, PairedSum
from actreg_dispatch.dtypes import round_to
from actreg_dispatch.norms import named_norm
from actreg_dispatch.oracle import exact_result, exact_sum
from actreg_dispatch.sums.certified import merge_pairs, two_sum

numbers = st.floats(-(2.0**100), 2.0**100, allow_subnormal=False).filter(
    lambda v: v == 0 or abs(v) > 2.0**-100
)
sums = st.lists(st.floats(0, 1e15), max_size=20)


@given(a=numbers, b=numbers)
def test_two_sum_loses_nothing(a, b):
    s, e = two_sum(a, b)
    assert s == a + b
    assert Fraction(s) + Fraction(e) == Fraction(a) + Fraction(b)


@given(parts=st.lists(sums, min_size=1, max_size=5))
def test_pairs_merge_to_the_sum_of_the_whole(parts):
    total = (0.0, 0.0)
    for part in parts:
        piece = (0.0, 0.0)
        for value in part:
            piece = merge_pairs(*piece, value, 0.0)
        total = merge_pairs(*total, *piece)
    hi, lo = total
    exact = sum(Fraction(value) for part in parts for value in part)
    assert abs(Fraction(hi) + Fraction(lo) - exact) <= exact / 2**96
    assert hi == hi + lo  # normalized


def test_a_sum_that_is_not_finite_is_its_hi():
    assert merge_pairs(math.inf, math.nan, 1.0, 0.0) == (math.inf, 0.0)
    assert merge_pairs(1e308, 0.0, 1e308, 0.0) == (math.inf, 0.0)
    assert merge_pairs(1.7976931348623157e308, 2.0**969, 2.0**969, 0.0) == (math.inf, 0.0)
    assert math.isnan(merge_pairs(math.nan, 0.0, 1.0, 0.0)[0])


def test_rounding_to_float32_is_to_nearest_even_and_silent():
    dtype = np.dtype(np.float32)
    assert round_to(dtype, 1 + 2.0**-24) == 1
    assert round_to(dtype, 1 + 3 * 2.0**-24) == np.float32(1 + 2.0**-22)
    assert round_to(dtype, 3.4028235e38) == np.finfo(np.float32).max  # rounds down, no warning
    assert round_to(dtype, 1e39) == math.inf
    assert round_to(dtype, math.inf) == math.inf
    assert type(round_to(dtype, 0.1)) is np.float32


def test_the_penalty_is_rounded_once():
    total = 1 + 2.0**-24 + 2.0**-50  # just above a tie: rounding in two steps would go down
    one = (1.0,)
    found = named_norm("l1").evaluate((total,), one, one, 0.0, np.float32)
    assert found == (1 + 2.0**-23, (), True)
    found = named_norm("l2").evaluate((2.0,), (0.1,), one, 2.0, np.float64)
    assert found == (0.1 * math.sqrt(2.0), (float(np.sqrt(2.0)),), False)


def test_partial_sums_of_different_kinds_do_not_add_up():
    l1, l2 = ActivityRegularization.l1(1.0), ActivityRegularization.l2(1.0)
    ones = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="one norm and one compute dtype"):
        l1.partial_sum(ones) + l2.partial_sum(ones)
    with pytest.raises(ValueError, match="one norm and one compute dtype"):
        l1.partial_sum(ones) + l1.partial_sum(ones.astype(np.float64))
    with pytest.raises(TypeError):
        l1.partial_sum(ones) + 1.0
    assert l1.partial_sum(ones) + l1.partial_sum(ones.astype(np.float16)) == l1.partial_sum(
        np.ones(4, np.float32)
    )


def test_partial_sums_that_are_not_finite_compare_however_they_were_split():
    for name in ("numpy", "numba"):
        reg = ActivityRegularization(1.0, backend=name)
        whole = reg.partial_sum(np.array([math.inf, 1.0, 2.0]))
        pieces = [reg.partial_sum(np.array([value])) for value in (2.0, math.inf, 1.0)]
        assert sum(pieces) == whole
        assert whole == ActivityRegularization(1.0).partial_sum(np.array([math.inf]))


def test_a_partial_sum_is_shown_in_short():
    total = ActivityRegularization.l2(1.0).partial_sum(np.array([3.0, 4.0]))
    assert repr(total) == "<PartialSum of |x|**2 for float64 penalties, about 25.0>"
    both = ActivityRegularization.l1_l2(1.0, 1.0).partial_sum(np.array([3.0, 4.0]))
    shown = "<PairedSum of |x| and |x|**2 for float64 penalties, about 7.0 and 25.0>"
    assert repr(both) == shown


def test_a_pair_is_of_both_sums_and_of_one_dtype():
    values = np.array([3.0, 4.0])
    absolute = ActivityRegularization.l1(1.0).partial_sum(values)
    squares = ActivityRegularization.l2(1.0).partial_sum(values)
    narrow = ActivityRegularization.l2(1.0).partial_sum(values.astype(np.float32))
    assert PairedSum(absolute, squares).dtype == np.float64
    for pair in ((squares, absolute), (absolute, absolute), (absolute, narrow)):
        with pytest.raises(ValueError, match=r"absolute=.* are no pair; pass sums of \|x\| and"):
            PairedSum(*pair)
    with pytest.raises(TypeError, match="not both a PartialSum; pass sums such as partial_sum"):
        PairedSum(absolute, 2)


def test_partial_sums_travel():
    total = ActivityRegularization.l1(1.0).partial_sum(np.array([0.1, -0.2]))
    assert pickle.loads(pickle.dumps(total)) == total


@pytest.mark.parametrize(
    ("norm", "penalty", "gradients"),
    [
        (ActivityNorm.L1, 3.5, [1.5, 0.5]),
        (ActivityNorm.L2, 2.5, [1.3, 0.6]),
        (ActivityNorm.L2_SQUARED, 12.5, [4.0, -3.0]),
    ],
)
def test_the_definition_by_hand(norm, penalty, gradients):
    activations = np.array([3.0, -4.0])
    found, updated = exact_result(activations, np.ones(2), norm, 0.5)
    assert found == penalty
    assert updated.tolist() == gradients
    assert exact_sum(activations, norm) == (7 if norm is ActivityNorm.L1 else 25)
