"""Each operation of the graph language, written in the array library.

A function takes the node's input expressions, its weights by role and its attributes, and
returns the outputs in float32; the caller rounds them to the activation type. Attention is in
``attention``; sampling is left to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from midspan_lattice.expression import (
    Expression,
    as_float,
    constant,
    erf,
    gather,
    join,
    matmul,
    mean,
    pointwise,
)

Inputs = tuple[Expression, ...]
Weights = Mapping[str, Expression]
Attributes = Mapping[str, Any]
Lowered = list[Expression]


def _embedding(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    return [gather(weights["weight"], inputs[0]) * attributes["scale"]]


def _linear(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    product = matmul(inputs[0], weights["weight"].transposed())
    return [product + weights["bias"] if "bias" in weights else product]


def _logits(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    scores = _linear(inputs, weights, attributes)[0] * attributes["scale"]
    cap = attributes["soft_cap"]
    return [scores if cap is None else pointwise(np.tanh, scores / cap) * cap]


def _runs(x: Expression, weight: Expression) -> Expression:
    return x.reshape(x.shape[0], x.shape[-1] // weight.shape[0], weight.shape[0])


def _rms_norm(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    weight = weights["weight"]
    runs = _runs(inputs[0], weight)
    size = pointwise(np.sqrt, mean(runs * runs) + attributes["epsilon"])
    return [(runs / size * (weight + attributes["offset"])).reshape(*inputs[0].shape)]


def _layer_norm(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    weight = weights["weight"]
    runs = _runs(inputs[0], weight)
    centred = runs - mean(runs)
    normed = centred / pointwise(np.sqrt, mean(centred * centred) + attributes["epsilon"]) * weight
    return [(normed + weights["bias"] if "bias" in weights else normed).reshape(*inputs[0].shape)]


def _add(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    return [inputs[0] + inputs[1]]


def _multiply(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    return [inputs[0] * inputs[1]]


def _scale(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    return [inputs[0] * attributes["factor"]]


def _sigmoid(x: Expression) -> Expression:
    return constant(1.0) / (pointwise(np.exp, x * -1.0) + 1.0)


def _relu(x: Expression) -> Expression:
    return pointwise(np.maximum, x, 0.0)


def _gelu_tanh(x: Expression) -> Expression:
    inner = (x + x * x * x * 0.044715) * math.sqrt(2.0 / math.pi)
    return x * 0.5 * (pointwise(np.tanh, inner) + 1.0)


FUNCTIONS: Mapping[str, Callable[[Expression], Expression]] = {
    "silu": lambda x: x / (pointwise(np.exp, x * -1.0) + 1.0),
    "gelu": lambda x: x * 0.5 * (erf(x * math.sqrt(0.5)) + 1.0),
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu_squared": lambda x: _relu(x) * _relu(x),
    "sigmoid": _sigmoid,
    "tanh": lambda x: pointwise(np.tanh, x),
}


def _activation(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    return [FUNCTIONS[attributes["function"]](inputs[0])]


def _gated(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    return [FUNCTIONS[attributes["function"]](inputs[0]) * inputs[1]]


def _gated_pair(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    half = inputs[0].shape[-1] // 2
    halves = (inputs[0].part(-1, 0, half), inputs[0].part(-1, half, 2 * half))
    return _gated(halves, weights, attributes)


def _split(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    ends = np.cumsum(attributes["sizes"]).tolist()
    return [inputs[0].part(-1, end - size, end) for end, size in zip(ends, attributes["sizes"], strict=True)]


def _rotary(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    frequencies = constant(attributes["inverse_frequencies"])
    angles = as_float(inputs[2]).reshape(inputs[2].shape[0], 1, 1) * frequencies
    cosine = pointwise(np.cos, angles) * attributes["amplitude"]
    sine = pointwise(np.sin, angles) * attributes["amplitude"]
    return [_turn(x, cosine, sine, attributes) for x in inputs[:2]]


def _turn(x: Expression, cosine: Expression, sine: Expression, attributes: Attributes) -> Expression:
    size, head_size = attributes["rotary_size"], attributes["head_size"]
    heads = x.reshape(x.shape[0], x.shape[-1] // head_size, head_size)
    if attributes["interleaved"]:
        first, second = heads.part(-1, 0, size, 2), heads.part(-1, 1, size, 2)
    else:
        first, second = heads.part(-1, 0, size // 2), heads.part(-1, size // 2, size)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    if attributes["interleaved"]:
        pairs = join([half.reshape(*half.shape, 1) for half in turned], -1)
        turned = [pairs.reshape(*heads.shape[:2], size)]
    if size < head_size:
        turned.append(heads.part(-1, size, head_size))
    return join(turned, -1).reshape(*x.shape)


def _select_rows(inputs: Inputs, weights: Weights, attributes: Attributes) -> Lowered:
    return [gather(inputs[0], inputs[1])]


LOWERINGS: Mapping[str, Callable[[Inputs, Weights, Attributes], Lowered]] = {
    "embedding": _embedding,
    "linear": _linear,
    "logits": _logits,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add": _add,
    "multiply": _multiply,
    "scale": _scale,
    "activation": _activation,
    "gated": _gated,
    "gated_pair": _gated_pair,
    "split": _split,
    "rotary": _rotary,
    "select_rows": _select_rows,
}
"""Operation -> its lowering; ``add_rms_norm`` is a sum and a norm, see ``tracing``."""
