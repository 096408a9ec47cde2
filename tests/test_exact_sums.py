"""Exact sums on the CPU: tiles on both sides of the check that lets them be sums of binary64."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from actreg_dispatch import ActivityNorm, get_backend
from actreg_dispatch.backends import numba
from actreg_dispatch.backends.numba.exact import EXACT_TERMS
from actreg_dispatch.norms import named_norm
from actreg_dispatch.oracle import exact_sum
from actreg_dispatch.sums.exact import (
    COUNTERS,
    UNIT,
    UNWEIGHTED_UNIT,
    UNWEIGHTED_WORDS,
    WORD_BITS,
    WORDS,
    sum_of_words,
)

BOTH = named_norm("l1_l2_squared")
SUMS = [ActivityNorm.L1, ActivityNorm.L2_SQUARED]


def check(values, backend="numba"):
    total = get_backend(backend).partial_sum(values, BOTH)
    for part, norm in zip(total.parts, SUMS, strict=True):
        assert part.units == exact_sum(values, norm) * 2**3222
        assert part.special == 0.0


def odd_square(near):
    """Return a number near that whose rounded square has an odd significand."""
    while not np.square(near).view(np.int64) & 1:
        near = np.nextafter(near, 2 * near)
    return near


# Many terms that leave the anchor the most they can, so that a last bit at 2⁻⁹³ just fits into 53
# bits beside their sum, and one at 2⁻⁹⁴ does not: the largest term, the others, and the smallest by
# the exponent of its term.
FULL = {
    "|x|, float32": (np.float32, 1.0, 2.0**-28 + 2.0**-51, lambda s: 2.0**s * (1 + 2.0**-23), 70),
    "|x|, float64": (np.float64, 1.0, 1 + 2.0**-51, lambda s: 2.0**s * (1 + 2.0**-52), 41),
    "x², float64": (
        np.float64,
        1.0,
        1 + 2.0**-52,
        lambda s: odd_square(np.float64(1.01 * 2.0 ** (s / 2))),
        41,
    ),
}


@pytest.mark.parametrize("beyond", [-1, 0, 1, 2])
@pytest.mark.parametrize(("dtype", "largest", "other", "smallest", "span"), FULL.values(), ids=FULL)
def test_tiles_at_the_edge_of_the_check(dtype, largest, other, smallest, span, beyond):
    values = np.full(EXACT_TERMS, other, dtype)
    values[0], values[-1] = largest, smallest(-span - beyond)
    check(values)


@pytest.mark.parametrize("beyond", [-1, 0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_terms_of_few_bits_at_the_edge_of_what_is_cut_off(beyond, sign):
    values = np.full(EXACT_TERMS, 1.0, np.float32)
    values[1:] = sign * 2.0 ** -(27 + beyond) * (1 + 2.0**-23)
    check(values)


@given(
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    spans=st.lists(st.integers(0, 75), min_size=1, max_size=4),
    size=st.sampled_from([1, 3, EXACT_TERMS - 1, EXACT_TERMS, EXACT_TERMS + 1, 5 * EXACT_TERMS]),
    exponent=st.integers(-20, 10),
    seed=st.integers(0, 99),
)
def test_tiles_of_every_span(dtype, spans, size, exponent, seed):
    rng = np.random.default_rng(seed)
    exponents = exponent - rng.choice([0, *spans], size)
    values = np.ldexp(1 + rng.integers(0, 2**52, size) * 2.0**-52, exponents)
    check((values * rng.choice([-1, 1], size)).astype(dtype))


@pytest.mark.parametrize(
    ("dtype", "step"), [(np.float32, 70), (np.float32, 23), (np.float64, 41), (np.float64, 20)]
)
@pytest.mark.parametrize("rounds", [1, 2, 4, 5, 6, 7])
def test_terms_where_a_round_ends(dtype, step, rounds):
    """Each round has the least that its largest allows, and the next begins right below."""
    exponents = 100 - (step + 1) * np.arange(rounds + 1)
    exponents = np.sort(np.r_[exponents, exponents - step])
    exponents = exponents[exponents >= (-148 if dtype is np.float32 else -900)]
    check(np.exp2(np.r_[exponents, exponents]).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_terms_that_are_too_small_for_a_tile(dtype, share):
    rng = np.random.default_rng(0)
    values = rng.normal(size=3 * EXACT_TERMS + 7)
    small = rng.random(values.size) < share
    exponents = rng.integers(-110, -15, values.size)
    check(np.where(small, np.ldexp(values, exponents), values).astype(dtype))
    if dtype is np.float64:  # whose squares underflow
        check(np.where(small, np.ldexp(values, 9 * exponents), values))


@pytest.mark.parametrize(
    "exponent", [-538, -537, -512, -495, -490, -470, -451, -450, 506, 507, 510, 511]
)
def test_squares_at_the_ends_of_the_range(exponent):
    rng = np.random.default_rng(0)
    check(np.ldexp(1 + rng.random(3 * EXACT_TERMS), exponent))


@pytest.mark.parametrize(
    "exponent", [-1074, -1060, -1022, -901, -900, 1012, 1013, 1014, 1021, 1022, 1023]
)
def test_magnitudes_at_the_ends_of_the_range(exponent):
    rng = np.random.default_rng(0)
    check(np.ldexp(1 + rng.random(EXACT_TERMS), exponent))


@pytest.mark.parametrize("value", [np.nextafter(2, 0), np.nextafter(np.float32(2), np.float32(0))])
def test_the_largest_sums_of_a_tile(value):
    check(np.full(EXACT_TERMS, value))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, -0.0, np.finfo(np.float16).smallest_subnormal])
def test_zeros_and_what_is_next_to_them(dtype, value):
    values = np.zeros(2 * EXACT_TERMS + 1, dtype)
    values[::3] = value
    check(values)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, EXACT_TERMS - 1, EXACT_TERMS, -1])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_that_is_not_finite_is_all_that_is_left(dtype, place, special):
    values = np.ones(2 * EXACT_TERMS, dtype)
    values[place] = special
    for part in get_backend("numba").partial_sum(values, BOTH).parts:
        assert part.units == 0
        assert_array_equal(part.special, abs(special))


def test_nan_outweighs_infinity():
    values = np.array([np.inf, np.nan, 1.0])
    assert np.isnan(get_backend("numba").partial_sum(values, BOTH).absolute.special)


@pytest.mark.parametrize("shape", [(37,), (5, 11), (3, 1, 20)])
def test_more_terms_than_words_hold_are_summed_in_parts(monkeypatch, shape):
    monkeypatch.setattr(numba, "MOST_TERMS", 7)
    check(np.random.default_rng(0).normal(size=shape))


def test_shares_of_threads_add_up():
    check(np.random.default_rng(0).normal(size=200_001).astype(np.float32))
    check(np.random.default_rng(0).normal(size=(2, 60_001)).T[::2])


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pickles_are_small_and_equal(dtype, protocol):
    values = np.random.default_rng(0).normal(size=10_000).astype(dtype)
    pair = get_backend("numba").partial_sum(values, BOTH)
    for total, most in ((pair, 200), (pair.absolute, 100), (pair.squares, 110)):
        pickled = pickle.dumps(total, protocol)
        assert pickle.loads(pickled) == total
        assert len(pickled) <= most + 30 * (protocol < 4)
        assert copy.deepcopy(total) == total
    for value in (0.0, np.inf):
        total = get_backend("numba").partial_sum(np.full(3, value, dtype), BOTH)
        assert pickle.loads(pickle.dumps(total, protocol)) == total


@pytest.mark.parametrize(("unit", "count"), [(UNIT, WORDS), (UNWEIGHTED_UNIT, UNWEIGHTED_WORDS)])
def test_words_say_by_their_number_what_they_weigh(unit, count):
    amounts = np.zeros(count + COUNTERS - WORDS, np.int64)
    amounts[[0, 7, count - 1]] = 5, -3, 2
    expected = 5 - 3 * 2 ** (7 * WORD_BITS) + 2 ** ((count - 1) * WORD_BITS + 1)
    found = sum_of_words(amounts, 2, np.dtype(np.float64))
    assert Fraction(found.units) * Fraction(2) ** UNIT == expected * Fraction(2) ** unit
    amounts[count] = 1
    assert sum_of_words(amounts, 2, np.dtype(np.float64)).special == np.inf
    amounts[count + 1] = 1
    assert np.isnan(sum_of_words(amounts, 2, np.dtype(np.float64)).special)
