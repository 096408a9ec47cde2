"""The API: what a regularization is made of, and the results of its origin.

The first ten tests are those of ``regularizers/activity.rs`` in the Rust crate scirs2, by meaning.
"""

from __future__ import annotations

import copy
import fractions
import math
import pickle

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from actreg_dispatch import ActivityNorm, ActivityRegularization, UnknownBackendError


def applied(reg, values):
    activations = np.array(values)
    gradients = np.zeros_like(activations)
    return reg.apply(activations, gradients), gradients


def test_each_constructor_creates_its_norm():
    assert ActivityRegularization.l1(0.1).norm is ActivityNorm.L1
    assert ActivityRegularization.l2(0.1).norm is ActivityNorm.L2
    assert ActivityRegularization.l2_squared(0.1).norm is ActivityNorm.L2_SQUARED
    assert ActivityRegularization(0.1, "l2").lam == 0.1


def test_l1_penalty_is_the_sum_of_magnitudes():
    assert_allclose(ActivityRegularization.l1(0.1).penalty(np.array([1.0, -2.0, 3.0])), 0.6)


def test_l1_gradient_is_the_sign():
    _, gradients = applied(ActivityRegularization.l1(0.1), [1.0, -2.0, 0.0])
    assert_array_equal(gradients, [0.1, -0.1, 0.0])


def test_l2_penalty_is_the_length():
    assert_allclose(ActivityRegularization.l2(0.1).penalty(np.array([3.0, 4.0])), 0.5)


def test_l2_gradient_is_the_direction():
    _, gradients = applied(ActivityRegularization.l2(0.1), [3.0, 4.0])
    assert_allclose(gradients, [0.06, 0.08])


def test_l2_squared_penalty_is_the_sum_of_squares():
    reg = ActivityRegularization.l2_squared(0.1)
    assert_allclose(reg.penalty(np.array([1.0, 2.0, 3.0])), 1.4)


def test_l2_squared_gradient_is_twice_the_activation():
    _, gradients = applied(ActivityRegularization.l2_squared(0.1), [2.0, 3.0])
    assert_allclose(gradients, [0.4, 0.6])


def test_l2_of_the_zero_vector_has_no_gradient():
    penalty, gradients = applied(ActivityRegularization.l2(0.1), [0.0, 0.0, 0.0])
    assert penalty == 0.0
    assert_array_equal(gradients, [0.0, 0.0, 0.0])


def test_two_dimensional_activations():
    penalty, gradients = applied(ActivityRegularization.l1(0.1), [[1.0, -2.0], [3.0, -4.0]])
    assert_allclose(penalty, 1.0)
    assert_array_equal(gradients, [[0.1, -0.1], [0.1, -0.1]])


@pytest.mark.parametrize("norm", ActivityNorm)
def test_penalty_and_apply_agree(norm):
    reg = ActivityRegularization(0.1, norm)
    penalty, _ = applied(reg, [1.0, -2.0, 3.0])
    assert penalty == reg.penalty(np.array([1.0, -2.0, 3.0]))


@pytest.mark.parametrize(
    "lam",
    [1, 0, 0.5, np.float32(0.5), np.int64(2), np.array(0.25), fractions.Fraction(1, 3), -0.0],
)
def test_lam_is_stored_as_a_python_float(lam):
    reg = ActivityRegularization(lam)
    assert type(reg.lam) is float
    assert reg.lam == float(lam)
    assert str(reg.lam) != "-0.0"


@pytest.mark.parametrize("lam", [-1e-300, float("nan"), float("inf"), np.float32(-1), 10**400])
def test_lam_out_of_range_is_refused(lam):
    with pytest.raises(ValueError, match=r"lam=.* finite"):
        ActivityRegularization(lam)


@pytest.mark.parametrize(
    "lam",
    [
        *("0.1", b"1", memoryview(b"2"), None, True, np.bool_(True), 1j, np.complex128(1)),
        *([0.1], np.array([0.1]), np.array(1j), np.ma.array(1.0)),
    ],
)
def test_lam_that_is_no_number_is_refused(lam):
    with pytest.raises(TypeError, match=r"(?s)lam=.* pass a real number"):
        ActivityRegularization(lam)


def test_lam_is_assignable_and_checked():
    reg = ActivityRegularization.l1(0.0)
    for lam in (0.1, 0.2):
        reg.lam = lam
        assert reg.penalty(np.array([1.0, 1.0])) == lam * 2
    with pytest.raises(ValueError, match="lam=-1"):
        reg.lam = -1
    assert reg.lam == 0.2


