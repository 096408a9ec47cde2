"""The arithmetic that the backends share, against rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actreg_dispatch import ActivityNorm, DoubleDouble
from actreg_dispatch.exact import exact_result, exact_sum
from actreg_dispatch.rounding import merge_pairs, outcome_of, round_to, two_product, two_sum

numbers = st.floats(-(2.0**100), 2.0**100, allow_subnormal=False).filter(
    lambda v: v == 0 or abs(v) > 2.0**-100
)
sums = st.lists(st.floats(0, 1e15), max_size=20)


@given(a=numbers, b=numbers)
def test_two_sum_and_two_product_lose_nothing(a, b):
    s, e = two_sum(a, b)
    assert s == a + b
    assert Fraction(s) + Fraction(e) == Fraction(a) + Fraction(b)
    p, e = two_product(a, b)
    assert p == a * b
    assert Fraction(p) + Fraction(e) == Fraction(a) * Fraction(b)


@given(parts=st.lists(sums, min_size=1, max_size=5))
def test_partial_sums_merge_to_the_rounded_sum_of_the_whole(parts):
    total = DoubleDouble()
    for part in parts:
        piece = DoubleDouble()
        for value in part:
            piece = piece.merge(DoubleDouble(value))
        total = total.merge(piece)
    whole = [value for part in parts for value in part]
    exact = sum(map(Fraction, whole))
    assert total.hi == math.fsum(whole)
    assert abs(Fraction(total.hi) + Fraction(total.lo) - exact) <= exact / 2**96
    assert total.hi == total.hi + total.lo  # normalized


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
    dtype = np.dtype(np.float32)
    total = 1 + 2.0**-24 + 2.0**-50  # just above a tie: rounding in two steps would go down
    found = outcome_of(total, ActivityNorm.L1, 1.0, dtype, 0.0)
    assert found == (1 + 2.0**-23, 0.0, True)
    found = outcome_of(2.0, ActivityNorm.L2, 0.1, np.dtype(np.float64), 2.0)
    assert found == (0.1 * math.sqrt(2.0), float(np.sqrt(2.0)), False)


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
