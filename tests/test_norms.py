"""What a norm is, and that one from outside the package works on every route."""

from __future__ import annotations

import copy
import json
import pickle
from fractions import Fraction

import dask
import dask.array as da
import numpy as np
import pytest
from numpy.testing import assert_allclose

from actreg_dispatch import (
    ActivityRegularization,
    files,
    get_backend,
    norms,
    register_norm,
    warmup,
)
from actreg_dispatch.cli import main
from actreg_dispatch.norms import NORMS, Norm, signed, sqrt
from actreg_dispatch.oracle import binary64, root_of, rounded

# PyTorch scripts its own formulas of forward-mode AD
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


# Norms that the package does not have, and the same in exact arithmetic.


ELASTIC = Norm(  # one pass, one λ for both sums
    "elastic",
    terms=(1, 2),
    penalty=lambda lam, s: lam[0] * (s[0] + s[1]),
    gradient=lambda x, lam, c: signed(lam[0], x) + (lam[0] + lam[0]) * x,
)
SPARSE_GROUP = Norm(  # two passes, two λ: the sparse group lasso, λ₁·Σ|x| + λ₂·‖x‖
    "sparse_group",
    terms=(1, 2),
    penalty=lambda lam, s: lam[0] * s[0] + lam[1] * sqrt(s[1]),
    coefficients=lambda lam, s: (sqrt(s[1]),),
    gradient=lambda x, lam, c: signed(lam[0], x) + (lam[1] * x) / c[0],
)
LAMS = {"elastic": 0.1, "sparse_group": (0.1, 0.3)}


def double(value):
    return Fraction(binary64(value))


def exact(name, activations, gradients, scale=1.0):
    """Return the penalty and the updated gradients, of sums and operations in fractions."""
    real = np.float64 if activations.dtype == np.float64 else np.float32
    x = activations.astype(real)
    magnitudes = [Fraction(abs(float(value))) for value in x.ravel()]
    total, squares = rounded(sum(magnitudes), 53), rounded(sum(m * m for m in magnitudes), 53)
    lam = [float(real(each)) for each in np.atleast_1d(LAMS[name])]
    steps = [real(each * scale) for each in np.atleast_1d(LAMS[name])]
    sign, first = np.sign(x), Fraction(lam[0])
    if name == "elastic":
        size = first * double(total + squares)
        added = steps[0] * sign + (steps[0] * real(2)) * x
    else:
        root = binary64(root_of(squares)) if squares else 0.0
        size = double(first * total) + double(Fraction(lam[1]) * Fraction(root))
        added = steps[0] * sign + (steps[1] * x) / real(root or 1.0)
    updated = (gradients.astype(real) + added).astype(gradients.dtype)
    return real(binary64(size)), updated


def expression(name, x, magnitude, root):
    """Return the penalty of ``x`` as a library's own expression."""
    total, squares = magnitude(x).sum(), (x * x).sum()
    if name == "elastic":
        return 0.1 * (total + squares)
    return 0.1 * total + 0.3 * root(squares)


def bits(*arrays):
    return [np.asarray(array).tobytes() for array in arrays]


def values_of(*shape, dtype=np.float64, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return np.where(np.abs(values) < 0.3, 0.0, values).astype(dtype)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    for norm in (ELASTIC, SPARSE_GROUP):
        assert register_norm(norm) is norm
    yield
    for norm in (ELASTIC, SPARSE_GROUP):
        del NORMS[norm.name]


each_norm = pytest.mark.parametrize("name", LAMS)
each_dtype = pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])


def regularization(name, **options):
    return ActivityRegularization(LAMS[name], name, **options)


# On arrays of NumPy.


@each_norm
@each_dtype
@pytest.mark.parametrize("size", [0, 1, 7, 1000])
@pytest.mark.parametrize("backend_name", ["numpy", "numba"])
def test_a_registered_norm_is_exactly_rounded(name, dtype, size, backend_name):
    x, g = values_of(size, dtype=dtype), values_of(size, dtype=dtype, seed=1)
    reg = regularization(name, backend=backend_name)
    expected = exact(name, x, g, -3.0)
    penalty, alone = reg.apply(x, g, scale=-3.0), reg.penalty(x)
    assert bits(penalty, alone, g) == bits(expected[0], *expected)


