"""A cache that keeps each token's key and value of all layers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import GraphError, MidspanError
from midspan.interface import CacheGroup, CacheLayout

Array = NDArray[Any]


class WholeCache:
    """One array for each group: [blocks, block_size, layers, kv_heads, key_size + value_size], float32.

    Args:
        layout: groups and block size.
        blocks: for each group, the padding block included.
    """

    def __init__(self, layout: CacheLayout, blocks: tuple[int, ...]) -> None:
        self.layout = layout
        self.blocks = blocks
        self._groups = {group.name: group for group in layout.groups}
        self._arrays = {
            group.name: np.zeros(
                (count, layout.block_size, group.layers, group.kv_heads, group.key_size + group.value_size), np.float32
            )
            for group, count in zip(layout.groups, blocks, strict=True)
        }

    def tokens(self, group: str, layer: int) -> Array:
        """A layer's rows by slot, [blocks * block_size, kv_heads, key_size + value_size], writable."""
        array, _ = self._find(group)
        return array.reshape(-1, *array.shape[2:])[:, layer]

    def read(self, group: str, blocks: Sequence[int]) -> NDArray[np.float32]:
        """Blocks in the canonical layout."""
        array, described = self._find(group)
        chosen = array[_numbers(blocks, len(array))].transpose(2, 0, 1, 3, 4)
        width = max(described.key_size, described.value_size)
        data = np.zeros((described.layers, 2, len(blocks), *chosen.shape[2:4], width), np.float32)
        data[:, 0, ..., : described.key_size] = chosen[..., : described.key_size]
        data[:, 1, ..., : described.value_size] = chosen[..., described.key_size :]
        return data

    def write(self, group: str, blocks: Sequence[int], data: NDArray[np.float32]) -> None:
        """Fill blocks from the canonical layout."""
        array, described = self._find(group)
        keys, values = data[:, 0, ..., : described.key_size], data[:, 1, ..., : described.value_size]
        chosen = _numbers(blocks, len(array))
        width = max(described.key_size, described.value_size)
        wanted = (described.layers, 2, len(chosen), array.shape[1], described.kv_heads, width)
        if data.shape != wanted:
            raise GraphError(f"blocks were given as {data.shape}, the canonical layout is {wanted}")
        array[chosen] = np.concatenate((keys, values), axis=-1).transpose(1, 2, 0, 3, 4)

    def copy(self, group: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks; all are read before any is written."""
        array, _ = self._find(group)
        if pairs:
            sources, targets = (_numbers(side, len(array)) for side in zip(*pairs, strict=True))
            array[targets] = array[sources]

    def memory_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(array.nbytes for array in self._arrays.values())

    def close(self) -> None:
        """Give the memory back."""
        self._arrays = {}

    def _find(self, group: str) -> tuple[Array, CacheGroup]:
        if group not in self._arrays:
            raise MidspanError(f"The cache has no group '{group}', or was closed.")
        return self._arrays[group], self._groups[group]


def _numbers(blocks: Sequence[int], count: int) -> NDArray[np.int64]:
    unknown = [block for block in blocks if not 0 <= block < count]
    if unknown:
        raise GraphError(f"there is no block {unknown[0]}, only 0 to {count - 1}")
    return np.asarray(blocks, np.int64)
