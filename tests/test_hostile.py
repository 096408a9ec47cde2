"""Arrays that nobody should pass: each is either computed exactly or refused untouched.

What is to be refused is worked out from the addresses of all bytes, one by one.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actreg_dispatch import ActivityNorm, ActivityRegularization
from actreg_dispatch.oracle import exact_result

SUPPORTED = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype("f4"), np.dtype("f8")]
UNSUPPORTED = [np.dtype(name) for name in ("i1", "i4", "u8", "?", "c8", "g", "O", "S4", "m8[s]")]
UNSUPPORTED += [np.dtype([("x", "f4"), ("y", "f4")])]


class Curious(np.ndarray):
    """A subclass that has a say in every view of itself, and another in arithmetic."""

    def __array_finalize__(self, source):
        self.note = getattr(source, "note", "new")

    def __abs__(self):
        raise AssertionError("arithmetic of the subclass")

    __mul__ = __add__ = __array_wrap__ = __abs__


@st.composite
def views(draw, buffer, dtype, shape):
    """Return a view of ``buffer`` of any strides, aligned or not, that stays inside."""
    itemsize = dtype.itemsize
    odd = draw(st.integers(0, 9)) == 0
    unit = 1 if odd or itemsize == 0 else itemsize
    strides = [draw(st.integers(-3, 9)) * unit for _ in shape]
    if draw(st.booleans()):  # plain
        strides = list(np.empty(shape, dtype).strides)
    reach = [stride * (length - 1) for stride, length in zip(strides, shape, strict=True)]
    low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + itemsize
    if 0 in shape:
        low, high = 0, itemsize
    spare = buffer.size - (high - low)
    if spare < 0:
        return np.zeros(shape, dtype)
    offset = draw(st.integers(0, spare // unit)) * unit - low
    return np.ndarray(shape, dtype, buffer, offset, strides)


def bytes_of(array):
    """Return the addresses of the first bytes of the elements, one by one."""
    start = array.__array_interface__["data"][0]
    return [
        start + sum(i * s for i, s in zip(index, array.strides, strict=True))
        for index in np.ndindex(array.shape)
    ]


def refused(x, g):
    """Return the error that these arrays must meet, or None."""
    for array in (x, g):
        if array.dtype.newbyteorder("=") not in SUPPORTED or isinstance(array, np.ma.MaskedArray):
            return TypeError
    if x.dtype != g.dtype:
        return TypeError
    if x.shape != g.shape or not g.flags.writeable:
        return ValueError
    size = x.dtype.itemsize
    written = [first + k for first in bytes_of(g) for k in range(size)]
    read = {first + k for first in bytes_of(x) for k in range(size)}
    if len(set(written)) < len(written) or read & set(written):
        return ValueError
    return None


@st.composite
def cases(draw):
    """Return activations, gradients and the buffers that they lie in."""
    dtypes = st.sampled_from(SUPPORTED)
    if draw(st.integers(0, 9)) == 0:
        dtypes = st.sampled_from(SUPPORTED + UNSUPPORTED)
    dtype = draw(dtypes)
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    other = draw(dtypes) if draw(st.integers(0, 19)) == 0 else dtype
    wrong = draw(st.integers(0, 19)) == 0
    other_shape = (*shape, 1) if wrong else shape
    if draw(st.integers(0, 9)) == 0 and dtype != SUPPORTED[1]:
        dtype = dtype.newbyteorder()
        other = dtype if draw(st.booleans()) else other
    buffers = [np.zeros(4096, np.uint8) for _ in range(2)]
    own = draw(st.integers(0, 3)) > 0  # else both in one
    arrays = []
    for buffer, kind, form in ((buffers[0], dtype, shape), (buffers[own], other, other_shape)):
        if kind.hasobject:
            arrays.append(np.ones(form, kind))
            continue
        array = draw(views(buffer, kind, form))
        values = draw(st.lists(st.integers(-9, 9), min_size=array.size, max_size=array.size))
        if array.dtype.kind in "fVg" and not array.dtype.names:
            array[...] = np.array(values, np.float32).reshape(array.shape) / 4
        wrap = draw(st.sampled_from([None] * 6 + [Curious, np.ma.MaskedArray, np.memmap]))
        if wrap is not None:
            array = array.view(wrap)
        arrays.append(array)
    if draw(st.integers(0, 9)) == 0:
        arrays[1].flags.writeable = False
    return (*arrays, buffers)


def check(case, norm, backend, lam):
    x, g, buffers = case
    error = refused(x, g)
    before = [buffer.tobytes() for buffer in buffers]
    reg = ActivityRegularization(lam, norm, backend=backend)
    if error is not None:
        with pytest.raises(error, match=r"gradients|activations") as told:
            reg.apply(x, g)
        assert "\n" not in str(told.value)
        assert [buffer.tobytes() for buffer in buffers] == before
        return
    values, start = (np.array(a, a.dtype.newbyteorder("="), subok=False) for a in (x, g))
    if not (np.isfinite(values.astype("f8")).all() and np.isfinite(start.astype("f8")).all()):
        reg.apply(x, g)  # bits that were made of two elements may be anything
        return
    penalty, updated = exact_result(values, start, ActivityNorm(norm), lam)
    assert np.asarray(reg.penalty(x)).tobytes() == penalty.tobytes()
    assert [buffer.tobytes() for buffer in buffers] == before
    assert np.asarray(reg.apply(x, g)).tobytes() == penalty.tobytes()
    assert np.array(g, updated.dtype, subok=False).tobytes() == updated.tobytes()
    np.asarray(g)[...] = start  # what is left of the change lies outside the view
    assert [buffer.tobytes() for buffer in buffers] == before


options = {
    "case": cases(),
    "norm": st.sampled_from([norm.value for norm in ActivityNorm]),
    "backend": st.sampled_from([None, "numpy", "numba"]),
    "lam": st.sampled_from([0.0, 0.1, 2.0]),
}
health = {"suppress_health_check": list(HealthCheck), "deadline": None}


@settings(max_examples=400, derandomize=True, **health)
@given(**options)
def test_any_array_is_computed_or_refused(case, norm, backend, lam):
    check(case, norm, backend, lam)


@pytest.mark.long
@settings(max_examples=25_000, derandomize=False, **health)
@given(**options)
def test_any_of_25000_arrays_is_computed_or_refused(case, norm, backend, lam):
    check(case, norm, backend, lam)


@pytest.mark.long
def test_a_guided_search_finds_no_array_that_is_judged_wrongly(python):
    pytest.importorskip("atheris")
    fuzzer = str(Path(__file__).with_name("fuzz_hostile.py"))
    done = python(fuzzer, "-max_total_time=120", "-print_final_stats=1", timeout=600)
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert int(runs[1]) > 1000


# Objects that say of themselves what is not so.


def lying(base):
    """Return a subclass whose instances are larger, by their own word, than their memory."""

    class Liar(base):
        shape = property(lambda self: (10**6,))
        size = property(lambda self: 10**6)
        strides = property(lambda self: (4,))
        dtype = property(lambda self: np.dtype(np.float32))
        flags = property(lambda self: np.ones(3).flags)
        __array_interface__ = property(lambda self: {"shape": (10**6,), "data": (64, False)})

    return Liar


@pytest.mark.parametrize("name", [None, "numpy", "numba"])
def test_a_subclass_is_taken_for_what_it_is(name):
    reg = ActivityRegularization(0.5, backend=name)
    liar = lying(np.ndarray)
    x, g = np.ones(4), np.zeros(4)
    assert reg.apply(x.view(liar), g.view(liar)) == reg.penalty(x.view(liar)) == 2.0
    assert float(reg.partial_sum(x.view(liar))) == 4.0
    assert (g == 0.5).all()
    g.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        reg.apply(x, g.view(liar))
    for bad in (np.ones(3), np.ones(4, np.float32), np.ones(4, int)):
        with pytest.raises((TypeError, ValueError), match="gradients have"):
            reg.apply(x, bad.view(liar))


def test_a_subclass_of_cupy_is_taken_for_what_it_is(cupy):
    liar = lying(cupy.ndarray)
    x, g = cupy.ones(4), cupy.zeros(4)
    reg = ActivityRegularization(0.5)
    fakes = [a.view(liar) for a in (x, g)]
    assert reg.apply(*fakes) == reg.penalty(fakes[0]) == 2.0
    assert (g == 0.5).all()


class Impostor:
    """No array, whatever it says."""

    dtype, shape, size, ndim, itemsize = np.dtype(float), (3,), 3, 1, 8
    __class__ = np.ndarray

    @property
    def __array_interface__(self):
        return {"version": 3, "shape": (3,), "typestr": "<f8", "data": (64, False)}

    __cuda_array_interface__ = __array_interface__

    def __dlpack__(self, **_):
        raise AssertionError("it was asked for memory")

    __array__ = __dlpack__


class Alike(type):
    """Of classes that cannot be told from NumPy's by comparison."""

    def __hash__(cls):
        return hash(np.ndarray)

    def __eq__(cls, other):
        return True


