"""Paged attention: the definition.

Written to be read: a loop over requests and, inside, over their tokens. Each
token's result depends on its own query and on the cached tokens that it sees,
and on nothing else, not even on the chunk in which it was computed. Knows the
cache only as rows of keys and values by slot.
"""

from __future__ import annotations

from typing import Any, Protocol, Union

import numpy as np
from numpy.typing import NDArray

from midspan.runtimes.reference.cached_rows import CachedRows

Array = NDArray[Any]
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


class LayerCache(Protocol):
    """What the definition needs of a cache."""

    def layer(self, group: str, layer: int) -> tuple[Union[CachedRows, Array], Union[CachedRows, Array]]:
        """Writable views of keys and values, [blocks, block_size, kv_heads, size] each."""
        ...


def attention(
    query: Array,
    key: Array,
    value: Array,
    query_starts: Int32,
    context_lengths: Int32,
    block_table: Int32,
    slots: Int32,
    cache: LayerCache,
    *,
    sinks: Array | None = None,
    group: str,
    layer: int,
    heads: int,
    kv_heads: int,
    key_size: int,
    value_size: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    alibi_slopes: tuple[float, ...] | None,
) -> Array:
    """Write this step's keys and values, then attend to the cache.

    Args:
        query: [T, heads * key_size].
        key: [T, kv_heads * key_size].
        value: [T, kv_heads * value_size].
        query_starts, context_lengths, block_table, slots: from the batch.
        cache: keys and values, in the cache's element type.
        sinks: [heads], joins each softmax as a score without a value.
        group, layer: which part of the cache.
        heads, kv_heads, key_size, value_size: shapes; query head h reads kv head ``h // (heads / kv_heads)``.
        scale: factor of ``query . key``.
        window: a token sees this many tokens, itself included; None: all.
        soft_cap: scores become ``c * tanh(score / c)``.
        alibi_slopes: one for each head, times (key position - query position), added (arXiv 2108.12409).

    Returns:
        [T, heads * value_size] in the query's type.
    """
    keys, values = (
        stored if isinstance(stored, CachedRows) else CachedRows(data=stored) for stored in cache.layer(group, layer)
    )
    block_size = keys.data.shape[1]
    keys, values = keys.by_slot(), values.by_slot()
    keys.put(slots, key.reshape(-1, kv_heads, key_size))
    values.put(slots, value.reshape(-1, kv_heads, value_size))

    queries = np.ascontiguousarray(query.astype(np.float32)).reshape(-1, kv_heads, heads // kv_heads, key_size)
    slopes = None if alibi_slopes is None else np.array(alibi_slopes, np.float32).reshape(kv_heads, -1, 1)
    sink_scores = None if sinks is None else sinks.astype(np.float32).reshape(kv_heads, -1, 1)
    output = np.zeros((query.shape[0], heads * value_size), np.float32)
    for request in range(context_lengths.shape[0]):
        start, end, context = int(query_starts[request]), int(query_starts[request + 1]), int(context_lengths[request])
        first_position = context - (end - start)
        oldest = _first_seen(first_position, window)
        seen = np.arange(oldest, context)
        rows = block_table[request, seen // block_size] * block_size + seen % block_size
        past_keys, past_values = keys[rows].decode(), values[rows].decode()
        for token in range(start, end):
            position = first_position + token - start
            first = _first_seen(position, window)
            visible = slice(first - oldest, position + 1 - oldest)
            scores = np.matmul(queries[token], past_keys[visible].transpose(1, 2, 0)) * np.float32(scale)
            if soft_cap is not None:
                scores = np.tanh(scores / np.float32(soft_cap)) * np.float32(soft_cap)
            if slopes is not None:
                scores = scores + slopes * (np.arange(first, position + 1) - position).astype(np.float32)
            shares = _softmax(scores, sink_scores)
            output[token] = np.matmul(shares, past_values[visible].transpose(1, 0, 2)).reshape(-1)
    return output.astype(query.dtype)


def _first_seen(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _softmax(scores: Float32, sinks: Float32 | None) -> Float32:
    """Softmax over the last axis of [kv_heads, heads / kv_heads, tokens]; with sinks the shares add up to below 1."""
    largest = np.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        largest = np.maximum(largest, sinks)
    weights = np.exp(scores - largest)
    total = np.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - largest)
    shares: Float32 = weights / total
    return shares
