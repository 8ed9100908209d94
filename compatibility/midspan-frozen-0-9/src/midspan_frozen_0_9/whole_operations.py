"""Each operation of the graph language, in numpy, by what the interface says of it in words.

A function gets the node's inputs, its weights by role, its attributes and the cache, and
returns the node's outputs. Everything is float32. Rows are worked out one by one, so that a
row's result does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.interface import StepResult
from midspan.runtimes.reference.sampling import sample as choose_tokens
from midspan_frozen_0_9.whole_cache import WholeCache

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One node in one step.

    Attributes:
        inputs: in the operation's order.
        weights: by role, float32.
        attributes: of the node.
        cache: for attention.
    """

    inputs: Sequence[Any]
    weights: Mapping[str, Array]
    attributes: Mapping[str, Any]
    cache: WholeCache | None

    def wide(self, place: int) -> Array:
        """An input in float32."""
        array: Array = np.asarray(self.inputs[place], np.float32)
        return array

    def number(self, name: str) -> np.float32:
        """An attribute as a float32 number."""
        value: np.float32 = np.float32(self.attributes[name])
        return value


def _embedding(call: Call) -> list[Any]:
    return [call.weights["weight"][call.inputs[0]] * call.number("scale")]


def _product(call: Call) -> Array:
    rows: Array = np.matmul(call.wide(0)[:, None, :], call.weights["weight"].T)[:, 0]
    return rows + call.weights["bias"] if "bias" in call.weights else rows


def _linear(call: Call) -> list[Any]:
    return [_product(call)]


def _logits(call: Call) -> list[Any]:
    scores = _product(call) * call.number("scale")
    if call.attributes["soft_cap"] is not None:
        scores = np.tanh(scores / call.number("soft_cap")) * call.number("soft_cap")
    return [scores]


def _rms(x: Array, call: Call) -> Array:
    weight = call.weights["weight"]
    runs = np.ascontiguousarray(x).reshape(len(x), x.shape[-1] // len(weight), len(weight))
    size = np.sqrt((runs * runs).mean(axis=-1, keepdims=True) + call.number("epsilon"))
    normed: Array = (runs / size * (weight + call.number("offset"))).reshape(x.shape)
    return normed


def _rms_norm(call: Call) -> list[Any]:
    return [_rms(call.wide(0), call)]


def _add_rms_norm(call: Call) -> list[Any]:
    total = call.wide(0) + call.wide(1)
    return [_rms(total, call), total]


def _layer_norm(call: Call) -> list[Any]:
    x, weight = call.wide(0), call.weights["weight"]
    runs = np.ascontiguousarray(x).reshape(len(x), x.shape[-1] // len(weight), len(weight))
    centred = runs - runs.mean(axis=-1, keepdims=True)
    size = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + call.number("epsilon"))
    normed = centred / size * weight
    return [(normed + call.weights["bias"] if "bias" in call.weights else normed).reshape(x.shape)]


def _add(call: Call) -> list[Any]:
    return [call.wide(0) + call.wide(1)]


def _multiply(call: Call) -> list[Any]:
    return [call.wide(0) * call.wide(1)]


def _scale(call: Call) -> list[Any]:
    return [call.wide(0) * call.number("factor")]


def _gelu(x: Array) -> Array:
    error_function = np.frompyfunc(math.erf, 1, 1)(x * np.float32(math.sqrt(0.5))).astype(np.float32)
    result: Array = np.float32(0.5) * x * (np.float32(1) + error_function)
    return result


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    result: Array = np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
    return result


FUNCTIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (np.float32(1) + np.exp(-x)),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "relu_squared": lambda x: np.maximum(x, np.float32(0)) ** 2,
    "sigmoid": lambda x: np.float32(1) / (np.float32(1) + np.exp(-x)),
    "tanh": np.tanh,
}


def _activation(call: Call) -> list[Any]:
    return [FUNCTIONS[call.attributes["function"]](call.wide(0))]


def _gated(call: Call) -> list[Any]:
    return [FUNCTIONS[call.attributes["function"]](call.wide(0)) * call.wide(1)]


def _gated_pair(call: Call) -> list[Any]:
    gate, up = np.split(call.wide(0), 2, axis=-1)
    return [FUNCTIONS[call.attributes["function"]](gate) * up]


def _split(call: Call) -> list[Any]:
    borders = np.cumsum(call.attributes["sizes"][:-1], dtype=np.int64)
    return list(np.split(call.wide(0), borders, axis=-1))


