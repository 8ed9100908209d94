"""What every operation computes: the definition, as numpy functions.

A function is called as ``function(*inputs, **weights, **attributes)``; attention
gets the cache after its inputs. Activations come in the activation type
(float32, bfloat16 or float16) and leave in it: arithmetic is float32, the output
is rounded once. Knows no graph, no request and no other device.

Invariant: a row's result is a function of that row alone, bit for bit, however
many rows there are. Matrix products therefore go row by row: a library's product
of several rows picks its order of summation by their number. Attention keeps the
same promise for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.interface.batch import SamplingBatch
from midspan.runtimes.reference.activations import ACTIVATIONS
from midspan.runtimes.reference.attention import attention
from midspan.runtimes.reference.mixture import experts, route
from midspan.runtimes.reference.packed_weights import DynamicInt8, WeightOperand
from midspan.runtimes.reference.sample_outputs import outputs_of
from midspan.runtimes.reference.sampling import sample as choose_tokens

Array = NDArray[Any]
Float32 = NDArray[np.float32]


def embedding(token_ids: NDArray[np.int32], weight: Array, *, scale: float) -> Array:
    """Rows of the table, times scale.

    Args:
        token_ids: int32 [N].
        weight: [vocabulary, hidden], in the activation type.
        scale: factor.

    Returns:
        [N, hidden] in the table's type.
    """
    rows: Array = weight[token_ids]
    return rows if scale == 1.0 else _round(_wide(rows) * np.float32(scale), rows)


def linear(x: Array, weight: WeightOperand, bias: Array | None = None, *, split: str | None) -> Array:
    """``x @ weight.T + bias``; [N, in] -> [N, out]. ``split`` changes nothing on one device.

    With a ``DynamicInt8`` weight the product is that of the format ``int8.dynamic``.
    """
    return _round(_product(x, weight, bias), x)


def logits(
    x: Array, weight: WeightOperand, bias: Array | None = None, *, scale: float, soft_cap: float | None
) -> Float32:
    """As linear, in float32, times scale, softly capped; [N, in] -> float32 [N, vocabulary]."""
    scores: Float32 = _product(x, weight, bias) * np.float32(scale)
    if soft_cap is None:
        return scores
    capped: Float32 = np.tanh(scores / np.float32(soft_cap)) * np.float32(soft_cap)
    return capped


def rms_norm(x: Array, weight: Array, *, epsilon: float, offset: float) -> Array:
    """``x / sqrt(mean(x^2) + epsilon) * (weight + offset)`` over runs of ``len(weight)`` columns (arXiv 1910.07467)."""
    runs = _runs(x, weight)
    mean_square = np.mean(runs * runs, axis=-1, keepdims=True)
    normed = runs / np.sqrt(mean_square + np.float32(epsilon)) * (_wide(weight) + np.float32(offset))
    return _round(normed.reshape(x.shape), x)


def layer_norm(x: Array, weight: Array, bias: Array | None = None, *, epsilon: float) -> Array:
    """``(x - mean) / sqrt(variance + epsilon) * weight + bias`` over runs of ``len(weight)`` columns."""
    runs = _runs(x, weight)
    centred = runs - np.mean(runs, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred / np.sqrt(variance + np.float32(epsilon)) * _wide(weight)
    if bias is not None:
        normed = normed + _wide(bias)
    return _round(normed.reshape(x.shape), x)


def add(a: Array, b: Array) -> Array:
    """``a + b``."""
    return _round(_wide(a) + _wide(b), a)


def multiply(a: Array, b: Array) -> Array:
    """``a * b``, element by element."""
    return _round(_wide(a) * _wide(b), a)


def scale(x: Array, *, factor: float) -> Array:
    """``x * factor``."""
    return _round(_wide(x) * np.float32(factor), x)


def activation(x: Array, *, function: str) -> Array:
    """``function(x)``, one of ``ACTIVATIONS``."""
    return _round(ACTIVATIONS[function](_wide(x)), x)


def gated(gate: Array, up: Array, *, function: str) -> Array:
    """``function(gate) * up``, rounded once."""
    return _round(ACTIVATIONS[function](_wide(gate)) * _wide(up), gate)


def gated_pair(x: Array, *, function: str) -> Array:
    """``gated`` of the first and the second half of the columns; [N, 2 n] -> [N, n]."""
    half = x.shape[-1] // 2
    return gated(x[..., :half], x[..., half:], function=function)


def scale_rows(x: Array, factor: Array, *, function: str | None) -> Array:
    """``x * function(factor)``, rounded once; x [N, columns], factor [N, 1]."""
    wide = _wide(factor) if function is None else ACTIVATIONS[function](_wide(factor))
    return _round(_wide(x) * wide, x)


def add_rms_norm(x: Array, residual: Array, weight: Array, *, epsilon: float, offset: float) -> tuple[Array, Array]:
    """``sum = x + residual``, rounded; returns (rms_norm(sum), sum)."""
    total = add(x, residual)
    return rms_norm(total, weight, epsilon=epsilon, offset=offset), total


def split(x: Array, *, sizes: tuple[int, ...]) -> tuple[Array, ...]:
    """Consecutive parts of the columns."""
    borders = np.cumsum(sizes[:-1], dtype=np.int64)
    return tuple(np.split(x, borders, axis=-1))


def rotary(
    query: Array,
    key: Array,
    positions: NDArray[np.int32],
    *,
    head_size: int,
    rotary_size: int,
    inverse_frequencies: tuple[float, ...],
    amplitude: float,
    interleaved: bool,
) -> tuple[Array, Array]:
    """Turn the first ``rotary_size`` columns of each head by the token's position (arXiv 2104.09864).

    Args:
        query: [N, heads * head_size].
        key: [N, kv_heads * head_size].
        positions: int32 [N].
        head_size: columns of a head.
        rotary_size: columns that turn.
        inverse_frequencies: radians per position of each pair, rounded to float32, as is the angle.
        amplitude: factor of cosine and sine.
        interleaved: pairs are (2i, 2i + 1); otherwise (i, i + rotary_size / 2).

    Returns:
        Query and key, turned.
    """
    angles = positions[:, None].astype(np.float32) * np.array(inverse_frequencies, np.float32)
    cosine = (np.cos(angles) * np.float32(amplitude))[:, None, :]
    sine = (np.sin(angles) * np.float32(amplitude))[:, None, :]
    half = rotary_size // 2
    first, second = (
        (slice(0, rotary_size, 2), slice(1, rotary_size, 2))
        if interleaved
        else (
            slice(0, half),
            slice(half, rotary_size),
        )
    )

    def turn(x: Array) -> Array:
        heads = _wide(x).reshape(x.shape[0], x.shape[-1] // head_size, head_size)
        turned = heads.copy()
        turned[..., first] = heads[..., first] * cosine - heads[..., second] * sine
        turned[..., second] = heads[..., second] * cosine + heads[..., first] * sine
        return _round(turned.reshape(x.shape), x)

    return turn(query), turn(key)


def select_rows(x: Array, rows: NDArray[np.int32]) -> Array:
    """Rows of x by index."""
    selected: Array = x[rows]
    return selected


def sample(logits: Float32, sampling: SamplingBatch) -> tuple[Array, ...]:
    """Choose a token for each row, see ``midspan.runtimes.reference.sampling``."""
    return outputs_of(choose_tokens(logits, sampling))


REFERENCE: Mapping[str, Callable[..., Any]] = {
    "embedding": embedding,
    "linear": linear,
    "logits": logits,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "add": add,
    "multiply": multiply,
    "scale": scale,
    "activation": activation,
    "gated": gated,
    "gated_pair": gated_pair,
    "add_rms_norm": add_rms_norm,
    "split": split,
    "rotary": rotary,
    "attention": attention,
    "route": route,
    "experts": experts,
    "scale_rows": scale_rows,
    "select_rows": select_rows,
    "sample": sample,
}
"""Operation -> its definition."""


def _wide(x: Array) -> Float32:
    return x.astype(np.float32, copy=False)


def _round(x: Float32, like: Array) -> Array:
    return x.astype(like.dtype, copy=False)


def _runs(x: Array, weight: Array) -> Float32:
    """float32 [N, runs, len(weight)], contiguous, so that each run is summed in the same order."""
    return np.ascontiguousarray(_wide(x)).reshape(x.shape[0], x.shape[-1] // weight.shape[-1], weight.shape[-1])


def _product(x: Array, weight: WeightOperand, bias: Array | None) -> Float32:
    """float32 ``x @ weight.T + bias``, a product of its own for each row."""
    if isinstance(weight, DynamicInt8):
        product = weight.product(x)
    else:
        rows = np.ascontiguousarray(_wide(x))[:, None, :]
        product = np.matmul(rows, _wide(weight).T)[:, 0, :]
    return product if bias is None else product + _wide(bias)
