"""Keras 3, on its PyTorch and JAX backends: a regularizer and a layer.

Both call ``reg.penalty``, which :mod:`actreg_dispatch.torch` and :mod:`actreg_dispatch.jax` make
differentiable, and leave the rest to Keras: the sum of the losses, training, saving. A process that
loads a saved model imports this module first, and registers norms of its own.

Keras compiles its steps on JAX, and what is compiled keeps λ. Where a callback assigns
``layer.activity_regularizer.reg.lam`` or ``layer.reg.lam``, it then calls
``model.make_train_function(force=True)``, or the new λ is not seen.
"""

from __future__ import annotations

from typing import Any

import keras

from actreg_dispatch.errors import BackendUnavailableError
from actreg_dispatch.regularization import ActivityRegularization, check_regularization

__all__ = ["ActivityRegularizationLayer", "ActivityRegularizer"]


@keras.saving.register_keras_serializable("actreg_dispatch")
class ActivityRegularizer(keras.regularizers.Regularizer):
    """A regularizer for the ``activity_regularizer=`` of any layer.

    Parameters
    ----------
    reg : ActivityRegularization
        Norm and strength; readable as ``.reg``. A warm-up assigns ``.reg.lam`` (see the module).
        Choose ``reduction="sum"``, its default: Keras, from 3.14 on, itself divides by the batch
        size what a regularizer returns, and ``"batch"`` would divide once more. Before 3.14 Keras
        divides by nothing, and ``"batch"`` gives what it gives since.

    Raises
    ------
    TypeError
        If ``reg`` is not an ActivityRegularization.
    BackendUnavailableError
        If Keras runs on a backend other than PyTorch and JAX.

    Notes
    -----
    Keras tells no regularizer of masks; :class:`ActivityRegularizationLayer` uses them.

    Examples
    --------
    >>> reg = ActivityRegularization.l1(0.5)
    >>> layer = keras.layers.ReLU(activity_regularizer=ActivityRegularizer(reg))
    >>> _ = layer(keras.ops.array([[1.0, -2.0, 3.0]]))
    >>> [float(loss) for loss in layer.losses]
    [2.0]
    """

    def __init__(self, reg: ActivityRegularization) -> None:
        _check(reg)
        self.reg = reg

    def __call__(self, activations: Any) -> Any:
        """Return the penalty, as a tensor of Keras' backend that it can differentiate."""
        return self.reg.penalty(activations)

    def get_config(self) -> dict[str, Any]:
        """Return the options of ``reg``, as they are now."""
        return _config(self.reg)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ActivityRegularizer:
        """Return the regularizer that had this config."""
        return cls(_regularization(config))


@keras.saving.register_keras_serializable("actreg_dispatch")
class ActivityRegularizationLayer(keras.layers.Layer):
    """A layer that adds the penalty of its inputs to the loss, and leaves out what is masked.

    It is ``keras.layers.ActivityRegularization`` with any norm, and with masks. It does not have
    that name because whoever makes one also imports the class of ``reg``, whose name it is.

    Parameters
    ----------
    reg : ActivityRegularization
        Norm and strength; readable as ``.reg``. A warm-up assigns ``.reg.lam`` (see the module).
        Its ``reduction`` is all that divides: Keras does not divide what a layer adds by itself.
        ``"batch"`` is what Keras' own layer does from 3.14 on, ``"sum"`` what it did before.
    **options
        Those of every layer of Keras: ``name``, ``dtype`` and so on.

    Raises
    ------
    TypeError, BackendUnavailableError
        As for :class:`ActivityRegularizer`.

    Notes
    -----
    The penalty is added to the loss in training and in evaluation. The outputs are the inputs, with
    their mask. A position whose mask is False is left out, whatever it holds: it adds nothing to
    the penalty, has no gradient, and does not count where ``reduction`` divides.

    Examples
    --------
    >>> reg = ActivityRegularization.l1(0.5, reduction="batch")
    >>> layer = ActivityRegularizationLayer(reg)
    >>> _ = layer(keras.ops.array([[1.0, -2.0], [3.0, 0.0]]))
    >>> [float(loss) for loss in layer.losses]
    [1.5]
    """

    def __init__(self, reg: ActivityRegularization, **options: Any) -> None:
        _check(reg)
        super().__init__(**options)
        self.reg = reg
        self.supports_masking = True

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Return ``inputs``; ``mask`` has their first axes, as Keras' masks do, or all of them."""
        if mask is None:
            penalty = self.reg.penalty(inputs)
        else:
            missing = (None,) * (inputs.ndim - mask.ndim)
            weights = keras.ops.cast(mask, "bool")[(..., *missing)]
            penalty = self.reg.penalty(inputs, weights=weights)
        self.add_loss(penalty)
        return inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return ``input_shape``."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return the options of the layer, and those of ``reg`` as they are now."""
        return {**super().get_config(), "reg": _config(self.reg)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ActivityRegularizationLayer:
        """Return the layer that had this config."""
        reg = _regularization(config.get("reg", {}))
        return super().from_config({**config, "reg": reg})  # type: ignore[no-any-return]


def _check(reg: Any) -> None:
    check_regularization(reg)
    backend = keras.config.backend()
    if backend not in ("torch", "jax"):
        raise BackendUnavailableError(
            f"Keras runs on its backend {backend!r}, which cannot differentiate the penalty; set "
            f"the environment variable KERAS_BACKEND to 'torch' or 'jax' before Keras is imported"
        )


def _config(reg: ActivityRegularization) -> dict[str, Any]:
    lam, norm, epsilon, reduction, backend = reg.options
    return {  # without tuples, which JSON does not have
        "norm": norm.name,
        "lam": list(lam) if len(lam) > 1 else lam[0],
        "epsilon": epsilon,
        "reduction": list(reduction) if isinstance(reduction, tuple) else reduction,
        "axis": None if norm.axis is None else list(norm.axis),
        "backend": backend,
    }


def _regularization(config: dict[str, Any]) -> ActivityRegularization:
    for name in ("norm", "lam"):
        if name not in config:
            raise ValueError(f"config={config!r} has no {name!r}; pass what get_config returned")
    options: Any = {
        name: tuple(value) if name in ("reduction", "axis") and isinstance(value, list) else value
        for name, value in config.items()
    }
    return ActivityRegularization(**options)
