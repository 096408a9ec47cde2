"""Tensors of PyTorch: where they are written, what autograd makes of the penalty, and the layer.

That results are exact is for the conformance suite, which runs on tensors too; here they are
compared with NumPy arrays on the same memory, bit for bit, and with PyTorch's own derivatives.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
import re
import shutil
import sys
import types
import warnings

import ml_dtypes
import numpy as np
import pytest

import actreg_dispatch
from actreg_dispatch import (
    ActivationStatistics,
    ActivityNorm,
    ActivityRegularization,
    BackendUnavailableError,
    MixedArraysError,
    UnknownBackendError,
    registry,
    use_backend,
)

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import actreg_dispatch.torch as tensors  # noqa: E402
from actreg_dispatch.torch import ActivityRegularizer, memory  # noqa: E402

pytestmark = [
    # PyTorch scripts its own formulas of forward-mode AD
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    # PyTorch looks at the .grad of whatever it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning"),
    # what CuPy says of a PyTorch that is older than its protocol for streams
    pytest.mark.filterwarnings("ignore:ExternalStream is deprecated:DeprecationWarning"),
    # what torch.export says of itself
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Sparse CSR.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*:UserWarning"),
]
norms = pytest.mark.parametrize("norm", ActivityNorm, ids=lambda norm: norm.value)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape, dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype, **options)


def bits(tensor):
    """Return the bytes of the values of a tensor, in order."""
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tensor.tobytes()


def as_array(tensor):
    """Return a copy as a NumPy array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.detach().numpy().copy()


def formula(norm, lam=0.3):
    """Return the penalty as an expression of PyTorch."""
    return {
        ActivityNorm.L1: lambda x: lam * x.abs().sum(),
        ActivityNorm.L2: lambda x: lam * torch.linalg.vector_norm(x),
        ActivityNorm.L2_SQUARED: lambda x: lam * x.square().sum(),
        ActivityNorm.L1_L2_SQUARED: lambda x: lam * (x.abs().sum() + x.square().sum()),
        ActivityNorm.HOYER: lambda x: lam * x.abs().sum() ** 2 / x.square().sum(),
    }[norm]


# In place, where the tensor is.


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.permute(2, 0, 1),
    "channels last": lambda t: t[None].contiguous(memory_format=torch.channels_last),
    "every second": lambda t: t[:, ::2],
    "one column": lambda t: t[..., 3],
    "flipped strides of NumPy": lambda t: t[1:, 1:, 1:],
    "a row": lambda t: t[1, 2],
    "a number": lambda t: t[0, 0, 0],
    "empty": lambda t: t[:0],
}


@norms
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_are_updated_where_they_are_as_arrays_would_be(norm, dtype, layout):
    room, start = normal(4, 5, 6, dtype=dtype), normal(4, 5, 6, dtype=dtype, seed=1)
    activations, gradients = layout(room), layout(start.clone())
    x, g = as_array(activations), as_array(gradients)
    reg = ActivityRegularization(0.1, norm)
    expected = reg.apply(x, g, scale=-3.0)
    before, address = bits(room), gradients.data_ptr()
    penalty = reg.apply(activations, gradients, scale=-3.0)
    assert type(penalty) is torch.Tensor
    assert penalty.shape == ()
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bits(penalty) == expected.tobytes() == bits(reg.penalty(activations))
    assert gradients.data_ptr() == address
    assert bits(gradients) == g.tobytes()
    assert bits(room) == before
    assert not penalty.requires_grad


@norms
def test_the_rest_of_a_storage_is_left_alone(norm):
    room = torch.full((4, 6), 7.0)
    ActivityRegularization(0.1, norm).apply(normal(4, 3), room[:, ::2])
    assert (room[:, 1::2] == 7.0).all()
    assert (room[:, ::2] != 7.0).all()


def test_expanded_activations_are_read():
    gradients = torch.zeros(2, 5)
    wide = torch.tensor([[1.0], [-2.0]]).expand(2, 5)
    assert ActivityRegularization.l1(1.0).apply(wide, gradients) == 15.0
    assert gradients.tolist() == [[1.0] * 5, [-1.0] * 5]
    penalty, gradient = ActivityRegularization.l1(1.0).penalty_and_gradient(wide)
    assert penalty == 15.0
    assert torch.equal(gradient, gradients)


def test_a_leaf_and_its_grad_are_treated_as_by_an_optimizer():
    leaf = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    (leaf * leaf).sum().backward()
    grad = leaf.grad
    penalty = ActivityRegularization.l1(0.5).apply(leaf, leaf.grad)
    assert leaf.grad is grad
    assert grad.tolist() == [2.5, -4.5]
    assert penalty.item() == 1.5
    assert not penalty.requires_grad
    assert penalty.grad_fn is None
    ActivityRegularization.l1(0.5).apply(torch.ones(2), leaf)  # a leaf that requires grad itself
    assert leaf.tolist() == [1.5, -1.5]
    assert leaf.is_leaf


@pytest.mark.parametrize("operation", ["apply", "add_gradient", "out"])
def test_autograd_notices_that_a_saved_tensor_was_written(operation):
    reg, activations = ActivityRegularization.l1(0.5), torch.ones(3)
    leaf = torch.ones(3, requires_grad=True)
    saved = leaf.exp()
    loss = saved.sum()
    if operation == "apply":
        reg.apply(activations, saved)
    elif operation == "add_gradient":
        reg.add_gradient(activations, saved)
    else:
        reg.penalty_and_gradient(activations, saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@norms
def test_every_backward_has_a_gradient_of_its_own(norm):
    reg, leaf = ActivityRegularization(0.1, norm), normal(4, 3).requires_grad_()
    _, once = reg.penalty_and_gradient(leaf.detach())
    loss = reg.penalty(leaf)
    loss.backward(retain_graph=True)
    first = leaf.grad
    assert torch.equal(first, once)
    leaf.grad = None
    reg.lam = 5.0
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, once)
    assert leaf.grad.data_ptr() != first.data_ptr()
    loss.backward()
    assert torch.equal(leaf.grad, once + once)
    assert torch.equal(first, once)


def test_what_changed_since_the_penalty_has_no_gradient():
    leaf = torch.ones(3, requires_grad=True)
    loss = ActivityRegularization.l1(0.5).penalty(leaf)
    with torch.no_grad():
        leaf.mul_(-1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_reading_is_no_change():
    leaf = torch.ones(3, requires_grad=True)
    saved = leaf.exp()
    reg = ActivityRegularization.l2(0.5)
    reg.apply(saved, torch.zeros(3))
    reg.penalty(saved)
    reg.penalty_and_gradient(saved)
    reg.partial_sum(saved)
    saved.sum().backward()
    assert torch.equal(leaf.grad, saved)


def test_inference_mode():
    with torch.inference_mode():
        gradients = torch.zeros(2)
        assert ActivityRegularization.l1(0.5).apply(torch.ones(2), gradients) == 1.0
    assert gradients.tolist() == [0.5, 0.5]


def test_a_hook_may_update_the_gradient_that_passes():
    reg, leaf = ActivityRegularization.l2_squared(0.25), normal(5).requires_grad_()
    hidden = leaf * 2.0
    held = hidden.detach()

    def add(gradient):
        gradient = gradient.clone()
        reg.apply(held, gradient)
        return gradient

    hidden.register_hook(add)
    hidden.square().sum().backward()
    other = leaf.detach().requires_grad_()
    ((other * 2.0).square().sum() + 0.25 * (other * 2.0).square().sum()).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@norms
def test_out_is_overwritten_and_returned(norm):
    reg, activations = ActivityRegularization(0.1, norm), normal(4, 6)
    room = torch.full((4, 12), math.nan)
    out = room[:, ::2]
    penalty, gradient = reg.penalty_and_gradient(activations, scale=2.0)
    value, found = reg.penalty_and_gradient(activations, out, scale=2.0)
    assert found is out
    assert torch.equal(out, gradient)
    assert torch.equal(value, penalty)
    assert room[:, 1::2].isnan().all()
    assert not gradient.requires_grad
    assert not reg.penalty_and_gradient(activations.requires_grad_())[1].requires_grad


@norms
@pytest.mark.parametrize("reduction", ["sum", "mean", "batch", -1])
def test_pieces_lead_to_the_whole(norm, reduction):
    reg = ActivityRegularization(0.1, norm, reduction=reduction)
    activations, whole, pieces = normal(40, 5), torch.ones(40, 5), torch.ones(40, 5)
    penalty = reg.apply(activations, whole, scale=4.0)
    count = {"sum": None, "mean": 200, "batch": 40, -1: 5}[reduction]
    total = sum(reg.partial_sum(piece) for piece in activations.split(7))
    assert reg.finish(total, count=count) == penalty.item()
    for piece, gradient in zip(activations.split(7), pieces.split(7), strict=True):
        reg.add_gradient(piece, gradient, total, count=count, scale=4.0)
    assert bits(pieces) == bits(whole)


def test_subclasses_without_a_dispatcher_are_plain_memory():
    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise AssertionError("nothing is to be asked of the subclass")

    values = torch.tensor([1.0, -2.0])
    gradients = torch.zeros(2)
    reg = ActivityRegularization.l1(0.5)
    with torch._C.DisableTorchFunctionSubclass():
        named, named_gradients = values.as_subclass(Named), gradients.as_subclass(Named)
    assert reg.apply(named, named_gradients) == 1.5
    assert gradients.tolist() == [0.5, -0.5]


def test_memory_of_numpy_that_is_not_aligned():
    raw = np.zeros(4 * 9 + 1, np.uint8)[1:].view(np.float32)
    raw[:] = np.arange(9)
    reg, gradients = ActivityRegularization.l2(0.5), torch.zeros(9)
    penalty = reg.apply(torch.from_numpy(raw), gradients)
    expected = np.zeros(9, np.float32)
    assert penalty.item() == reg.apply(np.arange(9, dtype=np.float32), expected)
    assert bits(gradients) == expected.tobytes()


# Which backend.


def test_the_choice_of_a_backend_is_honoured(monkeypatch, caplog):
    activations = normal(10)

    def served_by(reg):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "actreg_dispatch"):
            reg.apply(activations, torch.zeros(10))
        return caplog.records[-1].getMessage().split()[1]

    assert served_by(ActivityRegularization.l1(0.1)) == "numba"
    assert served_by(ActivityRegularization.l1(0.1, backend="numpy")) == "numpy"
    with use_backend("numpy"):
        assert served_by(ActivityRegularization.l1(0.1)) == "numpy"
    monkeypatch.setenv("ACTREG_BACKEND", "numpy")
    assert served_by(ActivityRegularization.l1(0.1)) == "numpy"
    monkeypatch.setenv("ACTREG_BACKEND", "bogus")
    with pytest.raises(UnknownBackendError, match=r"ACTREG_BACKEND.*bogus"):
        tensors.penalty(ActivityRegularization.l1(0.1), activations.requires_grad_())