class Twin(Impostor, metaclass=Alike):
    pass


@pytest.mark.parametrize("cls", [Impostor, Twin])
def test_what_only_claims_to_be_an_array_is_refused(cls):
    reg, impostor = ActivityRegularization(0.5), cls()
    for arguments in ((impostor, np.zeros(3)), (np.zeros(3), impostor)):
        with pytest.raises(TypeError, match=r"must be a NumPy or CuPy array, not a "):
            reg.apply(*arguments)
    with pytest.raises(TypeError, match="must be a NumPy or CuPy array"):
        reg.penalty(impostor)


# Memory that is mapped, or whose owner is gone.


def test_mapped_memory_and_memory_whose_owner_is_gone(tmp_path):
    path = tmp_path / "map"
    np.ones(1000).tofile(path)
    reg = ActivityRegularization(0.5)
    mapped = np.memmap(path, np.float64, "r")
    with pytest.raises(ValueError, match=r"gradients are read-only.*gradients\.copy"):
        reg.apply(np.ones(1000), mapped)
    owner = bytearray(8000)
    gradients = np.frombuffer(owner)[::2][1:]
    del owner
    path.unlink()  # the map keeps the file
    gc.collect()
    assert reg.apply(mapped[::2][1:], gradients) == 249.5
    assert (gradients == 0.5).all()


# More elements than 32 bits count.


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_view_of_more_than_2_to_the_31_elements(dtype):
    size = 2**31 + 5
    ones = np.broadcast_to(np.ones((), dtype), (size,))
    assert float(ActivityRegularization(1.0, "l2_squared").partial_sum(ones)) == size
    compute = np.float64 if dtype == "float64" else np.float32
    assert ActivityRegularization(1.0).penalty(ones) == compute(size)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_gradients_of_more_than_2_to_the_31_elements(tmp_path, layout):
    """In a file with holes, of which only what is not zero takes room."""
    size = 2**31 + 8
    shape = (size,) if layout == "contiguous" else (size // 8, 8)
    files = [np.memmap(tmp_path / name, np.float16, "w+", shape=shape) for name in ("x", "g")]
    x, g = files if layout == "contiguous" else [file[:, ::-1] for file in files]
    last = (-1,) * x.ndim
    x[last], x[(0,) * x.ndim] = 3.0, -2.0
    assert ActivityRegularization(0.5).apply(x, g) == 2.5
    assert g[last] == 0.5
    assert g[(0,) * x.ndim] == -0.5
    assert int(np.count_nonzero(files[1])) == 2
