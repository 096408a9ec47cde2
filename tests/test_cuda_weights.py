"""Weights on a GPU: what is summed, what is written, what is certain, and what that costs.

The backend is called as the rest of the package calls it; an oracle in rational arithmetic says
what must come of it.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from cuda_frames import COMPUTE, compiled, require_headers, source_of
from supported import dtypes

from actreg_dispatch.dtypes import compute_dtype
from actreg_dispatch.norms import NORMS, Norm, signed, sqrt
from actreg_dispatch.options import Constants
from actreg_dispatch.oracle import binary64, root_of, rounded

RATIO = Norm(  # two sums, two passes, λ in the gradient alone
    "weighted_ratio",
    terms=(1, 2),
    penalty=lambda lam, s: lam[0] * (s[0] / sqrt(s[1])),
    coefficients=lambda lam, s: (sqrt(s[1]), s[0] / s[1]),
    gradient=lambda x, lam, c: signed(lam[0], x) / c[0] - lam[0] * (c[1] * x),
)
TESTED = {name: NORMS[name] for name in ("l1", "l2", "l2_squared", "l1_l2_squared")}
TESTED["ratio"] = RATIO
norms = pytest.mark.parametrize("norm", TESTED.values(), ids=TESTED)
of_two_sums = pytest.mark.parametrize(
    "norm", [TESTED["l1_l2_squared"], RATIO], ids=["one pass", "two passes"]
)
wide = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


# The oracle: sums of fractions, and the formulas, written here once more.


def real_of(x):
    return compute_dtype(x.dtype).type


def exact_sums(x, w):
    """Return the sums of w·|x| and w·x², or NaN or infinity; weights of 0 are left out."""
    values, weights = (np.asarray(each, np.float64).ravel() for each in (x, w))
    values, weights = values[weights != 0], weights[weights != 0]
    if not (np.isfinite(weights) & (weights > 0)).all() or np.isnan(values).any():
        return math.nan, math.nan
    if np.isinf(values).any():
        return math.inf, math.inf
    pairs = [
        (abs(Fraction(v)), Fraction(u))
        for v, u in zip(values.tolist(), weights.tolist(), strict=True)
    ]
    return sum((u * v for v, u in pairs), Fraction(0)), sum(
        (u * v * v for v, u in pairs), Fraction(0)
    )


def operation(value):
    """Round the result of an operation: to binary64, or to 53 bits where that has 0 or infinity."""
    if isinstance(value, float):
        return value
    nearest = binary64(value)
    if math.isfinite(nearest) and (nearest or not value):
        return Fraction(nearest)
    return rounded(value, 53)


def root(value):
    return math.sqrt(value) if isinstance(value, float) else operation(root_of(value))


def oracle(x, w, g, norm, lam, epsilon=0.0, scale=1.0):
    """Return the penalty, and what becomes of the gradients."""
    real, kept = real_of(x), np.broadcast_to(np.asarray(w, np.float64) != 0, x.shape)
    w = np.broadcast_to(w, x.shape)
    absolute, squares = (
        each if isinstance(each, float) else rounded(each, 53) for each in exact_sums(x, w)
    )
    total = {"l1": absolute, "l1_l2_squared": absolute, "weighted_ratio": absolute}
    if not total.get(norm.name, squares):
        return real(0), g.copy()
    factors = [Fraction(float(real(each))) for each in lam]

    def times(a, b):
        """Multiply; where one is not finite λ > 0 does not matter."""
        return b if isinstance(b, float) else operation(a * b)

    with np.errstate(all="ignore"):
        values, weights = x.astype(real), w.astype(real)
        strengths = [real(real(each) * real(scale)) * weights for each in lam]
        sign = np.where(values > 0, real(1), np.where(values < 0, real(-1), real(0)))

        def signed_by(strength):
            return np.where(sign == 0, real(0), strength * np.where(sign == 0, real(1), sign))

        def number(value):
            return real(value if isinstance(value, float) else binary64(value))

        if norm.name == "l1":
            size = times(factors[0], absolute)
            step = signed_by(strengths[0])
        elif norm.name == "l2_squared":
            size = times(factors[0], squares)
            step = (strengths[0] + strengths[0]) * values
        elif norm.name == "l1_l2_squared":
            size = number_sum(times(factors[0], absolute), times(factors[1], squares))
            step = signed_by(strengths[0]) + (strengths[1] + strengths[1]) * values
        elif norm.name == "l2":
            size = times(factors[0], root(squares))
            if not isinstance(squares, float) and squares <= Fraction(epsilon):
                return number(size), g.copy()
            step = (strengths[0] * values) / number(root(squares))
        elif isinstance(squares, float):
            size, step = math.nan, np.full_like(values, np.nan)
        else:
            size = times(factors[0], operation(absolute / root(squares)))
            inner = number(operation(absolute / squares))
            step = signed_by(strengths[0]) / number(root(squares)) - strengths[0] * (inner * values)
        updated = g.copy()
        updated[kept] = (g.astype(real) + step).astype(g.dtype)[kept]
        return number(size), updated


def number_sum(a, b):
    if isinstance(a, float) or isinstance(b, float):
        return float(a) + float(b)
    return operation(a + b)


def same(found, expected):
    return (
        np.array_equal(found, expected, equal_nan=True)
        and (np.signbit(found) == np.signbit(expected))[
            ~np.isnan(np.asarray(expected, np.float64))
        ].all()
    )


# What is run, exact from the first or certified first.


class Device:
    """Runs calls of the backend and compares them with the oracle."""

    def __init__(self, cupy, monkeypatch):
        from actreg_dispatch.backends import cuda

        self.cupy, self.backend, self.module = cupy, cuda.BACKEND, cuda
        self.monkeypatch, self.words = monkeypatch, None
        usual = cuda._words

        def kept(*arguments, **options):
            self.words = usual(*arguments, **options)
            return self.words

        monkeypatch.setattr(cuda, "_words", kept)

    def certify(self, from_size=0):
        self.monkeypatch.setattr(self.module, "CERTIFIED_FROM", from_size)

    @property
    def is_certain(self):
        """Whether the last call was certain; if so, no exact sum was taken."""
        words = self.words.get()
        assert words[-1] == 0 or not words[:-1].reshape(-1).any() or len(words) > 300
        return bool(words.reshape(-1, self.counters)[0, -1])

    @property
    def counters(self):
        from actreg_dispatch.backends.cuda.source import counters_of

        return counters_of(weighted=True)

    def on_device(self, w, shape):
        """Return weights as a view of ``shape``."""
        return self.cupy.broadcast_to(self.cupy.asarray(w), shape)

    def check(self, x, w, norm, lam=0.3, g=None, **options):
        """Check every operation on arrays of the host, or of the device, for both ways to sum."""
        there = x if isinstance(x, self.cupy.ndarray) else self.cupy.asarray(x)
        x, w = self.cupy.asnumpy(x), np.asarray(w)
        g = np.random.default_rng(9).normal(size=x.shape).astype(x.dtype) if g is None else g
        real, epsilon = real_of(x), options.pop("epsilon", 0.0)
        lam = (lam,) if norm.n_lams == 1 else (lam, 0.7 * lam)
        lam = tuple(float(real(each)) for each in lam)
        constants = Constants(lam, lam, epsilon)
        expected, updated = oracle(x, w, g, norm, lam, epsilon)
        weights = self.on_device(w, x.shape)
        certain = []
        for certified in (1 << 60, 0):
            self.certify(certified)
            gradients = self.cupy.array(g)
            found = self.backend.apply(there, gradients, norm, constants, weights)
            certain.append(self.is_certain)
            assert found.dtype == real
            assert same(found.get(), expected), (found, expected)
            assert same(gradients.get(), updated)
            found = self.backend.penalty(there, norm, constants, weights)
            assert same(found.get(), expected)
        assert not certain[0]
        return certain[1]


@pytest.fixture
def device(cupy, monkeypatch):
    return Device(cupy, monkeypatch)


def weights_of(kind, shape, dtype, rng):
    """Return weights of a kind, some of them 0, that broadcast to ``shape``."""
    of = {
        "full": shape,
        "per feature": shape[-1:],
        "per token": (*shape[:-1], 1),
        "one": (),
    }[kind]
    w = np.asarray(np.abs(rng.normal(size=of)) + 0.25)
    if w.size > 1:
        w.flat[::3] = 0.0
        w.flat[1] = -0.0
    return (w != 0) if dtype == np.bool_ else w.astype(dtype)


@norms
@dtypes
@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("full", "own"),
        ("full", "bool"),
        ("per feature", "T"),
        ("per token", "bool"),
        ("one", "own"),
    ],
)
def test_sums_and_gradients_are_weighted(device, norm, dtype, of, kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4, 7)).astype(dtype)
    w = weights_of(kind, x.shape, {"own": dtype, "T": real_of(x), "bool": np.bool_}[of], rng)
    assert device.check(x, w, norm)


@norms
def test_weights_of_1_and_true_have_the_bits_of_none(device, norm):
    rng = np.random.default_rng(1)
    x, g = rng.normal(size=(2, 300)).astype(np.float32)
    constants = Constants((0.25,) * norm.n_lams, (0.5,) * norm.n_lams, 0.0)
    there = device.cupy.asarray(x)
    for certified in (1 << 60, 0):
        device.certify(certified)
        found = []
        for w in (None, np.float32(1), np.True_, np.ones(300, np.float32)):
            weights = None if w is None else device.on_device(w, x.shape)
            gradients = device.cupy.array(g)
            penalty = device.backend.apply(there, gradients, norm, constants, weights)
            found.append((penalty.get().tobytes(), gradients.get().tobytes()))
        assert len(set(found)) == 1


@of_two_sums
@pytest.mark.parametrize("layout", ["transposed", "reversed", "every other", "columns"])
@pytest.mark.parametrize("kind", ["full", "per feature", "per token"])
def test_arrays_of_any_layout(device, norm, layout, kind):
    cupy, rng = device.cupy, np.random.default_rng(2)
    view = {
        "transposed": lambda a: a.transpose(2, 0, 1),
        "reversed": lambda a: a[::-1, :, ::-1],
        "every other": lambda a: a[::2, 1::2],
        "columns": lambda a: a[..., 1:3],
    }[layout]
    x, g = (view(cupy.asarray(rng.normal(size=(4, 6, 5)).astype(np.float32))) for _ in range(2))
    w = weights_of(kind, x.shape, np.float32, rng)
    constants = Constants((0.25,) * norm.n_lams, (0.5,) * norm.n_lams, 0.0)
    for certified in (1 << 60, 0):
        device.certify(certified)
        before = g.get()
        expected, updated = oracle(x.get(), w, before, norm, constants.lam, scale=2.0)
        weights = device.on_device(w, x.shape)
        found = device.backend.apply(x, g, norm, constants, weights)
        assert same(found.get(), expected)
        assert same(g.get(), updated)


def test_broadcast_weights_are_never_expanded(cupy):
    from actreg_dispatch.layout import collapse

    x, w = cupy.ones((6, 5, 4), np.float32), cupy.ones(4, np.float32)
    for narrow, shape in ((w, (30, 4)), (w[0], (120,)), (w[:1, None, None], (120,))):
        views = collapse(cupy.broadcast_to(narrow, x.shape), x, x)
        assert [view.shape for view in views] == [shape] * 3
        assert views[0].data.ptr == w.data.ptr
        assert views[0].strides[0] == 0


# What is left out.


@norms
@dtypes
@pytest.mark.parametrize("zero", [-0.0, False])
def test_an_element_of_weight_0_is_left_alone_whatever_it_holds(device, norm, dtype, zero):
    rng = np.random.default_rng(3)
    x, g = rng.normal(size=(2, 40)).astype(dtype)
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[x.itemsize]
    w = np.ones(40, np.bool_ if zero is False else dtype)
    w[10:14] = zero
    x[10:14] = math.nan, math.inf, -math.inf, 1.0
    signaling = (g.view(bits) * 0 + np.array(math.inf, dtype).view(bits)) | bits(1)
    g[10:12] = signaling[10:12].view(dtype)
    g[12] = -0.0
    lam = tuple(float(real_of(x)(0.3)) for _ in range(norm.n_lams))
    expected, updated = oracle(x, w, g, norm, lam)
    weights = device.on_device(w, x.shape)
    for certified in (1 << 60, 0):
        device.certify(certified)
        gradients = device.cupy.array(g)
        constants = Constants(lam, lam, 0.0)
        found = device.backend.apply(device.cupy.asarray(x), gradients, norm, constants, weights)
        assert device.is_certain == (certified == 0)
        assert same(found.get(), expected)
        assert gradients.get()[:10].tobytes() == updated[:10].tobytes()
        assert gradients.get()[10:14].tobytes() == g[10:14].tobytes()  # NaN has its bits, too
        assert gradients.get()[14:].tobytes() == updated[14:].tobytes()
    unbounded = Constants(lam, (math.inf,) * norm.n_lams, 0.0)
    gradients = device.cupy.array(g)
    device.backend.apply(device.cupy.asarray(x), gradients, norm, unbounded, weights)
    assert gradients.get()[10:14].tobytes() == g[10:14].tobytes()


@norms
@dtypes
def test_weights_that_are_all_0_leave_nothing(device, norm, dtype):
    x = np.array([1.0, math.nan, math.inf, -2.0], dtype)
    for w in (np.zeros(4, dtype), np.zeros(4, np.bool_), np.array(-0.0, dtype)):
        device.check(x, w, norm)


@norms
@dtypes
@pytest.mark.parametrize("bad", [-1e-30, math.inf, math.nan])
def test_a_bad_weight_makes_the_penalty_nan(device, norm, dtype, bad):
    bad = {-1e-30: -float(ml_dtypes.finfo(dtype).smallest_subnormal)}.get(bad, bad)
    constants = Constants((0.25,) * norm.n_lams, (0.5,) * norm.n_lams, 0.0)
    for at_bad in (0.0, -3.0, math.inf):
        x, w = np.ones(40, dtype), np.ones(40, dtype)
        x[7], w[7] = at_bad, bad
        there, weights = device.cupy.asarray(x), device.cupy.asarray(w)
        for certified in (1 << 60, 0):
            device.certify(certified)
            assert math.isnan(device.backend.penalty(there, norm, constants, weights))
            g = device.cupy.zeros_like(there)
            assert math.isnan(device.backend.apply(there, g, norm, constants, weights))
        total = device.backend.partial_sum(there, norm, weights)
        assert all(math.isnan(part.special) for part in total.parts)


# Extremes, where a product or its error is not a number of T, and ties.


@of_two_sums
@pytest.mark.parametrize("weight", [1e-45, 1e-30, 3e7, 3e38])
@pytest.mark.parametrize("unit", [1e-45, 1e-20, 1.0, 1e18, 1e38])
def test_any_magnitude_of_float32(device, norm, unit, weight):
    x = (np.array([3.0, -1.0, 0.5, 0.0, 1.25, -2.0]) * unit).astype(np.float32)
    w = (np.array([1.0, 0.3, 0.7, 1.0, 0.9, 0.0]) * weight).astype(np.float32)
    device.check(x, w, norm, lam=1e-3)
    device.check(np.append(x, np.float32(1)), np.append(w, np.float32(1)), norm, lam=1e-3)


@of_two_sums
@pytest.mark.parametrize("weight", [5e-324, 1e-200, 1e31, 1e300])
@pytest.mark.parametrize("unit", [5e-324, 1e-150, 1.0, 1e150, 1e300])
def test_any_magnitude_of_float64(device, norm, unit, weight):
    x = np.array([3.0, -1.0, 0.5, 0.0, 1.25, -2.0]) * unit
    w = np.array([1.0, 0.3, 0.7, 1.0, 0.9, 0.0]) * weight
    device.check(x, w, norm, lam=1e-3)
    device.check(np.append(x, 1.0), np.append(w, 1.0), norm, lam=1e-3)


@dtypes
def test_partial_sums_are_exact_whatever_the_magnitudes(device, dtype):
    rng, size = np.random.default_rng(4), 400
    powers = {np.float16: (-24, 15), np.float64: (-1074, 1020)}.get(dtype, (-130, 125))
    with np.errstate(all="ignore"):
        x, w = (
            (rng.uniform(1, 2, size) * np.exp2(rng.uniform(*powers, size))).astype(dtype)
            for _ in range(2)
        )
    x *= rng.choice([1, -1], size).astype(dtype)
    w[::17], x[::17] = 0, np.nan
    real = compute_dtype(x.dtype)
    for weights in (w, w.astype(real), w.astype(np.float64) > 1, w[:1]):
        expected = exact_sums(x, np.broadcast_to(weights, x.shape))
        if isinstance(expected[0], float):  # a broadcast weight that meets NaN
            continue
        there = device.on_device(weights, x.shape)
        total = device.backend.partial_sum(device.cupy.asarray(x), RATIO, there)
        assert [Fraction(part.units, 1 << 3222) for part in total.parts] == list(expected)
        assert total.parts[0].dtype == real


@wide
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_what_is_near_a_tie_takes_the_exact_sum(device, dtype, off):
    """A sum of 1 + 2⁻²⁴ or 1 + 2⁻⁵³, half a unit, or a little less or more."""
    half, last = (24, 30) if dtype == np.float32 else (53, 60)
    middle = half // 2 + 1
    x = np.array([1.0, 2.0**-middle, 2.0**-last], dtype)
    w = np.array([1.0, 2.0 ** (2 * middle - half), max(off, 0)], dtype)
    if off < 0:
        w[1] = np.nextafter(w[1], dtype(0))
    assert not device.check(x, w, TESTED["l2_squared"], lam=1.0)
    x = np.array([1.0, 0.5, 2.0 ** (-2 * last)], dtype)
    w = np.array([1.0, 2.0 ** (1 - half), max(off, 0)], dtype)
    if off < 0:
        w[1] = np.nextafter(w[1], dtype(0))
    assert not device.check(x, w, TESTED["l1"], lam=1.0)


@wide
@norms
def test_products_of_full_significands_lose_nothing(device, norm, dtype):
    """The exact kernels' partial sums too, next to which a certified one may be off a little."""
    rng = np.random.default_rng(5)
    for size in (1, 2, 3, 9, 100, 700):
        x, w = rng.normal(size=size).astype(dtype), rng.uniform(0, 4, size).astype(dtype)
        device.check(x, w, norm)
        device.check(-x, w[:1], norm, lam=1.0)


