"""The norms, named once for every layer of the package."""

import enum

__all__ = ["ActivityNorm"]


class ActivityNorm(enum.Enum):
    r"""Which size of the activations is penalized.

    ================= ================== ==================================================
    member            penalty P(x)       gradient dP/dx
    ================= ================== ==================================================
    ``L1``            λ·Σ|xᵢ|            +λ where xᵢ > 0, −λ where xᵢ < 0, 0 at 0 and NaN
    ``L2``            λ·√(Σxᵢ²)          (λ·xᵢ)/‖x‖, all zero where Σxᵢ² ≤ ``epsilon``
    ``L2_SQUARED``    λ·Σxᵢ²             (λ·2)·xᵢ
    ``L1_L2_SQUARED`` λ₁·Σ|xᵢ| + λ₂·Σxᵢ² the sum of those of ``L1`` and ``L2_SQUARED``
    ================= ================== ==================================================

    ``L2`` is the norm itself. What Keras calls "L2" is ``L2_SQUARED`` here, its "L1L2" is
    ``L1_L2_SQUARED``, and none carries the factor ½ that weight decay is often written with.

    Examples
    --------
    >>> ActivityNorm("l2_squared")
    <ActivityNorm.L2_SQUARED: 'l2_squared'>
    """

    L1 = "l1"
    L2 = "l2"
    L2_SQUARED = "l2_squared"
    L1_L2_SQUARED = "l1_l2_squared"
