"""The reference backend: plain NumPy, written to be obviously right.

The sums are made of integers, hence exact; the gradient is the formula. It takes any byte order and
alignment. It makes temporaries of the array's size and takes 10 to 50 ns per element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.dtypes import COMPUTE_DTYPES, FLOAT32, FLOAT64
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.sums.exact import UNIT, PartialSum, Total, outcome_of, total_of

__all__ = ["BACKEND", "ReferenceBackend"]

Array = np.ndarray[Any, Any]

_LIMB = 27  # bits: half of a significand, so that a product of two fits an integer of 64 bits


class ReferenceBackend(Backend):
    """NumPy alone."""

    name = "numpy"
    dtypes = COMPUTE_DTYPES.keys()

    def partial_sum(self, activations: Array, norm: Norm) -> Total:
        """Return the sum, or both, that the norm takes, exactly."""
        return total_of([_exact_sum(activations, degree) for degree in norm.terms])

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


def _units_of(bins: np.ndarray[Any, Any], degree: int) -> int:
    """Return the sum that is spread over ``bins``, in the units of a partial sum.

    ``bins[shift, place]`` holds the limbs of weight ``2**(degree * shift + _LIMB * place)``.
    """
    total = sum(
        int(bins[shift, place]) << (degree * shift + _LIMB * place)
        for shift, place in np.argwhere(bins).tolist()
    )
    return total << (-1074 * degree - UNIT)


def _exact_sum(array: np.ndarray[Any, Any], degree: int) -> PartialSum:
    """Return Σ|x| for the degree 1, Σx² for 2.

    The array may be of any supported dtype and strides.

    A binary64 magnitude is ``m * 2**(shift - 1074)`` with ``m < 2**53`` and ``0 <= shift < 2046``.
    The significands, or their squares, are cut into limbs, and the limbs of one shift are summed:
    a sum of 2¹⁶ numbers below 2²⁸ is exact in binary64, in any order.
    """
    chunk_size = 1 << 16
    compute = COMPUTE_DTYPES[array.dtype]
    bins = np.zeros((2046, 2 * degree), np.int64)
    special = 0.0
    with np.errstate(invalid="ignore"):  # a signaling NaN is a NaN
        if array.dtype.kind == "V":  # ml_dtypes' bfloat16, which nditer does not cast
            array = array.astype(FLOAT32)
        chunks: Iterable[Any] = np.nditer(
            array,
            flags=["buffered", "external_loop", "zerosize_ok"],
            op_dtypes=[FLOAT64],
            buffersize=chunk_size,
        )
        for chunk in chunks:
            for start in range(0, chunk.size, chunk_size):  # unbuffered if contiguous
                special += _spread(np.abs(chunk[start : start + chunk_size]), bins)
    return PartialSum(degree, compute, _units_of(bins, degree), special)


def _spread(
    magnitudes: np.ndarray[Any, np.dtype[np.float64]], bins: np.ndarray[Any, np.dtype[np.int64]]
) -> float:
    """Add the limbs of ``magnitudes`` to ``bins`` unless one is not finite; return that one, or 0.

    NaN outweighs infinity.
    """
    largest = float(magnitudes.max(initial=0.0))
    if not math.isfinite(largest):
        return largest
    bits, stored = magnitudes.view(np.uint64), np.uint64(52)
    exponents = (bits >> stored).astype(np.intp)
    leading = (exponents > 0).astype(np.uint64) << stored  # implied, but in subnormal numbers
    significands = leading | (bits & np.uint64(2**52 - 1))
    shifts = np.maximum(exponents, 1) - 1
    half, mask = np.uint64(_LIMB), np.uint64(2**_LIMB - 1)
    low, high = significands & mask, significands >> half
    limbs = [low, high]
    if bins.shape[1] == 4:
        ends, middle, top = low * low, np.uint64(2) * low * high, high * high
        limbs = [
            ends & mask,
            (ends >> half) + (middle & mask),
            (middle >> half) + (top & mask),
            top >> half,
        ]
    for place, limb in enumerate(limbs):
        sums = np.bincount(shifts, limb.astype(np.float64))
        bins[: sums.size, place] += sums.astype(np.int64)
    return 0.0


BACKEND = ReferenceBackend()
