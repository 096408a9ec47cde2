"""Keras 3: its regularizers and ours agree on its PyTorch and JAX backends, when it trains too.

Keras chooses its backend where it is imported, so each runs in a process of its own.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
from numpy.testing import assert_allclose

from actreg_dispatch import ActivityRegularization

pytestmark = pytest.mark.skipif(not find_spec("keras"), reason="Keras is missing")

BACKENDS = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(not find_spec(name), reason=f"{name} for Keras is missing"),
            pytest.mark.xdist_group(f"keras-{name}"),
        ],
    )
    for name in ("torch", "jax")
]

COMMON = """
import json, os, sys
import keras, numpy as np
from actreg_dispatch import ActivityRegularization as Reg
from actreg_dispatch.keras import ActivityRegularizationLayer, ActivityRegularizer

rng = np.random.default_rng(0)

def trained(model, x, y, epochs=2, rate=0.1, callbacks=()):  # with a last batch that is smaller
    model.compile(keras.optimizers.SGD(rate), "mse")
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **options)
    loss = model.evaluate(x, y, batch_size=4, verbose=0)
    weights = [np.asarray(weight).tolist() for weight in model.get_weights()]
    return [[float(each) for each in history.history["loss"]], float(loss), weights]
"""

KERAS = (
    COMMON
    + """
import doctest, actreg_dispatch.keras

x, y = rng.normal(size=(10, 3)).astype("f4"), rng.normal(size=(10, 2)).astype("f4")
initial = [rng.normal(size=shape).astype("f4") for shape in [(3, 5), (5,), (5, 2), (2,)]]

def model_of(regularizer=None, *layers):
    hidden = keras.layers.Dense(5, activation="relu", activity_regularizer=regularizer)
    model = keras.Sequential([keras.Input((3,)), hidden, *layers, keras.layers.Dense(2)])
    model.set_weights(initial)
    return model

# Whether this Keras divides what a regularizer returns by the batch size.
probe = keras.layers.ReLU(activity_regularizer=lambda x: keras.ops.sum(x))
probe(keras.ops.ones((4, 1)))
reduction = {1.0: "batch", 4.0: "sum"}[float(probe.losses[0])]

def penalty_and_gradient(layer, x):
    def penalty(x):
        layer(x)
        return layer.losses[0]

    if keras.config.backend() == "jax":
        import jax

        found = jax.value_and_grad(penalty)(keras.ops.array(x))
    else:
        leaf = keras.ops.array(x).requires_grad_()
        value = penalty(leaf)
        value.backward()
        found = value, leaf.grad
    return [np.float64(keras.ops.convert_to_numpy(each)).tolist() for each in found]

found = {"doctest": list(doctest.testmod(actreg_dispatch.keras)), "reduction": reduction}
activations = rng.normal(size=(4, 3, 5)).astype("f4")
found["activations"] = activations.tolist()
found["gradients"] = [
    [l1, l2]
    + [
        penalty_and_gradient(layer, activations)
        for layer in (
            keras.layers.ActivityRegularization(l1, l2),
            ActivityRegularizationLayer(Reg.l1_l2(l1, l2, reduction=reduction)),
        )
    ]
    for l1, l2 in [(0.1, 0.0), (0.0, 0.2), (0.1, 0.2)]
]
found["without"] = trained(model_of(), x, y)
found["regularizers"] = [
    [trained(model_of(theirs), x, y), trained(model_of(ActivityRegularizer(ours)), x, y)]
    for theirs, ours in [
        (keras.regularizers.L1(0.1), Reg.l1(0.1)),
        (keras.regularizers.L2(0.2), Reg.l2_squared(0.2)),
        (keras.regularizers.L1L2(0.1, 0.2), Reg.l1_l2(0.1, 0.2)),
    ]
]
found["layers"] = [
    [trained(model_of(None, theirs), x, y), trained(model_of(None, ours), x, y)]
    for theirs, ours in [
        (
            keras.layers.ActivityRegularization(l1, l2),
            ActivityRegularizationLayer(Reg.l1_l2(l1, l2, reduction=reduction)),
        )
        for l1, l2 in [(0.1, 0.0), (0.0, 0.2), (0.1, 0.2)]
    ]
]