def test_the_package_does_not_import_pytorch(python):
    code = """
import sys, actreg_dispatch, numpy
actreg_dispatch.ActivityRegularization.l1(1.0).penalty(numpy.ones(3))
print("torch" in sys.modules, "actreg_dispatch.torch" in sys.modules)
"""
    assert python("-c", code).stdout == "False False\n"


def test_bfloat16_without_ml_dtypes_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.delitem(memory.DTYPES, torch.bfloat16, raising=False)
    reg = ActivityRegularization.l1(0.1)
    with pytest.raises(TypeError, match=r"^activations .*bfloat16.*pip install ml_dtypes"):
        reg.penalty(torch.ones(2, dtype=torch.bfloat16))


# What is refused, before anything is written.


def refuse(error, match, activations, gradients):
    """Refuse both orders of writing, and leave the gradients alone."""
    reg = ActivityRegularization.l1(0.5)
    memory = gradients if type(gradients) is torch.Tensor else torch.zeros(0)
    readable = memory.is_cpu and memory.layout is torch.strided and memory.numel()
    before = bits(memory) if readable and not memory.is_neg() else None
    for operation in (reg.apply, reg.add_gradient, reg.penalty_and_gradient):
        with pytest.raises(error, match=match):
            operation(activations, gradients)
    assert before is None or bits(memory) == before


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to be removed from PyTorch
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def freed():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk():
    tensor = torch.ones(3, 3).T[1]
    tensor.untyped_storage().resize_(20)
    return tensor


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


UNUSABLE = {
    "sparse": (TypeError, "not dense.*to_dense", lambda: torch.ones(3).to_sparse()),
    "CSR": (TypeError, "not dense.*to_dense", lambda: torch.ones(3, 3).to_sparse_csr()),
    "MKL-DNN": (TypeError, "not dense.*to_dense", lambda: torch.ones(3).to_mkldnn()),
    "nested": (
        TypeError,
        "nested.*dense tensor",
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
    ),
    "jagged": (
        TypeError,
        "NestedTensor.*plain tensor",
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged),
    ),
    "quantized": (TypeError, "qint8.*float32", quantized),
    "meta": (TypeError, "are on meta.*move them", lambda: torch.empty(3, device="meta")),
    "complex": (TypeError, "complex64.*float32", lambda: torch.ones(3, dtype=torch.complex64)),
    "integer": (TypeError, "int64.*float32", lambda: torch.ones(3, dtype=torch.int64)),
    "bool": (TypeError, "bool.*float32", lambda: torch.ones(3, dtype=torch.bool)),
    "float8": (
        TypeError,
        "float8.*float32",
        lambda: torch.ones(3).to(torch.float8_e4m3fn),
    ),
    "conjugated": (
        TypeError,
        "complex64.*float32",
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
    ),
    "negated": (
        TypeError,
        "negated.*resolve_neg",
        lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    ),
    "fake": (TypeError, "FakeTensor.*plain tensor", fake),
    "zero tensor": (ValueError, "no memory.*clone", lambda: torch._efficientzerotensor((3,))),
    "functional": (
        ValueError,
        "no memory.*clone",
        lambda: torch._to_functional_tensor(torch.ones(3)),
    ),
    "freed": (ValueError, "no memory.*clone", freed),
    "shrunk": (ValueError, "no memory, or less.*clone", shrunk),
}


@pytest.mark.parametrize(("error", "match", "make"), UNUSABLE.values(), ids=UNUSABLE)
def test_tensors_without_memory_of_their_values_are_refused(error, match, make):
    tensor = make()
    refuse(error, f"^activations .*{match}", tensor, torch.ones(3))
    for operation in ("penalty", "partial_sum"):
        with pytest.raises(error, match=f"^activations .*{match}"):
            getattr(ActivityRegularization.l1(0.5), operation)(tensor)
    reg = ActivityRegularization.l1(0.5)
    for operation in (reg.apply, reg.add_gradient):
        with pytest.raises(error, match=f"^gradients .*{match}"):
            operation(torch.ones(3), tensor)
    with pytest.raises(error, match=f"^out .*{match}"):
        reg.penalty_and_gradient(torch.ones(3), tensor)


def test_what_does_not_go_together_is_refused():
    ones = torch.ones(3)
    refuse(TypeError, r"float64 but activations .*\.to\(activations", ones, ones.double())
    refuse(ValueError, r"have shape \(4,\) but activations have \(3,\)", ones, torch.ones(4))
    refuse(ValueError, "overlap themselves.*pass a copy", ones, torch.ones(1).expand(3))
    room = torch.ones(4)
    overlapping = room.as_strided((2, 2), (1, 1))
    refuse(ValueError, "overlap themselves.*pass a copy", torch.ones(2, 2), overlapping)
    for other in (room[1:], room[:3], room[:3].view(3)):
        refuse(ValueError, "share memory with activations", room[:3], other)
    refuse(ValueError, "share memory with activations", ones, ones.detach())
    assert ActivityRegularization.l1(0.5).apply(room[::2], room[1::2]) == 1.0  # interleaved


def test_libraries_are_not_mixed():
    ones, array = torch.ones(3), np.ones(3, np.float32)
    refuse(MixedArraysError, r"are a numpy\.ndarray, not a torch\.Tensor", ones, array)
    with pytest.raises(MixedArraysError, match=r"gradients are a torch\.Tensor"):
        ActivityRegularization.l1(0.5).apply(array, ones)
    assert array.tolist() == [1.0] * 3
    refuse(TypeError, r"must be a torch\.Tensor, not a list", ones, [0.0, 0.0, 0.0])
    with pytest.raises(TypeError, match=r"^activations must be a torch\.Tensor"):
        tensors.penalty(ActivityRegularization.l1(0.5), [1.0])
    with pytest.raises(MixedArraysError, match=r"^activations are a numpy\.ndarray"):
        ActivityRegularizer(ActivityRegularization.l1(0.5))(array)


def test_a_grad_that_is_not_there_yet():
    leaf, reg = torch.ones(3, requires_grad=True), ActivityRegularization.l1(0.5)
    with pytest.raises(TypeError, match=r"gradients are None.*backward\(\).*zeros_like"):
        reg.apply(leaf, leaf.grad)


