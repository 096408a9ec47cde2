"""Activity regularization as one fused call on whatever array the caller has.

>>> import numpy as np
>>> from actreg_dispatch import ActivityRegularization
>>> reg = ActivityRegularization.l1(1e-3)
>>> activations, gradients = np.array([[1.0, -2.0]]), np.zeros((1, 2))
>>> float(reg.apply(activations, gradients))  # gradients += dP/d(activations), in place
0.003
>>> gradients
array([[ 0.001, -0.001]])
"""

from actreg_dispatch.backend import Backend
from actreg_dispatch.errors import (
    BackendError,
    BackendUnavailableError,
    MixedArraysError,
    UnknownBackendError,
)
from actreg_dispatch.layers import Penalties
from actreg_dispatch.norms import ActivityNorm, register_norm
from actreg_dispatch.registry import (
    available_backends,
    get_backend,
    register_backend,
    use_backend,
)
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.runtime.warmup import warmup
from actreg_dispatch.statistics import ActivationStatistics
from actreg_dispatch.sums.exact import PairedSum, PartialSum

__all__ = [
    "ActivationStatistics",
    "ActivityNorm",
    "ActivityRegularization",
    "Backend",
    "BackendError",
    "BackendUnavailableError",
    "MixedArraysError",
    "PairedSum",
    "PartialSum",
    "Penalties",
    "UnknownBackendError",
    "available_backends",
    "get_backend",
    "register_backend",
    "register_norm",
    "use_backend",
    "warmup",
]

__version__ = "0.2.0.dev0"
