"""The norms: each is written once, here, and everything else is derived from it.

A norm sums powers of |x| over all elements. A :class:`Norm` says what becomes of the sums: the
penalty, and the gradient at an element. Its functions are plain Python over ``+ - * /``,
:func:`signed` and :func:`sqrt`. They are called once, with symbols; the expressions that come back
are the definition, which NumPy, Numba, CUDA, PyTorch, JAX and numbers beyond binary64's range all
evaluate, operation by operation, in the same order.

To add a norm, write one more :class:`Norm`; from outside the package, hand it to
:func:`register_norm`.
"""

from __future__ import annotations

import enum
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from actreg_dispatch.expressions import (
    Condition,
    Symbol,
    TooFewError,
    signed,
    signed_by_type,
    sqrt,
    symbols,
    traced,
)

__all__ = [
    "L1",
    "MOST_COEFFICIENTS",
    "MOST_LAMS",
    "NORMS",
    "ActivityNorm",
    "CudaText",
    "Norm",
    "named_norm",
    "register_norm",
    "signed",
    "signed_by_type",
    "sqrt",
]


class ActivityNorm(str, enum.Enum):
    r"""The names of the norms that come with the package; each is a string, too.

    ================= ================== ==================================================
    member            penalty P(x)       gradient dP/dx
    ================= ================== ==================================================
    ``L1``            λ·Σ|xᵢ|            +λ where xᵢ > 0, −λ where xᵢ < 0, 0 at 0 and NaN
    ``L2``            λ·√(Σxᵢ²)          (λ·xᵢ)/‖x‖, all zero where Σxᵢ² ≤ ``epsilon``
    ``L2_SQUARED``    λ·Σxᵢ²             (λ·2)·xᵢ
    ``L1_L2_SQUARED`` λ₁·Σ|xᵢ| + λ₂·Σxᵢ² the sum of those of ``L1`` and ``L2_SQUARED``
    ``HOYER``         λ·(Σ|xᵢ|)²/Σxᵢ²    2λr·(sign(xᵢ) − r·xᵢ) with r = Σ|xᵢ|/Σxᵢ²
    ================= ================== ==================================================

    ``L2`` is the norm itself. What Keras calls "L2" is ``L2_SQUARED`` here, its "L1L2" is
    ``L1_L2_SQUARED``, and none carries the factor ½ that weight decay is often written with.
    ``HOYER`` is the Hoyer-square of DeepHoyer (Yang, Wen and Li, ICLR 2020): between 1 and the
    number of elements times λ, whatever the scale of x, and smallest where one element is not 0.

    Examples
    --------
    >>> ActivityNorm("l2_squared")
    <ActivityNorm.L2_SQUARED: 'l2_squared'>
    """

    L1 = "l1"
    L2 = "l2"
    L2_SQUARED = "l2_squared"
    L1_L2_SQUARED = "l1_l2_squared"
    HOYER = "hoyer"


