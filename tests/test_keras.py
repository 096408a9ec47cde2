"""The strengths that Keras users know lead to the results of Keras 3, which runs beside ours."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
from numpy.testing import assert_allclose

from actreg_dispatch import ActivityRegularization

pytestmark = pytest.mark.skipif(  # to import Keras here would take its default library
    not (find_spec("keras") and find_spec("torch")), reason="Keras, or PyTorch for it, is missing"
)

KERAS = """
import json, sys
import keras, numpy as np, torch
rng, found = np.random.default_rng(0), []
for l1, l2 in [(0.1, 0.0), (0.0, 0.2), (0.1, 0.2)]:
    activations = torch.tensor(rng.normal(size=(4, 3, 5)).astype("f4"), requires_grad=True)
    layer = keras.layers.ActivityRegularization(l1=l1, l2=l2)
    layer(activations)
    (penalty,) = layer.losses
    penalty.backward()
    arrays = [float(penalty), activations.detach().tolist(), activations.grad.tolist()]
    found.append([l1, l2, *arrays])
print(json.dumps(found))
"""


def test_a_batch_has_the_penalty_and_the_gradient_of_keras(python):
    runs = json.loads(python("-c", KERAS, KERAS_BACKEND="torch").stdout)
    assert len(runs) == 3
    for l1, l2, penalty, activations, gradients in runs:
        reg = ActivityRegularization.l1_l2(l1, l2, reduction="batch")
        found, gradient = reg.penalty_and_gradient(np.float32(activations))
        assert_allclose(found, penalty, rtol=1e-6)
        assert_allclose(gradient, np.float32(gradients), rtol=1e-5)
