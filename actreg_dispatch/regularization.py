"""The API: a regularization is a norm and a strength λ, applied to whatever array comes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from actreg_dispatch.errors import MixedArraysError
from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.registry import (
    CUPY,
    NUMPY,
    RAW_ENVIRONMENT,
    RAW_KEY,
    Backend,
    asked_by_context,
    check_name,
    choose,
    library_of,
)
from actreg_dispatch.rounding import (
    COMPUTE_DTYPES,
    REFUSED,
    UNDECIDED,
    PairedSum,
    PartialSum,
    compute_dtype,
    degree_of,
    round_to,
)
from actreg_dispatch.strength import (
    REDUCTIONS,
    UNSCALED,
    Constants,
    check_count,
    check_scale,
    constants_of,
    count_of,
    strengths_of,
)
from actreg_dispatch.transfer import move, write_back, zeros_like
from actreg_dispatch.validation import (
    check_activations,
    check_apart,
    check_gradients,
    check_number,
)

__all__ = [
    "ActivityRegularization",
    "Penalties",
    "Resolved",
    "check_regularization",
    "resolved",
]

Strength = float | tuple[float, float]
Total = PartialSum | PairedSum

_NDARRAY = np.ndarray
_NO_LAST: tuple[Any, ...] = (None,) * 5
_NO_PLAN: tuple[Any, dict[Any, Any]] = None, {}

# To add a float to a NumPy scalar takes a third of the time that it takes to make one of the float,
# but before NumPy 2 the float32 would become a float64.
_FLOATS_ARE_WEAK = (np.float32(0) + 0.0).dtype == np.float32


class Penalties(NamedTuple):
    """What :meth:`ActivityRegularization.apply_all` returns."""

    total: Any
    """The sum of the penalties."""
    layers: Any
    """The penalty of each layer, in a list, or in a dict by name."""


class ActivityRegularization:
    r"""A penalty on the size of a layer's activations.

    =================== ================== ============================================
    norm                penalty P(x)       gradient added by :meth:`apply`
    =================== ================== ============================================
    ``"l1"``            λ·Σ|xᵢ|            +λ where xᵢ > 0, −λ where xᵢ < 0, else 0
    ``"l2"``            λ·√(Σxᵢ²)          (λ·xᵢ)/‖x‖, nothing where Σxᵢ² ≤ ``epsilon``
    ``"l2_squared"``    λ·Σxᵢ²             (λ·2)·xᵢ
    ``"l1_l2_squared"`` λ₁·Σ|xᵢ| + λ₂·Σxᵢ² that of ``"l1"`` plus that of ``"l2_squared"``
    =================== ================== ============================================

    ``"l2"`` is the norm itself: Keras' "L2" is ``"l2_squared"``, its "L1L2" ``"l1_l2_squared"``,
    and none has weight decay's ½.

    Parameters
    ----------
    lam : float or tuple of two floats
        The strength λ, a finite real number >= 0; a NumPy scalar or 0-d array will do. For
        ``"l1_l2_squared"`` both, λ₁ and λ₂, or one number for both. Assignable between calls, for a
        warm-up, and checked each time.
    norm : str or ActivityNorm, default "l1"
        Which norm.
    epsilon : float, optional
        ``"l2"`` only: the sum of squares up to which the gradient is zero. By default the machine
        epsilon of the compute dtype; 0.0 gives a zero gradient at x = 0 only.
    reduction : {"sum", "mean", "batch"}, default "sum"
        What λ is divided by, for the penalty and for the gradient: nothing, the number of elements,
        or the number of samples, which is the length of the first axis (as Keras 3 has it).
    backend : str, optional
        The backend that computes, whatever ``use_backend`` and ``ACTREG_BACKEND`` say; ``"auto"``
        chooses by array type. Data moves to the backend and back if it must.

    Raises
    ------
    TypeError
        If ``lam`` or ``epsilon`` is not a number.
    ValueError
        If ``lam`` or ``epsilon`` is negative, infinite or NaN, the norm or the reduction is
        unknown, or ``epsilon`` is given for another norm than ``"l2"``.
    UnknownBackendError
        If ``backend`` names no backend.

    Notes
    -----
    Activations may be NumPy or CuPy arrays of float16, bfloat16 (``ml_dtypes``; CuPy has it from
    version 14 on), float32 or float64, of any shape and strides; or tensors of PyTorch, arrays of
    JAX or Dask arrays (see :mod:`actreg_dispatch.torch`, :mod:`actreg_dispatch.jax` and
    :mod:`actreg_dispatch.dask`). The compute dtype T is float64 for float64 and float32 for the
    others. λ, divided as ``reduction`` says, is rounded to T once. The sum is as if it were exact,
    rounded to 53 bits; the penalty follows from it in binary64 and is rounded to T once. The
    gradient is computed in T, added in T, and rounded to the dtype of the gradients once. So every
    bit is the same for any order of summation. NaN and infinity propagate.

    L1, L2 and squared L2, their constructors, :meth:`apply` and :meth:`penalty` are those of
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
        lam: Strength,
        norm: str | ActivityNorm = "l1",
        *,
        epsilon: float | None = None,
        reduction: str = "sum",
        backend: str | None = None,
    ) -> None:
        try:
            self._norm = ActivityNorm(norm)
        except ValueError:
            known = ", ".join(repr(member.value) for member in ActivityNorm)
            raise ValueError(f"norm={norm!r} is unknown; use one of: {known}") from None
        self.lam = lam
        if epsilon is not None:
            if self._norm is not ActivityNorm.L2:
                raise ValueError(
                    f"epsilon={epsilon!r} has no meaning for norm {self._norm.value!r}; "
                    f"leave it out, it belongs to 'l2'"
                )
            epsilon = check_number("epsilon", epsilon)
        if reduction not in REDUCTIONS:
            known = ", ".join(map(repr, REDUCTIONS))
            raise ValueError(f"reduction={reduction!r} is unknown; use one of: {known}")
        self._reduction = reduction
        self._epsilon = epsilon
        self._floor = math.nan if epsilon is None else epsilon
        self._last, self._plan = _NO_LAST, _NO_PLAN
        self._backend = None if backend is None else check_name(backend, f"backend={backend!r}")

    @classmethod
    def l1(
        cls, lam: float, *, reduction: str = "sum", backend: str | None = None
    ) -> ActivityRegularization:
        """Return the L1 regularization: P(x) = λ·Σ|xᵢ|, gradient λ·sign(xᵢ)."""
        return cls(lam, ActivityNorm.L1, reduction=reduction, backend=backend)

    @classmethod
    def l2(
        cls,
        lam: float,
        *,
        epsilon: float | None = None,
        reduction: str = "sum",
        backend: str | None = None,
    ) -> ActivityRegularization:
        """Return the L2 regularization, the norm: P(x) = λ·√(Σxᵢ²), gradient (λ·xᵢ)/‖x‖."""
        return cls(lam, ActivityNorm.L2, epsilon=epsilon, reduction=reduction, backend=backend)

    @classmethod
    def l2_squared(
        cls, lam: float, *, reduction: str = "sum", backend: str | None = None
    ) -> ActivityRegularization:
        """Return the squared L2 regularization, Keras' "L2": P(x) = λ·Σxᵢ², gradient (λ·2)·xᵢ."""
        return cls(lam, ActivityNorm.L2_SQUARED, reduction=reduction, backend=backend)

    @classmethod
    def l1_l2(
        cls,
        l1: float = 0.0,
        l2_squared: float = 0.0,
        *,
        reduction: str = "sum",
        backend: str | None = None,
    ) -> ActivityRegularization:
        """Return both in one pass.

        With ``reduction="batch"`` it is what ``keras.layers.ActivityRegularization(l1, l2)`` adds.
        P(x) = l1·Σ|xᵢ| + l2_squared·Σxᵢ², gradient l1·sign(xᵢ) + (l2_squared·2)·xᵢ.
        """
        lam = check_number("l1", l1), check_number("l2_squared", l2_squared)
        return cls(lam, ActivityNorm.L1_L2_SQUARED, reduction=reduction, backend=backend)

    @property
    def lam(self) -> Any:
        """The strength λ, a Python float, or two of them; assigning checks it."""
        return self._lam

    @lam.setter
    def lam(self, value: Strength) -> None:
        if isinstance(value, np.ndarray) and value.shape == (2,):
            value = tuple(value.tolist())
        several = isinstance(value, (tuple, list))
        if self._norm is not ActivityNorm.L1_L2_SQUARED:
            if several and len(value) == 2:  # type: ignore[arg-type]
                raise TypeError(
                    f"lam={value!r} are several numbers, but norm {self._norm.value!r} takes one; "
                    f"pass one, or use norm 'l1_l2_squared'"
                )
            self._lam: Any = check_number("lam", value)
            return
        pair: Any = value if several else (value, value)
        if len(pair) != 2:
            raise ValueError(f"lam={value!r} are not two numbers; pass (l1, l2_squared)")
        self._lam = check_number("lam[0]", pair[0]), check_number("lam[1]", pair[1])

    @property
    def norm(self) -> ActivityNorm:
        """The norm."""
        return self._norm

    @property
    def epsilon(self) -> float | None:
        """The sum of squares up to which the L2 gradient is zero; None for the default."""
        return self._epsilon

    @property
    def reduction(self) -> str:
        """What λ is divided by: ``"sum"``, nothing, ``"mean"`` or ``"batch"``."""
        return self._reduction

    @property
    def backend(self) -> str | None:
        """The name of the backend that was asked for; None if none was."""
        return self._backend

    def penalty(self, activations: Any) -> Any:
        r"""Return the penalty of ``activations``, which are only read.

        λ·Σ|xᵢ| for ``"l1"``, λ·√(Σxᵢ²) for ``"l2"``, λ·Σxᵢ² for ``"l2_squared"``,
        λ₁·Σ|xᵢ| + λ₂·Σxᵢ² for ``"l1_l2_squared"``.

        Parameters
        ----------
        activations : numpy.ndarray, cupy.ndarray or other array
            Of a supported dtype (see the class), any shape and strides; may be empty.

        Returns
        -------
        numpy.floating, cupy.ndarray or other array
            In the compute dtype T: a NumPy scalar for a NumPy array; a 0-d array on the same
            device, without waiting for it, for a CuPy array; what their modules say for the others.
            0 for an empty array.

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
        library = library_of(activations)
        if library is not None:
            return library.penalty(self, activations)
        kind, activations = check_activations(activations)
        lam, _, _ = self._constants(activations)
        backend, target = self._choose(kind, activations)
        if target == kind:
            return backend.penalty(activations, self._norm, lam)
        result = backend.penalty(move(activations, kind, target), self._norm, lam)
        return _returned(result, target, activations, kind)

    def partial_sum(self, activations: Any) -> Total:
        """Return the sum over a piece of the activations, exactly.

        Σ|xᵢ| for ``"l1"``, Σxᵢ² for ``"l2"`` and ``"l2_squared"``, both for ``"l1_l2_squared"``.

        What comes in pieces, from a file, from several devices or processes, has the penalty of
        the whole: add up the partial sums of the pieces, in any order, and :meth:`finish`.

        Parameters
        ----------
        activations : numpy.ndarray or cupy.ndarray
            As for :meth:`penalty`. If they are on a device, waits for it.

        Returns
        -------
        PartialSum or PairedSum
            A number of unlimited precision, or both for ``"l1_l2_squared"``; λ is not part of it.

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
        library = library_of(activations)
        if library is not None:
            return library.partial_sum(self, activations)  # type: ignore[no-any-return]
        kind, activations = check_activations(activations)
        backend, target = self._choose(kind, activations)
        if target != kind:
            activations = move(activations, kind, target)
        return backend.partial_sum(activations, self._norm)

    def finish(self, total: Total, *, count: int | None = None) -> Any:
        """Return the penalty of activations whose sum is ``total``: λ·S, or λ·√S for ``"l2"``.

        Parameters
        ----------
        total : PartialSum or PairedSum
            The sum of what :meth:`partial_sum` returned for all pieces.
        count : int, optional
            How many elements (``reduction="mean"``) or samples (``"batch"``) all pieces together
            have; needed for these reductions only.

        Returns
        -------
        numpy.floating
            In the compute dtype T: bit for bit what :meth:`penalty` returns for the whole array.

        Raises
        ------
        TypeError
            If ``total`` is no such sum.
        ValueError
            If it sums |x| where the norm takes x² or the other way round, ``lam`` is too large
            for its dtype, or ``count`` is missing or < 0.
        """
        self._check_total(total)
        lam, _, epsilon = constants_of(self, total.dtype, check_count(self._reduction, count))
        return total.dtype.type(total.outcome(self._norm, lam, epsilon).penalty)

    def add_gradient(
        self,
        activations: Any,
        gradients: Any,
        total: Total | None = None,
        *,
        count: int | None = None,
        scale: float = 1.0,
    ) -> None:
        """Add to ``gradients`` in place what :meth:`apply` would add if it were given all pieces.

        Parameters
        ----------
        activations, gradients : numpy.ndarray, cupy.ndarray
            One piece of the whole, as for :meth:`apply`.
        total : PartialSum or PairedSum, optional
            The sum of what :meth:`partial_sum` returned for all pieces; ``"l2"`` needs it for ‖x‖.
        count : int, optional
            As for :meth:`finish`.
        scale : float, default 1.0
            As for :meth:`apply`.

        Raises
        ------
        TypeError, ValueError, BackendError
            As for :meth:`apply` and :meth:`finish`, or if ``total`` is missing or of another dtype.

        Examples
        --------
        >>> import numpy as np
        >>> reg = ActivityRegularization.l2(1.0)
        >>> activations, gradients = np.array([3.0, 4.0]), np.zeros(2)
        >>> pieces = activations[:1], activations[1:]
        >>> total = sum(reg.partial_sum(piece) for piece in pieces)
        >>> for piece, gradient in zip(pieces, (gradients[:1], gradients[1:])):
        ...     reg.add_gradient(piece, gradient, total)
        >>> gradients
        array([0.6, 0.8])
        """
        library = library_of(activations)
        if library is not None:
            library.add_gradient(self, activations, gradients, total, count=count, scale=scale)
            return
        kind, activations = check_activations(activations)
        gradients = check_gradients(activations, gradients, kind)
        count = check_count(self._reduction, count)
        lam, strength, epsilon = constants_of(self, activations.dtype, count, scale)
        divisor = 0.0
        if self._norm is ActivityNorm.L2 or total is not None:
            self._check_total(total, COMPUTE_DTYPES[activations.dtype])
        if self._norm is ActivityNorm.L2:
            found = total.outcome(self._norm, lam, epsilon)  # type: ignore[union-attr]
            if not found.has_gradient:
                return
            divisor = found.divisor
        backend, target = self._choose(kind, activations, gradients)
        if target == kind:
            backend.add_gradient(activations, gradients, self._norm, strength, divisor)
            return
        moved = move(gradients, kind, target)
        backend.add_gradient(move(activations, kind, target), moved, self._norm, strength, divisor)
        write_back(moved, target, gradients, kind)

    def penalty_and_gradient(
        self, activations: Any, out: Any = None, *, scale: float = 1.0
    ) -> tuple[Any, Any]:
        """Return the penalty of ``activations`` and its gradient, an array of their kind.

        For arrays that cannot or should not be written. The gradient is, bit for bit, what
        :meth:`apply` leaves in gradients that were zero.

        Parameters
        ----------
        activations : numpy.ndarray, cupy.ndarray or other array
            As for :meth:`penalty`. Only read.
        out : array, optional
            Where the gradient goes: an array such as :meth:`apply` takes for ``gradients``, which
            is overwritten. A new one by default.
        scale : float, default 1.0
            As for :meth:`apply`.

        Returns
        -------
        penalty : numpy.floating, cupy.ndarray or other array
            As :meth:`penalty` returns it.
        gradient : array
            ``out``, or a new array of the shape and dtype of ``activations``.

        Raises
        ------
        TypeError, ValueError, BackendError
            As for :meth:`apply`, before ``out`` is written.

        Examples
        --------
        >>> import numpy as np
        >>> reg = ActivityRegularization.l1(0.5)
        >>> penalty, gradient = reg.penalty_and_gradient(np.array([1.0, -2.0, 0.0]))
        >>> float(penalty), gradient
        (1.5, array([ 0.5, -0.5,  0. ]))
        """
        library = library_of(activations)
        if library is not None:
            return library.penalty_and_gradient(  # type: ignore[no-any-return]
                self, activations, out, scale=scale
            )
        kind, activations = check_activations(activations)
        if out is not None:
            gradients = check_gradients(activations, out, kind, "out")
            return self._update(kind, activations, gradients, scale, overwrite=True), out
        gradient = zeros_like(activations, kind)
        penalty = self._express(activations, gradient, True, scale)
        if penalty is None:
            penalty = self._update(kind, activations, gradient, scale)
        return penalty, gradient

    def apply(self, activations: Any, gradients: Any, *, scale: float = UNSCALED) -> Any:
        r"""Add the gradient of the penalty to ``gradients`` in place and return the penalty.

        Added to ``gradients[i]``: λ·sign(xᵢ) for ``"l1"``, (λ·xᵢ)/‖x‖ for ``"l2"`` unless
        Σxᵢ² ≤ ``epsilon``, (λ·2)·xᵢ for ``"l2_squared"``, λ₁·sign(xᵢ) + (λ₂·2)·xᵢ for
        ``"l1_l2_squared"``, evaluated in the compute dtype in just
        this order, without fused multiply-adds, where λ stands for ``scale`` times λ.

        Parameters
        ----------
        activations : numpy.ndarray, cupy.ndarray or torch.Tensor
            Of a supported dtype (see the class), any shape and strides; may be empty. Only read.
        gradients : numpy.ndarray, cupy.ndarray or torch.Tensor
            Of the same library, shape and dtype, writable, sharing no memory with
            ``activations``. Updated in place, where it is, whatever its strides.
        scale : float, default 1.0
            Multiplies λ for the gradient alone: a loss scale, or the gradient that comes in. The
            product is rounded to T once. Infinity and NaN propagate.

        Returns
        -------
        numpy.floating, cupy.ndarray or torch.Tensor
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
            and scale is UNSCALED
            and asked_by_context() is context
            and RAW_ENVIRONMENT.get(RAW_KEY) is environment
        ):
            x, g = activations, gradients
            if x.ndim != 1:
                x, g = _raveled(x, g)
            try:
                lam = self._lam
                penalty = REFUSED if x is None else function(x, g, lam, lam, self._floor)
            except TypeError:  # which takes some 50 µs, so not twice
                penalty, self._last = REFUSED, _NO_LAST
            if penalty >= 0.0:
                return zero + penalty
            if penalty == UNDECIDED:
                return self._exact(activations)
        penalty = self._express(activations, gradients, True, scale)
        if penalty is not None:
            return penalty
        library = library_of(activations)
        if library is not None:
            return library.apply(self, activations, gradients, scale=scale)
        kind, activations = check_activations(activations)
        gradients = check_gradients(activations, gradients, kind)
        return self._update(kind, activations, gradients, scale)

    def apply_all(self, activations: Any, gradients: Any, *, scale: float = UNSCALED) -> Penalties:
        """Do :meth:`apply` for many layers at once, each with a penalty of its own.

        Contiguous arrays of one dtype are done in one parallel region, or on a device by as many
        launches as one array takes, which is a fraction of the time of a loop if they are small.

        Parameters
        ----------
        activations, gradients : sequence of arrays, or mapping of names to arrays
            A layer each, as :meth:`apply` takes them, of any shapes, all of one library. No
            gradients may share memory with other gradients or any activations.
        scale : float, default 1.0
            As for :meth:`apply`.

        Returns
        -------
        Penalties
            ``layers``, the penalties as :meth:`apply` returns them, in a list, or in a dict by
            name; and ``total``, their sum, rounded to binary64, then to the widest of their dtypes.

        Raises
        ------
        TypeError, ValueError, BackendError
            As for :meth:`apply`, or if layers are missing, are of several libraries or share
            memory; before anything is written.

        Examples
        --------
        >>> import numpy as np
        >>> reg = ActivityRegularization.l1(0.5)
        >>> activations = {"hidden": np.array([1.0, -2.0]), "code": np.array([4.0])}
        >>> gradients = {name: np.zeros_like(x) for name, x in activations.items()}
        >>> total, layers = reg.apply_all(activations, gradients)
        >>> float(total), float(layers["code"]), gradients["code"]
        (3.5, 2.0, array([0.5]))
        """
        names, xs, gs = _layers(activations, gradients)
        if scale is not UNSCALED:
            scale = check_scale(scale)
        labels = list(range(len(xs))) if names is None else names
        library = library_of(xs[0]) if xs else None
        if library is not None:
            total, layers = library.apply_all(self, labels, xs, gs, scale=scale)
        else:
            total, layers = self._express_all(xs, gs, scale) or self._general_all(
                labels, xs, gs, scale
            )
        return Penalties(total, layers if names is None else dict(zip(names, layers, strict=True)))

    def _express_all(
        self, xs: tuple[Any, ...], gs: tuple[Any, ...], scale: float
    ) -> tuple[Any, list[Any]] | None:
        """Do all layers by one compiled function if they are plain enough, or return None."""
        if not xs or type(xs[0]) is not _NDARRAY or compute_dtype(xs[0].dtype) is None:
            return None
        backend, target = choose(NUMPY, xs[0].dtype, self._backend, log=False)
        express_all = getattr(backend, "express_all", None)
        if target != NUMPY or express_all is None:
            return None
        penalties = express_all(xs, gs, self._norm, self._lam, scale, self._reduction, self._floor)
        if penalties is None:
            return None
        choose(NUMPY, xs[0].dtype, self._backend)  # once more, to log it
        compute = COMPUTE_DTYPES[xs[0].dtype]
        layers, values = list(penalties.astype(compute)), penalties.tolist()
        for k in np.flatnonzero(penalties < 0.0).tolist():
            if values[k] == UNDECIDED:
                layers[k] = self._exact(xs[k])
            else:
                layers[k] = self._update(NUMPY, xs[k], gs[k], scale)
            values[k] = float(layers[k])
        return _sum_of(values, compute), layers

    def _general_all(
        self, labels: list[Any], xs: tuple[Any, ...], gs: tuple[Any, ...], scale: float
    ) -> tuple[Any, list[Any]]:
        """Check all layers, then do one after the other; return the total, too."""
        kinds, pairs, arrays, constants, choices = set(), [], [], [], []
        for label, x, g in zip(labels, xs, gs, strict=True):
            name, written = f"activations[{label!r}]", f"gradients[{label!r}]"
            kind, x = check_activations(x, name)
            g = check_gradients(x, g, kind, written, name)
            constants.append(self._constants(x, scale, name))
            choices.append(self._choose(kind, x, g))
            kinds.add(kind)
            pairs.append((kind, x, g))
            if kind in (NUMPY, CUPY):
                arrays += [(name, x, False), (written, g, True)]
        if len(kinds) > 1:
            raise MixedArraysError(
                f"activations are of several libraries ({', '.join(sorted(kinds))}); "
                f"call apply_all for each"
            )
        check_apart(arrays)
        if {target for _, target in choices} != {CUPY} or kinds != {CUPY}:
            layers = [self._update(kind, x, g, scale) for kind, x, g in pairs]
            total = _total(layers, None)
            if kinds == {CUPY}:
                total = _returned(total, NUMPY, pairs[0][1], CUPY)
            return total, layers
        _, xs, gs = zip(*pairs, strict=True)
        if len({str(x.device) for x in xs}) > 1:
            raise ValueError("activations are on several devices; call apply_all for each")
        backend = choices[0][0]
        with xs[0].device:
            apply_many = getattr(backend, "apply_many", None)
            done = apply_many and apply_many(xs, gs, self._norm, constants)
            layers = done or [self._update(kind, x, g, scale) for kind, x, g in pairs]
            return _total(layers, backend), layers

    def _update(
        self, kind: str, activations: Any, gradients: Any, scale: float, *, overwrite: bool = False
    ) -> Any:
        """Do :meth:`apply` for checked arrays, to zero gradients if they are to be overwritten."""
        lam, strength, epsilon = self._constants(activations, scale)
        backend, target = self._choose(kind, activations, gradients)
        if target == kind:
            if overwrite:
                gradients[...] = 0
            return backend.apply(activations, gradients, self._norm, lam, strength, epsilon)
        moved, x = move(gradients, kind, target), move(activations, kind, target)
        if overwrite:
            moved[...] = 0
        result = backend.apply(x, moved, self._norm, lam, strength, epsilon)
        write_back(moved, target, gradients, kind)
        return _returned(result, target, activations, kind)

    def _express(
        self, activations: Any, gradients: Any, writes: bool, scale: float = UNSCALED
    ) -> Any:
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
        lam = strength = self._lam
        if self._reduction != "sum" or scale is not UNSCALED:
            count = count_of(self._reduction, activations.shape)
            lam, strength = strengths_of(lam, count, scale)
        functions = plan[1].get((dtype, writes), ())
        try:
            for function in functions:
                penalty = function(x, g, lam, strength, self._floor)
                if penalty != REFUSED:
                    break
            else:
                function = self._find_function(dtype, x.size, writes)
                if function is None or function in functions:
                    return None
                choose(NUMPY, dtype, self._backend)  # once more, to log it
                plan[1][dtype, writes] = (*functions, function)
                penalty = function(x, g, lam, strength, self._floor)
        except TypeError:  # read-only
            return None
        if penalty < 0.0:
            return None if penalty == REFUSED else self._exact(activations)
        scalar = COMPUTE_DTYPES[dtype].type
        if writes and _FLOATS_ARE_WEAK and self._reduction == "sum":
            self._last = *asked, dtype, function, scalar(0)
        return scalar(penalty)

    def _find_function(
        self, dtype: np.dtype[Any], size: int, writes: bool
    ) -> Callable[[Any, Any, float, float, float], float] | None:
        """Return the chosen backend's function for such arrays, or None if it has none."""
        if compute_dtype(dtype) is None:
            return None
        backend, target = choose(NUMPY, dtype, self._backend, log=False)
        express = getattr(backend, "express", None)
        if target != NUMPY or express is None:
            return None
        return express(self._norm, dtype, size, writes=writes)  # type: ignore[no-any-return]

    def _constants(
        self, activations: Any, scale: float = UNSCALED, name: str = "activations"
    ) -> Constants:
        # Arrays of other libraries need not have a shape, as long as nothing is divided by it.
        divides = self._reduction != "sum"
        count = count_of(self._reduction, activations.shape, name) if divides else 1
        return constants_of(self, activations.dtype, count, scale, name)

    def _choose(self, kind: str, *arrays: Any) -> tuple[Backend, str]:
        aligned = kind != NUMPY or all(array.flags.aligned for array in arrays)
        return choose(kind, arrays[0].dtype, self._backend, aligned=aligned)

    def _exact(self, activations: Any) -> Any:
        """Return the penalty by way of the exact sum."""
        count = None if self._reduction == "sum" else count_of(self._reduction, activations.shape)
        return self.finish(self.partial_sum(activations), count=count)

    def _check_total(self, total: Any, dtype: np.dtype[Any] | None = None) -> None:
        """Refuse what is no sum for this norm, and for activations of the compute dtype if any."""
        if not isinstance(total, (PartialSum, PairedSum)):
            raise TypeError(
                f"total={total!r} is of type {type(total).__name__}; pass the sum of what "
                f"partial_sum returned for each piece, computed if it is lazy"
            )
        both = self._norm is ActivityNorm.L1_L2_SQUARED
        fits = isinstance(total, PairedSum) is both
        if not fits or (isinstance(total, PartialSum) and total.degree != degree_of(self._norm)):
            raise ValueError(
                f"total={total!r} is not what norm {self._norm.value!r} takes; "
                f"pass partial sums of the same regularization"
            )
        if dtype not in (None, total.dtype):
            raise ValueError(
                f"total is for {total.dtype} penalties, but those of the activations are {dtype}; "
                f"pass the sum of pieces of their dtype"
            )

    def _options(self) -> tuple[Any, ...]:
        return self._lam, self._norm, self._epsilon, self._reduction, self._backend

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": _NO_LAST, "_plan": _NO_PLAN}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActivityRegularization):
            return NotImplemented
        return self._options() == other._options()

    def __repr__(self) -> str:
        options = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("epsilon", self._epsilon, None),
                ("reduction", self._reduction, "sum"),
                ("backend", self._backend, None),
            )
            if value != default
        )
        return f"{type(self).__name__}({self._lam!r}, {self._norm.value!r}{options})"


