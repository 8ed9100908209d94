"""The KV cache in numpy: the canonical layout, nearly as it is.

Keys and values of a group stand in two arrays ``[layers, blocks, block_size,
kv_heads, size]`` in the cache's element type, scales in arrays of their own. Knows
no request. The arrays start as untouched zero pages, so blocks take memory when they
are first written.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from midspan.errors import GraphError, MidspanError, OutOfDeviceMemory
from midspan.interface.cache import CacheLayout
from midspan.runtimes.reference.cached_rows import CachedRows

Pair = tuple[CachedRows, CachedRows]


class ReferenceCache:
    """Blocks of keys and values in numpy arrays; see ``interface.cache.Cache``.

    Args:
        layout: groups, block size and element type.
        blocks: for each group, the padding block included.
    """

    def __init__(self, layout: CacheLayout, blocks: tuple[int, ...]) -> None:
        if len(blocks) != len(layout.groups):
            raise GraphError(f"{len(blocks)} block counts were given for {len(layout.groups)} cache groups")
        self.layout = layout
        self.blocks = blocks
        self._arrays: dict[str, Pair] = {}
        for group, count in zip(layout.groups, blocks, strict=True):
            shape = (group.layers, count, layout.block_size, group.kv_heads)
            try:
                keys = CachedRows.zeros((*shape, group.key_size), layout.dtype)
                values = CachedRows.zeros((*shape, group.value_size), layout.dtype)
            except MemoryError as error:
                raise OutOfDeviceMemory(
                    f"{count} cache blocks of group '{group.name}' do not fit into memory.",
                    remedy="Take fewer blocks, or a smaller cache element type.",
                ) from error
            self._arrays[group.name] = (keys, values)

    def layer(self, group: str, layer: int) -> Pair:
        """Writable views of one layer's keys and values, [blocks, block_size, kv_heads, size] each."""
        keys, values = self._group(group)
        return keys[layer], values[layer]

    def read(self, group: str, blocks: Sequence[int]) -> NDArray[np.float32]:
        """Copy blocks out, float32 [layers, 2, blocks, block_size, kv_heads, size]."""
        keys, values = self._group(group)
        data = np.zeros(_canonical_shape(keys, values, len(blocks)), np.float32)
        chosen = self._numbers(group, blocks)
        for side, rows in enumerate((keys, values)):
            data[:, side, ..., : rows.data.shape[-1]] = rows[:, chosen].decode()
        return data

    def write(self, group: str, blocks: Sequence[int], data: NDArray[np.float32]) -> None:
        """Fill blocks from the layout that ``read`` returns."""
        keys, values = self._group(group)
        wanted = _canonical_shape(keys, values, len(blocks))
        if data.shape != wanted:
            raise GraphError(f"{len(blocks)} blocks of group '{group}' have the shape {wanted}, the data {data.shape}")
        chosen = self._numbers(group, blocks)
        for side, rows in enumerate((keys, values)):
            rows.put((slice(None), chosen), data[:, side, ..., : rows.data.shape[-1]])

    def copy(self, group: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, each pair (from, to); all are read before any is written."""
        both = self._group(group)
        if not pairs:
            return
        sources, targets = (self._numbers(group, side) for side in zip(*pairs, strict=True))
        for rows in both:
            for array in (rows.data,) if rows.scales is None else (rows.data, rows.scales):
                array[:, targets] = array[:, sources]

    def memory_bytes(self) -> int:
        """Bytes of all arrays, touched or not."""
        return sum(rows.nbytes() for pair in self._arrays.values() for rows in pair)

    def close(self) -> None:
        """Give the memory back."""
        self._arrays = {}

    def _numbers(self, group: str, blocks: Sequence[int]) -> NDArray[np.int64]:
        """Block numbers as an index; negative ones would count from the end."""
        numbers = np.asarray(blocks, np.int64)
        count = self._arrays[group][0].data.shape[1]
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < count:
            raise IndexError(f"group '{group}' has blocks 0 to {count - 1}, not {blocks}")
        return numbers

    def _group(self, name: str) -> Pair:
        if not self._arrays:
            raise MidspanError("The cache was closed.")
        if name not in self._arrays:
            raise GraphError(f"the cache has no group '{name}', only {', '.join(self._arrays)}")
        return self._arrays[name]


def _canonical_shape(keys: CachedRows, values: CachedRows, blocks: int) -> tuple[int, ...]:
    layers, _, block_size, kv_heads, key_size = keys.data.shape
    return layers, 2, blocks, block_size, kv_heads, max(key_size, values.data.shape[-1])