def test_lam_beyond_the_dtype_is_refused_before_a_write():
    gradients = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"lam=1e\+300 is too large for float32 activations"):
        ActivityRegularization.l2_squared(1e300).apply(np.ones(2, np.float32), gradients)
    with pytest.raises(ValueError, match="too large"):  # as is 2λ, the factor of the gradient
        ActivityRegularization.l2_squared(1e308).apply(np.ones(2), np.ones(2))
    assert_array_equal(gradients, 0)
    assert ActivityRegularization.l1(1e300).penalty(np.ones(2)) == 2e300


@pytest.mark.parametrize("norm", ["L1", "l3", None, 1])
def test_unknown_norm_is_refused(norm):
    with pytest.raises(ValueError, match=r"norm=.* use one of: 'l1', 'l2', 'l2_squared'"):
        ActivityRegularization(0.1, norm)


def test_epsilon_belongs_to_l2_alone():
    assert ActivityRegularization.l2(0.1, epsilon=0).epsilon == 0.0
    with pytest.raises(ValueError, match=r"epsilon=0\.1 has no meaning for norm 'l1'"):
        ActivityRegularization(0.1, "l1", epsilon=0.1)
    with pytest.raises(ValueError, match="epsilon=-1"):
        ActivityRegularization.l2(0.1, epsilon=-1)
    with pytest.raises(TypeError, match="epsilon='x'"):
        ActivityRegularization.l2(0.1, epsilon="x")


def test_unknown_backend_is_refused_at_once():
    with pytest.raises(UnknownBackendError, match=r"backend='bogus' .* auto, numba, numpy, cupy"):
        ActivityRegularization(0.1, backend="bogus")


def test_norm_epsilon_and_backend_are_fixed():
    reg = ActivityRegularization.l2(0.1, epsilon=0.5, backend=" NumPy ")
    assert (reg.norm, reg.epsilon, reg.backend) == (ActivityNorm.L2, 0.5, "numpy")
    for name in ("norm", "epsilon", "backend"):
        with pytest.raises(AttributeError):
            setattr(reg, name, None)


SAMPLES = [
    ActivityRegularization.l1(0.1),
    ActivityRegularization.l2(0.1),
    ActivityRegularization.l2_squared(0.1),
    ActivityRegularization.l1(0.2),
    ActivityRegularization.l2(0.1, epsilon=0.0),
    ActivityRegularization.l1(0.1, backend="numpy"),
]


def test_equality_is_by_value():
    for i, a in enumerate(SAMPLES):
        for j, b in enumerate(SAMPLES):
            assert (a == copy.copy(b)) == (i == j)
    assert SAMPLES[0] != "l1"
    with pytest.raises(TypeError, match="unhashable"):
        hash(SAMPLES[0])


@pytest.mark.parametrize("reg", SAMPLES, ids=repr)
def test_repr_pickle_and_copy_round_trip(reg):
    assert eval(repr(reg)) == reg
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(reg, protocol)) == reg
    for twin in (copy.copy(reg), copy.deepcopy(reg)):
        assert twin == reg
        twin.lam = 5.0
        assert twin != reg


def test_repr_says_what_differs_from_the_default():
    assert repr(SAMPLES[0]) == "ActivityRegularization(0.1, 'l1')"
    assert repr(SAMPLES[4]) == "ActivityRegularization(0.1, 'l2', epsilon=0.0)"
    assert repr(SAMPLES[5]) == "ActivityRegularization(0.1, 'l1', backend='numpy')"


def test_finish_takes_partial_sums_of_its_own_kind():
    l1, l2 = ActivityRegularization.l1(0.5), ActivityRegularization.l2(0.5)
    total = l1.partial_sum(np.array([3.0, -4.0]))
    assert l1.finish(total) == 3.5
    with pytest.raises(TypeError, match=r"total=7\.0 is of type float; pass the sum of what"):
        l1.finish(7.0)
    with pytest.raises(ValueError, match="takes; pass partial sums of the same"):
        l2.finish(total)
    huge = ActivityRegularization.l2_squared(1e39)
    with pytest.raises(ValueError, match="lam=1e\\+39 is too large"):
        huge.finish(huge.partial_sum(np.ones(2, np.float32)))
    for bad in ([1.0], np.ones(2, int), np.ma.ones(2)):
        with pytest.raises(TypeError, match="activations"):
            l1.partial_sum(bad)


# Scale, reduction, and what comes in pieces.