@norms
@pytest.mark.parametrize("limit", [2.0**20, 2.0**100], ids=["float32", "float64"])
def test_weights_are_certified_up_to_a_limit(device, norm, limit):
    dtype = np.float32 if limit < 1e30 else np.float64
    x, below = np.array([1.25, 3.0, 0.7], dtype), np.nextafter(dtype(limit), dtype(0))
    assert device.check(x, np.array([1.5, below, 1.0], dtype), norm)
    assert not device.check(x, np.array([1.5, limit, 1.0], dtype), norm)


@norms
@wide
def test_a_weighted_sum_is_within_its_bound(device, norm, dtype):
    """Of elements of several blocks and groups, one of them after the last whole one."""
    size, rng, partials = 9_003, np.random.default_rng(6), []
    usual = device.module._partials

    def kept(*arguments):
        partials[:] = [usual(*arguments)]
        return partials[0]

    device.monkeypatch.setattr(device.module, "_partials", kept)
    device.certify()
    constants = Constants((0.25,) * norm.n_lams, (0.25,) * norm.n_lams, 0.0)
    for x in (np.full(size, 1 / 3), rng.normal(size=size) * 2.0 ** rng.uniform(-20, 20, size)):
        x, w = x.astype(dtype), rng.uniform(0, 3, size).astype(dtype)
        device.backend.penalty(
            *map(device.cupy.asarray, (x,)), norm, constants, device.cupy.asarray(w)
        )
        pairs = partials[0].get().reshape(-1, len(norm.terms), 2)
        bound = 2.0**-38 if dtype == np.float32 else 2.0**-104 * (size / 2**18 + 128) ** 2
        sums = dict(zip((1, 2), exact_sums(x, w), strict=True))
        for k, term in enumerate(norm.terms):
            found = sum(Fraction(each) for each in pairs[:, k].ravel().tolist())
            assert abs(found - sums[term]) <= bound * sums[term]


