"""Paged attention in the array library's terms: static shapes, no loop over requests.

Every token of a step, whosever it is, looks at all blocks of its request's table at once; what it
must not see is masked. Tokens go in tiles, so that the gathered keys of a few are held at a time.

Pages as the cache keeps them: keys ``[blocks, kv_heads, key_size, block_size]``, values
``[blocks, kv_heads, block_size, value_size]``, so that both products need no reordering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan_lattice.expression import (
    INT,
    Expression,
    as_float,
    at_most,
    choose,
    constant,
    gather,
    join,
    leaf,
    matmul,
    pointwise,
    reduce,
    store,
)

TILE_TOKENS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Pages:
    """One layer's pages in the cache.

    Attributes:
        keys, values: the names under which they are bound; how many there are is only known then.
        block_size: tokens of each.
    """

    keys: str
    values: str
    block_size: int


def _write_keys(pages: NDArray[Any], slots: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    size = pages.shape[-1]
    pages[slots // size, :, :, slots % size] = rows
    return pages


def _write_values(pages: NDArray[Any], slots: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    size = pages.shape[-2]
    pages[slots // size, :, slots % size] = rows
    return pages


def attention(
    inputs: tuple[Expression, ...], sinks: Expression | None, attributes: Mapping[str, Any], pages: Pages
) -> Expression:
    """The operation ``attention``.

    Args:
        inputs: query, key, value, query_starts, context_lengths, block_table, slots.
        sinks: [heads].
        attributes: of the node.
        pages: where the layer's keys and values are.

    Returns:
        float32 [T, heads * value_size].
    """
    query, key, value, starts, contexts, table, slots = inputs
    tokens, kv_heads = query.shape[0], attributes["kv_heads"]
    group = attributes["heads"] // kv_heads
    key_size, value_size = attributes["key_size"], attributes["value_size"]
    keys = leaf(pages.keys, (1, kv_heads, key_size, pages.block_size))
    values = leaf(pages.values, (1, kv_heads, pages.block_size, value_size))
    keys = store(_write_keys, keys, slots, key.reshape(tokens, kv_heads, key_size))
    values = store(_write_values, values, slots, value.reshape(tokens, kv_heads, value_size))
    request, position = _owners(starts, contexts, tokens)
    parts = []
    for start in range(0, tokens, TILE_TOKENS):
        stop = min(start + TILE_TOKENS, tokens)
        own_table = gather(table, request.part(0, start, stop))
        own_position = position.part(0, start, stop).reshape(stop - start, 1, 1, 1, 1)
        own_query = query.part(0, start, stop).reshape(stop - start, 1, kv_heads, group, key_size)
        parts.append(
            _attend(own_query, gather(keys, own_table), gather(values, own_table), own_position, sinks, attributes)
        )
    return join(parts, 0)


def _owners(starts: Expression, contexts: Expression, tokens: int) -> tuple[Expression, Expression]:
    """For each token the request that it belongs to and its position there, int32 [T] both.

    Rows that pad the step belong to some request, and what they compute is dropped.
    """
    requests = contexts.shape[0]
    ends = starts.part(0, 1, requests + 1)
    token = constant(np.arange(tokens).reshape(tokens, 1), INT)
    ended = at_most(ends.reshape(1, requests), token)
    request = pointwise(np.minimum, reduce(np.add, ended, 1), constant(requests - 1, INT)).reshape(tokens)
    position = gather(contexts, request) - gather(ends, request) + token.reshape(tokens)
    return request, position


def _attend(
    query: Expression,
    keys: Expression,
    values: Expression,
    position: Expression,
    sinks: Expression | None,
    attributes: Mapping[str, Any],
) -> Expression:
    """Some tokens: query [n, 1, kv, heads / kv, size], keys [n, M, kv, size, b], values [n, M, kv, b, size]."""
    count, blocks, kv_heads, _, block_size = keys.shape
    group = query.shape[3]
    past = constant(np.arange(blocks * block_size).reshape(1, blocks, 1, 1, block_size), INT)
    visible = at_most(past, position)
    if attributes["window"] is not None:
        visible = pointwise(
            np.logical_and, visible, pointwise(np.greater, past, position - attributes["window"], dtype=INT)
        )
    scores = matmul(query, keys) * attributes["scale"]
    if attributes["soft_cap"] is not None:
        scores = pointwise(np.tanh, scores / attributes["soft_cap"]) * attributes["soft_cap"]
    if attributes["alibi_slopes"] is not None:
        slopes = constant(np.reshape(attributes["alibi_slopes"], (1, 1, kv_heads, group, 1)))
        scores = scores + as_float(past - position) * slopes
    scores = choose(visible, scores, -np.inf)
    largest = reduce(np.maximum, scores, 1, 4)
    extra = None if sinks is None else sinks.reshape(1, 1, kv_heads, group, 1)
    if extra is not None:
        largest = pointwise(np.maximum, largest, extra)
    weights = pointwise(np.exp, scores - largest)
    total = reduce(np.add, weights, 1, 4)
    if extra is not None:
        total = total + pointwise(np.exp, extra - largest)
    # A block's unwritten slots may hold anything, and nothing times NaN is NaN: they are cleared first.
    seen = choose(visible.reshape(*visible.shape[:3], block_size, 1), values, 0.0)
    attended = reduce(np.add, matmul(weights / total, seen), 1)
    return attended.reshape(count, kv_heads * group * values.shape[-1])
