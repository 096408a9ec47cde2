"""The API: a regularization is a norm and a strength λ, applied to whatever array comes."""

from __future__ import annotations

from typing import Any

import numpy as np

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.registry import NUMPY, Backend, check_name, choose
from actreg_dispatch.rounding import COMPUTE_DTYPES, round_to
from actreg_dispatch.transfer import move, write_back
from actreg_dispatch.validation import check_activations, check_gradients, check_number

__all__ = ["ActivityRegularization"]


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
    Activations may be NumPy arrays of float16, bfloat16 (``ml_dtypes``), float32 or float64, or
    CuPy arrays of float32 or float64, of any shape and strides. The compute dtype T is float64 for
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
        kind = check_activations(activations)
        lam, _ = self._constants(activations.dtype)
        if kind == NUMPY:
            activations = np.asarray(activations)  # a subclass may redefine arithmetic
        backend, target = self._choose(kind, activations)
        if target == kind:
            return backend.penalty(activations, self._norm, lam)
        result = backend.penalty(move(activations, kind, target), self._norm, lam)
        return _returned(result, target, activations, kind)

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
        kind = check_activations(activations)
        check_gradients(activations, gradients, kind)
        lam, epsilon = self._constants(activations.dtype)
        if kind == NUMPY:
            activations, gradients = np.asarray(activations), np.asarray(gradients)
        backend, target = self._choose(kind, activations, gradients)
        if target == kind:
            return backend.apply(activations, gradients, self._norm, lam, epsilon)
        moved = move(gradients, kind, target)
        result = backend.apply(move(activations, kind, target), moved, self._norm, lam, epsilon)
        write_back(moved, target, gradients, kind)
        return _returned(result, target, activations, kind)

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
        return self.__dict__ | {"_prepared": {}}

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


def _returned(result: Any, source: str, activations: Any, target: str) -> Any:
    """Return a penalty that was computed elsewhere as the caller's own kind of scalar."""
    if target == NUMPY:
        return move(result, source, target)[()]
    with activations.device:
        return move(result, source, target)