class WarmUp(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.model.layers[0].activity_regularizer.reg.lam = epoch
        self.model.make_train_function(force=True)

model = model_of(ActivityRegularizer(Reg.l1(0.0)))
found["warm-up"] = trained(model, x, y, epochs=3, rate=0.0, callbacks=[WarmUp()])

layers = [
    ActivityRegularizationLayer(Reg.l2(0.3, epsilon=1e-3, backend="numpy"), name="l2"),
    ActivityRegularizationLayer(Reg.hoyer(0.4, reduction=(0, 1)), name="hoyer", dtype="float64"),
]
model = model_of(ActivityRegularizer(Reg.l1_l2(0.1, 0.2, reduction="mean")), *layers)
before = trained(model, x, y)[1]
layers[1].reg.lam = 0.5
model.compile(loss="mse")
path = os.path.join(os.environ["WHERE"], keras.config.backend() + ".keras")
model.save(path)
loaded = keras.models.load_model(path)
hidden, l2, hoyer, _ = loaded.layers
found["loaded"] = {
    "regs": [repr(each.reg) for each in (hidden.activity_regularizer, l2, hoyer)],
    "dtypes": [l2.compute_dtype, hoyer.compute_dtype],
    "losses": [before] + [float(each.evaluate(x, y, verbose=0)) for each in (model, loaded)],
}

class Nested(keras.layers.Layer):  # whose call Keras tries with what has no values
    def __init__(self):
        super().__init__()
        self.regularized = ActivityRegularizationLayer(Reg.l1(0.1))

    def call(self, inputs):
        return self.regularized(inputs)

found["nested"] = [
    trained(model_of(None, layer), x, y) for layer in (Nested(), Nested().regularized)
]
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module", params=BACKENDS)
def found(request, python, tmp_path_factory):
    """Return what came out on each backend of Keras in turn."""
    where = tmp_path_factory.mktemp("saved")
    return json.loads(python("-c", KERAS, KERAS_BACKEND=request.param, WHERE=str(where)).stdout)


def assert_trained_alike(run, other):
    """Compare losses of epochs, loss of an evaluation and weights; Keras sums in float32."""
    for mine, theirs in zip(run[:2] + run[2], other[:2] + other[2], strict=True):
        assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_batch_has_the_penalty_and_the_gradient_of_keras(found):
    activations = np.float32(found["activations"])
    for l1, l2, theirs, ours in found["gradients"]:
        reg = ActivityRegularization.l1_l2(l1, l2, reduction=found["reduction"])
        penalty, gradient = reg.penalty_and_gradient(activations)
        assert ours == [float(penalty), gradient.tolist()]
        assert_allclose(penalty, theirs[0], rtol=1e-6)
        assert_allclose(gradient, theirs[1], rtol=1e-5)


def test_a_regularizer_trains_as_those_of_keras_do(found):
    for theirs, ours in found["regularizers"]:
        assert_trained_alike(ours, theirs)
        assert abs(ours[1] - found["without"][1]) > 0.01


def test_a_layer_trains_as_that_of_keras_does(found):
    for theirs, ours in found["layers"]:
        assert_trained_alike(ours, theirs)
        assert abs(ours[1] - found["without"][1]) > 0.01


def test_a_layer_inside_a_layer_trains_as_by_itself(found):
    nested, alone = found["nested"]
    assert_trained_alike(nested, alone)


def test_a_callback_can_assign_lam(found):
    none, once, twice = found["warm-up"][0]
    assert once > none + 0.1
    assert_allclose(twice - none, 2 * (once - none), rtol=1e-5)


def test_a_saved_model_has_its_regularizations_when_it_is_loaded(found):
    loaded = found["loaded"]
    assert loaded["regs"] == [
        "ActivityRegularization((0.1, 0.2), 'l1_l2_squared', reduction='mean')",
        "ActivityRegularization(0.3, 'l2', epsilon=0.001, backend='numpy')",
        "ActivityRegularization(0.5, 'hoyer', reduction=(0, 1))",
    ]
    assert loaded["dtypes"] == ["float32", "float64"]
    before, saved, again = loaded["losses"]
    assert saved != before  # by the λ that was assigned
    assert again == saved


def test_the_examples_run(found):
    failed, attempted = found["doctest"]
    assert (failed, attempted > 0) == (0, True)


ERRORS = """
import json, sys
import actreg_dispatch
assert not {"keras", "actreg_dispatch.keras"} & set(sys.modules)
import keras
from actreg_dispatch.keras import ActivityRegularizationLayer, ActivityRegularizer

def error(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]

good, found = {"norm": "l1", "lam": 0.5}, {}
for cls in (ActivityRegularizer, ActivityRegularizationLayer):
    whole = (lambda config: {"reg": config}) if "Layer" in cls.__name__ else dict
    reg = actreg_dispatch.ActivityRegularization.l1(0.5)
    backends = [error(cls, reg)]
    real, keras.config.backend = keras.config.backend, lambda: "tensorflow"
    backends.append(error(cls, reg))
    keras.config.backend = real
    found[cls.__name__] = {
        "backends": backends,
        "reg": error(cls, "l1"),
        "no norm": error(cls.from_config, whole({"lam": 0.5})),
        "no lam": error(cls.from_config, whole({"norm": "l1"})),
        "norm": error(cls.from_config, whole(good | {"norm": "l7"})),
        "backend": error(cls.from_config, whole(good | {"backend": "abacus"})),
    }
print(json.dumps(found))
"""


def test_bad_input_is_refused(python):
    found = json.loads(python("-c", ERRORS, KERAS_BACKEND="numpy").stdout)
    assert len(found) == 2
    for errors in found.values():
        for name, (kind, text) in zip(("numpy", "tensorflow"), errors.pop("backends"), strict=True):
            assert kind == "BackendUnavailableError"
            assert f"'{name}'" in text
            assert "KERAS_BACKEND to 'torch' or 'jax'" in text
        for case, kind, words in [
            ("reg", "TypeError", "reg='l1' is of type str; pass an ActivityRegularization"),
            ("no norm", "ValueError", "no 'norm'; pass what get_config returned"),
            ("no lam", "ValueError", "no 'lam'; pass what get_config returned"),
            ("norm", "ValueError", "norm='l7' is unknown; use one of: 'l1'"),
            ("backend", "UnknownBackendError", "backend='abacus' names no backend; use one of"),
        ]:
            assert errors[case][0] == kind
            assert words in errors[case][1]


# Masks.

MASKS = (
    COMMON
    + """
table = rng.normal(size=(6, 4)).astype("f4")
table[0] = np.nan  # what is masked
tokens = np.array([[1, 2, 0], [3, 0, 0], [0, 0, 0], [4, 5, 1], [2, 2, 0]])

def embedding():
    return keras.layers.Embedding(6, 4, weights=[table], mask_zero=True)

found = []
for norm, reduction in [("l1", "sum"), ("l2", "sum"), ("l2_squared", "mean"), ("l1", "batch")]:
    layer = ActivityRegularizationLayer(Reg(0.1, norm, reduction=reduction))
    embedded = embedding()(keras.ops.array(tokens))
    output = layer(embedded)
    mask = keras.ops.convert_to_numpy(output._keras_mask)
    losses = [float(loss) for loss in layer.losses]
    for x, m in [(embedded[..., None], mask), (embedded, np.repeat(mask[..., None], 4, -1))]:
        other = ActivityRegularizationLayer(layer.reg)
        other(x, mask=keras.ops.array(m))
        losses += map(float, other.losses)
    found.append([norm, reduction, losses, mask.tolist()])

model = keras.Sequential(
    [
        keras.Input((3,), dtype="int32"),
        embedding(),
        ActivityRegularizationLayer(Reg.l2_squared(0.1, reduction="batch")),
        keras.layers.GlobalAveragePooling1D(),  # which uses the mask that comes down
    ]
)
table[0] = 7.0  # 0 times NaN is NaN there
model.layers[0].set_weights([table])
rows = np.array([[1, 2, 0], [3, 0, 0], [4, 5, 1], [2, 2, 0]])
run = trained(model, rows, np.zeros((4, 4), "f4"), epochs=3)
print(json.dumps([np.nan_to_num(table).tolist(), found, run]))
"""
)


@pytest.mark.parametrize("keras_backend", BACKENDS)
def test_what_is_masked_is_left_out(python, keras_backend):
    table, found, (losses, evaluated, weights) = json.loads(
        python("-c", MASKS, KERAS_BACKEND=keras_backend).stdout
    )
    tokens = np.array([[1, 2, 0], [3, 0, 0], [0, 0, 0], [4, 5, 1], [2, 2, 0]])
    kept = np.float32(table)[tokens[tokens != 0]]
    assert len(found) == 4
    for norm, reduction, penalties, mask in found:
        assert mask == (tokens != 0).tolist()
        count = {"sum": 1, "mean": kept.size, "batch": 4}[reduction]
        expected = ActivityRegularization(0.1 / count, norm).penalty(kept)
        assert_allclose(penalties, [expected] * 3, rtol=1e-6)
    assert_allclose(weights[0][0], 7.0)  # no gradient reached what is masked
    assert evaluated < losses[-1] < losses[0]
