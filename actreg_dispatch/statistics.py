"""How active activations are: counted in the pass that regularizes them."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from actreg_dispatch.runtime.threads import lock_over_fork

__all__ = ["ActivationStatistics", "check_statistics", "refuse_statistics"]


class ActivationStatistics:
    r"""Counts that add up over calls: how many elements there were, how many were not 0, and so on.

    Pass one as ``statistics=`` to :meth:`~actreg_dispatch.ActivityRegularization.apply`,
    :meth:`~actreg_dispatch.ActivityRegularization.penalty` or
    :meth:`~actreg_dispatch.ActivityRegularization.apply_all`, in which the elements are counted on
    the way. What is computed does not change by a bit. An element of weight 0 is not counted.

    Parameters
    ----------
    per_feature : bool, default False
        Also count, along the last axis, how often each unit was active. That reads the activations
        once more.

    Notes
    -----
    Several threads may use one object. A call that raises counts nothing. The CUDA backend cannot
    count, and says so.

    Examples
    --------
    >>> from actreg_dispatch import ActivityRegularization
    >>> statistics = ActivationStatistics(per_feature=True)
    >>> activations = np.array([[1.0, 0.0, -3.0], [2.0, 0.0, 0.0]])
    >>> float(ActivityRegularization.l1(0.5).penalty(activations, statistics=statistics))
    3.0
    >>> statistics
    <ActivationStatistics: 3 of 6 elements are not 0, the largest is 3.0>
    >>> statistics.share_of_zeros, statistics.active
    (0.5, array([2, 0, 1]))
    """

    def __init__(self, *, per_feature: bool = False) -> None:
        self._per_feature = bool(per_feature)
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._counts: tuple[Any, ...] = 0, 0, 0.0, None  # replaced as a whole

    @property
    def per_feature(self) -> bool:
        """Whether units are counted, too."""
        return self._per_feature

    @property
    def elements(self) -> int:
        """How many elements there were."""
        return int(self._counts[0])

    @property
    def nonzero(self) -> int:
        """How many of them were not 0; NaN is not."""
        return int(self._counts[1])

    @property
    def largest(self) -> float:
        r"""The largest \|x\|; 0.0 of no elements, and NaN if there was one."""
        return float(self._counts[2])

    @property
    def share_of_zeros(self) -> float:
        """The share of elements that were 0; NaN of no elements."""
        elements, nonzero = self.elements, self.nonzero
        return (elements - nonzero) / elements if elements else math.nan

    @property
    def active(self) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """How often each unit was not 0; None without ``per_feature``, or before the first call.

        Units at 0 are dead so far.
        """
        active = self._counts[3]
        if active is None:
            return None
        return np.array(active, np.int64)

    def add(self, elements: Any, nonzero: Any, largest: Any, active: Any = None) -> None:
        """Add what a backend counted."""
        with _ADDING:
            all_elements, all_nonzero, all_largest, all_active = self._counts
            self._counts = (
                all_elements + elements,
                all_nonzero + nonzero,
                largest if largest != largest or largest > all_largest else all_largest,
                active if all_active is None else all_active + active,
            )

    def check(self, activations: Any) -> None:
        """Refuse activations whose units are others than those before.

        Raises
        ------
        ValueError
            If units are counted and there is no last axis, or it has another length.
        """
        if not self._per_feature:
            return
        shape, active = activations.shape, self._counts[3]
        if not shape:
            raise ValueError(
                "statistics count units along the last axis, but activations have no axes; "
                "pass ActivationStatistics() without per_feature"
            )
        if active is not None and len(active) != shape[-1]:
            raise ValueError(
                f"statistics count {len(active)} units, but the last axis of activations has "
                f"{shape[-1]}; pass statistics of their own"
            )

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}: {self.nonzero} of {self.elements} elements are not 0, "
            f"the largest is {self.largest!r}>"
        )


_ADDING = threading.RLock()
lock_over_fork(_ADDING)


def refuse_statistics(statistics: Any, arrays: str) -> None:
    """Refuse to count arrays, which are called ``arrays``, that no backend counts on the way.

    Raises
    ------
    TypeError
        If there are statistics.
    """
    if statistics is not None:
        raise TypeError(
            f"statistics cannot be counted of {arrays}; leave them out, or pass NumPy arrays or "
            f"tensors of PyTorch on the CPU"
        )


def check_statistics(statistics: Any, activations: Any) -> None:
    """Refuse what is not an :class:`ActivationStatistics`, or not for such activations.

    Raises
    ------
    TypeError, ValueError
        See there.
    """
    if statistics is None:
        return
    if not isinstance(statistics, ActivationStatistics):
        raise TypeError(
            f"statistics={statistics!r} are of type {type(statistics).__name__}; "
            f"pass an ActivationStatistics()"
        )
    statistics.check(activations)