@pytest.mark.parametrize("scale", [None, "2", 1j, True, [1.0], np.ones(1)])
def test_a_scale_that_is_no_real_number_is_refused(scale):
    reg, gradients = ActivityRegularization(0.5), np.zeros(3)
    for kernel in (reg.apply, reg.penalty_and_gradient, reg.add_gradient):
        for step in (1, -1):
            with pytest.raises(TypeError, match=r"scale=.* pass a real number, such as the loss"):
                kernel(np.ones(3)[::step], gradients[::step], scale=scale)
    assert not gradients.any()


def test_numbers_of_other_kinds_are_scales():
    for scale in (2, np.float32(2.0), np.array(2.0), fractions.Fraction(2), 10**400):
        gradients = np.zeros(2)
        ActivityRegularization(0.5).apply(np.ones(2), gradients, scale=scale)
        assert (gradients == (1.0 if scale == 2 else math.inf)).all()


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match=r"reduction='avg' is unknown; use one of: 'sum', 'mean'"):
        ActivityRegularization.l1(0.5, reduction="avg")


@pytest.mark.parametrize("axes", [(), (0.5,), (True,), None, [0], (0, "batch"), np.array(0)])
def test_axes_are_whole_numbers(axes):
    with pytest.raises(ValueError, match=r"reduction=.* is unknown; .* or an axis or a tuple of"):
        ActivityRegularization.l1(0.5, reduction=axes)


def test_axes_that_do_not_exist_or_repeat_are_refused():
    with pytest.raises(ValueError, match=r"reduction=\(1, 1\) names an axis twice"):
        ActivityRegularization(0.5, reduction=(1, 1))
    gradients, layers = np.zeros((2, 3)), [np.zeros(2), np.zeros((2, 3))]
    for axes, message in (
        ((0, -2), r"reduction=\(0, -2\) names an axis of activations twice, as they have 2 axes"),
        (2, r"activations have 2 axes, but reduction=\(2,\) divides by the length of axis 2; name"),
        ((0, -3), "divides by the length of axis -3"),
    ):
        reg, x = ActivityRegularization(0.5, reduction=axes), np.ones((2, 3))
        for call in (reg.penalty, reg.penalty_and_gradient, lambda x, r=reg: r.apply(x, gradients)):
            with pytest.raises(ValueError, match=message):
                call(x)
    with pytest.raises(ValueError, match=r"activations\[0\] have 1 axes, but reduction=\(1,\)"):
        ActivityRegularization(0.5, reduction=1).apply_all([np.ones(2), np.ones((2, 3))], layers)
    assert not any(each.any() for each in (gradients, *layers))


def test_one_axis_is_a_tuple_of_it():
    reg = ActivityRegularization(0.5, reduction=np.int64(1))
    assert reg == ActivityRegularization(0.5, reduction=(1,))
    assert reg.reduction == (1,)
    assert repr(reg) == "ActivityRegularization(0.5, 'l1', reduction=(1,))"


def test_a_reduction_is_part_of_the_value():
    reg = ActivityRegularization.l2(0.5, reduction="mean")
    assert reg.reduction == "mean"
    assert repr(reg) == "ActivityRegularization(0.5, 'l2', reduction='mean')"
    assert reg != ActivityRegularization.l2(0.5)
    assert pickle.loads(pickle.dumps(reg)) == reg


def test_a_batch_needs_an_axis():
    reg, gradients = ActivityRegularization(0.5, reduction="batch"), np.array(0.0)
    for call in (lambda: reg.penalty(np.array(1.0)), lambda: reg.apply(np.array(1.0), gradients)):
        with pytest.raises(ValueError, match="activations have no axes, but"):
            call()
    assert gradients == 0


def test_reductions_of_nothing_and_of_one():
    for reduction in ("mean", "batch"):
        reg = ActivityRegularization(0.5, reduction=reduction)
        assert reg.penalty(np.ones((0, 3))) == 0.0
        assert reg.penalty(np.ones((1, 1))) == 0.5


def test_what_pieces_need_is_asked_for():
    reg, gradients = ActivityRegularization.l2(0.5, reduction="mean"), np.zeros(3)
    total = reg.partial_sum(np.ones(3))
    for count in (None, -1, 1.5, "3", 10**400):
        with pytest.raises(ValueError, match=r"count=.* pass how many elements"):
            reg.finish(total, count=count)
        with pytest.raises(ValueError, match=r"count=.* pass how many elements"):
            reg.add_gradient(np.ones(3), gradients, total, count=count)
    with pytest.raises(TypeError, match=r"total=None is of type NoneType; pass the sum"):
        reg.add_gradient(np.ones(3), gradients, count=3)
    with pytest.raises(ValueError, match=r"total is for float64 penalties, but .* float32"):
        reg.add_gradient(np.ones(3, "f4"), np.zeros(3, "f4"), total, count=3)
    with pytest.raises(ValueError, match="pass partial sums of the same regularization"):
        ActivityRegularization(0.5).add_gradient(np.ones(3), gradients, total)
    assert not gradients.any()


