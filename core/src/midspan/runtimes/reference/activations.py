"""Activation functions of the definitions: float32 in, float32 out.

Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def _gelu(x: Float32) -> Float32:
    halved = x * np.float32(math.sqrt(0.5))
    error_function = np.frompyfunc(math.erf, 1, 1)(halved).astype(np.float32)
    result: Float32 = np.float32(0.5) * x * (np.float32(1.0) + error_function)
    return result


def _gelu_tanh(x: Float32) -> Float32:
    inner = np.float32(math.sqrt(2.0 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    result: Float32 = np.float32(0.5) * x * (np.float32(1.0) + np.tanh(inner))
    return result


def _sigmoid(x: Float32) -> Float32:
    with np.errstate(over="ignore"):  # exp(-x) is infinite below -88, and the quotient 0 as it should be
        result: Float32 = np.float32(1.0) / (np.float32(1.0) + np.exp(-x))
    return result


def _silu(x: Float32) -> Float32:
    with np.errstate(over="ignore"):
        result: Float32 = x / (np.float32(1.0) + np.exp(-x))
    return result


def _relu(x: Float32) -> Float32:
    result: Float32 = np.maximum(x, np.float32(0.0))
    return result


def _relu_squared(x: Float32) -> Float32:
    return _relu(x) * _relu(x)


def _tanh(x: Float32) -> Float32:
    result: Float32 = np.tanh(x)
    return result


ACTIVATIONS: Mapping[str, Callable[[Float32], Float32]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu_squared": _relu_squared,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
}
"""Activation functions by name, float32 -> float32."""
