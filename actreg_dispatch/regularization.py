"""The API: a regularization is a norm and a strength λ, applied to whatever array comes."""

from __future__ import annotations

from typing import Any

import numpy as np

from actreg_dispatch import dispatch
from actreg_dispatch.constructors import Constructors
from actreg_dispatch.layers import Penalties, apply_all
from actreg_dispatch.norms import NORMS, ActivityNorm, named_norm
from actreg_dispatch.options import (
    UNSCALED,
    Options,
    Reduction,
    check_axes,
    check_lam,
    check_number,
    check_reduction,
    check_scale,
)
from actreg_dispatch.pieces import Piecewise
from actreg_dispatch.registry import (
    RAW_ENVIRONMENT,
    RAW_KEY,
    asked_by_context,
    check_name,
    library_of,
)
from actreg_dispatch.row_norms import row_norm
from actreg_dispatch.statistics import ActivationStatistics
from actreg_dispatch.sums.certified import NOT_HANDLED

__all__ = ["ActivityRegularization", "check_regularization"]

Strength = float | tuple[float, ...]


class ActivityRegularization(Constructors, Piecewise):
    r"""A penalty on the size of a layer's activations.

    Which size, and what its gradient is, says the norm: see :class:`ActivityNorm` for those that
    come with the package, and :func:`register_norm` for your own.

    Parameters
    ----------
    lam : float or tuple of floats
        The strength λ, a finite real number >= 0; a NumPy scalar or 0-d array will do. For
        ``"l1_l2_squared"`` both, λ₁ and λ₂, or one number for both. Assignable between calls, for a
        warm-up, and checked each time.
    norm : str or ActivityNorm, default "l1"
        The name of the norm.
    epsilon : float, optional
        ``"l2"`` only: the sum of squares up to which the gradient is zero. By default the machine
        epsilon of the compute dtype; 0.0 gives a zero gradient at x = 0 only.
    reduction : {"sum", "mean", "batch"}, int or tuple of ints, default "sum"
        What λ is divided by, for the penalty and for the gradient: nothing, the number of elements,
        or the product of the lengths of these axes, so ``(0, 1)`` for the tokens of
        ``[batch, time, features]``. ``"batch"`` is axis 0.
    axis : int or tuple of ints, optional
        ``"l2"`` only: the axes of a row. The penalty is the sum of the norms of all rows,
        λ·Σ‖row‖ (the group lasso, L2,1), and the divisor of the gradient and ``epsilon`` are each
        row's.
    backend : str, optional
        The backend that computes, whatever ``use_backend`` and ``ACTREG_BACKEND`` say; ``"auto"``
        chooses by array type. Data moves to the backend and back if it must.

    Raises
    ------
    TypeError, ValueError
        If ``lam`` or ``epsilon`` is not a number, negative, infinite or NaN, the norm, the
        reduction or the backend is unknown, or the norm takes no ``epsilon``.

    Notes
    -----
    Activations may be NumPy or CuPy arrays of float16, bfloat16 (``ml_dtypes``; CuPy has it from
    version 14 on), float32 or float64, of any shape and strides; or arrays of the libraries in
    :mod:`actreg_dispatch.torch`, :mod:`actreg_dispatch.jax` and :mod:`actreg_dispatch.dask`. The
    compute dtype T is float64 for float64 and float32 for the others. λ, divided as ``reduction``
    says, is rounded to T once. A sum is as if it were exact, rounded to 53 bits; the penalty
    follows from it in binary64 and is rounded to T once. The gradient is computed in T, added in T,
    and rounded to the dtype of the gradients once. So every bit is the same for any order of
    summation. NaN and infinity propagate.

    L1, L2 and squared L2, their constructors, :meth:`apply` and :meth:`penalty` are those of
    ``ActivityRegularization`` in the Rust crate scirs2 (``regularizers/activity.rs``).
    """

    __hash__ = None  # type: ignore[assignment]  # lam may change

    def __init__(
        self,
        lam: Strength,
        norm: str = "l1",
        *,
        epsilon: float | None = None,
        reduction: Reduction | int = "sum",
        axis: int | tuple[int, ...] | None = None,
        backend: str | None = None,
    ) -> None:
        found = named_norm(norm)
        if axis is not None:
            advice = "pass an axis, such as -1, or a tuple of axes"
            found = row_norm(found, check_axes(axis, f"axis={axis!r}", advice))
        lam = check_lam(lam, found)
        if epsilon is not None:
            if not found.has_guard:
                known = NORMS.copy().values()
                guarded = ", ".join(repr(each.name) for each in known if each.has_guard)
                raise ValueError(
                    f"epsilon={epsilon!r} has no meaning for norm {found.name!r}; "
                    f"leave it out, it belongs to {guarded}"
                )
            epsilon = check_number("epsilon", epsilon)
        reduction = check_reduction(reduction)
        if backend is not None:
            backend = check_name(backend, f"backend={backend!r}")
        self._dispatcher = dispatch.Dispatcher(Options(lam, found, epsilon, reduction, backend))

    @classmethod
    def from_options(cls, options: Options) -> ActivityRegularization:
        """Return the regularization that has these :attr:`options`."""
        lam, norm, epsilon, reduction, backend = options
        given: Any = lam if len(lam) > 1 else lam[0]
        options_: Any = {"epsilon": epsilon, "reduction": reduction, "axis": norm.axis}
        return cls(given, norm.name, backend=backend, **options_)

    @property
    def lam(self) -> Any:
        """The strength λ, a Python float, or a tuple of them; assigning checks it."""
        lam = self.options.lam
        return lam if self.options.norm.n_lams > 1 else lam[0]

    @lam.setter
    def lam(self, value: Strength) -> None:
        _, norm, epsilon, reduction, backend = self.options
        lam = check_lam(value, norm)
        self._dispatcher.options = Options(lam, norm, epsilon, reduction, backend)

    @property
    def norm(self) -> str:
        """The name of the norm; an :class:`ActivityNorm` if it comes with the package."""
        name = self.options.norm.name
        return ActivityNorm(name) if name in _MEMBERS else name

    @property
    def epsilon(self) -> float | None:
        """The sum of squares up to which the L2 gradient is zero; None for the default."""
        return self.options.epsilon

    @property
    def reduction(self) -> Reduction:
        """What λ is divided by: ``"sum"``, nothing, ``"mean"``, ``"batch"``, or a tuple of axes."""
        return self.options.reduction

    @property
    def axis(self) -> tuple[int, ...] | None:
        """The axes of a row; None if the norm is that of the whole array."""
        return self.options.norm.axis

    @property
    def backend(self) -> str | None:
        """The name of the backend that was asked for; None if none was."""
        return self.options.backend

    @property
    def options(self) -> Options:
        """All options as they are now, which assigning to :attr:`lam` does not change."""
        return self._dispatcher.options

    def penalty(
        self,
        activations: Any,
        *,
        weights: Any = None,
        statistics: ActivationStatistics | None = None,
    ) -> Any:
        r"""Return the penalty of ``activations``, which are only read.

        Parameters
        ----------
        activations : numpy.ndarray, cupy.ndarray or other array
            Of a supported dtype (see the class), any shape and strides; may be empty.
        weights : array, optional
            What the terms of the sums are multiplied by, so that the penalty is the norm of the
            weighted terms: λ·Σwᵢ|xᵢ|, λ·Σwᵢxᵢ², and so on. An array of the same library that
            broadcasts to the shape of ``activations``, of their dtype, of T or bool; finite and
            >= 0. An element of weight 0 is left out, whatever it holds, be it NaN. A bool mask also
            counts: λ is divided by the number of elements that it keeps (``reduction="mean"``), or
            of positions along the axes that keep any. Never expanded in memory.
        statistics : ActivationStatistics, optional
            Counts how many elements are not 0, and so on, in the same pass.

        Returns
        -------
        numpy.floating, cupy.ndarray or other array
            In the compute dtype T: a NumPy scalar for a NumPy array; a 0-d array on the same
            device, without waiting for it, for a CuPy array; what their modules say for the others.
            0 for an empty array.

        Raises
        ------
        TypeError, ValueError
            If ``activations`` are not a supported array, or ``lam`` is too large for their dtype;
            if ``weights`` are not such an array, or the norm takes none (``Norm.takes_weights``).
            On a device, where nothing waits, weights that are negative or not finite make the
            penalty NaN instead.
        UnknownBackendError, BackendUnavailableError
            If the backend that is asked for does not exist or cannot run here.

        Examples
        --------
        >>> import numpy as np
        >>> float(ActivityRegularization.l2(0.1).penalty(np.array([3.0, 4.0])))
        0.5
        >>> padded, mask = np.array([1.0, -3.0, np.nan]), np.array([True, True, False])
        >>> float(ActivityRegularization.l1(0.5).penalty(padded, weights=mask))
        2.0
        """
        if weights is None is statistics:
            penalty = self._dispatcher.penalty(activations)
            if penalty is not None:
                return penalty
        library = library_of(type(activations))
        if library is not None:
            return library.penalty(self, activations, **dispatch.given(weights, statistics))
        return dispatch.penalty(self.options, activations, weights, statistics)

    def penalty_and_gradient(
        self, activations: Any, out: Any = None, *, scale: float = 1.0, weights: Any = None
    ) -> tuple[Any, Any]:
        """Return the penalty of ``activations`` and its gradient, an array of the same library.

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
        weights : array, optional
            As for :meth:`apply`, which says what is raised, before ``out`` is written. The gradient
            of an element that is left out is 0.

        Returns
        -------
        penalty : numpy.floating, cupy.ndarray or other array
            As :meth:`penalty` returns it.
        gradient : array
            ``out``, or a new array of the shape and dtype of ``activations``.

        Examples
        --------
        >>> import numpy as np
        >>> reg = ActivityRegularization.l1(0.5)
        >>> penalty, gradient = reg.penalty_and_gradient(np.array([1.0, -2.0, 0.0]))
        >>> float(penalty), gradient
        (1.5, array([ 0.5, -0.5,  0. ]))
        """
        library = library_of(type(activations))
        if library is not None:
            return library.penalty_and_gradient(  # type: ignore[no-any-return]
                self, activations, out, scale=scale, **dispatch.given(weights)
            )
        return dispatch.penalty_and_gradient(self._dispatcher, activations, out, scale, weights)

    def apply(
        self,
        activations: Any,
        gradients: Any,
        *,
        scale: float = UNSCALED,
        weights: Any = None,
        statistics: ActivationStatistics | None = None,
    ) -> Any:
        r"""Add the gradient of the penalty to ``gradients`` in place and return the penalty.

        The gradient is evaluated in the compute dtype, in the order that :class:`ActivityNorm`
        shows, without fused multiply-adds, where λ stands for ``scale`` times λ.

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
        weights : array, optional
            As for :meth:`penalty`. In the gradient, λ of an element is λ times its weight, rounded
            to T once; the gradient of an element of weight 0 stays as it is.
        statistics : ActivationStatistics, optional
            As for :meth:`penalty`.

        Returns
        -------
        numpy.floating, cupy.ndarray or torch.Tensor
            The penalty, exactly as :meth:`penalty` returns it.

        Raises
        ------
        TypeError, ValueError
            If an argument is not a supported array, the two differ in library, dtype or shape,
            ``gradients`` are read-only, overlap themselves, the activations or the weights, or
            ``lam`` is too large for the dtype; for weights as :meth:`penalty`.
        UnknownBackendError, BackendUnavailableError
            If the backend that is asked for does not exist or cannot run here. All of it is raised
            before anything is written.

        Examples
        --------
        >>> import numpy as np
        >>> activations, gradients = np.array([2.0, 3.0]), np.zeros(2)
        >>> float(ActivityRegularization.l2_squared(0.1).apply(activations, gradients))
        1.3
        >>> gradients
        array([0.4, 0.6])
        """
        # By the plan of the last such call, if it is one like that. This is the most frequent call,
        # so here is written what would take 0.1 µs more in a method of the plan's own.
        plan = self._dispatcher
        if type(activations) is _NDARRAY is type(gradients) and weights is None is statistics:
            axes = activations.ndim
            context, environment, dtype, kernel, zero = plan.writing[axes]
            if (
                activations.dtype is dtype is gradients.dtype
                and type(scale) is float
                and asked_by_context() is context
                and RAW_ENVIRONMENT.get(RAW_KEY) is environment
            ):
                lam, epsilon, _, _ = plan.assigned  # once: another thread may assign others
                try:
                    penalty = kernel(activations, gradients, lam, scale, epsilon)
                except TypeError:  # strided or read-only; to find out takes 50 µs, so not twice
                    plan.writing[axes] = dispatch.NO_PLAN
                else:
                    if penalty >= 0.0:
                        return zero + penalty
                    if penalty != NOT_HANDLED:
                        return plan.exact(activations, lam)
        if weights is None is statistics:
            penalty = plan.apply(activations, gradients, scale)
            if penalty is not None:
                return penalty
        library = library_of(type(activations))
        if library is not None:
            given = dispatch.given(weights, statistics)
            return library.apply(self, activations, gradients, scale=scale, **given)
        return dispatch.apply(self.options, activations, gradients, scale, weights, statistics)

    def apply_all(
        self,
        activations: Any,
        gradients: Any,
        *,
        scale: float = UNSCALED,
        weights: Any = None,
        statistics: ActivationStatistics | None = None,
    ) -> Penalties:
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
        weights : sequence of arrays, or mapping of names to arrays, optional
            As for :meth:`apply`, for each layer; None, or no such name, for one that has none.
            Layers with weights are done one after the other.
        statistics : ActivationStatistics, optional
            As for :meth:`penalty`, over all layers, which then are done one after the other.

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
        return apply_all(self, activations, gradients, check_scale(scale), weights, statistics)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dispatcher": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_dispatcher": dispatch.Dispatcher(state["_dispatcher"])})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActivityRegularization):
            return NotImplemented
        return self.options == other.options

    def __repr__(self) -> str:
        options = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("epsilon", self.epsilon, None),
                ("reduction", self.reduction, "sum"),
                ("axis", self.axis, None),
                ("backend", self.backend, None),
            )
            if value != default
        )
        return f"{type(self).__name__}({self.lam!r}, {self.options.norm.name!r}{options})"


def check_regularization(reg: Any) -> None:
    """Refuse as ``reg`` what is none, for functions that take one.

    Raises
    ------
    TypeError
        If it is not an :class:`ActivityRegularization`.
    """
    if not isinstance(reg, ActivityRegularization):
        raise TypeError(
            f"reg={reg!r} is of type {type(reg).__name__}; "
            f"pass an ActivityRegularization, such as ActivityRegularization.l1(1e-3)"
        )


_NDARRAY = np.ndarray
_MEMBERS = {member.value for member in ActivityNorm}