@each_norm
@each_dtype
@pytest.mark.parametrize("backend_name", ["numpy", "numba"])
def test_a_registered_norm_takes_any_strides(name, dtype, backend_name):
    room, start = values_of(9, 8, dtype=dtype), values_of(8, 9, dtype=dtype, seed=1)
    x, g = room.T[::2, ::-1], start[::2].copy()
    expected = exact(name, x, g)
    assert bits(regularization(name, backend=backend_name).apply(x, g), g) == bits(*expected)


@each_norm
def test_large_arrays_are_those_of_the_reference(name):
    x = values_of(70_001, dtype=np.float32)  # the kernels with threads
    found, expected = (
        regularization(name, backend=backend).penalty_and_gradient(x)
        for backend in ("numba", "numpy")
    )
    assert bits(*found) == bits(*expected)


@each_norm
@each_dtype
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_pieces_lead_to_the_whole(name, dtype, reduction):
    x = values_of(300, dtype=dtype)
    reg = regularization(name, reduction=reduction)
    penalty, gradient = reg.penalty_and_gradient(x)
    cuts = np.s_[:100], np.s_[100:101], np.s_[101:]
    total = sum(reg.partial_sum(x[cut]) for cut in cuts)
    found = np.zeros_like(x)
    for cut in cuts:
        reg.add_gradient(x[cut], found[cut], total, count=300)
    assert bits(reg.finish(total, count=300), found) == bits(penalty, gradient)


@each_norm
def test_many_layers_are_those_of_a_loop(name):
    xs = [values_of(size, dtype=np.float32, seed=size) for size in (3, 0, 500)]
    gs = [np.ones_like(x) for x in xs]
    expected = [exact(name, x, g) for x, g in zip(xs, gs, strict=True)]
    _, layers = regularization(name).apply_all(xs, gs)
    assert bits(*layers, *gs) == bits(*(p for p, _ in expected), *(g for _, g in expected))


@each_norm
def test_nothing_is_added_where_all_is_zero(name):
    x, g = np.zeros(5), np.ones(5)
    assert regularization(name).apply(x, g) == 0.0
    assert g.tolist() == [1.0] * 5


def test_sums_beyond_binary64_lead_to_numbers_in_range():
    for size in (1e200, 1e-200):
        x, g = np.array([3.0, -4.0]) * size, np.zeros(2)
        penalty = regularization("sparse_group").apply(x, g)
        assert_allclose(penalty, (0.1 * 7.0 + 0.3 * 5.0) * size, rtol=1e-15)
        assert_allclose(g, [0.1 + 0.3 * 0.6, -0.1 - 0.3 * 0.8], rtol=1e-15)


def test_warmup_compiles_all_that_are_registered(monkeypatch):
    met = []
    monkeypatch.setattr(
        "actreg_dispatch.runtime.warmup.ActivityRegularization",
        lambda lam, norm, **options: met.append(norm) or ActivityRegularization(lam, "l1"),
    )
    warmup("float32")
    assert met == list(NORMS)
    assert set(LAMS) < set(met)


# What a regularization says of it.


def test_a_regularization_knows_its_norm_by_name():
    reg = regularization("sparse_group")
    assert (reg.norm, reg.lam, type(reg.norm)) == ("sparse_group", (0.1, 0.3), str)
    assert repr(reg) == "ActivityRegularization((0.1, 0.3), 'sparse_group')"
    assert ActivityRegularization(0.5, "sparse_group").lam == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"epsilon=0\.1 has no meaning for norm 'sparse_group'"):
        regularization("sparse_group", epsilon=0.1)
    for other in (copy.copy(reg), copy.deepcopy(reg), pickle.loads(pickle.dumps(reg))):
        assert other == reg
        assert other.options.norm is SPARSE_GROUP


def test_a_process_that_does_not_know_the_norm_says_so(python):
    data = pickle.dumps(regularization("sparse_group")).hex()
    code = f"import pickle; pickle.loads(bytes.fromhex({data!r}))"
    done = python("-c", code, check=False)
    assert "ValueError: norm='sparse_group' is unknown; use one of: 'l1', 'l2'" in done.stderr
    assert "register_norm makes another known, in each process" in done.stderr


