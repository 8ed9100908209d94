"""The simulated device's KV cache, in a layout that is nobody else's.

Each block is an array of its own, ``[layers, kv_heads, key_size + value_size, block_size]``:
features before tokens, keys above values, made when it is first written. So nothing fits by
accident, and reading, writing and migration really convert. Knows no request.

Invariants: ``memory_bytes`` counts every block, made or not; a block never written reads as zeros.
Types of 8 bits are counted as such and held as the float32 numbers that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import GraphError, MidspanError
from midspan.interface.cache import CacheGroup, CacheLayout
from midspan.runtimes.reference.cached_rows import cache_type, rounded

Array = NDArray[Any]


class SimulatedCache:
    """Implements ``interface.cache.Cache``.

    Args:
        layout: groups, block size and element type.
        blocks: for each group, the padding block included.
        block_bytes: bytes of a block of each group, as the device counts them.
        holds_data: False: what is written is forgotten and what is read is zeros.
        before_access: waits for steps that were started and may still write.
    """

    def __init__(
        self,
        layout: CacheLayout,
        blocks: tuple[int, ...],
        *,
        block_bytes: tuple[int, ...],
        holds_data: bool = True,
        before_access: Callable[[], None] = lambda: None,
    ) -> None:
        if len(blocks) != len(layout.groups):
            raise GraphError(f"{len(blocks)} block counts were given for {len(layout.groups)} cache groups")
        self.layout = layout
        self.blocks = blocks
        self._holds_data = holds_data
        self._before_access = before_access
        element = cache_type(layout.dtype)
        self._dtype = np.dtype(np.float32) if element.itemsize == 1 else element
        self._memory_bytes = sum(count * size for count, size in zip(blocks, block_bytes, strict=True))
        self._counts = {group.name: count for group, count in zip(layout.groups, blocks, strict=True)}
        self._groups = {group.name: group for group in layout.groups}
        self._stores: dict[str, dict[int, Array]] = {group.name: {} for group in layout.groups}
        self._open = True

    def read(self, group: str, blocks: Sequence[int]) -> NDArray[np.float32]:
        """Copy blocks out in the canonical layout."""
        self._before_access()
        facts, store = self._group(group, blocks)
        data = np.zeros(self._canonical_shape(facts, len(blocks)), np.float32)
        for place, block in enumerate(blocks):
            content = store.get(int(block))
            if content is not None:
                turned = content.transpose(0, 3, 1, 2)
                data[:, 0, place, ..., : facts.key_size] = turned[..., : facts.key_size]
                data[:, 1, place, ..., : facts.value_size] = turned[..., facts.key_size :]
        return data

    def write(self, group: str, blocks: Sequence[int], data: NDArray[np.float32]) -> None:
        """Fill blocks from the canonical layout."""
        self._before_access()
        facts, _ = self._group(group, blocks)
        wanted = self._canonical_shape(facts, len(blocks))
        if data.shape != wanted:
            raise GraphError(
                f"{len(blocks)} blocks of group '{group}' are {wanted}, and data of {data.shape} was given"
            )
        for place, block in enumerate(blocks):
            if self._holds_data:
                turned = self._made(group, int(block)).transpose(0, 3, 1, 2)
                turned[..., : facts.key_size] = self._kept(data[:, 0, place, ..., : facts.key_size])
                turned[..., facts.key_size :] = self._kept(data[:, 1, place, ..., : facts.value_size])

    def copy(self, group: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, each pair (from, to); all are read before any is written."""
        self._before_access()
        _, store = self._group(group, [block for pair in pairs for block in pair])
        read = [(target, store.get(source)) for source, target in pairs]
        for target, content in read:
            if content is None:
                store.pop(target, None)
            else:
                store[target] = content.copy()

    def layer(self, group: str, layer: int, blocks: Sequence[int]) -> tuple[Array, Array]:
        """Copies of one layer's keys and values of some blocks, ``[blocks, block_size, kv_heads, size]`` each."""
        facts, store = self._group(group, blocks)
        shape = (len(blocks), self.layout.block_size, facts.kv_heads)
        keys = np.zeros((*shape, facts.key_size), self._dtype)
        values = np.zeros((*shape, facts.value_size), self._dtype)
        for place, block in enumerate(blocks):
            content = store.get(int(block))
            if content is not None:
                turned = content[layer].transpose(2, 0, 1)
                keys[place], values[place] = turned[..., : facts.key_size], turned[..., facts.key_size :]
        return keys, values

    def put_layer(self, group: str, layer: int, blocks: Sequence[int], keys: Array, values: Array) -> None:
        """Write what ``layer`` returns back, for some blocks."""
        facts, _ = self._group(group, blocks)
        for place, block in enumerate(blocks):
            turned = self._made(group, int(block))[layer].transpose(2, 0, 1)
            turned[..., : facts.key_size], turned[..., facts.key_size :] = keys[place], values[place]

    def memory_bytes(self) -> int:
        """Bytes of all blocks, written or not."""
        return self._memory_bytes

    def close(self) -> None:
        """Give the memory back."""
        self._open = False
        self._stores = {}
        self._memory_bytes = 0

    def require_open(self) -> None:
        """Refuse to be used after ``close``.

        Raises:
            MidspanError: it was closed.
        """
        if not self._open:
            raise MidspanError("The cache was closed.")

    def _kept(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return rounded(rows, self.layout.dtype)

    def _canonical_shape(self, facts: CacheGroup, blocks: int) -> tuple[int, ...]:
        width = max(facts.key_size, facts.value_size)
        return (facts.layers, 2, blocks, self.layout.block_size, facts.kv_heads, width)

    def _made(self, group: str, block: int) -> Array:
        store, facts = self._stores[group], self._groups[group]
        if block not in store:
            shape = (facts.layers, facts.kv_heads, facts.key_size + facts.value_size, self.layout.block_size)
            store[block] = np.zeros(shape, self._dtype)
        return store[block]

    def _group(self, name: str, blocks: Sequence[int]) -> tuple[CacheGroup, dict[int, Array]]:
        self.require_open()
        if name not in self._groups:
            raise GraphError(f"the cache has no group '{name}', only {', '.join(self._groups)}")
        outside = [block for block in blocks if not 0 <= block < self._counts[name]]
        if outside:
            raise GraphError(f"group '{name}' has {self._counts[name]} blocks, and no block {outside[0]}")
        return self._groups[name], self._stores[name]
