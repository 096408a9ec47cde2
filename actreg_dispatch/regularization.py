"""The API: a regularization is a norm and a strength λ, applied to whatever array comes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.registry import (
    NUMPY,
    RAW_ENVIRONMENT,
    RAW_KEY,
    Backend,
    asked_by_context,
    check_name,
    choose,
)
from actreg_dispatch.rounding import (
    COMPUTE_DTYPES,
    REFUSED,
    UNDECIDED,
    PartialSum,
    compute_dtype,
    degree_of,
    round_to,
)
from actreg_dispatch.transfer import move, write_back
from actreg_dispatch.validation import check_activations, check_gradients, check_number

__all__ = ["ActivityRegularization"]

_NDARRAY = np.ndarray
_NO_LAST: tuple[Any, ...] = (None,) * 5
_NO_PLAN: tuple[Any, dict[Any, Any]] = None, {}

# To add a float to a NumPy scalar takes a third of the time that it takes to make one of the float,
# but before NumPy 2 the float32 would become a float64.
_FLOATS_ARE_WEAK = (np.float32(0) + 0.0).dtype == np.float32


class ActivityRegularization:
    r"""A penalty on the size of a layer's activations.

    =================== ============= ============================================
    norm                penalty P(x)  gradient added by :meth:`apply`
    =================== ============= ============================================
    ``"l1"``            λ·Σ|xᵢ|       +λ where xᵢ > 0, −λ where xᵢ < 0, else 0
    ``"l2"``            λ·√(Σxᵢ²)     (λ·xᵢ)/‖x‖, nothing where Σxᵢ² ≤ ``epsilon``
    ``"l2_squared"``    λ·Σxᵢ²        (λ·2)·xᵢ
    =================== ============= ============================================

    ``"l2"`` is the norm itself: Keras' "L2" is ``"l2_squared"``, and neither has weight decay's ½.

    Parameters
    ----------
    lam : float
        The strength λ, a finite real number >= 0; a NumPy scalar or 0-d array will do. Assignable
        between calls, for a warm-up, and checked each time.
    norm : str or ActivityNorm, default "l1"
        Which norm.
    epsilon : float, optional
        ``"l2"`` only: the sum of squares up to which the gradient is zero. By default the machine
        epsilon of the compute dtype; 0.0 gives a zero gradient at x = 0 only.
    backend : str, optional
        The backend that computes, whatever ``use_backend`` and ``ACTREG_BACKEND`` say; ``"auto"``
        chooses by array type. Data moves to the backend and back if it must.

    Raises
    ------
    TypeError
        If ``lam`` or ``epsilon`` is not a number.
    ValueError
        If ``lam`` or ``epsilon`` is negative, infinite or NaN, the norm is unknown, or
        ``epsilon`` is given for another norm than ``"l2"``.
    UnknownBackendError
        If ``backend`` names no backend.

    Notes
    -----
    Activations may be NumPy or CuPy arrays of float16, bfloat16 (``ml_dtypes``; CuPy has it from
    version 14 on), float32 or float64, of any shape and strides. The compute dtype T is float64 for
    float64 and float32 for the others. λ is rounded to T once. The sum is as if it were exact,
    rounded to 53 bits; the penalty follows from it in binary64 and is rounded to T once. The
    gradient is computed in T, added in T, and rounded to the dtype of the gradients once. So every
    bit is the same for any order of summation. NaN and infinity propagate.

    The three norms, the constructors, :meth:`apply` and :meth:`penalty` are those of
    ``ActivityRegularization`` in the Rust crate scirs2 (``regularizers/activity.rs``).

    Examples
    --------
    >>> import numpy as np
    >>> reg = ActivityRegularization.l1(0.5)
    >>> activations = np.array([1.0, -2.0, 0.0])
    >>> gradients = np.ones(3)
    >>> float(reg.apply(activations, gradients))
    1.5
    >>> gradients
    array([1.5, 0.5, 1. ])
    """

    __hash__ = None  # type: ignore[assignment]  # lam may change

    def __init__(
        self,
        lam: float,
        norm: str | ActivityNorm = "l1",
        *,
        epsilon: float | None = None,
        backend: str | None = None,
    ) -> None:
        self.lam = lam
        try:
            self._norm = ActivityNorm(norm)
        except ValueError:
            known = ", ".join(repr(member.value) for member in ActivityNorm)
            raise ValueError(f"norm={norm!r} is unknown; use one of: {known}") from None
        if epsilon is not None:
            if self._norm is not ActivityNorm.L2:
                raise ValueError(
                    f"epsilon={epsilon!r} has no meaning for norm {self._norm.value!r}; "
                    f"leave it out, it belongs to 'l2'"
                )
            epsilon = check_number("epsilon", epsilon)
        self._epsilon = epsilon
        self._floor = math.nan if epsilon is None else epsilon
        self._last, self._plan = _NO_LAST, _NO_PLAN
        self._backend = None if backend is None else check_name(backend, f"backend={backend!r}")

    @classmethod
    def l1(cls, lam: float, *, backend: str | None = None) -> ActivityRegularization:
        """Return the L1 regularization: P(x) = λ·Σ|xᵢ|, gradient λ·sign(xᵢ)."""
        return cls(lam, ActivityNorm.L1, backend=backend)

    @classmethod
    def l2(
        cls, lam: float, *, epsilon: float | None = None, backend: str | None = None
    ) -> ActivityRegularization:
        """Return the L2 regularization, the norm: P(x) = λ·√(Σxᵢ²), gradient (λ·xᵢ)/‖x‖."""
        return cls(lam, ActivityNorm.L2, epsilon=epsilon, backend=backend)

    @classmethod
    def l2_squared(cls, lam: float, *, backend: str | None = None) -> ActivityRegularization:
        """Return the squared L2 regularization, Keras' "L2": P(x) = λ·Σxᵢ², gradient (λ·2)·xᵢ."""
        return cls(lam, ActivityNorm.L2_SQUARED, backend=backend)

    @property
    def lam(self) -> float:
        """The strength λ, a Python float; assigning checks it."""
        return self._lam

    @lam.setter
    def lam(self, value: float) -> None:
        self._lam = check_number("lam", value)
        self._prepared: dict[np.dtype[Any], tuple[float, float]] = {}

    @property
    def norm(self) -> ActivityNorm:
        """The norm."""
        return self._norm

    @property
    def epsilon(self) -> float | None:
        """The sum of squares up to which the L2 gradient is zero; None for the default."""
        return self._epsilon

    @property
    def backend(self) -> str | None:
        """The name of the backend that was asked for; None if none was."""
        return self._backend

    def penalty(self, activations: Any) -> Any:
        r"""Return the penalty of ``activations``, which are only read.

        λ·Σ|xᵢ| for ``"l1"``, λ·√(Σxᵢ²) for ``"l2"``, λ·Σxᵢ² for ``"l2_squared"``.

        Parameters
        ----------
        activations : numpy.ndarray or cupy.ndarray
            Of a supported dtype (see the class), any shape and strides; may be empty.

        Returns
        -------
        numpy.floating or cupy.ndarray
            In the compute dtype T: a NumPy scalar for a NumPy array, a 0-d array on the
            same device, without waiting for it, for a CuPy array. 0 for an empty array.

        Raises
        ------
        TypeError
            If ``activations`` are not a supported array.
        ValueError
            If ``lam`` is too large for their dtype.
        UnknownBackendError, BackendUnavailableError
            If the backend that is asked for does not exist or cannot run here.

        Examples
        --------
        >>> import numpy as np
        >>> float(ActivityRegularization.l2(0.1).penalty(np.array([3.0, 4.0])))
        0.5
        """
        penalty = self._express(activations, activations, False)
        if penalty is not None:
            return penalty
        kind, activations = check_activations(activations)
        lam, _ = self._constants(activations.dtype)
        backend, target = self._choose(kind, activations)
        if target == kind:
            return backend.penalty(activations, self._norm, lam)
        result = backend.penalty(move(activations, kind, target), self._norm, lam)
        return _returned(result, target, activations, kind)

    def partial_sum(self, activations: Any) -> PartialSum:
        """Return Σ|xᵢ| for ``"l1"``, Σxᵢ² for the others, over a piece of the activations, exactly.

        What comes in pieces, from a file, from several devices or processes, has the penalty of
        the whole: add up the partial sums of the pieces, in any order, and :meth:`finish`.

        Parameters
        ----------
        activations : numpy.ndarray or cupy.ndarray
            As for :meth:`penalty`. If they are on a device, waits for it.

        Returns
        -------
        PartialSum
            A number of unlimited precision; λ is not part of it.

        Raises
        ------
        TypeError
            If ``activations`` are not a supported array.
        UnknownBackendError, BackendUnavailableError
            If the backend that is asked for does not exist or cannot run here.

        Examples
        --------
        >>> import numpy as np
        >>> reg = ActivityRegularization.l1(0.5)
        >>> activations = np.arange(6.0)
        >>> total = sum(reg.partial_sum(piece) for piece in np.split(activations, 3))
        >>> float(reg.finish(total)), float(reg.penalty(activations))
        (7.5, 7.5)
        """
        kind, activations = check_activations(activations)
        backend, target = self._choose(kind, activations)
        if target != kind:
            activations = move(activations, kind, target)
        return backend.partial_sum(activations, self._norm)

    def finish(self, total: PartialSum) -> Any:
        """Return the penalty of activations whose sum is ``total``: λ·S, or λ·√S for ``"l2"``.

        Parameters
        ----------
        total : PartialSum
            The sum of what :meth:`partial_sum` returned for all pieces.

        Returns
        -------
        numpy.floating
            In the compute dtype T: bit for bit what :meth:`penalty` returns for the whole array.

        Raises
        ------
        TypeError
            If ``total`` is no :class:`PartialSum`.
        ValueError
            If it sums |x| where the norm takes x² or the other way round, or ``lam`` is too large
            for its dtype.
        """
        if not isinstance(total, PartialSum):
            raise TypeError(
                f"total={total!r} is of type {type(total).__name__}; pass the sum of what "
                f"partial_sum returned for each piece"
            )
        if total.degree != degree_of(self._norm):
            raise ValueError(
                f"total sums |x|**{total.degree}, which norm {self._norm.value!r} does not take; "
                f"pass partial sums of the same regularization"
            )
        lam, epsilon = self._constants(total.dtype)
        return total.dtype.type(total.outcome(self._norm, lam, epsilon).penalty)

    def apply(self, activations: Any, gradients: Any) -> Any:
        r"""Add the gradient of the penalty to ``gradients`` in place and return the penalty.

        Added to ``gradients[i]``: λ·sign(xᵢ) for ``"l1"``, (λ·xᵢ)/‖x‖ for ``"l2"`` unless
        Σxᵢ² ≤ ``epsilon``, (λ·2)·xᵢ for ``"l2_squared"``, evaluated in the dtype of the arrays in
        just this order, without fused multiply-adds.

        Parameters
        ----------
        activations : numpy.ndarray or cupy.ndarray
            Of a supported dtype (see the class), any shape and strides; may be empty. Only read.
        gradients : numpy.ndarray or cupy.ndarray
            Of the same library, shape and dtype, writable, sharing no memory with
            ``activations``. Updated in place, where it is, whatever its strides.

        Returns
        -------
        numpy.floating or cupy.ndarray
            The penalty, exactly as :meth:`penalty` returns it.

        Raises
        ------
        TypeError
            If an argument is not a supported array, or the two differ in library or dtype.
        ValueError
            If shapes differ, ``gradients`` are read-only, overlap themselves or the activations,
            or ``lam`` is too large for the dtype.
        UnknownBackendError, BackendUnavailableError
            If the backend that is asked for does not exist or cannot run here.

        Notes
        -----
        Whatever is raised for the arguments is raised before anything is written.

        Examples
        --------
        >>> import numpy as np
        >>> activations, gradients = np.array([2.0, 3.0]), np.zeros(2)
        >>> float(ActivityRegularization.l2_squared(0.1).apply(activations, gradients))
        1.3
        >>> gradients
        array([0.4, 0.6])
        """
        context, environment, dtype, function, zero = self._last
        if (  # the same kind of call as the last one
            type(activations) is _NDARRAY is type(gradients)  # which __class__ may belie
            and activations.dtype is dtype is gradients.dtype
            and asked_by_context() is context
            and RAW_ENVIRONMENT.get(RAW_KEY) is environment
        ):
            x, g = activations, gradients
            if x.ndim != 1:
                x, g = _raveled(x, g)
            try:
                penalty = REFUSED if x is None else function(x, g, self._lam, self._floor)
            except TypeError:  # which takes some 50 µs, so not twice
                penalty, self._last = REFUSED, _NO_LAST
            if penalty >= 0.0:
                return zero + penalty
            if penalty == UNDECIDED:
                return self.finish(self.partial_sum(activations))
        penalty = self._express(activations, gradients, True)
        if penalty is not None:
            return penalty
        kind, activations = check_activations(activations)
        gradients = check_gradients(activations, gradients, kind)
        lam, epsilon = self._constants(activations.dtype)
        backend, target = self._choose(kind, activations, gradients)
        if target == kind:
            return backend.apply(activations, gradients, self._norm, lam, epsilon)
        moved = move(gradients, kind, target)
        result = backend.apply(move(activations, kind, target), moved, self._norm, lam, epsilon)
        write_back(moved, target, gradients, kind)
        return _returned(result, target, activations, kind)

    def _express(self, activations: Any, gradients: Any, writes: bool) -> Any:
        """Do the call by one compiled function if the arguments are plain enough, or return None.

        Such a function takes contiguous NumPy arrays and does at once what :meth:`apply` does step
        by step, checks included. It is what makes a call on a small array cheap. Whatever it does
        not take it leaves alone, to be computed, or complained about, the general way.
        """
        if type(activations) is not _NDARRAY:
            return None
        dtype = activations.dtype
        x, g = _raveled(activations, gradients)
        if x is None or g.dtype != dtype:  # Numba would not always tell a foreign byte order
            return None
        asked, plan = (asked_by_context(), RAW_ENVIRONMENT.get(RAW_KEY)), self._plan
        if plan[0] != asked:  # tuples that are replaced as a whole, so threads may race
            plan = self._plan = asked, {}
        functions = plan[1].get((dtype, writes), ())
        try:
            for function in functions:
                penalty = function(x, g, self._lam, self._floor)
                if penalty != REFUSED:
                    break
            else:
                function = self._find_function(dtype, x.size, writes)
                if function is None or function in functions:
                    return None
                choose(NUMPY, dtype, self._backend)  # once more, to log it
                plan[1][dtype, writes] = (*functions, function)
                penalty = function(x, g, self._lam, self._floor)
        except TypeError:  # read-only
            return None
        if penalty < 0.0:
            return None if penalty == REFUSED else self.finish(self.partial_sum(activations))
        scalar = COMPUTE_DTYPES[dtype].type
        if writes and _FLOATS_ARE_WEAK:
            self._last = *asked, dtype, function, scalar(0)
        return scalar(penalty)

    def _find_function(
        self, dtype: np.dtype[Any], size: int, writes: bool
    ) -> Callable[[Any, Any, float, float], float] | None:
        """Return the chosen backend's function for such arrays, or None if it has none."""
        if compute_dtype(dtype) is None:
            return None
        backend, target = choose(NUMPY, dtype, self._backend, log=False)
        express = getattr(backend, "express", None)
        if target != NUMPY or express is None:
            return None
        return express(self._norm, dtype, size, writes=writes)  # type: ignore[no-any-return]

    def _choose(self, kind: str, *arrays: Any) -> tuple[Backend, str]:
        aligned = kind != NUMPY or all(array.flags.aligned for array in arrays)
        return choose(kind, arrays[0].dtype, self._backend, aligned=aligned)

    def _constants(self, dtype: np.dtype[Any]) -> tuple[float, float]:
        """Return λ rounded to the compute dtype, and ``epsilon`` with its default filled in."""
        prepared = self._prepared  # the assignment of λ replaces it
        found = prepared.get(dtype)
        if found is not None:
            return found
        compute = COMPUTE_DTYPES[dtype]
        lam = float(round_to(compute, self._lam))
        doubled = self._norm is ActivityNorm.L2_SQUARED
        if lam > float(np.finfo(compute).max) / (2 if doubled else 1):
            raise ValueError(f"lam={self._lam!r} is too large for {dtype} activations; lower it")
        default = float(np.finfo(compute).eps)
        found = lam, default if self._epsilon is None else self._epsilon
        prepared[dtype] = found
        return found

    def _options(self) -> tuple[float, ActivityNorm, float | None, str | None]:
        return self._lam, self._norm, self._epsilon, self._backend

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}, "_last": _NO_LAST, "_plan": _NO_PLAN}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActivityRegularization):
            return NotImplemented
        return self._options() == other._options()

    def __repr__(self) -> str:
        options = "".join(
            f", {name}={value!r}"
            for name, value in (("epsilon", self._epsilon), ("backend", self._backend))
            if value is not None
        )
        return f"{type(self).__name__}({self._lam!r}, {self._norm.value!r}{options})"


def _raveled(x: Any, g: Any) -> tuple[Any, Any]:
    """Return contiguous arrays of one shape as views of one axis, anything else as None."""
    if type(g) is _NDARRAY and x.shape == g.shape and x.flags.c_contiguous and g.flags.c_contiguous:
        return x.ravel(), g.ravel()
    return None, None


def _returned(result: Any, source: str, activations: Any, target: str) -> Any:
    """Return a penalty that was computed elsewhere as the caller's own kind of scalar."""
    if target == NUMPY:
        return move(result, source, target)[()]
    with activations.device:
        return move(result, source, target)