class Norm:
    r"""One norm: what is summed, and what becomes of the sums.

    Parameters
    ----------
    name : str
        A lower-case identifier, which :class:`~actreg_dispatch.ActivityRegularization` knows it by.
    terms : tuple of int
        The powers of \|x\| that are summed over all elements: ``(1,)`` for Σ|x|, ``(2,)`` for Σx²,
        ``(1, 2)`` for both, read in one pass.
    penalty : callable
        ``penalty(lam, s)``, evaluated in binary64: ``lam`` is a tuple of one λ or more, ``s`` the
        tuple of the sums, each exact and rounded to 53 bits. It must not be negative, and monotone
        in each sum, in either direction.
    gradient : callable
        ``gradient(x, lam, c)``: the derivative at the element x, evaluated in the compute dtype T,
        rounded after every operation. λ is that of the gradient, so ``scale`` times that of the
        penalty; ``c`` is what ``coefficients`` returns.
    coefficients : callable, optional
        ``coefficients(lam, s)``: a tuple of what the gradient needs of the sums, at most 8,
        evaluated in binary64, each rounded to T once; monotone in each sum. Without it penalty and
        gradient take one pass over memory, and the gradient must be 0 at x = 0; with it they take
        two. If they use λ, the norm takes no weights.
    guard : callable, optional
        ``guard(s, epsilon)``: whether there is a gradient, a comparison by ``>`` or ``<``. A norm
        that has one takes the option ``epsilon``, and two passes.

    Raises
    ------
    TypeError, ValueError
        If the name, the terms or a function will not do; the message says which and why.

    Notes
    -----
    The functions may use ``+ - * /``, :func:`signed` and :func:`sqrt` on their arguments, no
    numbers of their own (``lam[0] + lam[0]`` is 2λ) and no conditions. Each is called once or a few
    times, here, with symbols; what is evaluated later are the expressions that it returned, in
    which a value that is used twice stands twice.

    Where every sum is 0, the penalty is 0 and nothing, or 0, is added; what an infinite λ of the
    gradient makes of x = 0 in one pass is added as it is. Where a sum is NaN, there
    is a gradient, whatever ``guard`` says. Sums beyond binary64's range are evaluated by numbers
    whose exponent does not end.

    Examples
    --------
    The norm "ℓ₁/ℓ₂", λ·Σ|x|/‖x‖, whose gradient is (λ/‖x‖)·(sign(x) − (Σ|x|/Σx²)·x):

    >>> ratio = Norm(
    ...     "l1_over_l2",
    ...     terms=(1, 2),
    ...     penalty=lambda lam, s: lam[0] * (s[0] / sqrt(s[1])),
    ...     coefficients=lambda lam, s: (lam[0] / sqrt(s[1]), s[0] / s[1]),
    ...     gradient=lambda x, lam, c: signed(c[0], x) - c[0] * (c[1] * x),
    ... )
    >>> ratio.two_pass, ratio.cuda.gradient
    (True, 'subtract(signed(c0, x), multiply(c0, multiply(c1, x)))')

    Attributes
    ----------
    name : str
    terms : tuple of int
        As they were given.
    n_lams, n_coefficients : int
        How many λ the functions use, and how many coefficients.
    two_pass : bool
        Whether the gradient needs the sums first.
    has_guard : bool
        Whether the norm takes ``epsilon``.
    takes_weights : bool
        Whether elements may have weights, which multiply λ in the gradient: not if the coefficients
        use λ.
    gradient : callable
        ``gradient(x, lam, c)``, on numbers or arrays of any library.
    coefficients, guard : callable
        ``coefficients(lam, s)`` and ``guard(s, epsilon)``, on numbers of any library; a norm that
        was given none has no coefficients, and always a gradient.
    evaluate : callable
        ``evaluate(s, lam, gradient_lam, epsilon, real)`` returns what the norm makes of its sums:
        penalty and coefficients, rounded by ``real``, and whether there is a gradient.
    agree : callable
        ``agree(a, b)``: whether two results of ``evaluate`` are the same to the bit, without NaN.
    rounded_lams : callable
        ``rounded_lams(lam, count, scale, real)``: λ of the penalty, divided by ``count``, and of
        the gradient, multiplied by ``scale``, too, each rounded by ``real`` once.
    lam_fits : callable
        ``lam_fits(lam, one)``: whether λ, which are values of T as ``one`` is, give a finite
        gradient at a small x, the sums being 1, so that nothing overflows before these are known.
    source : str
        The Python source of these, which tells one definition from another.
    cuda : CudaText
        The same expressions for CUDA.
    """

    axis: tuple[int, ...] | None = None  # of a norm of rows

    def __init__(
        self,
        name: str,
        terms: tuple[int, ...],
        penalty: Callable[[Any, Any], Any],
        gradient: Callable[[Any, Any, Any], Any],
        coefficients: Callable[[Any, Any], Any] | None = None,
        guard: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        if not (isinstance(name, str) and name.isidentifier() and name == name.lower()):
            raise ValueError(f"name={name!r} cannot name a norm; use a lower-case identifier")
        if terms not in ((1,), (2,), (1, 2)):
            raise ValueError(
                f"terms={terms!r} of norm {name!r} are not powers of |x| that are summed; "
                f"use (1,), (2,) or (1, 2)"
            )
        self.name, self.terms = str.__str__(name), tuple(map(int, terms))
        self.has_guard = guard is not None
        self.two_pass = self.has_guard or coefficients is not None
        s = symbols("s", len(terms))
        for count in range(1, MOST_LAMS + 1):  # which the functions tell by what they take
            lam, gradient_lam = symbols("lam", count), symbols("gradient_lam", count)
            try:
                size = traced("penalty", penalty, lam, s)
                cs = (
                    ()
                    if coefficients is None
                    else traced("coefficients", coefficients, gradient_lam, s)
                )
                c = symbols("c", len(cs))
                added = traced("gradient", gradient, Symbol("x", "x"), lam, c)
                break
            except TooFewError:
                if count == MOST_LAMS:
                    raise
        self.n_lams, self.n_coefficients = count, len(cs)
        if len(cs) > MOST_COEFFICIENTS:
            raise ValueError(
                f"coefficients of norm {name!r} are {len(cs)}, at most {MOST_COEFFICIENTS} are "
                f"kept; compute some of them in its gradient"
            )
        holds = Condition("True", "true")
        if guard is not None:
            holds = traced("guard", guard, s, Symbol("epsilon", "epsilon"))
        self.takes_weights = not any("lam" in each.python for each in cs)
        self.cuda = CudaText(size.cuda, tuple(each.cuda for each in cs), holds.cuda, added.cuda)
        self.source = _SOURCE.format(
            name=name,
            all_finite="".join(f" and isfinite({each.python})" for each in lam),
            divided="".join(f"real({each.python} / count), " for each in lam),
            scaled="".join(f"real({each.python} / count * scale), " for each in lam),
            all_zero=" and ".join(f"{each.python} == 0.0" for each in s),
            any_nan=" or ".join(f"{each.python} != {each.python}" for each in s),
            zeros="real(0.0), " * len(cs),
            ones="one, " * len(s),
            small=_SMALL,
            one_pass=not self.two_pass,
            penalty=size.python,
            rounded="".join(f"real({each.python}), " for each in cs),
            coefficients="".join(f"{each.python}, " for each in cs),
            guard=holds.python,
            gradient=added.python,
            same_signs="".join(
                f" and copysign(1.0, a{place}) == copysign(1.0, b{place})"
                for place in ("[0]", *(f"[1][{k}]" for k in range(len(cs))))
            ),
        )
        functions: dict[str, Any] = {
            "__name__": __name__,  # or Numba's cache looks for the functions in every module
            "copysign": math.copysign,
            "isfinite": math.isfinite,
            "signed": signed,
            "sqrt": sqrt,
        }
        exec(self.source, functions)  # made of the symbols above alone
        # Compiled code is linked by names, in which no two norms may have the same function.
        for each in _FUNCTIONS:
            functions[each].__qualname__ += f"_{name}_{zlib.crc32(self.source.encode()):08x}"
        self.evaluate, self.agree = functions["evaluate"], functions["agree"]
        self.gradient = functions["gradient"]
        self.coefficients, self.guard = functions["coefficients"], functions["guard"]
        self.rounded_lams, self.lam_fits = functions["rounded_lams"], functions["lam_fits"]
        self._check_values()

    def _check_values(self) -> None:
        """Refuse formulas whose values could not be told from those of a λ that is too large."""
        lam = tuple(np.arange(1.0, self.n_lams + 1.0))
        with np.errstate(all="ignore"):
            if not self.two_pass and self.gradient(np.float64(0.0), lam, ()) != 0.0:
                raise ValueError(
                    f"gradient of norm {self.name!r} is not 0 at x = 0, but nothing may be added "
                    f"where all x are 0; let coefficients or a guard make it take two passes"
                )
            if not self.lam_fits(lam, np.float64(1.0)):
                raise ValueError(
                    f"gradient of norm {self.name!r} is not finite where its sums are 1; write its "
                    f"functions so that it is"
                )

    def __repr__(self) -> str:
        return f"<Norm {self.name!r}>"

    def __reduce__(self) -> Any:
        return named_norm, (self.name,)


class CudaText(NamedTuple):
    """The expressions of a norm as calls of device functions.

    Of ``lam0``, ``gradient_lam0``, ``s0``, ``c0`` and so on, ``x`` and ``epsilon``.
    """

    penalty: str
    coefficients: tuple[str, ...]
    guard: str
    gradient: str


_FUNCTIONS = ["evaluate", "agree", "coefficients", "guard", "gradient", "rounded_lams", "lam_fits"]
MOST_LAMS = 4
MOST_COEFFICIENTS = 8
_SMALL = 2.0**-64  # x times λ is far from overflow in any T, but not subnormal, which is slow

_SOURCE = '''
def evaluate(s, lam, gradient_lam, epsilon, real):
    """Return what {name} makes of its sums."""
    if {all_zero}:
        return real(0.0), ({zeros}), {one_pass}
    return real({penalty}), ({rounded}), {any_nan} or {guard}


def agree(a, b):
    """Return whether two results of evaluate are the same, signs of zeros included."""
    return a == b{same_signs}


def coefficients(gradient_lam, s):
    """Return what the gradient of {name} needs of its sums, not yet rounded."""
    return ({coefficients})


def guard(s, epsilon):
    """Return whether sums that are not all 0 have a gradient of {name}."""
    return {guard}


def gradient(x, lam, c):
    """Return the gradient of {name} at x."""
    return {gradient}


def rounded_lams(lam, count, scale, real):
    """Return λ of the penalty and of the gradient of {name}, divided, scaled, and rounded once."""
    return ({divided}), ({scaled})


def lam_fits(lam, one):
    """Return whether λ of {name} are finite, and so is what is made of them alone."""
    s, gradient_lam, x = ({ones}), lam, one * {small}
    c = ({coefficients})
    return isfinite({gradient}){all_finite}
'''


# The norms there are.


NORMS: dict[str, Norm] = {}
"""Every known norm by its name; walk through a copy, since another thread may register one."""


def register_norm(norm: Norm) -> Norm:
    """Make a norm known by its name, wherever a norm is named.

    Parameters
    ----------
    norm : Norm
        In every process that computes with it: a regularization is pickled with the name alone.

    Returns
    -------
    Norm
        The same.

    Raises
    ------
    TypeError
        If it is not a :class:`Norm`.
    ValueError
        If its name is taken.
    """
    if not isinstance(norm, Norm):
        raise TypeError(f"norm={norm!r} is not a Norm; make one with actreg_dispatch.norms.Norm")
    if NORMS.setdefault(norm.name, norm) is not norm:
        raise ValueError(f"name={norm.name!r} is taken; choose another name for this norm")
    return norm


def named_norm(name: Any) -> Norm:
    """Return the norm of that name.

    Raises
    ------
    ValueError
        If this process knows none.
    """
    norm = NORMS.get(name) if isinstance(name, str) else None
    if isinstance(name, Norm) and NORMS.get(name.name) is name:
        return name
    if norm is None:
        known = ", ".join(map(repr, map(str, NORMS.copy())))
        raise ValueError(
            f"norm={name!r} is unknown; use one of: {known} (register_norm makes another known, "
            f"in each process)"
        )
    return norm


L1 = register_norm(
    Norm(
        "l1",
        terms=(1,),
        penalty=lambda lam, s: lam[0] * s[0],
        gradient=lambda x, lam, c: signed(lam[0], x),
    )
)
register_norm(
    Norm(
        "l2",
        terms=(2,),
        penalty=lambda lam, s: lam[0] * sqrt(s[0]),
        coefficients=lambda lam, s: (sqrt(s[0]),),
        gradient=lambda x, lam, c: (lam[0] * x) / c[0],
        guard=lambda s, epsilon: s[0] > epsilon,
    )
)
register_norm(
    Norm(
        "l2_squared",
        terms=(2,),
        penalty=lambda lam, s: lam[0] * s[0],
        gradient=lambda x, lam, c: (lam[0] + lam[0]) * x,
    )
)
register_norm(
    Norm(
        "l1_l2_squared",
        terms=(1, 2),
        penalty=lambda lam, s: lam[0] * s[0] + lam[1] * s[1],
        gradient=lambda x, lam, c: signed(lam[0], x) + (lam[1] + lam[1]) * x,
    )
)
register_norm(
    Norm(
        "hoyer",
        terms=(1, 2),
        penalty=lambda lam, s: lam[0] * (s[0] * (s[0] / s[1])),  # in this order all are in range
        coefficients=lambda lam, s: (s[0] / s[1] + s[0] / s[1], s[0] / s[0], s[0] / s[1]),
        gradient=lambda x, lam, c: (lam[0] * c[0]) * (signed(c[1], x) - c[2] * x),
    )
)
