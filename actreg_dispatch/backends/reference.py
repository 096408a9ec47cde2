"""The reference backend: plain NumPy, written to be obviously right.

The sums are made of integers, hence exact; the gradient is the formula. It takes any byte order and
alignment. It makes temporaries of the array's size and takes 10 to 50 ns per element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from actreg_dispatch.backend import Backend
from actreg_dispatch.dtypes import COMPUTE_DTYPES, FLOAT32, FLOAT64
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.statistics import ActivationStatistics
from actreg_dispatch.sums.exact import UNIT, PartialSum, Total, outcome_of, total_of
from actreg_dispatch.weights import check_weight_values

__all__ = ["BACKEND", "ReferenceBackend"]

Array = np.ndarray[Any, Any]

_LIMB = 27  # bits: half of a significand, so that a product of two fits an integer of 64 bits
_HALF, _MASK = np.uint64(_LIMB), np.uint64(2**_LIMB - 1)


class ReferenceBackend(Backend):
    """NumPy alone."""

    name = "numpy"
    dtypes = COMPUTE_DTYPES.keys()

    def partial_sum(self, activations: Array, norm: Norm, weights: Array | None = None) -> Total:
        """Return the sum, or both, that the norm takes, exactly."""
        check_weight_values(weights)
        return total_of([_exact_sum(activations, degree, weights) for degree in norm.terms])

    def penalty(
        self,
        activations: Array,
        norm: Norm,
        constants: Constants,
        weights: Array | None = None,
        statistics: ActivationStatistics | None = None,
    ) -> Any:
        """Return the penalty, a NumPy scalar."""
        found = outcome_of(self.partial_sum(activations, norm, weights), norm, constants)
        if statistics is not None:
            _count(activations, weights, statistics)
        return COMPUTE_DTYPES[activations.dtype].type(found.penalty)

    def apply(
        self,
        activations: Array,
        gradients: Array,
        norm: Norm,
        constants: Constants,
        weights: Array | None = None,
        statistics: ActivationStatistics | None = None,
    ) -> Any:
        """Add the gradient to ``gradients`` in place and return the penalty."""
        found = outcome_of(self.partial_sum(activations, norm, weights), norm, constants)
        if statistics is not None:
            _count(activations, weights, statistics)
        if found.has_gradient:
            given = activations, gradients, norm, constants, found.coefficients, weights
            self.add_gradient(*given)
        return COMPUTE_DTYPES[activations.dtype].type(found.penalty)

    def add_gradient(
        self,
        activations: Array,
        gradients: Array,
        norm: Norm,
        constants: Constants,
        coefficients: tuple[float, ...],
        weights: Array | None = None,
    ) -> None:
        """Add the gradient to ``gradients`` in place."""
        check_weight_values(weights)
        real = COMPUTE_DTYPES[activations.dtype].type
        with np.errstate(all="ignore"):  # NaN, infinity and overflow propagate without a word
            lam, c = (tuple(map(real, each)) for each in (constants.gradient_lam, coefficients))
            if weights is not None:
                w = weights.astype(real)
                lam = tuple(each * w for each in lam)
            added = norm.gradient(activations.astype(real), lam, c)
            updated = gradients.astype(real) + added
            kept: Any = True if weights is None else weights != 0
            np.copyto(gradients, updated, casting="unsafe", where=kept)


def _count(x: Array, weights: Array | None, statistics: ActivationStatistics) -> None:
    kept = np.broadcast_to(True if weights is None else weights != 0, x.shape)
    active = (x != 0) & kept
    magnitudes = np.abs(x[kept].astype(COMPUTE_DTYPES[x.dtype]))
    largest = float(magnitudes.max()) if magnitudes.size else 0.0
    others = tuple(range(x.ndim - 1))
    units = active.sum(axis=others) if statistics.per_feature else None
    statistics.add(int(kept.sum()), int(active.sum()), largest, units)


def _exact_sum(array: Array, degree: int, weights: Array | None) -> PartialSum:
    """Return Σ|x| for the degree 1, Σx² for 2, each term times its weight if there are any.

    Arrays may be of any supported dtypes and strides.

    A binary64 magnitude is ``m * 2**(shift - 1074)`` with ``m < 2**53`` and ``0 <= shift < 2046``.
    The products of significands are cut into limbs, and the limbs of one shift are summed: a sum of
    2¹⁶ numbers below 2²⁸ is exact in binary64, in any order.
    """
    chunk_size, factors = 1 << 16, degree if weights is None else degree + 1
    compute = COMPUTE_DTYPES[array.dtype]
    bins = np.zeros((2046 * factors, 2 * factors), np.int64)
    special = 0.0
    arrays = [array] if weights is None else [array, weights]
    with np.errstate(invalid="ignore"):  # a signaling NaN is a NaN
        # nditer does not cast ml_dtypes' bfloat16.
        plain = [each.astype(FLOAT32) if each.dtype.kind == "V" else each for each in arrays]
        chunks: Iterable[Any] = np.nditer(
            plain,
            flags=["buffered", "external_loop", "zerosize_ok"],
            op_dtypes=[FLOAT64] * len(plain),
            casting="unsafe",  # of a mask
            buffersize=chunk_size,
        )
        for chunk in chunks:
            x, *w = chunk if len(plain) > 1 else (chunk,)
            for start in range(0, x.size, chunk_size):  # unbuffered if contiguous
                cut = slice(start, start + chunk_size)
                kept = x[cut] if not w else x[cut][w[0][cut] != 0]
                their = [each[cut][each[cut] != 0] for each in w]
                special += _spread([np.abs(kept)] * degree + their, bins)
    units = sum(
        int(bins[shift, place]) << (shift + _LIMB * place)
        for shift, place in np.argwhere(bins).tolist()
    )
    return PartialSum(degree, compute, units << (-1074 * factors - UNIT), special)


def _spread(
    factors: list[np.ndarray[Any, np.dtype[np.float64]]],
    bins: np.ndarray[Any, np.dtype[np.int64]],
) -> float:
    """Add the limbs of products to ``bins`` unless one is not finite; return that one, or 0.

    The factors are magnitudes. NaN outweighs infinity.
    """
    largest = float(factors[0].max(initial=0.0))
    if not math.isfinite(largest):
        return largest
    shifts = np.zeros(factors[0].shape, np.intp)
    parts: list[list[Any]] = []
    for magnitudes in factors:
        bits, stored = magnitudes.view(np.uint64), np.uint64(52)
        exponents = (bits >> stored).astype(np.intp)
        leading = (exponents > 0).astype(np.uint64) << stored  # implied, if not subnormal
        significands = leading | (bits & np.uint64(2**52 - 1))
        shifts += np.maximum(exponents, 1) - 1
        parts.append([significands & _MASK, significands >> _HALF])
    limbs: list[Any] = functools.reduce(_times, parts)
    for place, limb in enumerate(limbs):
        sums = np.bincount(shifts, limb.astype(np.float64))
        bins[: sums.size, place] += sums.astype(np.int64)
    return 0.0


def _times(a: list[Any], b: list[Any]) -> list[Any]:
    """Return the limbs of a product, each below 2²⁸ as those of the factors are."""
    product: list[Any] = [np.uint64(0)] * (len(a) + len(b))
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            product[i + j] = product[i + j] + one * other
    for place in range(len(product) - 1):
        product[place + 1] = product[place + 1] + (product[place] >> _HALF)
        product[place] = product[place] & _MASK
    return product


BACKEND = ReferenceBackend()
