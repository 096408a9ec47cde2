"""From a call to what computes it: the plan of a call, the backend, and the constants.

A call on plain NumPy arrays goes to one compiled kernel, which checks them itself
(:class:`Dispatcher`). All other calls are checked here, step by step, before anything is written,
and then handed to a backend. Arrays of libraries that have an adapter never come here: their
adapters call back with the memory of the arrays.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.dtypes import COMPUTE_DTYPES, compute_dtype
from actreg_dispatch.options import (
    UNSCALED,
    Constants,
    Options,
    check_count,
    check_scale,
    constants_of,
    count_of,
)
from actreg_dispatch.registry import (
    NUMPY,
    RAW_ENVIRONMENT,
    RAW_KEY,
    asked_by_context,
    choose,
)
from actreg_dispatch.row_norms import RowsBackend, row_axes
from actreg_dispatch.statistics import check_statistics
from actreg_dispatch.sums.certified import NOT_HANDLED
from actreg_dispatch.sums.exact import PairedSum, PartialSum, Total, outcome_of
from actreg_dispatch.transfer import MovingBackend, new_like
from actreg_dispatch.validation import check_activations, check_gradients, check_weights
from actreg_dispatch.weights import check_weight_values, given, kept_of

__all__ = [
    "NO_PLAN",
    "Dispatcher",
    "add_gradient",
    "apply",
    "backend_for",
    "checked_constants",
    "checked_weights",
    "finish",
    "given",
    "partial_sum",
    "penalty",
    "penalty_and_gradient",
    "penalty_exactly",
    "resolve",
    "update",
]

_NDARRAY = np.ndarray
NO_PLAN: tuple[Any, ...] = (None,) * 5
_MOST_AXES = 64  # of an array of NumPy

# To add a float to a NumPy scalar takes a third of the time that it takes to make one of the float,
# but before NumPy 2 the float32 would become a float64.
_FLOATS_ARE_WEAK = (np.float32(0) + 0.0).dtype == np.float32


class Assigned(NamedTuple):
    """Options, and what is made of them once: λ and epsilon as kernels take them.

    ``torch.compile`` takes a number for a constant, but an array for an input of what it compiles.
    """

    lam: Any
    epsilon: float
    options: Options
    lam_array: np.ndarray[Any, Any]


class Dispatcher:
    """The options of one regularization, and what its calls on plain NumPy arrays came down to.

    Contiguous arrays go to one compiled kernel, which does at once what is done step by step below,
    checks included. Whatever it does not handle it leaves alone, to be computed, or complained
    about, the general way. Which kernel that is, a plan says: a tuple, made at the first such call
    and replaced as a whole, so threads may race, of what the choice of a backend was made by, the
    dtype, the kernel and a zero of the compute dtype. There is one for each number of axes, for
    calls that read and for calls that write.
    """

    __slots__ = "_kernels", "assigned", "reading", "writing"

    def __init__(self, options: Options) -> None:
        self.options = options
        self.reading, self.writing = ([NO_PLAN] * (_MOST_AXES + 1) for _ in range(2))
        self._kernels: tuple[Any, dict[Any, Any]] = None, {}

    @property
    def options(self) -> Options:
        """The options; no plan depends on λ, so it may be replaced."""
        return self.assigned.options

    @options.setter
    def options(self, options: Options) -> None:
        lam, _, epsilon, _, _ = options
        number: Any = lam if len(lam) > 1 else lam[0]
        limit = math.nan if epsilon is None else epsilon
        # As a whole, or of two threads each could be the last to assign a part.
        self.assigned = Assigned(number, limit, options, np.array(lam))

    def penalty(self, activations: Any) -> Any:
        """Return the penalty of a contiguous array, or None."""
        if type(activations) is not _NDARRAY:  # which __class__ may belie
            return None
        axes = activations.ndim
        context, environment, dtype, kernel, zero = self.reading[axes]
        if (
            activations.dtype is dtype
            and asked_by_context() is context
            and RAW_ENVIRONMENT.get(RAW_KEY) is environment
        ):
            lam, epsilon, _, _ = self.assigned  # once: another thread may assign others
            try:
                penalty = kernel(activations, lam, epsilon)
            except TypeError:  # strided; it takes some 50 µs to find out, so not twice
                self.reading[axes] = NO_PLAN
                return None
            if penalty >= 0.0:
                return zero + penalty
            if penalty != NOT_HANDLED:
                return self.exact(activations, lam)
        return self._planned(False, (activations,), ())

    def apply(self, activations: Any, gradients: Any, scale: Any = UNSCALED) -> Any:
        """Do a whole call on contiguous arrays, whether there is a plan or not, or return None."""
        if not (type(activations) is _NDARRAY is type(gradients)):
            return None
        if activations.shape != gradients.shape:
            return None
        return self._planned(True, (activations, gradients), (check_scale(scale),))

    def exact(self, activations: Any, lam: Any) -> Any:
        """Return the penalty, with the λ that the gradients were updated with, by exact sums."""
        lam = lam if type(lam) is tuple else (lam,)
        return penalty_exactly(self.options._replace(lam=lam), activations)

    def _planned(self, writes: bool, arrays: tuple[Any, ...], scale: tuple[float, ...]) -> Any:
        """Find the kernel that handles such arrays, call it, and keep it as the plan."""
        activations = arrays[0]
        lam, epsilon, options, _ = self.assigned
        dtype, compute = activations.dtype, compute_dtype(activations.dtype)
        if options.norm.axis is not None:
            return None
        # Numba would not always tell a foreign byte order.
        if compute is None or any(array.dtype != dtype for array in arrays):
            return None
        if not all(array.flags.c_contiguous for array in arrays):
            return None
        if not activations.ndim:
            if options.reduction not in ("sum", "mean"):
                return None
            arrays = tuple([array.reshape(1) for array in arrays])
        axes = arrays[0].ndim

        asked = asked_by_context(), RAW_ENVIRONMENT.get(RAW_KEY)
        known = self._kernels  # replaced as a whole, so threads may race
        if known[0] != asked:
            known = self._kernels = asked, {}
        found, call = known[1], (dtype, axes, writes)
        kernels = found.get(call, ())
        arguments = *arrays, lam, *scale, epsilon
        for kernel in kernels:
            penalty = _called(kernel, arguments)
            if penalty != NOT_HANDLED:
                break
        else:
            backend, target = choose(NUMPY, dtype, options.backend, log=False)
            if target != NUMPY:
                return None
            kernel = backend.fused_kernel(options.norm, options.reduction, arrays[0], writes=writes)
            if kernel is None or kernel in kernels:
                return None
            choose(NUMPY, dtype, options.backend)  # once more, to log it
            if asked != (asked_by_context(), RAW_ENVIRONMENT.get(RAW_KEY)):
                return None  # another thread has changed the variable: by which was it chosen?
            found[call] = (*kernels, kernel)
            penalty = _called(kernel, arguments)
        if penalty == NOT_HANDLED:
            return None
        zero = compute.type(0)
        if _FLOATS_ARE_WEAK:
            plans = self.writing if writes else self.reading
            plans[axes] = *asked, dtype, kernel, zero
        return compute.type(penalty) if penalty >= 0.0 else self.exact(activations, lam)


def _called(kernel: Any, arguments: tuple[Any, ...]) -> float:
    try:
        return kernel(*arguments)  # type: ignore[no-any-return]
    except TypeError:  # read-only
        return NOT_HANDLED


def resolve(
    options: Options,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    scale: float = UNSCALED,
) -> tuple[Backend, Constants]:
    """Return the backend and the constants of :func:`apply` for a NumPy array like that.

    For adapters that hand pieces of an array to the backend themselves.

    Raises
    ------
    TypeError, ValueError, BackendError
        As for :meth:`~actreg_dispatch.ActivityRegularization.apply`.
    """
    constants = constants_of(options, dtype, count_of(options.reduction, shape), scale)
    return _backend(options, NUMPY, *choose(NUMPY, dtype, options.backend)), constants


def _backend(options: Options, array_type: str, backend: Backend, target: str) -> Backend:
    """Return the chosen backend, which moves data if it must."""
    if options.norm.axis is not None:
        backend = RowsBackend(backend, target)
    return backend if target == array_type else MovingBackend(backend, array_type, target)


def backend_for(options: Options, array_type: str, *arrays: Any) -> Backend:
    """Return the backend for checked arrays, or None, which moves data if it must.

    They are of type ``array_type``, the first being the activations.
    """
    aligned = array_type != NUMPY or all(
        array.flags.aligned for array in arrays if array is not None
    )
    return _backend(
        options,
        array_type,
        *choose(array_type, arrays[0].dtype, options.backend, aligned=aligned),
    )


def checked_constants(
    options: Options,
    activations: Any,
    scale: float = UNSCALED,
    name: str = "activations",
    weights: Any = None,
) -> Constants:
    """Return what a backend is told for activations, which errors call ``name``."""
    if options.norm.axis is not None:  # or arrays of others need have no axes
        row_axes(options.norm, activations.ndim, name)  # which may not be there
    count = _count(options, activations, weights, name)
    return constants_of(options, activations.dtype, count, scale, name)


def _count(options: Options, activations: Any, weights: Any, name: str = "activations") -> int:
    """Return what λ is divided by for activations, with weights that have been checked."""
    if options.reduction == "sum":  # arrays of other libraries need not have a shape
        return 1
    if weights is not None and weights.dtype.kind == "b":
        return kept_of(options.reduction, weights, name)
    return count_of(options.reduction, activations.shape, name)


def checked_weights(
    options: Options,
    activations: Any,
    weights: Any,
    array_type: str,
    gradients: Any = None,
    *names: str,
) -> Any:
    """Return weights, if there are any, as a view of the shape of the activations.

    Raises
    ------
    TypeError, ValueError
        As for :func:`~actreg_dispatch.validation.check_weights`, or if the norm takes none.
    """
    if weights is None:
        return None
    if not options.norm.takes_weights:
        raise ValueError(
            f"weights cannot be used with norm {options.norm.name!r}, whose coefficients use λ; "
            f"write λ into its gradient instead"
        )
    return check_weights(activations, weights, array_type, gradients, *names)


# The operations of a regularization, checked.


def penalty(options: Options, activations: Any, weights: Any = None, statistics: Any = None) -> Any:
    """Return the penalty."""
    array_type, x = check_activations(activations)
    check_statistics(statistics, x)
    w = checked_weights(options, x, weights, array_type)
    constants = checked_constants(options, x, weights=w)
    backend = backend_for(options, array_type, x, w)
    return backend.penalty(x, options.norm, constants, **given(w, statistics))


def partial_sum(options: Options, activations: Any, weights: Any = None) -> Total:
    """Return the exact sum, or both."""
    array_type, x = check_activations(activations)
    w = checked_weights(options, x, weights, array_type)
    return backend_for(options, array_type, x, w).partial_sum(x, options.norm, **given(w))


def finish(options: Options, total: Total, count: int | None) -> Any:
    """Return the penalty of what ``total`` is the sum of."""
    _check_total(options, total)
    count = check_count(options.reduction, count)
    constants = constants_of(options, total.dtype, count)
    found = outcome_of(total, options.norm, constants)
    return total.dtype.type(found.penalty)


def apply(
    options: Options,
    activations: Any,
    gradients: Any,
    scale: float,
    weights: Any = None,
    statistics: Any = None,
) -> Any:
    """Add the gradient to ``gradients`` in place and return the penalty."""
    array_type, x = check_activations(activations)
    g = check_gradients(x, gradients, array_type)
    w = checked_weights(options, x, weights, array_type, g)
    check_statistics(statistics, x)
    return update(options, array_type, x, g, scale, w, statistics)


def add_gradient(
    options: Options,
    activations: Any,
    gradients: Any,
    total: Total | None,
    count: int | None,
    scale: float,
    weights: Any = None,
    *,
    overwrite: bool = False,
) -> None:
    """Add the gradient of a piece to ``gradients`` in place, or write it there."""
    array_type, x = check_activations(activations)
    gradients = check_gradients(x, gradients, array_type)
    w = checked_weights(options, x, weights, array_type, gradients)
    count = check_count(options.reduction, count)
    constants, norm = constants_of(options, x.dtype, count, scale), options.norm
    coefficients: tuple[float, ...] = ()
    if norm.two_pass or total is not None:
        _check_total(options, total, COMPUTE_DTYPES[x.dtype])
    if norm.two_pass:
        assert total is not None
        found = outcome_of(total, norm, constants)
        if not found.has_gradient:
            check_weight_values(w)
            if overwrite:
                gradients[...] = 0
            return
        coefficients = found.coefficients
    backend = backend_for(options, array_type, x, gradients, w)
    function = backend.set_gradient if overwrite else backend.add_gradient
    function(x, gradients, norm, constants, coefficients, **given(w))


def penalty_and_gradient(
    dispatcher: Dispatcher, activations: Any, out: Any, scale: float, weights: Any = None
) -> tuple[Any, Any]:
    """Return the penalty and its gradient, in ``out`` or a new array."""
    options = dispatcher.options
    array_type, x = check_activations(activations)
    if out is not None:
        g = check_gradients(x, out, array_type, "out")
        w = checked_weights(options, x, weights, array_type, g)
        return update(options, array_type, x, g, scale, w, overwrite=True), out
    w = checked_weights(options, x, weights, array_type)
    gradient = new_like(x, array_type)
    penalty = dispatcher.apply(x, gradient, scale) if w is None else None
    if penalty is None:
        penalty = update(options, array_type, x, gradient, scale, w)
    return penalty, gradient


def update(
    options: Options,
    array_type: str,
    x: Any,
    gradients: Any,
    scale: float,
    weights: Any = None,
    statistics: Any = None,
    *,
    overwrite: bool = False,
) -> Any:
    """Do :func:`apply` for checked arrays, or ``overwrite`` the gradients as if they were 0."""
    constants = checked_constants(options, x, scale, weights=weights)
    backend = backend_for(options, array_type, x, gradients, weights)
    function = backend.overwrite if overwrite else backend.apply
    return function(x, gradients, options.norm, constants, **given(weights, statistics))


def penalty_exactly(options: Options, activations: Any) -> Any:
    """Return the penalty by way of the exact sum."""
    count = _count(options, activations, None)
    return finish(options, partial_sum(options, activations), count)


def _check_total(options: Options, total: Any, dtype: np.dtype[Any] | None = None) -> None:
    """Refuse what is not a sum of this norm, and of activations of the compute dtype if any."""
    if not isinstance(total, (PartialSum, PairedSum)):
        raise TypeError(
            f"total={total!r} is of type {type(total).__name__}; pass the sum of what "
            f"partial_sum returned for each piece, computed if it is lazy"
        )
    if tuple(part.degree for part in total.parts) != options.norm.terms:
        raise ValueError(
            f"total={total!r} is not what norm {options.norm.name!r} takes; "
            f"pass partial sums of the same regularization"
        )
    if dtype not in (None, total.dtype):
        raise ValueError(
            f"total is for {total.dtype} penalties, but those of the activations are {dtype}; "
            f"pass the sum of pieces of their dtype"
        )
