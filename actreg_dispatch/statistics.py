"""How active activations are: counted with what regularizes them, and where."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import numpy as np

from actreg_dispatch.runtime.threads import lock_over_fork

__all__ = ["ActivationStatistics", "Counter", "Counts", "check_statistics", "refuse_statistics"]

Counts = tuple[Any, Any, Any, Any]
"""Elements, those that are not 0, the largest, and how often each unit was active, or None."""


class Counter(Protocol):
    """What counts on a device."""

    def read(self) -> Counts:
        """Wait for the device and return what was counted there."""


AnyCounter = TypeVar("AnyCounter", bound=Counter)


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
        once more, on a device no more than the rest.

    Notes
    -----
    Several threads may use one object. A call that raises counts nothing; but it may have settled
    how many units there are, which the first call does. Of calls that are under way while another
    thread calls :meth:`clear`, each is counted or forgotten. What is counted on a device stays
    there, and no call waits for it: who asks for a count does.

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
        with _CHANGING:
            self._counts: Counts = 0, 0, 0.0, None  # replaced as a whole
            self._counters: dict[Hashable, Counter] = {}
            self._units: int | None = None  # settled before anything is counted

    @property
    def per_feature(self) -> bool:
        """Whether units are counted, too."""
        return self._per_feature

    @property
    def elements(self) -> int:
        """How many elements there were."""
        return int(self._all()[0])

    @property
    def nonzero(self) -> int:
        """How many of them were not 0; NaN is not."""
        return int(self._all()[1])

    @property
    def largest(self) -> float:
        r"""The largest \|x\|; 0.0 of no elements, and NaN if there was one."""
        return float(self._all()[2])

    @property
    def share_of_zeros(self) -> float:
        """The share of elements that were 0; NaN of no elements."""
        elements, nonzero, *_ = self._all()
        share: float = (elements - nonzero) / elements if elements else math.nan
        return share

    @property
    def active(self) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """How often each unit was not 0; None without ``per_feature``, or before the first call.

        Units at 0 are dead so far.
        """
        active = self._all()[3]
        return None if active is None else np.array(active, np.int64)

    def add(self, elements: Any, nonzero: Any, largest: Any, active: Any = None) -> None:
        """Add what a backend counted."""
        with _CHANGING:
            if active is not None:
                if self._units not in (None, len(active)):
                    return  # it was cleared meanwhile, and counts others by now
                self._units = len(active)
            self._counts = _sum_of(self._counts, (elements, nonzero, largest, active))

    def counter(self, place: Hashable, make: Callable[[], AnyCounter]) -> AnyCounter:
        """Return what counts at a place on a device; ``make`` makes it where there is none yet.

        What it counts belongs to the counts here.
        """
        with _CHANGING:
            if place not in self._counters:
                self._counters[place] = make()
            counter: AnyCounter = self._counters[place]  # type: ignore[assignment]
            return counter

    def check(self, *activations: Any) -> None:
        """Refuse activations whose units are others than those before, or settle how many.

        Raises
        ------
        ValueError
            If units are counted and there is no last axis, or it has another length.
        """
        if not self._per_feature:
            return
        with _CHANGING:
            units = self._units
            for each in activations:
                if not each.shape:
                    raise ValueError(
                        "statistics count units along the last axis, but activations have no axes; "
                        "pass ActivationStatistics() without per_feature"
                    )
                units = each.shape[-1] if units is None else units
                if units != each.shape[-1]:
                    raise ValueError(
                        f"statistics count {units} units, but the last axis of activations has "
                        f"{each.shape[-1]}; pass statistics of their own"
                    )
            self._units = units  # before anything is written: another thread may be at its first

    def _all(self) -> Counts:
        """Return all counts; waits for the devices that have some."""
        with _CHANGING:
            counts, counters = self._counts, list(self._counters.values())
        for counter in counters:
            counts = _sum_of(counts, counter.read())
        return counts

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied or pickled, which counts on the host."""
        counts = {"_counts": self._all(), "_counters": {}}
        return {"_per_feature": self._per_feature, "_units": self._units, **counts}

    def __repr__(self) -> str:
        elements, nonzero, largest, _ = self._all()
        return (
            f"<{type(self).__name__}: {nonzero} of {elements} elements are not 0, "
            f"the largest is {float(largest)!r}>"
        )


_CHANGING = threading.RLock()
lock_over_fork(_CHANGING)


def _sum_of(a: Counts, b: Counts) -> Counts:
    """Return both counts together."""
    largest = b[2] if b[2] != b[2] or b[2] > a[2] else a[2]
    active = a[3] if b[3] is None else b[3] if a[3] is None else a[3] + b[3]
    return a[0] + b[0], a[1] + b[1], largest, active


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


def check_statistics(statistics: Any, *activations: Any) -> None:
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
    statistics.check(*activations)
