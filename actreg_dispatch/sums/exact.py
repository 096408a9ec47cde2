"""Exact sums: numbers of unlimited precision, and what norms make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from actreg_dispatch.dtypes import round_to
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import Constants
from actreg_dispatch.sums.certified import Outcome
from actreg_dispatch.sums.extended import Extended, binary64, round_to_53_bits

__all__ = [
    "COUNTERS",
    "INFINITIES",
    "NANS",
    "UNIT",
    "UNWEIGHTED_UNIT",
    "UNWEIGHTED_WORDS",
    "WORDS",
    "WORD_BITS",
    "PairedSum",
    "PartialSum",
    "Total",
    "outcome_of",
    "sum_of_words",
    "total_of",
]

UNIT, WORDS, WORD_BITS = -3222, 249, 26
"""Of a superaccumulator: word k weighs 2^(26 k) units of 2^-3222, w·x² of the smallest numbers.

That takes 3 * 2046 + 159 bits for the largest, and room for carries.
"""
UNWEIGHTED_UNIT, UNWEIGHTED_WORDS = UNIT + 41 * WORD_BITS, 168
"""Of one on a device where nothing has a weight, in units of 2^-2156.

All of its words are zeroed and read at each call. x² of the smallest numbers is 2^-2148, and that
of the largest takes 2 * 2046 + 106 bits.
"""
INFINITIES, NANS, COUNTERS = WORDS, WORDS + 1, WORDS + 3
"""Where infinities and NaN are counted, and how many words there are with all counters.

The third says whether results on a device are certain without the words.
"""


@dataclass(frozen=True)
class PartialSum:
    """The exact sum of |x| or x² over a piece of the activations.

    Partial sums add up with ``+`` or :func:`sum`, without rounding: whatever the pieces and
    whatever the order, the total is that of the whole. They can be compared, pickled and sent to
    other processes. ``float(total)`` is the sum rounded to binary64.

    Attributes
    ----------
    degree : int
        1 for a sum of |x|, 2 for a sum of x².
    dtype : numpy.dtype
        The compute dtype T of the activations.
    units : int
        The sum in units of ``2**-3222``, which w·x² of the smallest numbers is.
    special : float
        Infinity or NaN, once met, else 0; then ``units`` are 0.

    Examples
    --------
    >>> from actreg_dispatch import ActivityRegularization
    >>> reg = ActivityRegularization.l2(1.0)
    >>> total = reg.partial_sum(np.array([3.0])) + reg.partial_sum(np.array([4.0]))
    >>> float(total), float(reg.finish(total))
    (25.0, 5.0)
    """

    degree: int
    dtype: np.dtype[Any]
    units: int = 0
    special: float = 0.0

    def __post_init__(self) -> None:
        if self.special:
            object.__setattr__(self, "units", 0)

    def __add__(self, other: PartialSum) -> PartialSum:
        """Return the sum over both pieces.

        Raises
        ------
        ValueError
            If the two are not of one norm and dtype.
        """
        if not isinstance(other, PartialSum):
            return NotImplemented
        if (self.degree, self.dtype) != (other.degree, other.dtype):
            raise ValueError(
                f"other sums |x|**{other.degree} for {other.dtype} penalties, this one "
                f"|x|**{self.degree} for {self.dtype}; add sums of one norm and one compute dtype"
            )
        units, special = self.units + other.units, self.special + other.special
        return PartialSum(self.degree, self.dtype, units, special)

    def __radd__(self, other: object) -> PartialSum:
        return self if other == 0 else NotImplemented  # where the built-in sum starts

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the zeros that most sums end in, which are up to 280 bytes.
        zeros = max(0, (self.units & -self.units).bit_length() - 1)
        return _restored, (self.degree, self.dtype.char, self.units >> zeros, zeros, self.special)

    def __float__(self) -> float:
        return self.special or binary64(self._value())

    def __repr__(self) -> str:
        power = "" if self.degree == 1 else f"**{self.degree}"
        return f"<PartialSum of |x|{power} for {self.dtype} penalties, about {float(self)!r}>"

    def rounded(self) -> Fraction | float:
        """Return the sum rounded to 53 bits, ``RN64(S)``; a float if it is not finite."""
        return self.special or round_to_53_bits(self._value())

    @property
    def parts(self) -> tuple[PartialSum, ...]:
        """The sums, of which there is one."""
        return (self,)

    def _value(self) -> Fraction:
        return Fraction(self.units, 1 << -UNIT)


def _restored(degree: int, dtype: str, units: int, zeros: int, special: float) -> PartialSum:
    """Return the sum that was pickled."""
    return PartialSum(degree, np.dtype(dtype), units << zeros, special)


@dataclass(frozen=True)
class PairedSum:
    """The exact sums of |x| and of x² over a piece of the activations.

    What :class:`PartialSum` is for the other norms, this is for those that take both sums, such as
    ``L1_L2_SQUARED``: it adds up with ``+`` or :func:`sum`, without rounding.

    Attributes
    ----------
    absolute, squares : PartialSum
        The sums, of degree 1 and 2.
    """

    absolute: PartialSum
    squares: PartialSum

    def __post_init__(self) -> None:
        pair = self.absolute, self.squares
        if not all(isinstance(part, PartialSum) for part in pair):
            raise TypeError(
                f"absolute={self.absolute!r} and squares={self.squares!r} are not both a "
                f"PartialSum; pass sums such as partial_sum returns"
            )
        if [part.degree for part in pair] != [1, 2] or len({part.dtype for part in pair}) > 1:
            raise ValueError(
                f"absolute={self.absolute!r} and squares={self.squares!r} are no pair; "
                f"pass sums of |x| and of x², both of one compute dtype"
            )

    def __add__(self, other: PairedSum) -> PairedSum:
        """Return the sums over both pieces."""
        if not isinstance(other, PairedSum):
            return NotImplemented
        return PairedSum(self.absolute + other.absolute, self.squares + other.squares)

    def __radd__(self, other: object) -> PairedSum:
        return self if other == 0 else NotImplemented

    def __repr__(self) -> str:
        about = f"about {float(self.absolute)!r} and {float(self.squares)!r}"
        return f"<PairedSum of |x| and |x|**2 for {self.dtype} penalties, {about}>"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The compute dtype T of the activations."""
        return self.absolute.dtype

    @property
    def parts(self) -> tuple[PartialSum, ...]:
        """The two sums."""
        return self.absolute, self.squares