@norms
def test_a_lam_too_large_and_a_scale_that_is_no_number_write_nothing(norm):
    gradients = torch.zeros(3)
    with pytest.raises(ValueError, match="lam"):
        ActivityRegularization(1e300, norm).apply(torch.ones(3), gradients)
    with pytest.raises(TypeError, match="scale"):
        ActivityRegularization(0.5, norm).apply(torch.ones(3), gradients, scale="2")
    assert not gradients.any()


@pytest.mark.parametrize("transform", ["vmap", "grad", "functionalize"])
def test_nothing_is_written_inside_a_transform(transform):
    reg, gradients = ActivityRegularization.l1(0.5), torch.zeros(2, 3)
    calls = (
        lambda x: reg.apply(x, torch.zeros(3)),
        lambda x: reg.apply(torch.ones(3), x),
        lambda x: reg.penalty_and_gradient(x)[0],
        lambda x: reg.partial_sum(x),
        lambda x: reg.add_gradient(torch.ones(3), x),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"inside a transform of torch\.func"):
            getattr(torch.func, transform)(call)(gradients)
    assert not gradients.any()


def test_nothing_is_read_in_a_mode_that_makes_tensors_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = torch.ones(3)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(TypeError, match=r"activations become a FakeTensor in the mode.*outside"),
    ):
        ActivityRegularization.l1(0.5).penalty(real)


def test_a_default_device_does_not_matter():
    activations, gradients = torch.ones(3, requires_grad=True), torch.zeros(3)
    reg = ActivityRegularization.l1(0.5)
    with torch.device("meta"):
        assert reg.apply(activations, gradients).is_cpu
        penalty = reg.penalty(activations)
        passed = ActivityRegularizer(reg)(activations)
        (penalty + passed.sum()).backward()
    assert activations.grad.tolist() == [2.0] * 3


# The penalty as autograd sees it.


@norms
@dtypes
@pytest.mark.parametrize("incoming", [1.0, 65536.0, -0.1, 0.0])
def test_the_gradient_is_that_of_the_library_to_the_bit(norm, dtype, incoming):
    reg = ActivityRegularization(0.1, norm)
    activations = normal(7, 11, dtype=dtype).requires_grad_()
    penalty = reg.penalty(activations)
    expected, gradient = reg.penalty_and_gradient(activations, scale=incoming)
    assert penalty.requires_grad
    assert bits(penalty) == bits(expected)
    penalty.backward(torch.tensor(incoming, dtype=penalty.dtype))
    if dtype in (torch.float64,) or incoming != -0.1:  # -0.1 is rounded to float32 on its way
        assert bits(activations.grad) == bits(gradient)
    else:
        rounded = float(np.float32(incoming))
        assert bits(activations.grad) == bits(
            reg.penalty_and_gradient(activations, scale=rounded)[1]
        )


@norms
@pytest.mark.parametrize("incoming", [math.inf, -math.inf, math.nan])
def test_an_incoming_gradient_that_is_not_finite_propagates(norm, incoming):
    activations = torch.tensor([1.0, -2.0], requires_grad=True)
    (ActivityRegularization(0.1, norm).penalty(activations) * incoming).backward()
    # Both elements of the Hoyer-square's gradient are positive.
    expected = [incoming, incoming if norm is ActivityNorm.HOYER else -incoming]
    assert str(activations.grad.tolist()) == str(expected)


@norms
def test_a_scaled_loss_has_scaled_gradients(norm):
    reg, activations = ActivityRegularization(0.1, norm), normal(6).requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD([activations], lr=1.0)
    before = activations.detach().clone()
    scaler.scale(reg.penalty(activations)).backward()
    assert torch.equal(activations.grad, 2.0**12 * reg.penalty_and_gradient(before)[1])
    scaler.step(optimizer)
    assert torch.equal(activations, before - reg.penalty_and_gradient(before)[1])


@norms
@pytest.mark.parametrize("reduction", ["sum", "mean", "batch", -1])
def test_gradcheck(norm, reduction):
    reg = ActivityRegularization(0.3, norm, reduction=reduction)
    activations = normal(3, 2, dtype=torch.float64).requires_grad_()
    options = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(reg.penalty, (activations,), **options)
    assert gradgradcheck(reg.penalty, (activations,), check_fwd_over_rev=True)


@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autograd_of_the_same_expression_agrees(norm, dtype):
    ours = normal(50, 40, dtype=dtype).requires_grad_()
    theirs = ours.detach().double().requires_grad_()  # in which float32 sums are right
    penalty = ActivityRegularization(0.3, norm).penalty(ours.relu())
    expected = formula(norm)(theirs.relu())
    (penalty.square() * 0.5).backward()
    (expected.square() * 0.5).backward()
    torch.testing.assert_close(penalty, expected.to(dtype))
    torch.testing.assert_close(ours.grad, theirs.grad.to(dtype))


@norms
def test_derivatives_of_the_second_order_agree(norm):
    results = []
    for penalty in (ActivityRegularization(0.3, norm).penalty, formula(norm)):
        x = normal(4, 3, dtype=torch.float64).requires_grad_()
        factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(factor * penalty(x), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.pow(3).sum(), (x, factor)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("epsilon", [None, 0.0, 25.0, 26.0])
def test_derivatives_of_l2_at_epsilon(epsilon):
    reg = ActivityRegularization.l2(0.5, epsilon=epsilon)
    for values in ([3.0, 4.0], [0.0, 0.0]):
        x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(reg.penalty(x), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), x)
        flat = sum(value * value for value in values) <= (epsilon or 0.0)
        expected = [0.0, 0.0] if flat else [0.5 * 0.032, 0.5 * -0.024]  # (Σ - x·Σx/25) / 5
        torch.testing.assert_close(second, torch.tensor(expected, dtype=torch.float64))
        assert gradient.any() == (not flat)


def test_lam_is_that_of_the_forward_pass():
    reg, activations = ActivityRegularization.l1(0.5), torch.ones(2, requires_grad=True)
    layer = ActivityRegularizer(reg)
    penalty, passed = reg.penalty(activations), layer(activations)
    reg.lam = 8.0
    penalty.backward()
    assert activations.grad.tolist() == [0.5, 0.5]
    passed.backward(torch.zeros(2))
    assert activations.grad.tolist() == [1.0, 1.0]
    assert reg.lam == 8.0


def test_activations_changed_between_forward_and_backward_are_noticed():
    activations = torch.ones(3, requires_grad=True) * 1.0
    penalty = ActivityRegularization.l2(0.5).penalty(activations)
    activations.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_no_graph_is_recorded_where_none_is_wanted():
    reg, leaf = ActivityRegularization.l1(0.5), torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not reg.penalty(leaf).requires_grad
    assert not reg.penalty(leaf.detach()).requires_grad
    assert tensors.penalty(reg, leaf).grad_fn.name() == reg.penalty(leaf).grad_fn.name()


@norms
def test_empty_and_expanded_tensors_have_gradients(norm):
    reg = ActivityRegularization(0.5, norm)
    empty = torch.ones(0, 3, requires_grad=True)
    reg.penalty(empty).backward()
    assert empty.grad.shape == (0, 3)
    results = []
    for penalty in (reg.penalty, formula(norm, 0.5)):
        leaf = torch.tensor([1.0, -2.0], requires_grad=True)
        penalty(leaf.expand(3, 2)).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


# Transforms and compilers.


@norms
def test_transforms_of_functions_agree_with_those_of_the_expression(norm):
    ours, theirs, x = (
        ActivityRegularization(0.3, norm).penalty,
        formula(norm),
        normal(3, 4).double(),
    )
    func = torch.func

    def of_each(penalty):
        return lambda x: func.vmap(penalty)(x).square().sum()

    transforms = {
        "grad": func.grad,
        "vmap": func.vmap,
        "vmap over columns": lambda f: func.vmap(f, in_dims=1),
        "vmap of grad": lambda f: func.vmap(func.grad(f)),
        "vmap of vmap": lambda f: func.vmap(func.vmap(f)),
        "grad of vmap": lambda f: func.grad(of_each(f)),
        "hessian": func.hessian,
        "reverse over reverse": lambda f: func.jacrev(func.jacrev(f)),
        "reverse over forward": lambda f: func.jacrev(func.jacfwd(f)),
        "forward": func.jacfwd,
        "product": lambda f: lambda x: func.jvp(f, (x,), (x + 1,)),
        "third order": lambda f: (
            lambda x: func.jvp(func.grad(lambda x: func.grad(f)(x).pow(3).sum()), (x,), (x + 1,))
        ),
    }
    for name, transform in transforms.items():
        found, expected = transform(ours)(x), transform(theirs)(x)
        torch.testing.assert_close(found, expected, msg=lambda m, name=name: f"{name}: {m}")
    assert bits(func.grad(ours)(x)) == bits(
        ActivityRegularization(0.3, norm).penalty_and_gradient(x)[1]
    )


