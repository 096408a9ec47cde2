"""Binary64 whose exponent does not end, for sums of squares of 1e±200.

Wherever binary64 has a number, subnormal numbers included, the result of an operation is that
number; beyond, it is rounded to 53 bits. So what a norm computes of sums in range has the same bits
either way. The CUDA backend has the same type, in ``backends/cuda/arithmetic.cuh``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from actreg_dispatch.norms import signed_by_type, sqrt

__all__ = ["Extended", "binary64", "round_to_53_bits"]


class Extended:
    """A number of 53 bits; operations on two are rounded once.

    Parameters
    ----------
    value : Fraction or float
        What it is; infinity and NaN are floats.
    """

    def __init__(self, value: Fraction | float) -> None:
        is_finite = isinstance(value, Fraction) or math.isfinite(value)
        self.value = Fraction(value) if is_finite else float(value)

    def __float__(self) -> float:
        return binary64(self.value)

    def __add__(self, other: Extended) -> Extended:
        return self._combined(operator.add, other)

    def __sub__(self, other: Extended) -> Extended:
        return self._combined(operator.sub, other)

    def __mul__(self, other: Extended) -> Extended:
        return self._combined(operator.mul, other)

    def __truediv__(self, other: Extended) -> Extended:
        return self._combined(operator.truediv, other)

    def __neg__(self) -> Extended:
        return Extended(-self.value)

    def __gt__(self, other: Extended) -> bool:
        return self.value > other.value

    def __eq__(self, other: object) -> bool:
        return self.value == (other.value if isinstance(other, Extended) else other)

    __hash__ = None  # type: ignore[assignment]

    def _combined(self, operation: Callable[[Any, Any], Any], other: Extended) -> Extended:
        a, b = self.value, other.value
        by_zero = operation is operator.truediv and b == 0
        if isinstance(a, float) or isinstance(b, float) or by_zero:
            with np.errstate(all="ignore"):
                return Extended(operation(np.float64(float(self)), np.float64(float(other))))
        return Extended(_rounded(operation(a, b)))


@sqrt.register
def _(number: Extended) -> Extended:
    value = number.value
    if isinstance(value, float) or value < 0:
        with np.errstate(all="ignore"):
            return Extended(np.sqrt(np.float64(float(number))))
    shift = max(0, 140 - value.numerator.bit_length() + value.denominator.bit_length())
    shift += shift % 2
    scaled = (value.numerator << shift) // value.denominator
    floor = math.isqrt(scaled)  # of at least 69 bits; an odd last bit stands for what is cut off
    inexact = floor * floor * value.denominator != value.numerator << shift
    return Extended(_rounded(Fraction(2 * floor + inexact, 2 << shift // 2)))


@signed_by_type.register
def _(x: Extended, a: Extended) -> Extended:
    if x.value > 0:
        return a
    return -a if x.value < 0 else Extended(0.0)


def _rounded(value: Fraction) -> Fraction:
    """Return the number of binary64 nearest to ``value``, or that of 53 bits beyond its range."""
    nearest = binary64(value)
    if math.isfinite(nearest) and (nearest or not value):
        return Fraction(nearest)
    return round_to_53_bits(value)


def round_to_53_bits(value: Fraction) -> Fraction:
    """Return ``value`` rounded to 53 bits, to nearest-even, its exponent unbounded."""
    if not value:
        return value
    scale = Fraction(2) ** (value.numerator.bit_length() - value.denominator.bit_length())
    return Fraction(float(value / scale)) * scale


def binary64(value: Fraction | float) -> float:
    """Return ``value`` rounded to binary64, subnormal numbers and infinity included."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