@of_two_sums
@pytest.mark.parametrize("of", [np.float32, np.bool_])
def test_an_array_large_enough_to_be_certified(device, norm, of):
    rng = np.random.default_rng(7)
    x, g = rng.normal(size=(2, 300, 219)).astype(np.float32)
    w = (
        rng.uniform(-1, 3, 219).clip(0) if of == np.float32 else rng.random((300, 1)) > 0.4
    ).astype(of)
    lam = (0.25,) * norm.n_lams
    expected, updated = oracle(x, w, g, norm, lam)
    there, gradients = device.cupy.asarray(x), device.cupy.asarray(g)
    weights, constants = device.on_device(w, x.shape), Constants(lam, lam, 0.0)
    found = device.backend.apply(there, gradients, norm, constants, weights)
    assert device.is_certain
    assert same(found.get(), expected)
    assert same(gradients.get(), updated)


# The other operations.


@norms
@dtypes
def test_a_gradient_can_be_added_or_written_alone(device, norm, dtype):
    rng = np.random.default_rng(8)
    x, g = rng.normal(size=(2, 6, 5)).astype(dtype)
    w = rng.uniform(-1, 3, 5).clip(0).astype(dtype)
    x[:, 0], w[0] = math.nan, 0.0
    real, lam = real_of(x), (0.25,) * norm.n_lams
    constants, weights = Constants(lam, lam, 0.0), device.on_device(w, x.shape)
    there = device.cupy.asarray(x)
    absolute, squares = exact_sums(x, np.broadcast_to(w, x.shape))
    coefficients = {
        "l2": (root(rounded(squares, 53)),),
        RATIO.name: (
            root(rounded(squares, 53)),
            operation(rounded(absolute, 53) / rounded(squares, 53)),
        ),
    }.get(norm.name, ())
    coefficients = tuple(float(real(binary64(each))) for each in coefficients)
    known = norm, constants, coefficients, weights
    for old in (g, np.zeros_like(g)):
        expected, updated = oracle(x, w, old, norm, lam)
        added = device.cupy.array(old)
        device.backend.add_gradient(there, added, *known)
        assert same(added.get(), updated)
    written = device.cupy.array(g)
    device.backend.set_gradient(there, written, *known)
    assert same(written.get(), updated)
    written = device.cupy.array(g)
    assert device.backend.overwrite(there, written, norm, constants, weights) == expected
    assert same(written.get(), updated)


