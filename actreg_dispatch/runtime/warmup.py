"""Compiling ahead of the first call that matters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from actreg_dispatch.norms import NORMS
from actreg_dispatch.regularization import ActivityRegularization

__all__ = ["warmup"]

_SIZES = (4, 1 << 17)  # elements, for the serial and for the parallel kernels


def warmup(
    dtypes: Any = (np.float32, np.float64),
    norms: str | Iterable[str] | None = None,
    *,
    backend: str | None = None,
    strided: bool = False,
) -> None:
    """Compile, or load from the cache, what calls with these dtypes and norms will run.

    A kernel is compiled at its first call otherwise, which takes some tenths of a second to some
    seconds, or a few milliseconds if an earlier process left it in Numba's cache. Arrays have up to
    five axes here; those of more compile a small function at their first call all the same.

    Parameters
    ----------
    dtypes : dtype or iterable of dtypes, default float32 and float64
        The dtypes of the activations.
    norms : str or iterable of str, optional
        The norms; by default all that are known, registered ones included.
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
    >>> warmup("float32", "l1")
    """
    norms = NORMS.copy() if norms is None else norms
    for dtype in (dtypes,) if isinstance(dtypes, (str, type, np.dtype)) else tuple(dtypes):
        for norm in (norms,) if isinstance(norms, str) else tuple(norms):
            reg = ActivityRegularization(0.0, norm, backend=backend)
            for size in _SIZES:
                plain, spread = np.ones((2, size), dtype), np.ones((2, size, 2), dtype)[..., 0]
                # What takes an exact sum is done as columns are.
                columns = plain.reshape(2, -1, 2).transpose(0, 2, 1)
                for activations, gradients in (plain, columns, spread)[: 2 + strided]:
                    reg.apply(activations, gradients)
                    reg.penalty(activations)
                    reg.add_gradient(activations, gradients, reg.partial_sum(activations))
                for axes in range(1, 6):
                    activations, gradients = plain.reshape(2, *(1,) * (axes - 1), -1)
                    reg.apply(activations, gradients)
                    reg.penalty(activations)
                    reg.apply_all([activations], [gradients])
