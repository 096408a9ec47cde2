"""Constructors with the names of the norms that come with the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.options import Reduction, check_number

__all__ = ["Constructors"]

R = TypeVar("R", bound="Constructors")


class Constructors(ABC):
    """The part of :class:`~actreg_dispatch.ActivityRegularization` that makes one by its norm.

    Where ``"l1_l2_squared"`` takes two λ, its constructor names them; the options of each are those
    that its norm takes.
    """

    @abstractmethod
    def __init__(self, lam: Any, norm: str = "l1", **options: Any) -> None:
        """Take λ, the norm and the options."""

    @classmethod
    def l1(
        cls: type[R], lam: float, *, reduction: Reduction | int = "sum", backend: str | None = None
    ) -> R:
        """Return the L1 regularization: P(x) = λ·Σ|xᵢ|, gradient λ·sign(xᵢ)."""
        return cls(lam, ActivityNorm.L1, reduction=reduction, backend=backend)

    @classmethod
    def l2(
        cls: type[R],
        lam: float,
        *,
        epsilon: float | None = None,
        reduction: Reduction | int = "sum",
        axis: int | tuple[int, ...] | None = None,
        backend: str | None = None,
    ) -> R:
        """Return the L2 regularization, the norm: P(x) = λ·√(Σxᵢ²), gradient (λ·xᵢ)/‖x‖.

        With ``axis``, the sum of the norms of all rows along it, P(x) = λ·Σ‖row‖; ‖x‖ in the
        gradient is that of the row of xᵢ.
        """
        options: Any = {"epsilon": epsilon, "reduction": reduction, "axis": axis}
        return cls(lam, ActivityNorm.L2, backend=backend, **options)

    @classmethod
    def l2_squared(
        cls: type[R], lam: float, *, reduction: Reduction | int = "sum", backend: str | None = None
    ) -> R:
        """Return the squared L2 regularization, Keras' "L2": P(x) = λ·Σxᵢ², gradient (λ·2)·xᵢ."""
        return cls(lam, ActivityNorm.L2_SQUARED, reduction=reduction, backend=backend)

    @classmethod
    def l1_l2(
        cls: type[R],
        l1: float = 0.0,
        l2_squared: float = 0.0,
        *,
        reduction: Reduction | int = "sum",
        backend: str | None = None,
    ) -> R:
        """Return both in one pass.

        With ``reduction="batch"`` it is what ``keras.layers.ActivityRegularization(l1, l2)`` adds.
        P(x) = l1·Σ|xᵢ| + l2_squared·Σxᵢ², gradient l1·sign(xᵢ) + (l2_squared·2)·xᵢ.
        """
        lam = check_number("l1", l1), check_number("l2_squared", l2_squared)
        return cls(lam, ActivityNorm.L1_L2_SQUARED, reduction=reduction, backend=backend)

    @classmethod
    def hoyer(
        cls: type[R], lam: float, *, reduction: Reduction | int = "sum", backend: str | None = None
    ) -> R:
        """Return the Hoyer-square, which is scale-free: P(x) = λ·(Σ|xᵢ|)²/Σxᵢ².

        The gradient is 2λr·(sign(xᵢ) − r·xᵢ) with r = Σ|xᵢ|/Σxᵢ² (Yang, Wen and Li, "DeepHoyer",
        ICLR 2020); 0, and nothing is added, where all x are 0.
        """
        return cls(lam, ActivityNorm.HOYER, reduction=reduction, backend=backend)