@norms
@dtypes
@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_arrays_without_elements_or_axes(device, norm, dtype, shape):
    x = np.full(shape, -1.5, dtype)
    device.check(x, np.full(shape, 2.0, dtype), norm, g=np.zeros(shape, dtype))
    device.check(x, np.array(True), norm, g=np.zeros(shape, dtype))
    total = device.backend.partial_sum(
        device.cupy.asarray(x), norm, device.on_device(np.ones((), dtype), shape)
    )
    assert [part.units == 0 for part in total.parts] == [x.size == 0] * len(norm.terms)


def test_a_subnormal_product_of_lambda_and_weight_stays(device):
    """CuPy's compiler would flush it to 0."""
    x, w = np.array([1.0, -1.0], np.float32), np.array([2.0**-100, 3 * 2.0**-126], np.float32)
    lam = 2.0**-23
    assert oracle(x, w, np.zeros(2, np.float32), TESTED["l1"], (lam,))[1].all()
    device.check(x, w, TESTED["l1"], lam=lam, g=np.zeros(2, np.float32))
    device.check(x, np.float32(1e-42), TESTED["l1"], lam=lam, g=np.zeros(2, np.float32))


@norms
def test_indices_have_64_bits(cupy, norm):
    """Rows 2**31 elements apart, of views that are larger than any memory; few are visited."""
    from actreg_dispatch.backends.cuda.kernels import kernels_of
    from actreg_dispatch.backends.cuda.source import counters_of

    threads, far = 256, 2**31
    rng = np.random.default_rng(0)
    values, weights = rng.uniform(1, 2, size=(2, 3, threads)).astype(np.float32)
    rows, room, narrow = (cupy.asarray(each) for each in (values, 0 * values, weights))
    stretched = cupy.lib.stride_tricks.as_strided
    x, g, w = (stretched(each, (3, far), each.strides) for each in (rows, room, narrow))
    kernels = kernels_of(norm, weighted=True)
    words = cupy.zeros(len(norm.terms) * counters_of(weighted=True), np.int64)
    grid = {"size": threads, "block_size": threads}
    kernels.sum(x, 3 * far, far, w, words, **grid)
    found = words.get()
    words[...] = 0
    kernels.sum(rows, values.size, threads, narrow, words, **grid)
    assert np.array_equal(found, words.get())
    two = [cupy.asarray(2.0, np.float32)] * norm.n_coefficients
    lam = (0.5,) * norm.n_lams
    kernels.update(
        x, 3 * far, far, w, *lam, *two, *[cupy.ones((), bool)] * norm.two_pass, g, **grid
    )
    step = norm.gradient(
        values, tuple(np.float32(0.5) * weights for _ in lam), (np.float32(2),) * len(two)
    )
    assert np.array_equal(room.get(), step)