def _rotary(call: Call) -> list[Any]:
    frequencies = np.array(call.attributes["inverse_frequencies"], np.float32)
    angles = np.asarray(call.inputs[2], np.float32)[:, None, None] * frequencies
    cosine, sine = np.cos(angles) * call.number("amplitude"), np.sin(angles) * call.number("amplitude")
    size, half = call.attributes["rotary_size"], call.attributes["rotary_size"] // 2
    first, second = slice(0, half), slice(half, size)
    if call.attributes["interleaved"]:
        first, second = slice(0, size, 2), slice(1, size, 2)
    outputs = []
    for x in (call.wide(0), call.wide(1)):
        heads = x.reshape(len(x), x.shape[-1] // call.attributes["head_size"], call.attributes["head_size"])
        turned = heads.copy()
        turned[..., first] = heads[..., first] * cosine - heads[..., second] * sine
        turned[..., second] = heads[..., second] * cosine + heads[..., first] * sine
        outputs.append(turned.reshape(x.shape))
    return outputs


def _attention(call: Call) -> list[Any]:
    query, key, value = (call.wide(place) for place in range(3))
    starts, contexts, table, slots = call.inputs[3:]
    kv_heads, key_size = call.attributes["kv_heads"], call.attributes["key_size"]
    if call.cache is None:
        raise ValueError("attention needs a cache")
    kept = call.cache.tokens(call.attributes["group"], call.attributes["layer"])
    kept[slots, :, :key_size] = key.reshape(-1, kv_heads, key_size)
    kept[slots, :, key_size:] = value.reshape(-1, kv_heads, call.attributes["value_size"])
    output = np.zeros((len(query), call.attributes["heads"] * call.attributes["value_size"]), np.float32)
    block_size = call.cache.layout.block_size
    for request in range(len(contexts)):
        for token in range(starts[request], starts[request + 1]):
            position = int(contexts[request] - (starts[request + 1] - token))
            first = max(0, position + 1 - (call.attributes["window"] or position + 1))
            seen = np.arange(first, position + 1)
            rows = kept[table[request, seen // block_size] * block_size + seen % block_size]
            output[token] = _attend(query[token], rows, seen - position, call)
    return [output]


def _attend(query: Array, rows: Array, distances: Array, call: Call) -> Array:
    """One token's heads; rows: [tokens, kv_heads, key_size + value_size]; distances: 0 for the token itself."""
    kv_heads, key_size = call.attributes["kv_heads"], call.attributes["key_size"]
    grouped = query.reshape(kv_heads, -1, key_size)
    scores = np.matmul(grouped, rows[..., :key_size].transpose(1, 2, 0)) * call.number("scale")
    if call.attributes["soft_cap"] is not None:
        scores = np.tanh(scores / call.number("soft_cap")) * call.number("soft_cap")
    if call.attributes["alibi_slopes"] is not None:
        slopes = np.array(call.attributes["alibi_slopes"], np.float32).reshape(kv_heads, -1, 1)
        scores = scores + slopes * distances.astype(np.float32)
    if "sinks" in call.weights:
        sinks = call.weights["sinks"].reshape(kv_heads, -1, 1)
        scores = np.concatenate((scores, sinks), axis=-1)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = (shares / shares.sum(axis=-1, keepdims=True))[..., : len(rows)]
    attended: Array = np.matmul(shares, rows[..., key_size:].transpose(1, 0, 2)).reshape(-1)
    return attended


def _select_rows(call: Call) -> list[Any]:
    return [call.wide(0)[call.inputs[1]]]


def _sample(call: Call) -> list[Any]:
    return sample_outputs(choose_tokens(call.wide(0), call.inputs[1]))


def sample_outputs(result: StepResult) -> list[Any]:
    """The six outputs of the sample operation."""
    rows, found = len(result.token_ids), result.logprobs
    invalid = np.zeros(rows, np.bool_) if result.invalid is None else result.invalid
    if found is None:
        numbers, ids = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int32)
        return [result.token_ids, numbers.reshape(0), ids.reshape(0), ids, numbers, invalid]
    return [result.token_ids, found.chosen, found.ranks, found.top_token_ids, found.top, invalid]


OPERATIONS: Mapping[str, Callable[[Call], list[Any]]] = {
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
    "add_rms_norm": _add_rms_norm,
    "split": _split,
    "rotary": _rotary,
    "attention": _attention,
    "select_rows": _select_rows,
    "sample": _sample,
}
"""Operation -> its code."""
