"""The reference backend: plain NumPy, written to be obviously right.

The sums are made of integers, hence exact; the gradient is the formula. It takes any byte order and
alignment. It makes temporaries of the array's size and takes 10 to 50 ns per element.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.dtypes import COMPUTE_DTYPES
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.sums.exact import Total, exact_sum, outcome_of, total_of

__all__ = ["BACKEND", "ReferenceBackend"]

Array = np.ndarray[Any, Any]


class ReferenceBackend(Backend):
    """NumPy alone."""

    name = "numpy"
    dtypes = COMPUTE_DTYPES.keys()

    def partial_sum(self, activations: Array, norm: Norm) -> Total:
        """Return the sum, or both, that the norm takes, exactly."""
        return total_of([exact_sum(activations, degree) for degree in norm.terms])

    def penalty(self, activations: Array, norm: Norm, constants: Constants) -> Any:
        """Return the penalty, a NumPy scalar."""
        found = outcome_of(self.partial_sum(activations, norm), norm, constants)
        return COMPUTE_DTYPES[activations.dtype].type(found.penalty)

    def apply(self, activations: Array, gradients: Array, norm: Norm, constants: Constants) -> Any:
        """Add the gradient to ``gradients`` in place and return the penalty."""
        found = outcome_of(self.partial_sum(activations, norm), norm, constants)
        if found.has_gradient:
            self.add_gradient(activations, gradients, norm, constants, found.coefficients)
        return COMPUTE_DTYPES[activations.dtype].type(found.penalty)

    def add_gradient(
        self,
        activations: Array,
        gradients: Array,
        norm: Norm,
        constants: Constants,
        coefficients: tuple[float, ...],
    ) -> None:
        """Add the gradient to ``gradients`` in place."""
        real = COMPUTE_DTYPES[activations.dtype].type
        with np.errstate(all="ignore"):  # NaN, infinity and overflow propagate without a word
            lam, c = (tuple(map(real, each)) for each in (constants.gradient_lam, coefficients))
            gradients[...] = gradients.astype(real) + norm.gradient(
                activations.astype(real), lam, c
            )


BACKEND = ReferenceBackend()
