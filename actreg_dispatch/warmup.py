"""Compiling ahead of the first call that matters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.regularization import ActivityRegularization

__all__ = ["warmup"]

_SIZES = (1, 1 << 17)  # elements, for the serial and for the parallel kernels


def warmup(
    dtypes: Iterable[Any] = (np.float32, np.float64),
    norms: Iterable[str | ActivityNorm] = tuple(ActivityNorm),
    *,
    backend: str | None = None,
    strided: bool = False,
) -> None:
    """Compile, or load from the cache, all that calls with these dtypes and norms will need.

    A kernel is compiled at its first call otherwise, which takes 0.2 to 3 s, or 4 to 9 ms if an
    earlier process left it in Numba's cache.

    Parameters
    ----------
    dtypes : iterable of dtype, default float32 and float64
        The dtypes of the activations.
    norms : iterable of str or ActivityNorm, default all
        The norms.
    backend : str, optional
        The backend, as :class:`ActivityRegularization` takes it.
    strided : bool, default False
        Whether to do the same for arrays that are not contiguous.

    Raises
    ------
    TypeError, ValueError, BackendError
        Whatever the calls themselves raise for such arguments.

    Examples
    --------
    >>> warmup(["float32"], ["l1"])
    """
    norms = tuple(norms)
    for dtype in dtypes:
        for norm in norms:
            reg = ActivityRegularization(0.0, norm, backend=backend)
            for size in _SIZES:
                plain, spread = np.zeros((2, size), dtype), np.zeros((2, size, 2), dtype)[..., 0]
                for activations, gradients in (plain, spread) if strided else (plain,):
                    reg.apply(activations, gradients)
                    reg.penalty(activations)
