"""Sums that a CUDA device certifies: their bounds, when they are certain, and what follows if not.

Here every sum is certified first, however few its elements; the results must be the reference's.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from supported import dtypes

from actreg_dispatch import ActivityRegularization
from actreg_dispatch import norms as norms_module
from actreg_dispatch.norms import NORMS, Norm, signed, sqrt

norms = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture
def device(cupy, monkeypatch):
    """Return what runs a call on the device and compares it with the reference."""
    return Device(cupy, monkeypatch)


class Device:
    """Runs calls whose sums are certified first, and knows what became of the last."""

    def __init__(self, cupy, monkeypatch):
        from actreg_dispatch.backends import cuda
        from actreg_dispatch.backends.cuda.source import counters_of

        self.cupy, self.counters, self.kept = cupy, counters_of(weighted=False), {}
        self.is_summing_anything, self.all_words = True, []
        monkeypatch.setattr(cuda, "CERTIFIED_FROM", 0)
        for name in ("_words", "_partials"):
            monkeypatch.setattr(cuda, name, self.keeping(name, getattr(cuda, name)))

    def keeping(self, name, make):
        def made(*arguments, **options):
            self.kept[name] = make(*arguments, **options)
            self.all_words += [self.kept[name]] * (name == "_words")
            return self.kept[name]

        return made

    @property
    def is_certain(self):
        """Whether the last call was certain; if not, and only then, the exact sum was taken."""
        words = self.kept["_words"].get().reshape(-1, self.counters)
        certain = bool(words[0, -1])
        assert words[:, :-1].any() != certain or not self.is_summing_anything
        return certain

    def check(self, x, norm, lam=0.25, g=None, **options):
        """Check penalty and update against the reference, and return whether they were certain."""
        reg = ActivityRegularization(lam, norm, **options)
        g = np.ones_like(x) if g is None else g
        updated = g.copy()
        with np.errstate(all="ignore"):
            expected = ActivityRegularization(lam, norm, backend="numpy", **options).apply(
                x, updated
            )
        self.is_summing_anything = bool((x != 0).any())
        there, gradients = self.cupy.asarray(x), self.cupy.asarray(g)
        penalty = reg.apply(there, gradients)
        np.testing.assert_array_equal(penalty.get(), expected)
        assert np.array_equal(gradients.get(), updated, equal_nan=True)
        certain = self.is_certain
        np.testing.assert_array_equal(reg.penalty(there).get(), expected)
        assert self.is_certain == certain
        return certain


def exactly(values, power=1):
    return sum(abs(Fraction(float(value))) ** power for value in values)


def spread(rng, size, dtype):
    """Return values of many magnitudes, in float32 from 2⁻³⁰ to 2³⁰."""
    powers = 5 if dtype == np.float16 else 30
    return (rng.normal(size=size) * 2.0 ** rng.uniform(-powers, powers, size)).astype(dtype)


@dtypes
@pytest.mark.parametrize("norm", ["l1", "l2", "hoyer"])
@pytest.mark.parametrize("kind", ["equal", "normal", "spread", "rising", "falling", "huge first"])
def test_a_sum_is_within_its_bound(device, norm, dtype, kind):
    size = 9_007  # elements of 3 blocks, before and after whole vectors too
    rng = np.random.default_rng(0)
    x = {
        "equal": lambda: np.full(size, 1 / 3),
        "normal": lambda: rng.normal(size=size),
        "spread": lambda: spread(rng, size, dtype),
        "rising": lambda: np.sort(np.abs(spread(rng, size, dtype))),
        "falling": lambda: np.sort(np.abs(spread(rng, size, dtype)))[::-1],
        "huge first": lambda: np.r_[100.0, rng.uniform(0.5, 1, size - 1) * 2.0**-10],
    }[kind]()
    x = np.asarray(x).astype(dtype)[3:]
    room = device.cupy.zeros(size, dtype)[3:]
    room[...] = device.cupy.asarray(x)
    ActivityRegularization(0.25, norm).penalty(room)
    terms = NORMS[norm].terms
    pairs = device.kept["_partials"].get().reshape(-1, len(terms), 2)
    for k, term in enumerate(terms):
        total = exactly(x, term)
        found = sum(Fraction(value) for value in pairs[:, k].ravel().tolist())
        off = abs(found - total) / total
        bound = 2.0**-38 + 2.0**-70 * size
        if dtype == np.float64:
            bound = 2.0**-104 * (size / 2**18 + 128) ** 2
        assert off <= bound
        if kind == "equal" and term == 1:
            assert off <= 2.0**-50  # where nothing is lost but in binary64


@norms
@dtypes
def test_what_is_usual_is_certain(device, norm, dtype):
    rng = np.random.default_rng(1)
    for size in (100, 3000):
        found = [device.check(rng.normal(size=size).astype(dtype), norm) for _ in range(4)]
        assert sum(found) >= 3


@dtypes
@pytest.mark.parametrize("norm", ["l1", "l2", "l1_l2_squared"])
def test_the_first_and_last_elements_count_wherever_an_array_begins(device, norm, dtype):
    """Vectors are of 2 to 8 elements; what is not part of one is done apart."""
    rng = np.random.default_rng(2)
    per_vector = 16 // np.dtype(dtype).itemsize
    for size in (1, per_vector - 1, per_vector, 2 * per_vector + 1, 5 * per_vector - 1):
        for start in range(per_vector):
            x = rng.normal(size=size).astype(dtype)
            g = rng.normal(size=size).astype(dtype)
            updated = g.copy()
            expected = ActivityRegularization(0.5, norm, backend="numpy").apply(x, updated)
            for g_start in {start, 0}:  # and where the two differ
                rooms = device.cupy.full((2, size + 2 * per_vector), 7, dtype)
                there = rooms[0, start : start + size]
                gradients = rooms[1, g_start : g_start + size]
                there[...], gradients[...] = device.cupy.asarray(x), device.cupy.asarray(g)
                found = ActivityRegularization(0.5, norm).apply(there, gradients)
                assert found.get() == expected
                assert gradients.get().tobytes() == updated.tobytes()
                untouched = rooms[1].get()
                untouched[g_start : g_start + size] = 7
                assert (untouched == 7).all()


# Close to a rounding boundary of float32 or float64, and on it, with λ = 1: sums of 2²⁴ or 2⁵³ and
# an odd number.

HUGE = {
    (np.float32, "l1"): [2.0**24],
    (np.float32, "l2_squared"): [2.0**11] * 4,
    (np.float64, "l1"): [2.0**53],
    (np.float64, "l2_squared"): [2.0**26] * 2,
}


@pytest.mark.parametrize(("dtype", "norm"), HUGE)
@pytest.mark.parametrize("odd", [1, 3])
def test_what_is_near_a_tie_takes_the_exact_sum(device, dtype, norm, odd):
    root = math.sqrt if norm == "l2_squared" else float

    def is_certain(off):
        """Check a sum that is so far from the tie."""
        last = [1.0] if off == 0 else [1.0, root(off)] if off > 0 else [root(1 + off)]
        x = np.array([*HUGE[dtype, norm], *[1.0] * (odd - 1), *last], dtype)
        return device.check(x, norm, lam=1.0)

    near = 2.0**-16 if dtype == np.float32 else 2.0**-40
    assert not is_certain(0.0)
    assert not is_certain(near)
    assert not is_certain(-near)
    assert is_certain(2.0**-6)
    assert is_certain(-(2.0**-6))


@dtypes
@norms
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_takes_the_exact_sum_wherever_it_is(device, norm, dtype, value):
    for size in (1, 37):
        for place in {0, size // 2, size - 1}:
            x = np.random.default_rng(3).normal(size=size).astype(dtype)
            x[place] = value
            assert not device.check(x, norm)


@pytest.fixture
def registered(monkeypatch):
    """Return what registers a norm for one test."""
    monkeypatch.setattr(norms_module, "NORMS", dict(NORMS))
    return lambda *arguments, **options: norms_module.register_norm(Norm(*arguments, **options))


def test_a_sum_that_guards_and_nothing_else_must_be_finite(device, registered):
    registered(
        "guarded",
        terms=(1, 2),
        penalty=lambda lam, s: lam[0] * s[0],
        gradient=lambda x, lam, c: signed(lam[0], x),
        guard=lambda s, epsilon: s[1] > epsilon,
    )
    assert not device.check(np.array([1e200, -1e200]), "guarded")


@pytest.mark.parametrize("last", [[2.0**-24], [2.0**-24, 2.0**-40]], ids=["below", "above"])
def test_both_mixed_corners_of_two_sums_count(device, registered, last):
    """The ratio is just below or above a tie, which the same ends of both sums do not tell."""
    registered(
        "ratio",
        terms=(1, 2),
        penalty=lambda lam, s: lam[0] * (s[0] / s[1]),
        gradient=lambda x, lam, c: signed(lam[0], x),
    )
    assert not device.check(np.array([1.0, *last], np.float32), "ratio", lam=1.0)


def test_subnormal_results_are_told_apart(device):
    """λ makes a penalty of two or three times the smallest number of a sum that is near the tie."""
    x, lam = np.array([1.0, 1.5, 2.0**-40], np.float32), 2.0**-149
    for values in (x, x[:2], np.array([1.0, 1.5 - 2.0**-20], np.float32)):
        near = values.sum(dtype=np.float64) - 2.5
        certain = device.check(values, "l1", lam=lam)
        assert certain == (abs(near) > 2.0**-30)


def test_a_sum_that_may_overflow_when_rounded_is_not_certain(device, registered):
    """It rounds to 2**1024, whose root of a square is finite if nothing overflows on the way."""
    registered(
        "root",
        terms=(1,),
        penalty=lambda lam, s: lam[0] * sqrt(s[0] * s[0]),
        gradient=lambda x, lam, c: signed(lam[0], x),
    )
    x = np.array([np.finfo(np.float64).max, 2.0**969, 2.0**969])
    assert not device.check(x, "root", lam=0.25)


def test_the_sign_of_a_zero_must_be_certain(device, registered):
    registered(
        "difference",
        terms=(1, 2),
        penalty=lambda lam, s: lam[0] * s[0],
        coefficients=lambda lam, s: (lam[0] * (s[0] - s[1]),),
        gradient=lambda x, lam, c: c[0] * x,
    )
    assert not device.check(np.ones(9, np.float32), "difference", lam=0.0)


def test_zeros_have_no_penalty_whatever_the_formula(device, registered):
    registered(
        "offset",
        terms=(1,),
        penalty=lambda lam, s: lam[0] * (lam[0] + s[0]),
        gradient=lambda x, lam, c: signed(lam[0], x),
    )
    assert device.check(np.zeros(9), "offset")
    assert device.check(np.ones(9), "offset")


@norms
@pytest.mark.parametrize("unit", [1e-200, 1e-150, 1e150, 1e200, 5e-324, 1e308])
def test_any_magnitude_of_float64(device, norm, unit):
    with np.errstate(over="ignore"):
        x = np.array([3.0, -1.0, 0.5, 0.0] * 5) * unit
    device.check(x, norm, lam=1e-3)
    device.check(np.append(x, 1.0), norm, lam=1e-3)  # with one that is far larger, or smaller


@norms
@pytest.mark.parametrize("unit", [1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e20, 1e30, 1e38])
def test_any_magnitude_of_float32(device, norm, unit):
    with np.errstate(over="ignore"):
        x = (np.array([3.0, -1.0, 0.5, 0.0] * 5) * unit).astype(np.float32)
    device.check(x, norm, lam=1e-3)
    device.check(np.append(x, np.float32(1.0)), norm, lam=1e-3)


def test_squares_that_lose_bits_below_the_smallest_number_are_not_certain(device):
    x = np.full(100, 1e-22, np.float32)
    assert not device.check(x, "l2_squared")
    assert device.check(x, "l1")
    x = np.full(100, 1e-160)
    assert not device.check(x, "l2_squared")
    assert device.check(x, "l1")


@norms
@dtypes
def test_zeros_add_nothing(device, norm, dtype):
    certain = device.check(np.zeros(50, dtype), norm)
    assert certain == (NORMS[norm].terms == (1,))


def test_layers_are_certain_each_for_itself(device):
    """The second is on a tie, so that it alone takes the exact sum."""
    rng, cupy = np.random.default_rng(4), device.cupy
    xs = [rng.normal(size=n).astype(np.float32) for n in (5000, 2, 0, 70)]
    xs[1][:] = 2.0**24, 1.0
    for norm in NORMS:
        gs = [rng.normal(size=x.size).astype(np.float32) for x in xs]
        expected = [g.copy() for g in gs]
        lam = 1.0 if NORMS[norm].n_lams == 1 else (1.0, 0.0)
        _, layers = ActivityRegularization(lam, norm, backend="numpy").apply_all(xs, expected)
        there = [cupy.asarray(g) for g in gs]
        found = ActivityRegularization(lam, norm).apply_all([*map(cupy.asarray, xs)], there)
        assert [p.get() for p in found.layers] == layers
        assert [g.get().tobytes() for g in there] == [g.tobytes() for g in expected]
        (words,) = (each for each in device.all_words if each.size > 3 * device.counters)
        device.all_words.clear()
        words = words.get().reshape(4, -1, device.counters)
        certain = [bool(each) for each in words[:, 0, -1]]
        if norm == "l1":
            assert certain == [True, False, True, True]
        for k in (0, 1, 3):
            assert words[k, :, :-1].any() != certain[k]