# What they compile to, and what they cost.


def weighted_kernels():
    from actreg_dispatch.backends.cuda.counting import counting_kernels
    from actreg_dispatch.backends.cuda.kernels import kernels_of

    found = {each.name: each for each in counting_kernels(weighted=True) if each is not None}
    for norm in TESTED.values():
        plain = kernels_of(norm)
        for kernel in kernels_of(norm, weighted=True):
            if kernel is not None and kernel not in plain:
                found[kernel.name] = kernel
    return found


def test_calls_without_weights_have_kernels_of_their_own():
    from actreg_dispatch.backends.cuda.kernels import kernels_of

    names = {kernel.name for kernel in kernels_of(TESTED["l1"]) if kernel is not None}
    assert not any("weighted" in name for name in names)
    of_weights = weighted_kernels()
    assert all(name.startswith("actreg_weighted_") for name in of_weights)
    assert {"sum_1", "sum_certified_1_2", "apply_l1", "update_l2", "certify_l2", "count"} <= {
        name.removeprefix("actreg_weighted_") for name in of_weights
    }


@pytest.mark.parametrize("architecture", [75, 120])
@pytest.mark.parametrize("dtype", COMPUTE)
def test_every_weighted_kernel_compiles(request, dtype, architecture):
    require_headers(request)
    ptx = compiled(source_of({dtype: weighted_kernels()}, weighted=True), architecture)
    ours = re.compile("// begin inline asm.*?// end inline asm", re.DOTALL)
    assert "fma.rn.f32" not in ours.sub("", ptx)
    assert ".ftz" not in ptx


