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

Weights are Dask arrays, too, and each chunk of the activations meets its own chunk of them. Where
chunks differ, the weights are rechunked, and the activations never are. An axis of length 1 is
broadcast in the task. What a bool mask keeps is counted lazily. A weight that is negative or not
finite raises in the task that meets it.

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
from actreg_dispatch.errors import MixedArraysError
from actreg_dispatch.norms import Norm
from actreg_dispatch.options import (
    Options,
    Reduction,
    check_scale,
    constants_of,
    divided_axes,
)
from actreg_dispatch.registry import NUMPY, requested
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.row_norms import row_axes
from actreg_dispatch.runtime.threads import serially
from actreg_dispatch.statistics import refuse_statistics
from actreg_dispatch.sums.exact import Total
from actreg_dispatch.transfer import move, new_like
from actreg_dispatch.validation import check_activations

__all__ = ["add_gradient", "apply", "apply_all", "partial_sum", "penalty", "penalty_and_gradient"]


def penalty(
    reg: ActivityRegularization,
    activations: da.Array,
    *,
    weights: da.Array | None = None,
    statistics: None = None,
) -> da.Array:
    """Return the penalty of ``activations``, lazily.

    A 0-d array in the compute dtype T, of NumPy or CuPy as the chunks are. These may be of any
    lengths, unknown ones included; what raises elsewhere raises here, not in a task, if it shows
    without computing. ``reg`` is taken as it is now: later changes of ``lam`` change nothing.
    ``weights`` are a Dask array that broadcasts to the activations; for the rest see
    :meth:`~actreg_dispatch.ActivityRegularization.penalty`.

    Examples
    --------
    >>> import dask.array as da
    >>> from actreg_dispatch import ActivityRegularization
    >>> activations = da.arange(-3.0, 3.0, chunks=2)
    >>> penalty = ActivityRegularization.l1(0.5).penalty(activations)
    >>> penalty.shape, float(penalty.compute())
    ((), 4.5)
    """
    refuse_statistics(statistics, "Dask arrays")
    options = _frozen(reg)
    return _penalty(options, activations, _matched(options, activations, weights))[0]


def partial_sum(
    reg: ActivityRegularization, activations: da.Array, *, weights: da.Array | None = None
) -> Any:
    """Return the sum, or both, that the norm takes, exactly and lazily.

    A :class:`dask.delayed.Delayed`, which adds up with other partial sums, lazy or not. Compute it
    before ``finish``, and not in one ``dask.compute`` among arrays: Dask 2026.8 returns the results
    grouped by type, in another order than they were asked for.
    """
    check_activations(activations._meta)
    options = _frozen(reg)
    total = _total(options, activations, _matched(options, activations, weights))
    if hasattr(total, "to_delayed"):
        return total.to_delayed().item()
    return dask.delayed(total)  # an expression of query planning, which is experimental in Dask


def penalty_and_gradient(
    reg: ActivityRegularization,
    activations: da.Array,
    out: None = None,
    *,
    scale: float = 1.0,
    weights: da.Array | None = None,
) -> tuple[da.Array, da.Array]:
    """Return the penalty of ``activations`` and its gradient, lazily.

    The penalty is that of :func:`penalty`; the gradient has the dtype, chunks and array type of
    ``activations``. ``weights`` are those of :func:`penalty`. A Dask array cannot be written, so
    ``out`` is refused with a TypeError.
    """
    if out is not None:
        raise TypeError(
            "out cannot be written by a Dask array, which is lazy; leave it out and store the "
            "gradient that is returned, for example with dask.array.store(gradient, out)"
        )
    options, scale = _frozen(reg), check_scale(scale)
    weights = _matched(options, activations, weights)
    penalty, total, counts = _penalty(options, activations, weights)
    shared = weights, total if options.norm.two_pass else None, *counts
    task = partial(_gradient_chunk, options=options, scale=scale, along=_along(weights))
    gradient = _each("actreg-gradient", task, activations, *shared, meta=activations._meta)
    return penalty, gradient


def apply(*arguments: Any, **options: Any) -> NoReturn:
    """Refuse to update Dask arrays in place.

    Dask can replace what one array object stands for, but a slice of an array is another object,
    and an update of that would be lost silently.
    """
    raise TypeError(
        "gradients of Dask activations cannot be updated in place; write penalty, gradient = "
        "reg.penalty_and_gradient(activations) and then gradients = gradients + gradient"
    )


