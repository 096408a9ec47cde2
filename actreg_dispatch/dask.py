"""Dask arrays: penalty and gradient as lazy Dask arrays, with the bits of the whole array.

A task for each chunk takes its exact partial sum, a tree of tasks adds these up, and one more
finishes the penalty. Since the sums are exact, the chunks make no difference. A chunk of the
gradient depends on the same chunk of the activations alone or, for norms of two passes such as
``"l2"``, on the total, too.

What the result depends on is frozen when the graph is built: λ, the other options, and the backend
that ``backend=``, :func:`~actreg_dispatch.use_backend` or ``ACTREG_BACKEND`` asks for in the
process that builds it. Whether the backend can run is found out where the chunks are. Tasks run
serial kernels: the workers are the threads.

The chunks may be NumPy or CuPy arrays. The penalty is an array of the same library, the partial
sums are on the host.

Notes
-----
A norm of two passes reads every chunk twice, and Dask keeps those that it has read until the total
is known. Of activations larger than memory, take the total first, and then what needs it:

>>> import dask.array as da
>>> import numpy as np
>>> from actreg_dispatch import ActivityRegularization
>>> from actreg_dispatch.runtime.threads import serially
>>> reg = ActivityRegularization.l2(1.0)
>>> activations = da.from_array(np.array([3.0, 0.0, 0.0, 4.0]), chunks=2)
>>> total = reg.partial_sum(activations).compute()
>>> def gradient(chunk):
...     added = np.zeros_like(chunk)
...     with serially():  # the workers are the threads
...         reg.add_gradient(chunk, added, total)
...     return added
>>> activations.map_blocks(gradient, dtype=activations.dtype).compute()
array([0.6, 0. , 0. , 0.8])
>>> float(reg.finish(total))
5.0
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import dask
import dask.array as da
import numpy as np
from dask.base import normalize_token, tokenize

from actreg_dispatch import dispatch
from actreg_dispatch.dtypes import COMPUTE_DTYPES
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import (
    Options,
    Reduction,
    check_scale,
    constants_of,
    count_of,
    divided_axes,
)
from actreg_dispatch.registry import NUMPY, requested
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.runtime.threads import serially
from actreg_dispatch.sums.exact import Total
from actreg_dispatch.transfer import move, new_like
from actreg_dispatch.validation import check_activations

__all__ = ["add_gradient", "apply", "apply_all", "partial_sum", "penalty", "penalty_and_gradient"]


def penalty(reg: ActivityRegularization, activations: da.Array) -> da.Array:
    """Return the penalty of ``activations``, lazily.

    A 0-d array in the compute dtype T, of NumPy or CuPy as the chunks are. These may be of any
    lengths, unknown ones included; what raises elsewhere raises here, not in a task, if it shows
    without computing. ``reg`` is taken as it is now: later changes of ``lam`` change nothing.

    Examples
    --------
    >>> import dask.array as da
    >>> from actreg_dispatch import ActivityRegularization
    >>> activations = da.arange(-3.0, 3.0, chunks=2)
    >>> penalty = ActivityRegularization.l1(0.5).penalty(activations)
    >>> penalty.shape, float(penalty.compute())
    ((), 4.5)
    """
    return _penalty(_frozen(reg), activations)[0]


def partial_sum(reg: ActivityRegularization, activations: da.Array) -> Any:
    """Return the sum, or both, that the norm takes, exactly and lazily.

    A :class:`dask.delayed.Delayed`, which adds up with other partial sums, lazy or not. Compute it
    before ``finish``, and not in one ``dask.compute`` among arrays: Dask 2026.8 returns the results
    grouped by type, in another order than they were asked for.
    """
    check_activations(activations._meta)
    total = _total(_frozen(reg), activations)
    if hasattr(total, "to_delayed"):
        return total.to_delayed().item()
    return dask.delayed(total)  # an expression of query planning, which is experimental in Dask


def penalty_and_gradient(
    reg: ActivityRegularization, activations: da.Array, out: None = None, *, scale: float = 1.0
) -> tuple[da.Array, da.Array]:
    """Return the penalty of ``activations`` and its gradient, lazily.

    The penalty is that of :func:`penalty`; the gradient has the dtype, chunks and array type of
    ``activations``. A Dask array cannot be written, so ``out`` is refused with a TypeError.
    """
    if out is not None:
        raise TypeError(
            "out cannot be written by a Dask array, which is lazy; leave it out and store the "
            "gradient that is returned, for example with dask.array.store(gradient, out)"
        )
    options, scale = _frozen(reg), check_scale(scale)
    penalty, total, count = _penalty(options, activations)
    shared = total if options.norm.two_pass else None
    task = partial(_gradient_chunk, options=options, scale=scale)
    gradient = _each("actreg-gradient", task, activations, shared, count, meta=activations._meta)
    return penalty, gradient


def apply(reg: ActivityRegularization, activations: Any, gradients: Any, *, scale: Any) -> NoReturn:
    """Refuse to update Dask arrays in place.

    Dask can replace what one array object stands for, but a slice of an array is another object,
    and an update of that would be lost silently.
    """
    raise TypeError(
        "gradients of Dask activations cannot be updated in place; write penalty, gradient = "
        "reg.penalty_and_gradient(activations) and then gradients = gradients + gradient"
    )


def apply_all(
    reg: ActivityRegularization, labels: Any, activations: Any, gradients: Any, *, scale: Any
) -> NoReturn:
    """Refuse to update Dask arrays in place; see :func:`apply`."""
    apply(reg, activations, gradients, scale=scale)


def add_gradient(
    reg: ActivityRegularization,
    activations: Any,
    gradients: Any,
    total: Any,
    *,
    count: Any,
    scale: Any,
) -> NoReturn:
    """Refuse to update Dask arrays in place; see :func:`apply`."""
    raise TypeError(
        "gradients of Dask activations cannot be updated in place; use penalty_and_gradient, or "
        "call add_gradient on each chunk in dask.array.map_blocks"
    )


@normalize_token.register(ActivityRegularization)  # type: ignore[untyped-decorator]
def _(reg: ActivityRegularization) -> Any:
    """Return what the names of tasks depend on, so that equal ones are done once."""
    return type(reg).__module__, type(reg).__qualname__, *reg.options


@normalize_token.register(Norm)  # type: ignore[untyped-decorator]
def _(norm: Norm) -> Any:
    return norm.name, norm.source


def _frozen(reg: ActivityRegularization) -> Options:
    """Return the options, with the backend that is asked for here, which workers do not know."""
    return reg.options._replace(backend=requested(reg.backend)[0])


def _penalty(options: Options, activations: da.Array) -> tuple[da.Array, da.Array, Any]:
    """Return the penalty, the sum that it is made of, and what λ is divided by, all lazy.

    What is wrong is complained about here rather than by a task, if it shows without computing.
    """
    array_type, meta = check_activations(activations._meta)
    count = _count(options.reduction, activations)
    if isinstance(count, int):
        constants_of(options, meta.dtype, count)  # which refuses a λ that is too large
    total = _total(options, activations)
    zero = np.zeros_like(meta, COMPUTE_DTYPES[meta.dtype], shape=())
    task = partial(_finish, options=options, array_type=array_type)
    penalty = _each("actreg-penalty", task, total, count, meta=zero)
    return penalty, total, count


def _total(options: Options, activations: da.Array) -> da.Array:
    """Return the sum over all chunks: a 0-d array whose one chunk is an exact sum, or a pair."""
    return _added_up("actreg-sum", partial(_sum_chunk, options=options), activations)


def _each(
    name: str, task: Callable[..., Any], array: da.Array, *shared: Any, meta: Any
) -> da.Array:
    """Return what ``task`` makes of each chunk; ``shared`` are constants and 0-d arrays."""
    axes = tuple(range(array.ndim))
    pairs = [(each, () if isinstance(each, da.Array) else None) for each in shared]
    return da.blockwise(
        task,
        axes,
        array,
        axes,
        *itertools.chain(*pairs),
        name=f"{name}-{tokenize(task, array, *shared)}",
        align_arrays=False,
        dtype=meta.dtype,
        meta=meta,
    )


def _added_up(name: str, task: Callable[..., Any], array: da.Array) -> da.Array:
    """Return the sum of what ``task`` returns for each chunk, added up in a tree."""
    return da.reduction(
        array,
        task,
        _add_up,
        name=name,
        concatenate=False,
        dtype=object,
        meta=np.empty((), object),
    )


def _count(reduction: Reduction, activations: da.Array) -> Any:
    """Return what λ is divided by: an int, or a 0-d array where that takes computing."""
    axes = divided_axes(reduction, activations.ndim)
    if not any(math.isnan(activations.shape[axis]) for axis in axes):
        return count_of(reduction, activations.shape)
    along = tuple(slice(None) if axis in axes else 0 for axis in range(activations.ndim))
    chunks = activations.blocks[along]
    return _added_up("actreg-count", partial(_count_chunk, counted=axes), chunks)


# Tasks.


def _sum_chunk(chunk: Any, computing_meta: bool = False, *, options: Options, **axes: Any) -> Any:
    if computing_meta:
        return _no_numbers(chunk)
    with serially():
        return dispatch.partial_sum(options, _array(chunk))


def _count_chunk(
    chunk: Any, computing_meta: bool = False, *, counted: tuple[int, ...], **axes: Any
) -> Any:
    if computing_meta:
        return _no_numbers(chunk)
    return math.prod(chunk.shape[axis] for axis in counted)


def _no_numbers(chunk: Any) -> Any:
    """Return what Dask is told that sums are, although a chunk of them is a single number."""
    return np.empty((0,) * chunk.ndim, object)


def _add_up(sums: Any, **axes: Any) -> Any:
    """Return the sum of numbers in lists of lists."""
    return sum(map(_add_up, sums)) if isinstance(sums, list) else sums


def _finish(total: Total, count: int, *, options: Options, array_type: str) -> Any:
    result = dispatch.finish(options, total, count)
    return result if array_type == NUMPY else move(result, NUMPY, array_type)


def _gradient_chunk(
    chunk: Any, total: Total | None, count: int, *, options: Options, scale: float
) -> Any:
    chunk = _array(chunk)
    array_type, plain = check_activations(chunk)
    gradient = new_like(plain, array_type, "empty")
    with serially():
        dispatch.add_gradient(options, plain, gradient, total, count, scale, overwrite=True)
    return gradient


def _array(chunk: Any) -> Any:
    """Return the chunk, which Dask may have made a scalar if it has no axes, as an array."""
    return np.asarray(chunk) if isinstance(chunk, np.generic) else chunk