def test_vmap_over_no_samples():
    penalty = ActivityRegularization.l2(0.3).penalty
    assert torch.func.vmap(penalty)(torch.ones(0, 3)).shape == (0,)
    assert torch.func.vmap(torch.func.grad(penalty))(torch.ones(0, 3)).shape == (0, 3)


def test_forward_mode_inside_itself_is_refused():
    penalty, x = ActivityRegularization.l2_squared(0.3).penalty, normal(3)
    with pytest.raises(NotImplementedError, match=r"nest forward-mode AD.*reverse mode"):
        torch.func.jacfwd(torch.func.jacfwd(penalty))(x)


def test_forward_mode_with_dual_numbers():
    x, along = normal(5), normal(5, seed=1)
    with forward_ad.dual_level():
        dual = ActivityRegularization.l2_squared(0.3).penalty(forward_ad.make_dual(x, along))
        value, tangent = forward_ad.unpack_dual(dual)
    torch.testing.assert_close(value, 0.3 * x.square().sum())
    torch.testing.assert_close(tangent, 0.6 * (x * along).sum())


def test_batched_gradients_are_refused():
    x = normal(3).requires_grad_()
    penalty = ActivityRegularization.l1(0.3).penalty(x)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(penalty, x, torch.ones(2), is_grads_batched=True)


class Compiler:
    """``torch.compile`` into one whole graph, without code generation; counts its graphs."""

    def __init__(self, backend="aot_eager"):
        self.counter = CompileCounterWithBackend(backend)

    def __call__(self, function):
        return torch.compile(function, backend=self.counter, fullgraph=True)

    @property
    def graphs(self):
        return self.counter.frame_count

    @property
    def operators(self):
        """The library's operators in the last graph, in order."""
        targets = [str(node.target) for node in self.counter.graphs[-1].graph.nodes]
        return [name.split(".")[1] for name in targets if name.startswith("actreg_dispatch.")]


@pytest.fixture
def compiled():
    """Compile into whole graphs; forget all of them before and afterwards."""
    torch._dynamo.reset()
    yield Compiler()
    torch._dynamo.reset()


@norms
def test_a_compiled_penalty_and_its_gradient_have_the_same_bits(compiled, norm):
    reg = ActivityRegularization(0.3, norm, reduction="mean")
    function = compiled(lambda x: reg.penalty(x * 2) * 3)
    for values in (normal(4, 3), normal(4, 3, seed=1)):
        x, y = (values.clone().requires_grad_() for _ in range(2))
        found, expected = function(x), reg.penalty(y * 2) * 3
        found.backward()
        expected.backward()
        assert bits(found) == bits(expected)
        assert bits(x.grad) == bits(y.grad)
    assert compiled.operators == ["penalty"]
    assert compiled.graphs == 1


@norms
def test_a_compiled_update_writes_where_the_gradients_are(compiled, norm):
    reg, leaf = ActivityRegularization(0.3, norm), normal(4, 3).requires_grad_()
    leaf.grad, expected = torch.ones(4, 3), torch.ones(4, 3)
    grad = leaf.grad
    penalty = compiled(lambda x, gradients: reg.apply(x, gradients, scale=2.0))(leaf, grad)
    assert bits(penalty) == bits(reg.apply(leaf, expected, scale=2.0))
    assert bits(grad) == bits(expected)
    assert not penalty.requires_grad
    assert compiled.operators == ["update"]

    both = reg.penalty_and_gradient(leaf)
    assert list(map(bits, compiled(reg.penalty_and_gradient)(leaf))) == list(map(bits, both))
    value, out = compiled(reg.penalty_and_gradient)(leaf, grad)
    assert out is grad
    assert [bits(value), bits(out)] == list(map(bits, both))


@norms
def test_a_compiled_layer_trains_as_it_does_otherwise(compiled, norm):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4),
        ActivityRegularizer(ActivityRegularization(0.3, norm), scale=3.0),
        torch.nn.Linear(4, 2),
    )
    x, results = normal(5, 3), []
    for function in (compiled(model), model):
        model.zero_grad()
        model[1].penalty = None
        function(x).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), model[1].penalty])
    torch.testing.assert_close(*results)
    assert not model[1].penalty.requires_grad
    assert compiled.operators == ["penalty", "pass_through"]
    model.eval()
    assert torch.equal(compiled(model)(x), model(x))
    assert model[1].penalty is None
    assert compiled.operators == []


