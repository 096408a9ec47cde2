"""What the functions of a norm are written with, and how they become expressions.

:func:`signed` and :func:`sqrt` are evaluated by whatever library their argument is of. Called with
symbols, a function returns the expression that it is, in Python and for CUDA.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import numpy as np

__all__ = [
    "Condition",
    "Symbol",
    "TooFewError",
    "signed",
    "signed_by_type",
    "sqrt",
    "symbols",
    "traced",
]


def signed(a: Any, x: Any) -> Any:
    """Return ``a`` with the sign of ``x``: ``a`` where x > 0, ``-a`` where x < 0, else 0.

    0 where ``x`` is 0 or NaN, even if ``a`` is infinite, which ``a * sign(x)`` would not be.

    Examples
    --------
    >>> signed(np.float32(0.5), np.array([3, -2, 0], np.float32)).tolist()
    [0.5, -0.5, 0.0]
    """
    return signed_by_type(x, a)


@singledispatch
def signed_by_type(x: Any, a: Any) -> Any:
    """Do :func:`signed`; a library registers its own by the type of ``x``."""
    one = np.asarray(x).dtype.type(1)
    return np.where(np.abs(x) > 0, a * np.copysign(one, x), one - one)


@singledispatch
def sqrt(value: Any) -> Any:
    """Return the square root; a library registers its own by the type of ``value``.

    Examples
    --------
    >>> float(sqrt(9.0))
    3.0
    """
    return np.sqrt(value)


class Symbol:
    """A number that is not known yet; operations on it build the expression that they are.

    The expression is kept in two languages: Python, and calls of the functions that round in CUDA.
    """

    def __init__(self, python: str, cuda: str) -> None:
        self.python, self.cuda = python, cuda

    def __add__(self, other: Any) -> Symbol:
        return _operation(self, "+", "add", other)

    def __sub__(self, other: Any) -> Symbol:
        return _operation(self, "-", "subtract", other)

    def __mul__(self, other: Any) -> Symbol:
        return _operation(self, "*", "multiply", other)

    def __truediv__(self, other: Any) -> Symbol:
        return _operation(self, "/", "divide", other)

    def __radd__(self, other: Any) -> Symbol:
        return _operation(other, "+", "add", self)

    __rsub__ = __rmul__ = __rtruediv__ = __radd__  # a literal, which is refused

    def __gt__(self, other: Any) -> Condition:
        found = _operation(self, ">", "greater", other)
        return Condition(found.python, found.cuda)

    def __lt__(self, other: Any) -> Condition:
        found = _operation(other, ">", "greater", self)
        return Condition(found.python, found.cuda)

    def __neg__(self) -> Symbol:
        return Symbol(f"(-{self.python})", f"negative({self.cuda})")

    def __bool__(self) -> bool:
        raise TypeError("whether a number holds is not known yet; use no if, and, or, not, ==")

    def __eq__(self, other: object) -> bool:
        return self.__bool__()

    __hash__ = None  # type: ignore[assignment]


class Condition:
    """Whether one symbol is greater than another."""

    def __init__(self, python: str, cuda: str) -> None:
        self.python, self.cuda = python, cuda

    __bool__ = Symbol.__bool__


def _operation(a: Any, sign: str, function: str, b: Any) -> Symbol:
    a, b = _symbol(a), _symbol(b)
    return Symbol(f"({a.python} {sign} {b.python})", f"{function}({a.cuda}, {b.cuda})")


def _symbol(value: Any) -> Symbol:
    if not isinstance(value, Symbol):
        raise TypeError(f"{value!r} is not made of the arguments; write a + a rather than 2 * a")
    return value


@signed_by_type.register
def _(x: Symbol, a: Any) -> Symbol:
    return Symbol(f"signed({_symbol(a).python}, {x.python})", f"signed({a.cuda}, {x.cuda})")


@sqrt.register
def _(value: Symbol) -> Symbol:
    return Symbol(f"sqrt({value.python})", f"root({value.cuda})")


def symbols(name: str, count: int) -> tuple[Symbol, ...]:
    """Return so many symbols, the elements of a tuple in Python."""
    return tuple(Symbol(f"{name}[{k}]", f"{name}{k}") for k in range(count))


class TooFewError(TypeError):
    """There are fewer λ than a function takes."""


def traced(role: str, function: Any, *arguments: Any) -> Any:
    """Return the expression, or expressions, that a function of a norm computes."""
    if not callable(function):
        raise TypeError(f"{role}={function!r} cannot be called; pass a function")
    try:
        found = function(*arguments)
    except (IndexError, ValueError) as error:  # by index, or taken apart
        raise TooFewError(
            f"{role} takes more numbers than there are: {error}; there is a sum for each of the "
            f"terms, a few λ, and what coefficients returns"
        ) from error
    except Exception as error:
        raise TypeError(
            f"{role} cannot be traced: {error}; use + - * /, signed and sqrt on its arguments"
        ) from error
    if role == "guard":
        what, fits = "a comparison by > or <", isinstance(found, Condition)
    elif role == "coefficients":
        what = "a tuple of expressions"
        fits = isinstance(found, tuple) and all(isinstance(each, Symbol) for each in found)
    else:
        what, fits = "an expression", isinstance(found, Symbol)
    if not fits:
        raise TypeError(
            f"{role} returned {found!r}; it must return {what}, made of its arguments by "
            f"+ - * /, signed and sqrt"
        )
    return found