def test_the_place_for_a_gradient_is_checked_before_it_is_written():
    reg, activations = ActivityRegularization(0.5), np.ones(3)
    for out, error in ((np.ones(2), "shape"), (np.ones(3, "f4"), "dtype"), (activations, "share")):
        with pytest.raises((TypeError, ValueError), match=rf"^out .*{error}"):
            reg.penalty_and_gradient(activations, out)
        assert (out == 1).all()
    out = np.ones(3, "f4")
    with pytest.raises(ValueError, match="too large"):
        ActivityRegularization(1e300).penalty_and_gradient(np.ones(3, "f4"), out)
    assert (out == 1).all()


# Both L1 and squared L2.


def test_both_penalties_in_one_pass():
    reg = ActivityRegularization.l1_l2(0.5, 0.25)
    assert reg == ActivityRegularization((0.5, 0.25), "l1_l2_squared")
    assert repr(reg) == "ActivityRegularization((0.5, 0.25), 'l1_l2_squared')"
    gradients = np.zeros(3)
    assert reg.apply(np.array([2.0, -4.0, 0.0]), gradients) == 0.5 * 6 + 0.25 * 20
    assert gradients.tolist() == [0.5 + 1.0, -0.5 - 2.0, 0.0]
    reg.lam = 1  # for both
    assert reg.lam == (1.0, 1.0)
    assert ActivityRegularization.l1_l2(l1=0.5).lam == (0.5, 0.0)


def test_one_of_both_strengths_may_be_zero():
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    for l1, l2_squared in ((0.1, 0.0), (0.0, 0.1)):
        alone = ActivityRegularization(0.1, "l1" if l1 else "l2_squared")
        both = ActivityRegularization.l1_l2(l1, l2_squared)
        assert both.penalty(values) == alone.penalty(values)
        assert_array_equal(
            both.penalty_and_gradient(values)[1], alone.penalty_and_gradient(values)[1]
        )


def test_both_strengths_are_checked():
    reg = ActivityRegularization.l1_l2(0.5, 0.25)
    for lam, error, message in (
        ((0.5, -1.0), ValueError, r"lam\[1\]=-1.0 is out of range"),
        (("1", 0.5), TypeError, r"lam\[0\]='1' is of type str"),
        ((1.0, 2.0, 3.0), ValueError, r"are not 2 numbers, .* pass as many, or one number for all"),
    ):
        with pytest.raises(error, match=message):
            reg.lam = lam
    assert reg.lam == (0.5, 0.25)
    with pytest.raises(ValueError, match=r"l2_squared=-1.0 is out of range"):
        ActivityRegularization.l1_l2(0.5, -1)
    with pytest.raises(TypeError, match=r"lam=\(1.0, 2.0\) are several .*norm 'l1_l2_squared'"):
        ActivityRegularization((1.0, 2.0), "l1")
    reg.lam = np.array([0.5, 2.0])
    assert reg.lam == (0.5, 2.0)
    gradients = np.ones(2, np.float32)
    ActivityRegularization.l1_l2(3e38, 0.0).apply(np.zeros(2, np.float32), gradients)  # fits
    ActivityRegularization.l1_l2(3e38, 0.0).apply_all([np.zeros(2, np.float32)], [gradients])
    with pytest.raises(ValueError, match=r"lam=\(0.5, 3e\+38\) is too large"):
        ActivityRegularization.l1_l2(0.5, 3e38).apply(np.ones(2, np.float32), gradients)
    assert (gradients == 1).all()


def test_sums_for_one_norm_are_not_those_for_both():
    one, both = ActivityRegularization(0.5), ActivityRegularization.l1_l2(0.5, 0.5)
    values = np.ones(3)
    for reg, total in ((one, both.partial_sum(values)), (both, one.partial_sum(values))):
        with pytest.raises(ValueError, match="pass partial sums of the same regularization"):
            reg.finish(total)
    with pytest.raises(TypeError):
        one.partial_sum(values) + both.partial_sum(values)
    assert pickle.loads(pickle.dumps(both.partial_sum(values))) == both.partial_sum(values)
