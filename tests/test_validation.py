"""Bad input gets a clear error before anything is written."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from actreg_dispatch import ActivityNorm, ActivityRegularization, validation

norms = pytest.mark.parametrize("norm", ActivityNorm, ids=lambda norm: norm.value)


def refuse(error, match, activations, gradients, norm="l1", **options):
    """Assert the error of ``apply`` and that no byte of the gradients changed."""
    before = np.array(gradients, copy=True).tobytes() if hasattr(gradients, "dtype") else None
    with pytest.raises(error, match=match):
        ActivityRegularization(0.1, norm, **options).apply(activations, gradients)
    if before is not None:
        assert np.array(gradients, copy=True).tobytes() == before


@norms
@pytest.mark.parametrize("shape", [(), (2,), (3, 1), (1, 3)])
def test_shapes_must_be_equal(norm, shape):
    match = r"gradients have shape .* but activations have \(3,\).*nothing is broadcast"
    refuse(ValueError, match, np.ones(3), np.ones(shape), norm)


def test_gradients_must_be_writable():
    gradients = np.ones(3)
    gradients.flags.writeable = False
    refuse(ValueError, r"gradients are read-only; pass .*gradients\.copy", np.ones(3), gradients)


OVERLAPPING = {
    "broadcast": as_strided(np.ones(1), (6,), (0,)),
    "broadcast rows": as_strided(np.ones(3), (2, 3), (0, 8)),
    "sliding window": as_strided(np.ones(8), (3, 4), (8, 16)),
    "backwards": as_strided(np.ones(8)[::-1], (3, 4), (-8, -16)),
    "half an element": as_strided(np.ones(8), (6,), (4,)),
    "three axes": as_strided(np.ones(99), (2, 3, 4), (24, 8, 16)),
}


@pytest.mark.parametrize("gradients", OVERLAPPING.values(), ids=OVERLAPPING)
def test_gradients_must_not_overlap_themselves(gradients):
    match = r"gradients overlap themselves.*pass a copy of gradients"
    refuse(ValueError, match, np.ones(gradients.shape), gradients)


def test_strides_that_interlock_without_overlap_are_legal():
    room = np.zeros(60)
    # Addresses 3i + 5j with i < 5, j < 3 are all different, though no axis clears the other.
    gradients = as_strided(room, (5, 3), (24, 40))
    assert float(ActivityRegularization.l1(1.0).apply(np.ones((5, 3)), gradients)) == 15.0
    assert room.sum() == 15.0


SHARING = {
    "the same array": lambda a: (a, a),
    "a view": lambda a: (a, a[:]),
    "the other way round": lambda a: (a, a[::-1]),
    "shifted by one": lambda a: (a[:-1], a[1:]),
    "crossing": lambda a: (a[::2][:5], a[:5]),
    "transposed": lambda a: (a.reshape(4, 5)[:4, :4], a.reshape(4, 5)[:4, :4].T),
}


@norms
@pytest.mark.parametrize("views", SHARING.values(), ids=SHARING)
def test_activations_and_gradients_must_not_share_memory(norm, views):
    match = "gradients share memory with activations.*copy"
    refuse(ValueError, match, *views(np.arange(20.0)), norm)


def test_interleaved_views_are_legal():
    room = np.ones((4, 6))
    for activations, gradients in (
        (room[:, ::2], room[:, 1::2]),
        (room[::2], room[1::2]),
        (room[:, :3], room[:, 3:]),
    ):
        room[...] = 1
        ActivityRegularization.l1(0.5).apply(activations, gradients)
        assert (activations == 1).all()
        assert (gradients == 1.5).all()


def test_an_overlap_that_is_too_hard_to_decide_is_refused(monkeypatch):
    room = np.zeros(200_000)
    strides = (8 * 1001, 8 * 1013, 8 * 1019)
    activations = as_strided(room, (50, 60, 70), strides)
    gradients = as_strided(room[1:], (50, 60, 70), strides)
    monkeypatch.setattr(validation, "_OVERLAP_WORK", 10)
    refuse(ValueError, "gradients overlap themselves", activations, gradients)
    monkeypatch.setattr(validation, "_overlaps_itself", lambda array: False)
    refuse(ValueError, "gradients share memory with activations", activations, gradients)


NOT_ARRAYS = {
    "list": [1.0, 2.0],
    "float": 1.0,
    "numpy scalar": np.float64(1.0),
    "None": None,
    "memoryview": memoryview(b"12345678"),
    "masked array": np.ma.array([1.0, 2.0], mask=[0, 1]),
}


@pytest.mark.parametrize("value", NOT_ARRAYS.values(), ids=NOT_ARRAYS)
def test_only_arrays_are_taken(value):
    refuse(TypeError, r"^gradients (must be|are a masked).*(\.asarray|filled)", np.ones(2), value)
    refuse(TypeError, r"^activations (must be|are a masked)", value, np.ones(2))
    with pytest.raises(TypeError, match=r"^activations"):
        ActivityRegularization(0.1).penalty(value)


def test_data_frames_are_refused():
    class DataFrame:  # what NumPy would happily convert
        dtype = np.dtype(np.float64)

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("nothing may be converted")

    refuse(TypeError, "DataFrame; convert it", DataFrame(), np.ones(2))


@pytest.mark.parametrize(
    "dtype",
    [np.int32, np.uint8, bool, np.complex128, object, np.longdouble, "S3", "f8,f8", "M8[s]"],
)
def test_other_dtypes_are_refused(dtype):
    if dtype is np.longdouble and np.dtype(dtype).itemsize == 8:
        pytest.skip("longdouble is float64 here")
    values = np.zeros(2, dtype)
    with pytest.raises(TypeError, match=r"activations have dtype .* float32 or float64.*astype"):
        ActivityRegularization(0.1).penalty(values)
    refuse(TypeError, "gradients have dtype", np.ones(2), values)


def test_dtypes_must_be_equal():
    match = r"gradients have dtype float64 but activations have float32.*astype"
    refuse(TypeError, match, np.ones(2, np.float32), np.ones(2))


@norms
def test_byte_order_is_computed_and_kept(norm):
    swapped = np.dtype(np.float32).newbyteorder("S")
    values = np.array([3.0, -4.0, 0.0], np.float32)
    expected = np.ones(3, np.float32)
    penalty = ActivityRegularization(0.1, norm).apply(values, expected)
    activations, gradients = values.astype(swapped), np.ones(3, swapped)
    found = ActivityRegularization(0.1, norm).apply(activations, gradients)
    assert (found, type(found)) == (penalty, np.float32)
    assert gradients.dtype == swapped
    assert (gradients == expected).all()
    refuse(TypeError, "gradients have dtype", values, gradients)


@norms
def test_misaligned_arrays_are_computed(norm):
    def misaligned(values):
        room = np.zeros(values.nbytes + 1, np.uint8)[1:].view(values.dtype)
        room[...] = values
        assert not room.flags.aligned
        return room

    values, expected = np.arange(-5.0, 5.0), np.ones(10)
    reg = ActivityRegularization(0.1, norm)
    penalty = reg.apply(values, expected)
    assert reg.penalty(misaligned(values)) == penalty
    for x in (values, misaligned(values)):
        gradients = misaligned(np.ones(10))
        assert reg.apply(x, gradients) == penalty
        assert (gradients == expected).all()


@norms
@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_memory_maps_and_plain_subclasses(norm, name, tmp_path):
    values = np.arange(-6.0, 6.0).reshape(3, 4)
    np.save(tmp_path / "x.npy", values)
    np.save(tmp_path / "g.npy", np.ones((3, 4)))
    expected = np.ones((3, 4))
    reg = ActivityRegularization(0.1, norm, backend=name)
    penalty = reg.apply(values, expected)

    class Plain(np.ndarray):
        pass

    class Contrary(np.ndarray):
        __array_ufunc__ = None

        def __array_function__(self, *arguments):
            raise AssertionError("nothing of the subclass may be called")

    for activations, gradients in (
        (np.load(tmp_path / "x.npy", "r"), np.load(tmp_path / "g.npy", "r+")),
        (values.view(Plain), np.ones((3, 4)).view(Plain)),
        (values.view(Contrary), np.ones((3, 4)).view(Contrary)),
        (values.astype(">f8").view(Plain), np.ones((3, 4), ">f8").view(Plain)),
        (values.view(np.matrix), np.ones((3, 4)).view(np.matrix)),
    ):
        found = reg.apply(activations, gradients)
        assert (found, type(found)) == (penalty, np.float64)
        assert (np.asarray(gradients) == expected).all()
    del activations, gradients
    assert (np.load(tmp_path / "g.npy") == expected).all()


@norms
def test_read_only_activations_are_read(norm, backend):
    values = np.arange(5.0)
    values.flags.writeable = False
    reg = backend.regularization(0.1, norm)
    gradients = backend.array(np.zeros(5))
    assert float(reg.apply(backend.array(values), gradients)) == float(
        reg.penalty(backend.array(values))
    )


def test_the_checks_hold_for_cupy_arrays(cupy):
    room = cupy.zeros(20)
    match = "gradients share memory"
    for activations, gradients in ((room, room), (room[:-1], room[1:])):
        with pytest.raises(ValueError, match=match):
            ActivityRegularization(0.1).apply(activations, gradients)
    with pytest.raises(ValueError, match="gradients overlap themselves"):
        ActivityRegularization(0.1).apply(cupy.ones((2, 3)), cupy.broadcast_to(room[:3], (2, 3)))
    with pytest.raises(ValueError, match="gradients have shape"):
        ActivityRegularization(0.1).apply(cupy.ones(3), cupy.ones(4))
    with pytest.raises(TypeError, match="activations have dtype int64"):
        ActivityRegularization(0.1).penalty(cupy.arange(3))
    assert not room.any()
    ActivityRegularization(0.5).apply(room[::2], room[1::2])  # interleaved
