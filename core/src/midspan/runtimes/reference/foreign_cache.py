"""The definition of attention on a cache that is not the reference's own.

It reads the blocks that a step touches in the canonical layout, lets the
definition work on the copy, and writes the blocks with new tokens back: slow,
right, and all that a device with a cache of its own needs until it has an attention
kernel. Knows the cache through the interface alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.interface.cache import Cache, CacheGroup
from midspan.runtimes.reference.element_types import element_type


class _Copy:
    """Blocks of one group under numbers of their own, as the definition wants them."""

    def __init__(self, data: NDArray[np.float32], group: CacheGroup, dtype: str) -> None:
        self._keys = data[:, 0, ..., : group.key_size].astype(element_type(dtype))
        self._values = data[:, 1, ..., : group.value_size].astype(element_type(dtype))

    def layer(self, group: str, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        return self._keys[layer], self._values[layer]

    def canonical(self, blocks: NDArray[Any]) -> NDArray[np.float32]:
        keys, values = self._keys[:, blocks], self._values[:, blocks]
        width = max(keys.shape[-1], values.shape[-1])
        data = np.zeros((keys.shape[0], 2, *keys.shape[1:-1], width), np.float32)
        data[:, 0, ..., : keys.shape[-1]] = keys
        data[:, 1, ..., : values.shape[-1]] = values
        return data


def through_copies(definition: Callable[..., Any], group_name: str) -> Callable[..., Any]:
    """The definition's function for one node, made to work on any cache.

    Args:
        definition: takes an attention node's seven inputs and a cache of the reference's kind.
        group_name: of the node's cache group.

    Returns:
        A function of the same inputs and any ``Cache``.
    """

    def run(*inputs: Any) -> Any:
        *leading, block_table, slots, cache = inputs
        group = _group(cache, group_name)
        size = cache.layout.block_size
        written = np.unique(slots // size)
        blocks = np.unique(np.concatenate((written, block_table.reshape(-1))))
        copy = _Copy(cache.read(group_name, blocks.tolist()), group, cache.layout.dtype)
        own_table = np.searchsorted(blocks, block_table).astype(np.int32)
        own_slots = (np.searchsorted(blocks, slots // size) * size + slots % size).astype(np.int32)
        result = definition(*leading, own_table, own_slots, copy)
        if written.size:
            cache.write(group_name, written.tolist(), copy.canonical(np.searchsorted(blocks, written)))
        return result

    return run


def _group(cache: Cache, name: str) -> CacheGroup:
    return next(group for group in cache.layout.groups if group.name == name)
