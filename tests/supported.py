"""The dtypes that arrays may have, for tests of each of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
