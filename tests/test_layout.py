"""Views in memory order: the same elements, no copy, few axes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actreg_dispatch.layout import collapse


def base():
    return np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (base(), (120,)),
        (base().T, (120,)),
        (base()[::-1, ::-1, ::-1, ::-1], (120,)),
        (base().transpose(1, 3, 0, 2), (120,)),
        (base()[:, :, :, ::2], (24, 3)),
        (base()[:, :, ::2], (12, 5)),
        (base()[:, 1], (2, 20)),
        (base()[:, :1, None, :, 2:3], (2, 4)),
        (base()[..., 1], (24,)),
        (np.array(3.0), (1,)),
        (np.ones((1, 1, 1))[::-1], (1,)),
    ],
)
def test_axes_merge_where_memory_is_even(array, shape):
    (view,) = collapse(array)
    assert view.shape == shape
    assert np.shares_memory(view, array)


def test_arrays_of_different_order_keep_their_pairs():
    x, g = base(), np.zeros((5, 4, 3, 2)).T
    views = collapse(x, g)
    assert views[0].shape == views[1].shape
    views[1][...] = views[0]
    assert (g == x).all()


@given(data=st.data())
def test_the_views_pair_the_same_elements_without_a_copy(data):
    def view():
        order = data.draw(st.permutations(range(3)))
        array = np.arange(4 * 5 * 6.0).reshape(np.array([4, 5, 6])[list(order)])
        array = array.transpose(np.argsort(order))
        steps = [data.draw(st.sampled_from([1, -1])) for _ in range(3)]
        array = array[tuple(slice(None, None, step) for step in steps)]
        return array[tuple(cut)]

    cut = [slice(0, None, data.draw(st.sampled_from([1, 2, 3]))) for _ in range(3)]
    x, g = view(), view()
    found = collapse(x, g)
    assert np.shares_memory(found[0], x)
    assert np.shares_memory(found[1], g)
    pairs = sorted(zip(x.ravel().tolist(), g.ravel().tolist(), strict=True))
    assert sorted(zip(found[0].ravel().tolist(), found[1].ravel().tolist(), strict=True)) == pairs