def test_a_warm_up_compiles_once_and_is_followed(compiled):
    several = ActivityRegularization.l1_l2(0.0, 0.0)
    layer = ActivityRegularizer(ActivityRegularization.l2(0.0))

    def loss(x):
        hidden = layer(x * 2)
        return hidden.square().sum() + several.penalty(hidden)

    function = compiled(loss)
    for step in range(6):
        layer.reg.lam, several.lam, layer.scale = 0.1 * step, (0.2 * step, 0.3 * step), 1.0 + step
        x, y = (normal(4, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
        found = function(x)
        found.backward()
        penalty = layer.penalty
        expected = loss(y)
        expected.backward()
        assert torch.equal(penalty, layer.penalty)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(x.grad, y.grad)
    assert compiled.graphs == 1


def test_layers_that_differ_in_lam_share_a_graph(compiled):
    regs = [ActivityRegularization.l2(0.1 * k) for k in range(6)]
    function = compiled(lambda reg, x: reg.penalty(x))
    for reg in regs:
        assert function(reg, torch.ones(4)) == reg.penalty(torch.ones(4))
    assert compiled.graphs == 1


def test_the_backend_of_compiled_code_is_chosen_when_it_runs(compiled, caplog):
    reg = ActivityRegularization.l1(0.5)
    function = compiled(reg.penalty)
    for name in ("numba", "numpy"):
        caplog.clear()
        with use_backend(name), caplog.at_level(logging.DEBUG, "actreg_dispatch"):
            assert function(torch.ones(3)) == 1.5
        assert f"backend {name} " in caplog.text
    assert compiled.graphs == 1


def test_compiled_code_refuses_what_is_refused_otherwise(compiled):
    reg = ActivityRegularization.l1(0.5)
    gradients = torch.zeros(4)
    with pytest.raises(ValueError, match=r"gradients have shape \(4,\) but activations have"):
        compiled(lambda x, g: reg.apply(x, g))(torch.ones(3), gradients)
    assert not gradients.any()
    with pytest.raises(TypeError, match=r"int64.*float32"):
        compiled(reg.penalty)(torch.ones(3, dtype=torch.int64))
    reg.lam = 1e300
    with pytest.raises(ValueError, match=r"lam=1e\+300 is too large"):
        compiled(reg.penalty)(torch.ones(3))


def test_compiled_code_breaks_its_graph_for_transforms():
    torch._dynamo.reset()
    reg, x = ActivityRegularization.l2(0.5), normal(3, 4)
    layer = ActivityRegularizer(reg)
    each = torch.func.vmap(torch.func.grad(lambda x: layer(x).square().sum() + reg.penalty(x)))
    torch.testing.assert_close(torch.compile(each, backend="aot_eager")(x), each(x))
    torch._dynamo.reset()


def test_the_first_call_may_be_a_compiled_one(python):
    code = """
import torch
from actreg_dispatch import ActivityRegularization
reg = ActivityRegularization.l1(0.5, backend="numpy")
function = torch.compile(lambda x: reg.penalty(x), backend="eager", fullgraph=True)
print(function(torch.ones(3)).item(), function(torch.nn.Parameter(torch.ones(3))).item())
"""
    assert python("-W", "ignore", "-c", code).stdout == "1.5 1.5\n"


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_generated_code_calls_the_library():
    torch._dynamo.reset()
    compiler, layer = Compiler("inductor"), ActivityRegularizer(ActivityRegularization.l1(0.5))
    reg = ActivityRegularization.l2(0.3)

    def loss(x):
        hidden = layer(x * 2)
        return hidden.square().sum() + reg.penalty(hidden)

    function, gradients = compiler(loss), []
    for call in (function, loss):
        x = normal(4, 3).requires_grad_()
        call(x).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()


class Exported(torch.nn.Module):
    """A model whose loss has a penalty, and in which a layer adds that of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 4)
        self.layer = ActivityRegularizer(ActivityRegularization.l2(0.3), scale=2.0)
        self.reg = ActivityRegularization.l1(0.2)

    def forward(self, x):
        hidden = self.layer(self.linear(x))
        return hidden.square().sum() + self.reg.penalty(hidden)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_trains_with_the_lam_of_its_time(training, strict):
    model, x = Exported().train(training), normal(5, 3)
    model.layer.penalty = seen = torch.ones(())
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=strict)
    assert model.layer.penalty is seen
    expected = model(x)
    expected.backward()
    model.reg.lam = model.layer.reg.lam = 5.0
    room = io.BytesIO()
    torch.export.save(program, room)
    room.seek(0)
    module = torch.export.load(room).module()
    found = module(x)
    found.backward()
    assert torch.equal(found, expected)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad)
    assert module(normal(7, 3)).isfinite()
    layer = "actreg_dispatch.pass_through.default"
    assert (layer in str(program.graph)) is training
    assert "actreg_dispatch.penalty.default" in str(program.run_decompositions().graph)


def test_an_exported_model_has_second_derivatives():
    found = []
    for function in (torch.export.export(Exported(), (normal(5, 3),)).module(), Exported()):
        x = normal(5, 3).requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_symbolic_tracing_keeps_the_layer_whole():
    layer = ActivityRegularizer(ActivityRegularization.l1(0.5))
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Tanh(), layer, torch.nn.ReLU()))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 3
    layer.reg.lam = 0.25  # is not traced
    leaf = torch.ones(2, requires_grad=True)
    traced(leaf).backward(torch.zeros(2))
    assert leaf.grad.all()
    assert layer.penalty == 0.5 * leaf.tanh()[0]


def samples():
    """Return arguments of every operator."""
    x, one = normal(3, 4), torch.tensor(2.0, dtype=torch.float64)
    leaf, lam = x.clone().requires_grad_(), torch.tensor([0.3], dtype=torch.float64)
    options = lam, "l2", None, None, "sum", None
    w, mask = x[0].abs().requires_grad_(), x > 0
    return {
        "penalty": [
            (leaf, *options, None),
            (x.T.bfloat16(), *options, None),
            (leaf, lam, "l1", None, None, "mean", "numpy", None),
            (leaf, lam, "hoyer", None, None, "batch", None, w),
            (leaf, lam, "l2", [-1], 0.0, "0 1", None, w),
            (leaf, *options, mask),
        ],
        "gradient": [
            (x, one, None, *options, None),
            (x.T, one, x.T.contiguous(), *options, None),
            (x, one, x.clone(), *options, w.detach()),
            (x, one, None, *options, mask),
        ],
        "update": [
            (x, x.clone(), 1.5, overwrite, *options, weights)
            for overwrite in (False, True)
            for weights in (None, w.detach(), mask)
        ],
        "pass_through": [
            (leaf, one, *options, None),
            (x, one, *options, None),
            (leaf, one, *options, w),
            (x, one, *options, w),
            (leaf, one, *options, mask),
        ],
    }


@pytest.mark.parametrize("name", samples())
def test_operators_are_what_they_say(name):
    for arguments in samples()[name]:
        operator = getattr(torch.ops.actreg_dispatch, name).default
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


# The layer.


@norms
@dtypes
def test_the_layer_adds_what_apply_adds(norm, dtype):
    reg = ActivityRegularization(0.1, norm)
    layer = ActivityRegularizer(reg, scale=3.0)
    activations = normal(7, 11, dtype=dtype).requires_grad_()
    incoming = normal(7, 11, dtype=dtype, seed=1)
    before, expected = incoming.clone(), incoming.clone()
    penalty = reg.apply(activations, expected, scale=3.0)
    passed = layer(activations)
    assert passed.data_ptr() == activations.data_ptr()
    assert torch.equal(passed, activations)
    passed.backward(incoming)
    assert bits(activations.grad) == bits(expected)
    assert bits(incoming) == bits(before)
    assert bits(layer.penalty) == bits(penalty)
    assert not layer.penalty.requires_grad


@norms
def test_the_layer_is_the_penalty_in_the_loss(norm):
    def network(*layers):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 9), torch.nn.ReLU(inplace=True), *layers, torch.nn.Linear(9, 2)
        ).double()

    ours = network(ActivityRegularizer(ActivityRegularization(0.3, norm)))
    theirs = network()
    x = normal(8, 6, dtype=torch.float64)
    ours(x).square().sum().backward()
    hidden = theirs[:2](x)
    (theirs[2](hidden).square().sum() + formula(norm)(hidden)).backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(ours[2].penalty, formula(norm)(hidden.detach()))


def test_the_layer_in_evaluation_mode_and_under_no_grad():
    layer = ActivityRegularizer(ActivityRegularization.l1(0.5))
    leaf = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert layer(leaf) is leaf
    assert layer.penalty == 1.0
    plain = leaf.detach()
    assert layer(plain * 2.0).tolist() == [2.0, 2.0]
    assert layer.penalty == 2.0
    layer.eval()
    assert layer(leaf) is leaf
    assert layer.penalty is None
    layer(leaf).sum().backward()
    assert leaf.grad.tolist() == [1.0, 1.0]


def test_the_scale_of_the_layer_is_that_of_the_forward_pass_and_checked():
    layer, leaf = ActivityRegularizer(ActivityRegularization.l1(0.5)), torch.ones(2)
    leaf.requires_grad_()
    layer.scale = 4
    passed = layer(leaf)
    layer.scale = math.inf
    passed.backward(torch.zeros(2))
    assert leaf.grad.tolist() == [2.0, 2.0]
    layer(leaf).backward(torch.zeros(2))
    assert leaf.grad.tolist() == [math.inf] * 2
    with pytest.raises(TypeError, match=r"scale.*pass a real number"):
        layer.scale = "2"
    assert layer.scale == math.inf
    with pytest.raises(TypeError, match=r"reg=0\.5.*pass an ActivityRegularization"):
        ActivityRegularizer(0.5)


def test_a_layer_called_twice_adds_both_gradients():
    layer, leaf = ActivityRegularizer(ActivityRegularization.l1(0.5)), torch.ones(2)
    leaf.requires_grad_()
    (layer(leaf) + layer(leaf * 3.0)).backward(torch.zeros(2))
    assert leaf.grad.tolist() == [0.5 + 1.5] * 2
    assert layer.penalty == 3.0


def test_the_layer_has_no_state_but_is_copied_whole():
    layer = ActivityRegularizer(ActivityRegularization.l2(0.5, epsilon=0.0), scale=2.0)
    layer(torch.tensor([3.0, 4.0], requires_grad=True))
    assert not layer.state_dict()
    assert not list(layer.parameters())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.reg == layer.reg
        assert other.reg is not layer.reg
        assert (other.scale, other.penalty.item()) == (2.0, 2.5)
        leaf = torch.tensor([3.0, 4.0], requires_grad=True)
        other(leaf).backward(torch.zeros(2))
        torch.testing.assert_close(leaf.grad, torch.tensor([0.6, 0.8]))
    assert repr(layer) == "ActivityRegularizer(" + repr(layer.reg) + ", scale=2.0)"
    layer.scale = 1.0
    assert repr(layer) == "ActivityRegularizer(ActivityRegularization(0.5, 'l2', epsilon=0.0))"


def test_pytorch_refuses_to_change_what_passed_in_place():
    leaf = torch.ones(2, requires_grad=True)
    passed = ActivityRegularizer(ActivityRegularization.l1(0.5))(leaf * 2.0)
    with pytest.raises(RuntimeError, match="modified inplace"):
        passed.relu_()


def test_activations_changed_after_the_layer_are_noticed():
    hidden = torch.ones(2, requires_grad=True) * 2.0
    passed = ActivityRegularizer(ActivityRegularization.l1(0.5))(hidden)
    hidden.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified inplace"):
        passed.sum().backward()


def test_automatic_mixed_precision():
    torch.manual_seed(0)
    reg = ActivityRegularization.l2_squared(0.25)
    layer, linear = ActivityRegularizer(reg), torch.nn.Linear(5, 4)
    x, seen = normal(3, 5), []
    with torch.autocast("cpu", torch.bfloat16):
        hidden = linear(x)
        hidden.register_hook(seen.append)
        (layer(hidden).float().sum() + reg.penalty(hidden)).backward()
    assert hidden.dtype == torch.bfloat16
    assert layer.penalty.dtype == torch.float32
    gradients = torch.ones(3, 4, dtype=torch.bfloat16)
    reg.apply(hidden, gradients)
    gradients += reg.penalty_and_gradient(hidden)[1]
    assert torch.equal(seen[0], gradients)
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_adds_the_gradient_once(reentrant):
    layer = ActivityRegularizer(ActivityRegularization.l2(0.5))
    reg, gradients, penalties = layer.reg, [], []
    linear = torch.nn.Linear(4, 4)

    def block(x):
        hidden = layer(linear(x).tanh())
        return hidden.square().sum() + reg.penalty(hidden)

    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        x = normal(3, 4).requires_grad_()
        run(x).backward()
        gradients.append(x.grad)
        penalties.append(layer.penalty)
    assert torch.equal(*gradients)
    assert torch.equal(*penalties)


def test_the_layer_has_second_derivatives_and_gradients_of_each_sample():
    layer = ActivityRegularizer(ActivityRegularization.l2(0.3), scale=2.0)
    x = normal(3, 4, dtype=torch.float64)
    assert gradgradcheck(layer, (x.clone().requires_grad_(),))
    each = torch.func.vmap(torch.func.grad(lambda x: layer(x).square().sum()))(x)
    expected = torch.func.vmap(torch.func.grad(lambda x: x.square().sum() + 0.6 * x.norm()))(x)
    torch.testing.assert_close(each, expected)
    assert layer.penalty is None


def test_the_layer_has_no_place_in_forward_mode():
    layer, x = ActivityRegularizer(ActivityRegularization.l2(0.3)), torch.ones(3)
    with pytest.raises(NotImplementedError, match=r"add actreg_dispatch\.torch\.penalty"):
        torch.func.jvp(layer, (x,), (x,))


@norms
@pytest.mark.parametrize("as_layer", [False, True])
def test_a_network_learns_the_same_as_with_the_plain_expression(norm, as_layer):
    reg = ActivityRegularization(0.01, norm)
    x = normal(64, 10, dtype=torch.float64)

    def train(ours):
        torch.manual_seed(0)
        encoder, decoder = torch.nn.Linear(10, 16).double(), torch.nn.Linear(16, 10).double()
        layer = ActivityRegularizer(reg) if ours and as_layer else torch.nn.Identity()
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.01)
        losses = []
        for step in range(60):
            batch = x[step % 4 :: 4]
            hidden = layer(encoder(batch).relu())
            loss = (decoder(hidden) - batch).square().sum()
            if not ours:
                loss = loss + formula(norm, 0.01)(hidden)
            elif not as_layer:
                loss = loss + reg.penalty(hidden)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() + (layer.penalty.item() if ours and as_layer else 0.0))
        return losses, [encoder.weight.detach(), decoder.weight.detach()]

    (ours, our_weights), (theirs, their_weights) = train(True), train(False)
    assert ours[-1] < 0.5 * ours[0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_weights, their_weights)


# Devices. No tensor of a CUDA device is at hand where PyTorch is built for CPUs, so a stand-in has
# one's memory, which is CuPy's, and says what such a tensor would say. On a GPU, PyTorch's side of
# it, its streams and allocator, remains to be seen.


class OnDevice(torch.Tensor):
    """A tensor that says it lies on a CUDA device, at the address of a CuPy array."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda", 0)

    @classmethod
    def at(cls, array):
        """Return the stand-in for a tensor of the dtype and strides of a CuPy array."""
        dtype = getattr(torch, array.dtype.name)
        steps = [step // array.itemsize for step in array.strides]
        tensor = torch.empty_strided(array.shape, steps, dtype=dtype).as_subclass(cls)
        tensor.array = array
        return tensor

    def detach(self):
        return self

    def data_ptr(self):
        return self.array.data.ptr


@pytest.fixture
def on_device(monkeypatch):
    """Let stand-ins pass for plain tensors."""
    monkeypatch.setattr(memory, "_PLAIN_CLASSES", (*memory._PLAIN_CLASSES, OnDevice))
    return OnDevice


def test_a_device_without_cupy_is_unavailable(on_device):
    if not registry.why_unavailable("cupy"):
        pytest.skip("CuPy can be used here")
    array = types.SimpleNamespace(
        dtype=np.dtype(np.float32),
        strides=(4,),
        itemsize=4,
        shape=(3,),
        data=types.SimpleNamespace(ptr=1),
    )
    tensor = on_device.at(array)
    with pytest.raises(BackendUnavailableError, match=r"device cuda:0 of the tensors.*CuPy"):
        ActivityRegularization.l1(0.5).penalty(tensor)
    with pytest.raises(ValueError, match=r"gradients are on cpu but activations on cuda:0"):
        ActivityRegularization.l1(0.5).apply(tensor, torch.ones(3))


class Stream:
    """A stream as PyTorch has it."""

    def __init__(self, stream):
        self.cuda_stream = stream.ptr

    def __cuda_stream__(self):
        return 0, self.cuda_stream


class OlderStream:
    """A stream as PyTorch had it before there was a protocol."""

    def __init__(self, stream):
        self.cuda_stream = stream.ptr


@pytest.fixture(params=[(Stream, False), (Stream, True), (OlderStream, False), (OlderStream, True)])
def stream(cupy, monkeypatch, request):
    """Return a stream that PyTorch says is its current one, and give tensors it makes memory."""
    kind, default = request.param
    current = cupy.cuda.Stream.null if default else cupy.cuda.Stream(non_blocking=True)
    told = kind(current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: told)
    empty = torch.empty

    def empty_on_device(*shape, dtype, device):
        if device != OnDevice.device:
            return empty(*shape, dtype=dtype, device=device)
        return OnDevice.at(cupy.empty(shape[0], str(dtype).removeprefix("torch.")))

    monkeypatch.setattr(torch, "empty", empty_on_device)
    return current


@norms
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["transposed", "offset", "empty"])
def test_memory_of_a_device_is_updated_in_place(cupy, on_device, stream, norm, dtype, layout):
    view = {
        "transposed": lambda a: a.T,
        "offset": lambda a: a[1:, ::2],
        "empty": lambda a: a[:0],
    }[layout]
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(dtype)
    room, start = cupy.asarray(values), cupy.asarray(values[::-1].copy())
    activations, gradients = on_device.at(view(room)), on_device.at(view(start))
    reg = ActivityRegularization(0.1, norm)
    x, g = view(values), view(values[::-1].copy())
    expected = reg.apply(x, g, scale=3.0)
    for penalty in (reg.apply(activations, gradients, scale=3.0), reg.penalty(activations)):
        assert penalty.is_cuda
        assert penalty.array.get().tobytes() == expected.tobytes()
    assert view(start).get().tobytes() == g.tobytes()
    assert room.get().tobytes() == values.tobytes()
    total = reg.partial_sum(activations)
    assert reg.finish(total) == expected
    start[...] = 0
    reg.add_gradient(activations, gradients, total)
    added = view(start).get()
    out = on_device.at(cupy.full_like(view(start), 7))
    assert reg.penalty_and_gradient(activations, out)[1] is out
    assert out.array.get().tobytes() == added.tobytes()
    assert added.tobytes() == reg.penalty_and_gradient(x)[1].tobytes()


@norms
def test_an_explicit_choice_moves_data_and_brings_it_back(cupy, on_device, stream, norm):
    values, start = np.float32([1.0, -2.0, 0.0]), np.float32([1.0, 1.0, 1.0])
    expected = ActivityRegularization(0.1, norm).apply(values, start)

    gradients = torch.ones(3)
    found = ActivityRegularization(0.1, norm, backend="cupy").apply(
        torch.from_numpy(values), gradients
    )
    assert found.is_cpu
    assert (found.numpy().tobytes(), bits(gradients)) == (expected.tobytes(), start.tobytes())

    gradients = cupy.ones(3, "float32")
    found = ActivityRegularization(0.1, norm, backend="numpy").apply(
        on_device.at(cupy.asarray(values)), on_device.at(gradients)
    )
    assert found.is_cuda
    assert found.array.get().tobytes() == expected.tobytes()
    assert gradients.get().tobytes() == start.tobytes()


def test_kernels_go_to_the_current_stream_of_pytorch(cupy, on_device, stream, monkeypatch):
    from actreg_dispatch.backends import cuda

    seen, launch = [], cuda.launch

    def spy(*arguments, **options):
        seen.append(cupy.cuda.get_current_stream().ptr)
        launch(*arguments, **options)

    monkeypatch.setattr(cuda, "launch", spy)
    activations = on_device.at(cupy.ones(3, "float32"))
    gradients = on_device.at(cupy.zeros(3, "float32"))
    reg = ActivityRegularization.l2(0.5)
    with cupy.cuda.Stream(non_blocking=True) as before:
        reg.apply(activations, gradients)
        reg.penalty(activations)
        reg.add_gradient(activations, gradients, reg.partial_sum(activations))
        reg.penalty_and_gradient(activations, gradients)
        assert cupy.cuda.get_current_stream() == before
    assert set(seen) == {stream.ptr}


def test_tensors_of_a_device_are_counted(cupy, on_device, stream):
    values = np.float32([[1.0, 0.0], [-3.0, 0.0]])
    x, g = on_device.at(cupy.asarray(values)), on_device.at(cupy.zeros((2, 2), np.float32))
    reg, statistics = ActivityRegularization.l2(0.3), ActivationStatistics(per_feature=True)
    reg.penalty(x, statistics=statistics)
    reg.apply(x, g, statistics=statistics)
    reg.penalty(torch.from_numpy(values), statistics=statistics)
    assert (statistics.elements, statistics.nonzero, statistics.largest) == (12, 6, 3.0)
    assert statistics.active.tolist() == [6, 0]


def test_a_view_of_a_device_keeps_the_tensor_alive(cupy, on_device):
    import gc
    import weakref

    tensor = on_device.at(cupy.arange(3, dtype="float32"))
    alive = weakref.ref(tensor)
    view = memory.view(tensor)
    del tensor
    gc.collect()
    assert alive() is not None
    assert view.get().tolist() == [0.0, 1.0, 2.0]
    del view
    gc.collect()
    assert alive() is None


def test_the_module_is_found_by_its_name():
    assert actreg_dispatch.torch is tensors
    assert registry.library_of(torch.nn.Parameter) is tensors


# Many layers.


@norms
@dtypes
def test_all_layers_at_once_are_those_of_a_loop(norm, dtype):
    reg = ActivityRegularization(0.1, norm)
    layers = {
        str(k): normal(*shape, dtype=dtype) for k, shape in enumerate([(5,), (), (0,), (3, 4)])
    }
    alone = {name: torch.ones_like(x) for name, x in layers.items()}
    expected = {name: reg.apply(x, alone[name], scale=2.0) for name, x in layers.items()}
    together = {name: torch.ones_like(x) for name, x in layers.items()}
    versions = [g._version for g in together.values()]
    total, penalties = reg.apply_all(layers, together, scale=2.0)
    assert all(bits(penalties[name]) == bits(expected[name]) for name in layers)
    assert all(bits(together[name]) == bits(alone[name]) for name in layers)
    assert total.dtype == penalties["0"].dtype
    assert total.shape == ()
    assert [g._version for g in together.values()] == [version + 1 for version in versions]


def test_layers_of_which_one_is_wrong_are_all_left_alone():
    reg, tensor = ActivityRegularization(0.1), torch.ones(3)
    for wrong, error, message in (
        ((tensor, torch.ones(2)), ValueError, r"gradients\[1\] have shape \(2,\)"),
        ((tensor, np.ones(3, np.float32)), MixedArraysError, r"gradients\[1\] are a numpy.ndarray"),
        ((tensor, torch.ones(3).double()), TypeError, r"gradients\[1\] have dtype torch.float64"),
    ):
        gradients = [torch.zeros(3), wrong[1]]
        with pytest.raises(error, match=message):
            reg.apply_all([tensor, wrong[0]], gradients)
        assert not gradients[0].any()
    with pytest.raises(MixedArraysError, match=r"activations\[1\] are a torch.Tensor among"):
        reg.apply_all([np.ones(3), tensor], [np.zeros(3), torch.zeros(3)])


# Weights and statistics.


@norms
@dtypes
def test_weights_give_the_bits_that_they_give_arrays(norm, dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 50).to(dtype)
    for weights in (torch.rand(50).to(dtype), torch.rand(6, 1) > 0.5, torch.tensor(2.0).to(dtype)):
        reg = ActivityRegularization(0.3, norm, reduction="batch")
        arrays = [memory.view(memory.plain("it", each, masks=True)) for each in (x, weights)]
        expected = reg.penalty_and_gradient(arrays[0], weights=arrays[1])
        leaf, g = x.clone().requires_grad_(), torch.zeros_like(x)
        loss = reg.penalty(leaf, weights=weights)
        loss.backward()
        assert loss.item() == expected[0] == reg.apply(x, g, weights=weights).item()
        out = torch.ones_like(x)
        assert reg.penalty_and_gradient(x, out, weights=weights)[0] == loss
        again, pieces = reg.penalty_and_gradient(x, weights=weights)[1], torch.zeros_like(x)
        total = reg.partial_sum(x, weights=weights)
        count = int(weights.sum()) if weights.dtype == torch.bool else 6
        reg.add_gradient(x, pieces, total, count=count, weights=weights)
        (layer,) = reg.apply_all([x], [every := torch.zeros_like(x)], weights=[weights]).layers
        assert layer == loss
        for found in (leaf.grad, g, out, again, pieces, every):
            assert memory.view(found).tobytes() == expected[1].tobytes()


def test_the_gradient_by_weights_is_what_each_term_adds():
    for norm, expected in (("l1", [1.5, 2.0]), ("l2_squared", [4.5, 8.0]), ("l2", [0.45, 0.8])):
        x, w = torch.tensor([3.0, -4.0], requires_grad=True), torch.ones(2, requires_grad=True)
        reg = ActivityRegularization(0.5, norm)
        reg.penalty(x, weights=w).backward()
        torch.testing.assert_close(w.grad, torch.tensor(expected))
        assert bits(x.grad) == bits(reg.penalty_and_gradient(x, weights=w)[1])


def test_weights_of_0_have_the_gradient_of_the_formula_unless_it_is_not_finite():
    reg, w = ActivityRegularization(0.5), torch.tensor([2.0, 0.0, 0.0], requires_grad=True)
    (2 * reg.penalty(torch.tensor([1.0, 3.0, math.nan]), weights=w)).backward()
    assert w.grad.tolist() == [1.0, 3.0, 0.0]
    for norm in ActivityNorm:
        w.grad = None
        ActivityRegularization(0.5, norm).penalty(torch.zeros(3), weights=w).backward()
        assert w.grad.tolist() == [0.0] * 3
    empty = torch.ones(0, requires_grad=True)
    reg.penalty(torch.ones(0), weights=empty).backward()
    assert empty.grad.shape == (0,)


@norms
@pytest.mark.parametrize("reduction", ["sum", "batch"])
@pytest.mark.parametrize("shape", [(3, 2), (2,), (3, 1)], ids=str)
def test_derivatives_by_activations_and_weights_of_both_orders(norm, reduction, shape):
    reg = ActivityRegularization(0.3, norm, reduction=reduction)
    x = normal(3, 2, dtype=torch.float64).requires_grad_()
    w = (normal(*shape, dtype=torch.float64, seed=1).abs() + 0.1).requires_grad_()

    def penalty(x, w):
        return reg.penalty(x, weights=w)

    assert gradcheck(penalty, (x, w), check_forward_ad=True)
    assert gradgradcheck(penalty, (x, w), check_fwd_over_rev=True)
    assert gradgradcheck(ActivityRegularizer(reg, scale=2.0), (x, w))


@norms
@pytest.mark.parametrize("reduction", ["sum", "mean", "batch"])
def test_derivatives_of_what_a_mask_keeps(norm, reduction):
    reg = ActivityRegularization(0.3, norm, reduction=reduction)
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    x = normal(3, 2, dtype=torch.float64).requires_grad_()
    assert gradgradcheck(lambda x: reg.penalty(x, weights=mask), (x,), check_fwd_over_rev=True)
    hessians = []
    for values in (x.detach(), x.detach().where(mask, math.nan)):
        at = values.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(reg.penalty(at, weights=mask), at, create_graph=True)
        assert not gradient[~mask].any()
        hessians += torch.autograd.grad(gradient[mask].square().sum(), at)
    assert hessians[0].isfinite().all()
    assert torch.equal(*hessians)


def test_transforms_of_functions_take_weights():
    func, reg = torch.func, ActivityRegularization(0.3, "l2")
    x, w = normal(4, 3, 5).double(), normal(5, seed=1).double().abs() + 0.1

    def expression(x, w):
        return 0.3 * (w * x * x).sum().sqrt()

    def penalty(x, w):
        return reg.penalty(x, weights=w)

    transforms = {
        "vmap of grad": lambda f: func.vmap(func.grad(f, (0, 1)), (0, None)),
        "vmap over weights": lambda f: lambda x, w: func.vmap(f, (None, 0))(x, w[:, None]),
        "hessian": lambda f: func.hessian(f, (0, 1)),
        "forward": lambda f: func.jacfwd(f, (0, 1)),
    }
    for name, transform in transforms.items():
        found, expected = transform(penalty)(x, w), transform(expression)(x, w)
        torch.testing.assert_close(found, expected, msg=lambda m, name=name: f"{name}: {m}")
    with pytest.raises(NotImplementedError, match=r"statistics cannot be counted .* without stat"):
        func.grad(lambda x: reg.penalty(x, statistics=ActivationStatistics()))(x)


def test_weights_are_tensors_where_the_activations_are():
    reg, x, g = ActivityRegularization(0.3), torch.ones(3), torch.zeros(3)
    for weights, error, message in (
        (np.ones(3, np.float32), MixedArraysError, "weights are a numpy.ndarray, not a torch"),
        (torch.ones(3, dtype=torch.int32), TypeError, "weights have dtype torch.int32; convert"),
        (torch.ones(4), ValueError, "weights have shape"),
        (-torch.ones(3), ValueError, "weights have -1.0 at"),
        (g, ValueError, "weights share memory with the gradients"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            reg.apply(x, g, weights=weights)
    with pytest.raises(TypeError, match=r"activations have dtype torch\.bool"):
        reg.penalty(torch.ones(3, dtype=torch.bool))
    assert not g.any()


def test_tensors_are_counted():
    statistics = ActivationStatistics(per_feature=True)
    reg, x = ActivityRegularization(0.3), torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    leaf = x.clone().requires_grad_()
    assert reg.penalty(leaf, statistics=statistics).requires_grad
    reg.apply(x, torch.zeros_like(x), statistics=statistics)
    reg.apply_all([x], [torch.zeros_like(x)], statistics=statistics)
    assert (statistics.elements, statistics.nonzero, statistics.largest) == (12, 6, 3.0)
    assert statistics.active.tolist() == [6, 0]


def weightings():
    """Return weights that are learnt, given for each feature, and a mask of tokens."""
    return {
        "learnt": (normal(4, 5, seed=1).abs() + 0.1).requires_grad_(),
        "features": normal(5, seed=1).abs(),
        "mask": normal(4, 1, seed=1) > 0,
    }


@norms
@dtypes
def test_the_layer_adds_what_apply_adds_with_weights(norm, dtype):
    reg = ActivityRegularization(0.1, norm, reduction="batch")
    layer, incoming = ActivityRegularizer(reg, scale=3.0), normal(4, 5, dtype=dtype, seed=2)
    for weights in weightings().values():
        if weights.is_floating_point():
            weights = weights.detach().to(dtype).requires_grad_(weights.requires_grad)
        activations, expected = normal(4, 5, dtype=dtype).requires_grad_(), incoming.clone()
        penalty = reg.apply(activations, expected, scale=3.0, weights=weights)
        layer(activations, weights).backward(incoming)
        assert bits(activations.grad) == bits(expected)
        assert bits(layer.penalty) == bits(penalty)
        if weights.requires_grad:
            found, weights.grad = weights.grad, None
            (3.0 * reg.penalty(activations, weights=weights)).backward()
            torch.testing.assert_close(found, weights.grad)


def test_weights_that_are_detached_have_no_gradient_of_the_layer():
    layer, x = ActivityRegularizer(ActivityRegularization.l1(0.5)), torch.ones(2, 3)
    w = torch.ones(3, requires_grad=True)
    assert not layer(x, w.detach()).requires_grad
    layer(x, w).sum().backward()
    assert w.grad.tolist() == [1.0] * 3
    layer.eval()
    assert layer(x, w) is x
    assert layer.penalty is None


@norms
@pytest.mark.parametrize("weights", weightings())
def test_compiled_weights_give_the_bits_that_they_give_otherwise(compiled, norm, weights):
    reg = ActivityRegularization(0.3, norm, reduction="batch")
    layer = ActivityRegularizer(reg, scale=3.0)

    def step(x, gradients, w):
        loss = 2 * reg.penalty(x, weights=w) + layer(x * 1.0, w).square().sum()
        return loss, reg.apply(x, gradients, weights=w), *reg.penalty_and_gradient(x, weights=w)

    results = []
    for function in (compiled(step), step):
        x, gradients = normal(4, 5).requires_grad_(), torch.ones(4, 5)
        w = weightings()[weights]
        loss, *others = function(x, gradients, w)
        loss.backward()
        assert not any(each.requires_grad for each in others)
        results.append([loss, *others, gradients, layer.penalty, x.grad, w.grad])
    *found, by_weights = results[0]
    *expected, expected_by_weights = results[1]
    assert list(map(bits, found)) == list(map(bits, expected))
    torch.testing.assert_close(by_weights, expected_by_weights)
    assert compiled.graphs == 1
    assert sorted(compiled.operators) == ["pass_through", *["penalty"] * 2, *["update"] * 2]


def test_compiled_weights_of_any_length_and_their_errors(compiled):
    reg = ActivityRegularization(0.3, "l2", reduction="mean")
    function = compiled(lambda x, w: reg.penalty(x, weights=w))
    for length in (4, 6, 9):
        x, w = normal(length, 5), torch.ones(5, requires_grad=True)
        function(x, w).backward()
        found, w.grad = w.grad, None
        reg.penalty(x, weights=w).backward()
        torch.testing.assert_close(found, w.grad)
    assert compiled.graphs == 2  # of the first length, and of any
    gradients = torch.zeros(9, 5)
    for weights, message in ((torch.ones(4), "weights have shape"), (-w, "weights have -1.0 at")):
        with pytest.raises(ValueError, match=message):
            function(x, weights)
        with pytest.raises(ValueError, match=message):
            compiled(lambda x, g, w: reg.apply(x, g, weights=w))(x, gradients, weights)
    assert not gradients.any()


class Weighted(torch.nn.Module):
    """A model whose activations are weighed by the norms of a decoder, and by a mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = ActivityRegularizer(ActivityRegularization.l1(0.5), scale=2.0)
        self.decoder = torch.nn.Linear(4, 3)

    def forward(self, x, mask):
        hidden = self.layer(x, self.decoder.weight.norm(dim=0))
        return self.decoder(self.layer(hidden, weights=mask)).square().sum()


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_keeps_its_weights(strict):
    model, x, mask = Weighted(), normal(5, 4), normal(5, 1, seed=1) > 0
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(model, (x, mask), dynamic_shapes=(batch, batch), strict=strict)
    module, found = program.module(), []
    for function in (module, model):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, mask)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + gradient.square().sum()).backward()
        found.append([loss, gradient, leaf.grad, function.get_parameter("decoder.weight").grad])
    torch.testing.assert_close(*found)
    assert bits(found[0][1]) == bits(found[1][1])
    assert module(normal(7, 4), torch.ones(7, 1, dtype=torch.bool)).isfinite()


def test_symbolic_tracing_keeps_a_layer_with_weights_whole():
    model, x, mask = Weighted(), normal(5, 4), normal(5, 1, seed=1) > 0
    traced = torch.fx.symbolic_trace(model)
    calls = [node for node in traced.graph.nodes if node.target == "layer"]
    assert [(node.op, len(node.args), list(node.kwargs)) for node in calls] == [
        ("call_module", 1, ["weights"])
    ] * 2
    gradients = []
    for function in (model, traced):
        (gradient,) = torch.autograd.grad(function(x, mask), model.decoder.weight)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_compiled_code_counts_outside_of_its_graphs():
    reg, statistics = ActivityRegularization(0.3), ActivationStatistics()

    def count(x):
        penalty = reg.penalty(x + 1, statistics=statistics)
        return penalty + reg.apply(x * 2, torch.zeros_like(x), statistics=statistics)

    torch._dynamo.reset()
    assert torch.compile(count, backend="eager")(torch.ones(2, 3)) == count(torch.ones(2, 3))
    assert statistics.elements == 24
    torch._dynamo.reset()
    for method in (
        lambda x: reg.penalty(x, statistics=statistics),
        lambda x: reg.apply(x, torch.zeros_like(x), statistics=statistics),
    ):
        whole = torch.compile(method, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="counted outside of graphs: leave"):
            whole(torch.ones(2, 3))
    assert statistics.elements == 24
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_do_not_count(strict):
    class Counting(torch.nn.Module):
        def forward(self, x):
            return ActivityRegularization(0.3).penalty(x, statistics=statistics)

    statistics = ActivationStatistics()
    with pytest.raises(
        (NotImplementedError, torch._dynamo.exc.Unsupported),
        match=r"statistics cannot be counted in an exported program; leave them out",
    ):
        torch.export.export(Counting(), (torch.ones(3),), strict=strict)
    assert not statistics.elements
