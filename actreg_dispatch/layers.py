"""Many layers at once: one parallel region for all of them, or a few launches on a device.

Plain NumPy arrays go to one compiled function, which checks them itself. All others are checked
here, every one of them before any gradients are written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from actreg_dispatch.dispatch import (
    backend_for,
    checked_constants,
    checked_weights,
    given,
    penalty_exactly,
    update,
)
from actreg_dispatch.dtypes import FLOAT32, compute_dtype, round_to
from actreg_dispatch.errors import MixedArraysError
from actreg_dispatch.norms import L1
from actreg_dispatch.options import Constants, Options
from actreg_dispatch.registry import CUPY, NUMPY, choose, library_of
from actreg_dispatch.statistics import check_statistics
from actreg_dispatch.sums.certified import NEEDS_EXACT_SUM, NOT_HANDLED
from actreg_dispatch.sums.extended import binary64
from actreg_dispatch.transfer import on_device_of
from actreg_dispatch.validation import check_activations, check_apart, check_gradients
from actreg_dispatch.weights import check_weight_values

__all__ = ["Penalties", "apply_all", "penalties_of_rows"]


_SEQUENCES = (list, tuple)
_SUM = Constants((1.0,), (1.0,), 0.0)  # of penalties, their L1 norm


class Penalties(NamedTuple):
    """What :meth:`~actreg_dispatch.ActivityRegularization.apply_all` returns."""

    total: Any
    """The sum of the penalties."""
    layers: Any
    """The penalty of each layer, in a list, or in a dict by name."""


def apply_all(
    reg: Any,
    activations: Any,
    gradients: Any,
    scale: float,
    weights: Any = None,
    statistics: Any = None,
) -> Penalties:
    """Add the gradients of all layers to ``gradients`` in place and return the penalties.

    ``reg`` is the regularization, which adapters are given as a whole.
    """
    names, xs, gs = _named_layers(activations, gradients)
    labels = list(range(len(xs))) if names is None else names
    ws = None if weights is None else _weights_of_layers(weights, names, labels)
    library = library_of(type(xs[0])) if xs else None
    if library is not None:
        options = given(ws, statistics)
        total, layers = library.apply_all(reg, labels, xs, gs, scale=scale, **options)
    else:
        is_plain = ws is None is statistics
        fused = _fused_batch(reg.options, xs, gs, scale) if is_plain else None
        total, layers = fused or _checked_batch(
            reg.options, labels, xs, gs, scale, ws or (None,) * len(xs), statistics
        )
    return Penalties(total, layers if names is None else dict(zip(names, layers, strict=True)))


def _named_layers(
    activations: Any, gradients: Any
) -> tuple[list[Any] | None, tuple[Any, ...], tuple[Any, ...]]:
    """Return the names of the layers, if they have any, and their activations and gradients."""
    if not (type(activations) in _SEQUENCES and type(gradients) in _SEQUENCES):
        mappings = isinstance(activations, Mapping), isinstance(gradients, Mapping)
        if all(mappings):
            if activations.keys() != gradients.keys():
                odd = sorted(map(repr, activations.keys() ^ gradients.keys()))
                raise ValueError(
                    f"activations and gradients differ in the layers {', '.join(odd)}; "
                    f"pass both under the same names"
                )
            names = list(activations)
            return names, tuple(activations[n] for n in names), tuple(gradients[n] for n in names)
        if any(mappings):
            raise TypeError(
                f"activations are a {type(activations).__name__} but gradients are a "
                f"{type(gradients).__name__}; pass two lists of arrays, or two dicts by name"
            )
        for name, layers in (("activations", activations), ("gradients", gradients)):
            if not isinstance(layers, _SEQUENCES):
                raise TypeError(
                    f"{name} are a {type(layers).__name__}; pass lists of arrays, or dicts by name"
                )
    xs, gs = tuple(activations), tuple(gradients)  # which no other thread can change
    if len(xs) != len(gs):
        raise ValueError(
            f"gradients has {len(gs)} layers but activations has {len(xs)}; pass one for each"
        )
    return None, xs, gs


def _weights_of_layers(weights: Any, names: list[Any] | None, labels: list[Any]) -> tuple[Any, ...]:
    """Return the weights of each layer, or None for one that has none."""
    if names is not None:
        if not isinstance(weights, Mapping) or not weights.keys() <= set(names):
            raise ValueError(
                f"weights={weights!r} are not a mapping of some of the layers' names; name layers "
                f"as activations does, and leave out those without weights"
            )
        return tuple(weights.get(name) for name in names)
    if not isinstance(weights, _SEQUENCES) or len(weights) != len(labels):
        raise ValueError(
            f"weights are not a list of {len(labels)}, one for each layer of activations; "
            f"pass None for a layer without weights"
        )
    return tuple(weights)


def _fused_batch(
    options: Options, xs: tuple[Any, ...], gs: tuple[Any, ...], scale: float
) -> tuple[Any, list[Any]] | None:
    """Do all layers by one compiled function if they are plain enough, or return None."""
    if not xs or type(xs[0]) is not np.ndarray or options.norm.axis is not None:
        return None
    dtype = xs[0].dtype
    compute = compute_dtype(dtype)
    if compute is None:
        return None
    backend, target = choose(NUMPY, dtype, options.backend, log=False)
    penalties = backend.fused_batch(xs, gs, options, scale) if target == NUMPY else None
    if penalties is None:
        return None
    choose(NUMPY, dtype, options.backend)  # once more, to log it
    _complete(penalties, options, xs, gs, scale)
    return _sum_of(penalties.tolist(), compute), list(penalties.astype(compute))


def _complete(penalties: Any, options: Options, xs: Any, gs: Any, scale: float) -> None:
    """Find what a fused batch has left open."""
    if min(penalties.tolist()) >= 0.0:  # as usual, and quicker than NumPy
        return
    for k in np.flatnonzero(penalties < 0.0).tolist():
        if penalties[k] == NEEDS_EXACT_SUM:
            penalties[k] = penalty_exactly(options, xs[k])
        elif penalties[k] == NOT_HANDLED:
            penalties[k] = update(options, NUMPY, xs[k], gs[k], scale)


def penalties_of_rows(
    options: Options,
    activations: np.ndarray[Any, Any],
    gradients: np.ndarray[Any, Any] | None,
    scale: float,
) -> np.ndarray[Any, Any] | None:
    """Return a penalty for each part along the first axis, all by one compiled function, or None.

    Arrays are contiguous, native and apart; gradients, if any, are overwritten.
    """
    backend, target = choose(NUMPY, activations.dtype, options.backend)
    if target != NUMPY or options.norm.axis is not None:
        return None
    penalties = backend.fused_rows(activations, gradients, options, scale)
    if penalties is not None:
        _complete(penalties, options, activations, gradients, scale)
    return penalties


def _checked_batch(
    options: Options,
    labels: Sequence[Any],
    xs: tuple[Any, ...],
    gs: tuple[Any, ...],
    scale: float,
    weights: tuple[Any, ...],
    statistics: Any,
) -> tuple[Any, list[Any]]:
    """Check all layers, then do one after the other, or on a device all in a few launches."""
    array_types, layers, arrays = set(), [], []
    for label, activations, gradients, weighing in zip(labels, xs, gs, weights, strict=True):
        name, written = f"activations[{label!r}]", f"gradients[{label!r}]"
        w_name = f"weights[{label!r}]"
        array_type, x = check_activations(activations, name)
        g = check_gradients(x, gradients, array_type, written, name)
        w = checked_weights(options, x, weighing, array_type, g, w_name, name)
        check_weight_values(w, w_name)
        constants = checked_constants(options, x, scale, name, w)
        array_types.add(array_type)
        layers.append((backend_for(options, array_type, x, g, w), x, g, constants, w))
        if array_type in (NUMPY, CUPY):
            arrays += [(name, x, False), (written, g, True)]
            arrays += [(w_name, w, False)] if w is not None else []
    if len(array_types) > 1:
        raise MixedArraysError(
            f"activations are of several libraries ({', '.join(sorted(array_types))}); "
            f"call apply_all for each"
        )
    check_statistics(statistics, *(x for _, x, *_ in layers))
    check_apart(arrays)
    if not layers:
        return np.float64(0.0), []
    (array_type,) = array_types
    backends, checked_xs, checked_gs, all_constants, checked_ws = zip(*layers, strict=True)
    if array_type == CUPY and len({str(x.device) for x in checked_xs}) > 1:
        raise ValueError("activations are on several devices; call apply_all for each")
    with on_device_of(checked_xs[0], array_type):
        weighted = any(w is not None for w in checked_ws)
        is_plain = statistics is None and not weighted
        batched = is_plain and len({id(backend) for backend in backends}) == 1
        penalties = batched and backends[0].apply_batch(
            checked_xs, checked_gs, options.norm, all_constants
        )
        if not penalties:
            penalties = [
                backend.apply(x, g, options.norm, constants, **given(w, statistics))
                for backend, x, g, constants, w in layers
            ]
        if array_type == CUPY:  # on the device; penalties are their own magnitudes
            stacked = sys.modules["cupy"].stack(_of_one_dtype(penalties))
            backend = backend_for(options._replace(norm=L1), array_type, stacked)
            return backend.penalty(stacked, L1, _SUM), penalties
    widest = max((each.dtype for each in penalties), key=lambda dtype: dtype.itemsize)
    return _sum_of(map(float, penalties), widest), penalties


def _sum_of(penalties: Iterable[float], dtype: np.dtype[Any]) -> Any:
    """Return the sum, rounded to binary64, then to ``dtype``."""
    penalties = list(penalties)
    try:
        total = math.fsum(penalties)
    except OverflowError:  # also of a sum on the way, whatever the others are
        total = sum(penalty for penalty in penalties if not math.isfinite(penalty))
        if total == 0.0:
            total = binary64(sum(map(Fraction, penalties)))
    return round_to(dtype, total)


def _of_one_dtype(penalties: Sequence[Any]) -> Sequence[Any]:
    """Return penalties on a device, as float64 if some are.

    CuPy's kernels flush subnormal float32 numbers to zero. Those are their bits times 2⁻¹⁴⁹.
    """
    if len({penalty.dtype for penalty in penalties}) == 1:
        return penalties
    wide = []
    for penalty in penalties:
        if penalty.dtype == FLOAT32:
            bits = penalty.view(np.uint32)
            penalty = sys.modules["cupy"].where(bits < 1 << 23, bits * 2.0**-149, penalty)
        wide.append(penalty)
    return wide