def check_regularization(reg: Any) -> None:
    """Refuse as ``reg`` what is none, for functions that take one.

    Raises
    ------
    TypeError
        If it is no :class:`ActivityRegularization`.
    """
    if not isinstance(reg, ActivityRegularization):
        raise TypeError(
            f"reg={reg!r} is of type {type(reg).__name__}; "
            f"pass an ActivityRegularization, such as ActivityRegularization.l1(1e-3)"
        )


class Resolved(NamedTuple):
    """What a call for NumPy arrays comes down to."""

    backend: Backend
    target: str  # the array type that the backend takes
    lam: Any  # and the rest as in Constants
    strength: Any
    epsilon: float


def resolved(
    reg: ActivityRegularization,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    scale: float = UNSCALED,
) -> Resolved:
    """Return what :meth:`~ActivityRegularization.apply` would do for a NumPy array like that.

    For modules that lead pieces of an array to the backend themselves.

    Raises
    ------
    TypeError, ValueError, BackendError
        As for :meth:`~ActivityRegularization.apply`.
    """
    constants = constants_of(reg, dtype, count_of(reg.reduction, shape), scale)
    return Resolved(*choose(NUMPY, dtype, reg.backend), *constants)


def _layers(
    activations: Any, gradients: Any
) -> tuple[list[Any] | None, tuple[Any, ...], tuple[Any, ...]]:
    """Return the names of the layers, if they have any, and their activations and gradients."""
    if isinstance(activations, Mapping) and isinstance(gradients, Mapping):
        if activations.keys() != gradients.keys():
            odd = sorted(map(repr, activations.keys() ^ gradients.keys()))
            raise ValueError(
                f"activations and gradients differ in the layers {', '.join(odd)}; "
                f"pass both under the same names"
            )
        names = list(activations)
        return names, tuple(activations[n] for n in names), tuple(gradients[n] for n in names)
    if isinstance(activations, Mapping) or isinstance(gradients, Mapping):
        raise TypeError(
            f"activations are a {type(activations).__name__} but gradients are a "
            f"{type(gradients).__name__}; pass two lists of arrays, or two dicts by name"
        )
    for name, layers in (("activations", activations), ("gradients", gradients)):
        if not isinstance(layers, (list, tuple)):
            raise TypeError(
                f"{name} are a {type(layers).__name__}; pass lists of arrays, or dicts by name"
            )
    xs, gs = tuple(activations), tuple(gradients)  # which no other thread can change
    if len(xs) != len(gs):
        raise ValueError(
            f"gradients has {len(gs)} layers but activations has {len(xs)}; pass one for each"
        )
    return None, xs, gs


def _total(layers: list[Any], backend: Backend | None) -> Any:
    """Return the sum of the penalties, rounded once; on a device if ``backend`` sums there."""
    if not layers:
        return np.float64(0.0)
    if backend is not None:
        stacked = sys.modules["cupy"].stack(layers)
        return backend.penalty(stacked, ActivityNorm.L1, 1.0)  # penalties are their own magnitudes
    widest = max((layer.dtype for layer in layers), key=lambda t: t.itemsize)
    return _sum_of(map(float, layers), widest)


def _sum_of(penalties: Iterable[float], dtype: np.dtype[Any]) -> Any:
    """Return the sum, rounded to binary64, then to ``dtype``."""
    try:
        total = math.fsum(penalties)
    except OverflowError:
        total = math.inf
    return round_to(dtype, total)


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