# What an element costs, in issues to binary64 units and in all, and in bytes, is the difference of
# two sizes whose blocks have as much to do as those of large arrays.
FEW, MANY = 5 * 16_384, 10 * 16_384
PROFILE = """
import cupy, numpy as np
from actreg_dispatch.backends.cuda import BACKEND, kernels
from actreg_dispatch.norms import NORMS
from actreg_dispatch.options import Constants

kernels.FEW_BLOCKS = 1
rng = np.random.default_rng(0)
for dtype in ("float16", "float32", "float64"):
    for size in (FEW, MANY):
        x = cupy.asarray(rng.normal(size=(size // 64, 64)).astype(dtype))
        g, own = cupy.zeros_like(x), cupy.ones_like(x)
        weights = {"none": None, "full": own, "bool": own.astype(bool)}
        weights["per feature"] = cupy.broadcast_to(own[0], x.shape)
        for kind, w in weights.items():
            for name in ("l1", "l2", "l2_squared"):
                norm = NORMS[name]
                numbers = Constants((0.5,) * norm.n_lams, (0.5,) * norm.n_lams, 0.0)
                call = f"{name} {dtype} {kind} {size}"
                record(f"apply {call}", lambda: BACKEND.apply(x, g, norm, numbers, w))
                record(f"penalty {call}", lambda: BACKEND.penalty(x, norm, numbers, w))
"""


