"""The definition of attention on a cache that is not the reference's own.

It reads the blocks that a step touches in the canonical layout, lets the
definition work on the copy, and writes the blocks with new tokens back: slow,
right, and all that a device with a cache of its own needs until it has an attention
kernel. Knows the cache through the interface alone, and so not how it rounds: in an
element type that is not known here, new keys and values are written and read back
before anything attends to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.interface.cache import Cache, CacheGroup
from midspan.runtimes.reference.cached_rows import CACHE_TYPES, CachedRows


class _Copy:
    """Blocks of one group under numbers of their own, as the definition wants them."""

    def __init__(self, data: NDArray[np.float32], group: CacheGroup, dtype: str) -> None:
        element = dtype if dtype in CACHE_TYPES else "float32"
        self._keys = CachedRows.encode(data[:, 0, ..., : group.key_size].copy(), element)
        self._values = CachedRows.encode(data[:, 1, ..., : group.value_size].copy(), element)

    def layer(self, group: str, layer: int) -> tuple[CachedRows, CachedRows]:
        return self._keys[layer], self._values[layer]

    def store(self, layer: int, slots: NDArray[Any], key: NDArray[Any], value: NDArray[Any]) -> None:
        for rows, new in zip(self.rows(layer), (key, value), strict=True):
            rows.put(slots, new.reshape(len(slots), *rows.data.shape[1:]))

    def rows(self, layer: int) -> tuple[CachedRows, CachedRows]:
        """Views of keys and values by slot, [slots, kv_heads, size] each."""
        return self._keys[layer].by_slot(), self._values[layer].by_slot()

    def canonical(self, blocks: NDArray[Any]) -> NDArray[np.float32]:
        keys, values = self._keys[:, blocks].decode(), self._values[:, blocks].decode()
        width = max(keys.shape[-1], values.shape[-1])
        data = np.zeros((keys.shape[0], 2, *keys.shape[1:-1], width), np.float32)
        data[:, 0, ..., : keys.shape[-1]] = keys
        data[:, 1, ..., : values.shape[-1]] = values
        return data


def through_copies(definition: Callable[..., Any], group_name: str, layer: int) -> Callable[..., Any]:
    """The definition's function for one node, made to work on any cache.

    Args:
        definition: takes an attention node's seven inputs and a cache of the reference's kind.
        group_name: of the node's cache group.
        layer: the node's layer in the group.

    Returns:
        A function of the same inputs and any ``Cache``.
    """

    def run(*inputs: Any) -> Any:
        query, key, value, query_starts, context_lengths, block_table, slots, given = inputs
        cache: Cache = given
        group = _group(cache, group_name)
        size, dtype = cache.layout.block_size, cache.layout.dtype
        written = np.unique(slots // size)
        blocks = np.unique(np.concatenate((written, block_table.reshape(-1))))
        own_table = np.searchsorted(blocks, block_table).astype(np.int32)
        own_slots = (np.searchsorted(blocks, slots // size) * size + slots % size).astype(np.int32)
        own_written = np.searchsorted(blocks, written)
        copy = _Copy(cache.read(group_name, blocks.tolist()), group, dtype)
        if dtype not in CACHE_TYPES:
            copy.store(layer, own_slots, key, value)
            _write(cache, group_name, written, copy.canonical(own_written))
            copy = _Copy(cache.read(group_name, blocks.tolist()), group, dtype)
            key, value = (rows[own_slots].decode() for rows in copy.rows(layer))
        result = definition(query, key, value, query_starts, context_lengths, own_table, own_slots, copy)
        if dtype in CACHE_TYPES:
            _write(cache, group_name, written, copy.canonical(own_written))
        return result

    return run


def _write(cache: Cache, group: str, blocks: NDArray[Any], data: NDArray[np.float32]) -> None:
    if blocks.size:
        cache.write(group, blocks.tolist(), data)


def _group(cache: Cache, name: str) -> CacheGroup:
    return next(group for group in cache.layout.groups if group.name == name)