Total = PartialSum | PairedSum
"""What a norm sums: one sum or both."""


def total_of(parts: Sequence[PartialSum]) -> Total:
    """Return one sum, or two as a pair."""
    return PairedSum(*parts) if len(parts) > 1 else parts[0]


def outcome_of(total: Total, norm: Norm, constants: Constants) -> Outcome:
    """Return what ``norm`` makes of its sums."""
    sums = [part.rounded() for part in total.parts]
    number: Any = np.float64
    if any(isinstance(s, Fraction) and s and not _SMALLEST <= s < _BEYOND for s in sums):
        number = Extended

    def real(value: Any) -> float:
        return float(round_to(total.dtype, float(value)))

    with np.errstate(all="ignore"):
        return Outcome(
            *norm.evaluate(
                tuple(number(float(s) if number is np.float64 else s) for s in sums),
                tuple(map(number, constants.lam)),
                tuple(map(number, constants.gradient_lam)),
                number(constants.epsilon),
                real,
            )
        )


_SMALLEST, _BEYOND = Fraction(2) ** -1022, 1 << 1024  # between them lie binary64's normal numbers


def sum_of_words(words: np.ndarray[Any, Any], degree: int, dtype: np.dtype[Any]) -> PartialSum:
    """Return what a superaccumulator of either length holds; ``dtype`` is T."""
    count = len(words) - (COUNTERS - WORDS)
    infinities, nans, _ = words[count:].tolist()
    special = math.nan if nans else math.inf if infinities else 0.0
    used = words[:count].tobytes()
    first = (len(used) - len(used.lstrip(b"\0"))) // 8
    last = -(-len(used.rstrip(b"\0")) // 8)
    units = sum(word << WORD_BITS * k for k, word in enumerate(words[first:last].tolist(), first))
    unit = UNIT if count == WORDS else UNWEIGHTED_UNIT
    return PartialSum(degree, dtype, units << (unit - UNIT), special)