@pytest.fixture(scope="module")
def profile(profiled):
    return profiled(f"FEW, MANY = {FEW}, {MANY}\n{PROFILE}")


def cost_of(events):
    """Return what an element costs: issues to binary64 units, in all, and bytes."""

    def total(call):
        issues = [event["issues"] for event in call]
        return np.array(
            [
                32 * sum(each["f64"] for each in issues),
                32 * sum(sum(each.values()) for each in issues),
                sum(event["loaded"] + event["stored"] for event in call),
            ]
        )

    few, many = map(total, events)
    return (many - few) / (MANY - FEW)


@pytest.mark.parametrize("operation", ["apply", "penalty"])
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["full", "bool", "per feature"])
def test_what_weights_cost_has_a_budget(profile, operation, norm, dtype, kind):
    """A weighted pass has no vectors, which is most of it; broadcast weights take a division."""
    plain, events = (
        [profile[f"{operation} {norm} {dtype} {each} {size}"] for size in (FEW, MANY)]
        for each in ("none", kind)
    )
    assert [event for call in events for event in call if "launch" not in event] == []
    assert [len(call) for call in events] == [len(call) for call in plain]
    passes = 1 + (operation == "apply" and norm == "l2")
    binary64, issues, moved = (cost_of(events) - cost_of(plain)) / passes
    itemsize = 1 if kind == "bool" else np.dtype(dtype).itemsize
    assert moved == pytest.approx(itemsize, rel=0.01)  # and what is broadcast is in a cache
    assert binary64 <= (7.1 if dtype == "float64" else 0.9)
    assert issues <= 28.5 + 7.5 * (kind == "per feature")
