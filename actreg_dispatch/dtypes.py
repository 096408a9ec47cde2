"""The dtypes of the activations, and the compute dtype T of each."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

__all__ = [
    "COMPUTE_DTYPES",
    "FLOAT16",
    "FLOAT32",
    "FLOAT64",
    "NATIVE_DTYPES",
    "compute_dtype",
    "round_to",
]

FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)

NATIVE_DTYPES: set[np.dtype[Any]] = {FLOAT16, FLOAT32, FLOAT64}
"""Supported dtypes in native byte order; bfloat16 joins them when it is first met."""

COMPUTE_DTYPES: dict[np.dtype[Any], np.dtype[Any]] = {
    stored: FLOAT64 if dtype is FLOAT64 else FLOAT32
    for dtype in NATIVE_DTYPES
    for stored in (dtype, dtype.newbyteorder("S"))
}
"""Supported dtype of the activations -> dtype T that gradient and penalty are computed in."""


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """Return the compute dtype T of activations of ``dtype``, or None if it is not supported."""
    known = COMPUTE_DTYPES.get(dtype)
    if known is None and "ml_dtypes" in sys.modules:  # bfloat16 is not NumPy's own
        bfloat16 = np.dtype(sys.modules["ml_dtypes"].bfloat16)
        if dtype == bfloat16:
            NATIVE_DTYPES.add(bfloat16)
            known = COMPUTE_DTYPES[bfloat16] = FLOAT32
    return known


def round_to(dtype: np.dtype[Any], value: float) -> np.floating[Any]:
    """Round a binary64 number to ``dtype``, once, to nearest-even; too large becomes infinite."""
    scalar = dtype.type
    if dtype == FLOAT32 and abs(value) > 3.4028234663852886e38:  # NumPy would warn of overflow
        with np.errstate(over="ignore"):
            return scalar(value)  # type: ignore[no-any-return]
    return scalar(value)  # type: ignore[no-any-return]
