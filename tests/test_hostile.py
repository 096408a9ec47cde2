"""Arrays that nobody should pass: each is either computed exactly or refused untouched.

What is to be refused is worked out from the addresses of all bytes, one by one.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actreg_dispatch import ActivityNorm, ActivityRegularization
from actreg_dispatch.exact import exact_result

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