# In files.


@each_norm
@each_dtype
def test_files(tmp_path, monkeypatch, name, dtype):
    monkeypatch.setattr(files, "BLOCK_BYTES", 500)
    monkeypatch.setattr(files, "WINDOW_BYTES", 1000)
    x, g = values_of(30, 31, dtype=dtype), values_of(30, 31, dtype=dtype, seed=1)
    paths = tmp_path / "activations.npy", tmp_path / "gradients.npy"
    for path, array in zip(paths, (x, g), strict=True):
        np.save(path, array)
    penalty, updated = exact(name, x, g, 2.0)
    reg = regularization(name)
    assert bits(files.penalty(reg, paths[0]).penalty) == bits(penalty)
    result = files.apply(reg, *paths, scale=2.0)
    assert bits(result.penalty, np.load(paths[1])) == bits(penalty, updated)
    assert result.passes == (2 if name == "sparse_group" else 1)


def test_the_command_line(tmp_path, capsys):
    path = tmp_path / "activations.npy"
    np.save(path, values_of(30))
    command = ["penalty", str(path), "--norm", "sparse_group", "--lam"]
    assert main([*command, "0.1,0.3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["norm"], told["lam"]) == ("sparse_group", [0.1, 0.3])
    assert float.fromhex(told["penalty_hex"]) == exact("sparse_group", *[values_of(30)] * 2)[0]
    assert main([*command, "0.1,0.2,0.3"]) == 2
    assert "lam=(0.1, 0.2, 0.3) are not 2 numbers" in capsys.readouterr().err


# In other libraries.


@each_norm
def test_pytorch(torch, name):
    from actreg_dispatch.torch import ActivityRegularizer

    values, reg = values_of(4, 6), regularization(name)
    expected = exact(name, values, np.zeros_like(values))
    x = torch.from_numpy(values).requires_grad_()
    penalty = reg.penalty(x)
    (gradient,) = torch.autograd.grad(penalty, x)
    assert bits(penalty.detach(), gradient) == bits(*expected)
    layer = ActivityRegularizer(reg)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert bits(gradient) == bits(exact(name, values, np.ones_like(values))[1])

    def plain(x):
        return expression(name, x, torch.abs, torch.sqrt)

    assert_allclose(
        torch.func.hessian(reg.penalty)(x.detach()),
        torch.func.hessian(plain)(x.detach()),
        rtol=1e-12,
        atol=1e-15,
    )
    each = torch.func.vmap(torch.func.grad(reg.penalty))(x.detach())
    assert bits(*each) == bits(*(exact(name, row, np.zeros_like(row))[1] for row in values))
    for size in (0.0, 1e200, 1e-200):
        second = torch.func.jacrev(torch.func.jacrev(reg.penalty))(size * x.detach()[0])
        assert second.isfinite().all()


@each_norm
def test_jax(jax, name):
    jnp, values, reg = jax.numpy, values_of(4, 6), regularization(name)
    expected = exact(name, values, np.zeros_like(values))
    x = jnp.asarray(values)
    for route in (
        reg.penalty_and_gradient,
        jax.value_and_grad(reg.penalty),
        jax.jit(jax.value_and_grad(reg.penalty)),
    ):
        assert bits(*route(x)) == bits(*expected)
    each = jax.jit(jax.vmap(jax.grad(reg.penalty)))(x)
    assert bits(*each) == bits(*(exact(name, row, np.zeros_like(row))[1] for row in values))

    def plain(x):
        return expression(name, x, lambda x: x * jnp.sign(x), jnp.sqrt)

    found, wanted = (jax.jit(jax.hessian(each))(x[0]) for each in (reg.penalty, plain))
    assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)
    for size in (0.0, 1e200, 1e-200):
        assert jnp.isfinite(jax.hessian(reg.penalty)(size * x[0])).all()


@each_norm
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_second_derivatives_far_out_in_jax_and_pytorch(jax, torch, name, dtype):
    values = values_of(5).astype(dtype)
    size = np.dtype(dtype).type(2.0**83)  # some 1e25, whose square float32 does not hold
    reg = regularization(name)
    near, far = (jax.hessian(reg.penalty)(jax.numpy.asarray(x)) for x in (values, values * size))
    also = torch.func.hessian(reg.penalty)(torch.from_numpy(values * size))
    tolerance = {"rtol": 1e-5, "atol": 1e-6 / float(size)}
    assert_allclose(also, far, **tolerance)
    if name == "sparse_group":
        assert_allclose(far * size, near, rtol=1e-5, atol=1e-6)
    else:
        assert_allclose(far, near, **tolerance)


@each_norm
def test_dask(name):
    values, reg = values_of(12, 10), regularization(name)
    expected = exact(name, values, np.zeros_like(values))
    with dask.config.set(scheduler="threads"):
        lazy = reg.penalty_and_gradient(da.from_array(values, chunks=(5, 3)))
        assert bits(*dask.compute(*lazy)) == bits(*expected)
        total = reg.partial_sum(da.from_array(values, chunks=4)).compute()
        assert bits(reg.finish(total)) == bits(expected[0])


def test_a_process_of_dask_that_does_not_know_the_norm_says_so():
    lazy = regularization("elastic").penalty(da.from_array(np.ones(4), chunks=2))
    with (
        dask.config.set({"multiprocessing.context": "spawn"}),
        pytest.raises(Exception, match="norm='elastic' is unknown; use one of: 'l1'"),
    ):
        lazy.compute(scheduler="processes", num_workers=1)


# The norm that comes with the package and is of two sums and two passes.


def test_hoyer_far_out():
    values = values_of(50)
    reg = ActivityRegularization.hoyer(0.5)
    penalty, gradient = reg.penalty_and_gradient(values)
    for size in (2.0**660, 2.0**-660):  # 1e±199
        found = reg.penalty_and_gradient(values * size)
        assert_allclose(found[0], penalty, rtol=1e-15)
        assert_allclose(found[1] * size, gradient, rtol=1e-14)


def test_hoyer_is_zero_at_zero():
    penalty, gradient = ActivityRegularization.hoyer(0.5).penalty_and_gradient(np.zeros(3))
    assert (penalty, gradient.tolist()) == (0.0, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hoyer_decreases_with_the_sum_of_squares(dtype):
    reg = ActivityRegularization.hoyer(0.5)
    penalties = [
        reg.penalty(np.array([1.0 + spread, 1.0 - spread], dtype)) for spread in (0, 0.25, 0.5, 1)
    ]
    assert penalties == sorted(penalties, reverse=True)
    assert (penalties[0], penalties[-1]) == (1.0, 0.5)


# What is refused.


def norm_with(**changes):
    """Return a norm of some functions that will do, and of one that will not."""
    functions = {
        "terms": (1,),
        "penalty": lambda lam, s: lam[0] * s[0],
        "gradient": lambda x, lam, c: signed(lam[0], x),
    }
    return Norm("made", **{**functions, **changes})


UNUSABLE = {
    "a name that is no identifier": (
        ValueError,
        "name='my norm'",
        lambda: Norm("my norm", (1,), None, None),
    ),
    "a name in capitals": (ValueError, "lower-case", lambda: Norm("Mine", (1,), None, None)),
    "a cube": (ValueError, r"terms=\(3,\) of norm 'made'", lambda: norm_with(terms=(3,))),
    "a list of terms": (ValueError, r"terms=\[1\]", lambda: norm_with(terms=[1])),
    "no function": (TypeError, "penalty=0.5 cannot be called", lambda: norm_with(penalty=0.5)),
    "a literal": (
        TypeError,
        "penalty cannot be traced: 2 is not made of the arguments",
        lambda: norm_with(penalty=lambda lam, s: 2 * lam[0] * s[0]),
    ),
    "a condition": (
        TypeError,
        "gradient cannot be traced: .* no if, and, or, not",
        lambda: norm_with(gradient=lambda x, lam, c: lam[0] if x > x else x),
    ),
    "another function": (
        TypeError,
        "penalty cannot be traced",
        lambda: norm_with(penalty=lambda lam, s: np.exp(s[0])),
    ),
    "a constant": (
        TypeError,
        "penalty returned 1.0; it must return",
        lambda: norm_with(penalty=lambda lam, s: 1.0),
    ),
    "a number for a tuple": (
        TypeError,
        "coefficients returned .* a tuple",
        lambda: norm_with(coefficients=lambda lam, s: s[0]),
    ),
    "nine coefficients": (
        ValueError,
        "coefficients of norm 'made' are 9, at most 8 are kept; compute some",
        lambda: norm_with(coefficients=lambda lam, s: (s[0],) * 9),
    ),
    "no comparison": (
        TypeError,
        "guard returned .* a comparison",
        lambda: norm_with(guard=lambda s, epsilon: s[0]),
    ),
    "a sum that is not there": (
        TypeError,
        "penalty takes more numbers than there are",
        lambda: norm_with(penalty=lambda lam, s: lam[0] * s[1]),
    ),
    "a gradient at 0 in one pass": (
        ValueError,
        "gradient of norm 'made' is not 0 at x = 0",
        lambda: norm_with(gradient=lambda x, lam, c: lam[0] + x),
    ),
}


@pytest.mark.parametrize(("error", "match", "make"), UNUSABLE.values(), ids=UNUSABLE)
def test_functions_that_define_no_norm_are_refused(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_a_norm_is_registered_once():
    with pytest.raises(ValueError, match="name='l1' is taken; choose another name"):
        register_norm(Norm("l1", (1,), lambda lam, s: lam[0] * s[0], lambda x, lam, c: x))
    assert register_norm(SPARSE_GROUP) is SPARSE_GROUP  # as where a module is imported again
    with pytest.raises(TypeError, match="norm='mine' is not a Norm"):
        register_norm("mine")


def test_a_norm_that_nobody_registered_is_unknown():
    with pytest.raises(
        ValueError, match=r"norm='made' is unknown; use one of: 'l1'.*register_norm"
    ):
        ActivityRegularization(0.1, "made")
    assert repr(norms.L1) == "<Norm 'l1'>"


# What may go wrong on the way.


def test_layers_of_unequal_shapes_are_refused_even_if_they_have_one_element():
    gradients = np.zeros(1)
    with pytest.raises(ValueError, match=r"gradients\[0\] have shape \(1,\) but"):
        ActivityRegularization(0.1).apply_all([np.array(2.0)], [gradients])
    assert not gradients.any()


def test_an_exact_sum_that_fails_leaves_gradients_updated_once(monkeypatch):
    reg, x = ActivityRegularization(1.0), np.array([1.0, 2.0**-53])  # on a tie
    reg.apply(np.ones(2), np.zeros(2))

    def partial_sum(*arguments):
        raise TypeError("no such sum")

    monkeypatch.setattr(get_backend("numba"), "partial_sum", partial_sum)
    gradients = np.zeros(2)
    with pytest.raises(TypeError, match="no such sum"):
        reg.apply(x, gradients)
    assert gradients.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("norm", ["l2_squared", "hoyer"])
def test_a_lam_whose_double_overflows_is_refused(norm):
    gradients = np.zeros(3)
    with pytest.raises(ValueError, match="too large for float64 activations"):
        ActivityRegularization(1.7e308, norm).apply(np.ones(3), gradients)
    assert not gradients.any()


def test_conditions_and_poles_are_told_when_a_norm_is_made():
    def norm(penalty, gradient):
        return Norm("odd", (1,), penalty, gradient)

    with pytest.raises(TypeError, match=r"penalty cannot be traced: .* use no if"):
        norm(lambda lam, s: lam[0] if lam[0] == s[0] else s[0], lambda x, lam, c: signed(lam[0], x))
    with pytest.raises(ValueError, match="'odd' is not finite where its sums are 1"):
        norm(lambda lam, s: lam[0] * s[0], lambda x, lam, c: signed(lam[0] / (lam[0] - lam[0]), x))


def test_a_lam_that_fits_one_dtype_is_still_refused_for_another():
    reg, lam = ActivityRegularization.l2_squared(1.0, backend="numpy"), float(np.float32(2e38))
    reg.lam = lam
    assert reg.penalty(np.ones(1)) == lam
    with pytest.raises(ValueError, match="too large for float32"):
        reg.penalty(np.ones(1, np.float32))