apply_all = apply


def add_gradient(
    reg: ActivityRegularization,
    activations: Any,
    gradients: Any,
    total: Any,
    *,
    count: Any,
    scale: Any,
    weights: Any = None,
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
    return norm.name, norm.source, norm.axis


def _frozen(reg: ActivityRegularization) -> Options:
    """Return the options, with the backend that is asked for here, which workers do not know."""
    return reg.options._replace(backend=requested(reg.backend)[0])


def _matched(options: Options, activations: da.Array, weights: Any) -> da.Array | None:
    """Return weights, if there are any, in chunks that match those of the activations.

    Weights of other chunks are rechunked, as arrays are by Dask's own operators. Those would cut
    both into the smallest common chunks, but a gradient has the chunks of its activations.
    """
    if weights is None:
        return None
    array_type, meta = check_activations(activations._meta)
    if not isinstance(weights, da.Array):
        kind = type(weights)
        raise MixedArraysError(
            f"weights are a {kind.__module__}.{kind.__qualname__} but activations a "
            f"dask.array.Array; make them one, for example with dask.array.from_array(weights)"
        )
    lengths = activations.shape[max(0, activations.ndim - weights.ndim) :]
    if weights.ndim > activations.ndim or not all(
        own in (1, other) or math.isnan(own + other)
        for own, other in zip(weights.shape, lengths, strict=True)
    ):
        raise ValueError(
            f"weights have shape {weights.shape}, which does not broadcast to {activations.shape}, "
            f"that of activations; give an axis that all of them share the length 1"
        )
    dispatch.checked_weights(options, meta, weights._meta, array_type)
    chunks = []
    for axis in range(-weights.ndim, 0):
        own, other = weights.chunks[axis], activations.chunks[axis]
        unknown = weights.shape[axis] != 1 and math.isnan(sum(own) + sum(other))
        if unknown and len(own) != len(other):
            raise ValueError(
                f"weights have {len(own)} chunks along axis {axis} and activations {len(other)}, "
                f"but not all lengths are known; call compute_chunk_sizes() of both, or give "
                f"weights as many chunks by weights.rechunk"
            )
        chunks.append(own if unknown else (1,) if weights.shape[axis] == 1 else other)
    if weights.chunks == tuple(chunks):
        return weights
    if weights.size == 0:  # which rechunk may leave as they are
        return da.zeros_like(weights, chunks=tuple(chunks))
    return weights.rechunk(tuple(chunks))


def _along(weights: da.Array | None) -> tuple[int, ...]:
    """Return the axes, counted from the last, along which weights are not broadcast."""
    if weights is None:
        return ()
    return tuple(axis for axis in range(-weights.ndim, 0) if weights.shape[axis] != 1)


def _penalty(
    options: Options, activations: da.Array, weights: da.Array | None
) -> tuple[da.Array, da.Array, list[Any]]:
    """Return the penalty, the sum that it is made of, and the factors of what λ is divided by.

    All is lazy. What is wrong is complained about here rather than by a task, if it shows without
    computing.
    """
    array_type, meta = check_activations(activations._meta)
    counts = _counts(options.reduction, activations, weights)
    if all(isinstance(count, int) for count in counts):
        constants_of(options, meta.dtype, math.prod(counts))  # which refuses too large a λ
    total = _total(options, activations, weights)
    zero = np.zeros_like(meta, COMPUTE_DTYPES[meta.dtype], shape=())
    task = partial(_finish, options=options, array_type=array_type)
    penalty = _each("actreg-penalty", task, total, *counts, meta=zero)
    return penalty, total, counts


def _total(options: Options, activations: da.Array, weights: da.Array | None) -> da.Array:
    """Return the sum over all chunks: a 0-d array whose one chunk is an exact sum, or a pair."""
    for axis in row_axes(options.norm, activations.ndim):
        if activations.numblocks[axis] > 1:
            raise ValueError(
                f"activations have {activations.numblocks[axis]} chunks along axis {axis}, along "
                f"which rows reach, but rows must be whole; use activations.rechunk({{{axis}: -1}})"
            )
    if weights is None:
        return _added_up("actreg-sum", partial(_sum_chunk, options=options), activations)
    task = partial(_weighted_sum_chunk, options=options, along=_along(weights))
    meta = np.empty((0,) * activations.ndim, object)
    sums = _each("actreg-weighted", task, activations, weights, meta=meta)
    return _added_up("actreg-weighted-sum", _add_up, sums)


def _each(
    name: str, task: Callable[..., Any], array: da.Array, *others: Any, meta: Any
) -> da.Array:
    """Return what ``task`` makes of each chunk.

    The others are constants and arrays whose chunks broadcast to those of ``array``, as 0-d ones
    do.
    """
    axes = tuple(range(array.ndim))
    pairs = [
        (each, axes[array.ndim - each.ndim :] if isinstance(each, da.Array) else None)
        for each in others
    ]
    return da.blockwise(
        task,
        axes,
        array,
        axes,
        *itertools.chain(*pairs),
        name=f"{name}-{tokenize(task, array, *others)}",
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


def _counts(reduction: Reduction, activations: da.Array, weights: da.Array | None) -> list[Any]:
    """Return the factors of what λ is divided by: ints, or 0-d arrays where that takes computing.

    A mask is asked how many positions along the axes keep any element, as
    :func:`~actreg_dispatch.weights.kept_of` does; what it is broadcast along counts as often.
    """
    axes = divided_axes(reduction, activations.ndim)
    if weights is None or weights.dtype.kind != "b" or not axes:
        return [_length(activations, axes)]
    missing = activations.ndim - weights.ndim
    repeated = tuple(axis for axis in axes if axis < missing or weights.shape[axis - missing] == 1)
    others = tuple(axis for axis in range(weights.ndim) if axis + missing not in axes)
    kept = (weights.any(axis=others) if others else weights).sum()
    return [kept, _length(activations, repeated)]


def _length(activations: da.Array, axes: tuple[int, ...]) -> Any:
    """Return the product of the lengths of axes, or 1: an int, or a 0-d array."""
    if not any(math.isnan(activations.shape[axis]) for axis in axes):
        return max(1, math.prod(int(activations.shape[axis]) for axis in axes))
    along = tuple(slice(None) if axis in axes else 0 for axis in range(activations.ndim))
    chunks = activations.blocks[along]
    return _added_up("actreg-count", partial(_count_chunk, counted=axes), chunks)


# Tasks.


def _sum_chunk(chunk: Any, computing_meta: bool = False, *, options: Options, **axes: Any) -> Any:
    if computing_meta:
        return _no_numbers(chunk)
    with serially():
        return dispatch.partial_sum(options, _array(chunk))


def _weighted_sum_chunk(
    chunk: Any, weights: Any, *, options: Options, along: tuple[int, ...]
) -> Any:
    chunk = _array(chunk)
    with serially():
        return dispatch.partial_sum(options, chunk, _weights_of(chunk, weights, along))


def _weights_of(chunk: Any, weights: Any, along: tuple[int, ...]) -> Any:
    """Return the weights of a chunk, of which Dask may not have known how long they are."""
    weights = _array(weights)
    if any(weights.shape[axis] != chunk.shape[axis] for axis in along):
        raise ValueError(
            f"weights have a chunk of shape {weights.shape} where activations have one of "
            f"{chunk.shape}; call compute_chunk_sizes() of both, which lets them be rechunked"
        )
    return weights


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


def _finish(total: Total, *counts: Any, options: Options, array_type: str) -> Any:
    result = dispatch.finish(options, total, math.prod(map(int, counts)))
    return result if array_type == NUMPY else move(result, NUMPY, array_type)


def _gradient_chunk(
    chunk: Any,
    weights: Any,
    total: Total | None,
    *counts: Any,
    options: Options,
    scale: float,
    along: tuple[int, ...],
) -> Any:
    chunk = _array(chunk)
    array_type, plain = check_activations(chunk)
    gradient = new_like(plain, array_type, "empty")
    count = math.prod(map(int, counts))
    w = None if weights is None else _weights_of(plain, weights, along)
    with serially():
        dispatch.add_gradient(options, plain, gradient, total, count, scale, w, overwrite=True)
    return gradient


def _array(chunk: Any) -> Any:
    """Return the chunk, which Dask may have made a scalar if it has no axes, as an array."""
    return np.asarray(chunk) if isinstance(chunk, np.generic) else chunk
