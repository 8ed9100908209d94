"""The KV cache in the arena, in the layout that the attention of this device wants.

A page is one block of one layer: keys ``[kv_heads, key_size, block_size]``, then values
``[kv_heads, block_size, value_size]``, then nothing up to the next whole tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from midspan.errors import GraphError, MidspanError
from midspan.interface import CacheGroup, CacheLayout
from midspan_lattice.arena import Arena, whole_tiles
from midspan_lattice.tracing import page_names

ELEMENTS = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def page_bytes(group: CacheGroup, layout: CacheLayout) -> int:
    """Bytes of one block of one layer."""
    values = group.kv_heads * (group.key_size + group.value_size) * layout.block_size
    return whole_tiles(values * ELEMENTS[layout.dtype].itemsize)


class LatticeCache:
    """Pages of every layer; see ``midspan.interface.Cache``.

    Args:
        layout: groups, block size and element type.
        blocks: for each group, the padding block included.
        arena: where they are put.
    """

    def __init__(self, layout: CacheLayout, blocks: tuple[int, ...], arena: Arena) -> None:
        self.layout = layout
        self.blocks = blocks
        self._arena = arena
        nbytes = sum(
            group.layers * count * page_bytes(group, layout) for group, count in zip(layout.groups, blocks, strict=True)
        )
        self._region = arena.take(nbytes, "A cache")
        self._parts: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        offset, dtype = 0, ELEMENTS[layout.dtype]
        for group, count in zip(layout.groups, blocks, strict=True):
            page = page_bytes(group, layout) // dtype.itemsize
            pages = arena.array(self._region, offset, (group.layers, count, page), dtype)
            offset += pages.nbytes
            split = group.kv_heads * group.key_size * layout.block_size
            end = split + group.kv_heads * group.value_size * layout.block_size
            ends = (group.layers, count, group.kv_heads)
            self._parts[group.name] = (
                pages[..., :split].reshape(*ends, group.key_size, layout.block_size),
                pages[..., split:end].reshape(*ends, layout.block_size, group.value_size),
            )

    def pages(self) -> dict[str, NDArray[Any]]:
        """Every layer's keys and values under the names that programs bind."""
        self._require_open()
        found: dict[str, NDArray[Any]] = {}
        for group, arrays in self._parts.items():
            for layer in range(len(arrays[0])):
                found.update(zip(page_names(group, layer), (array[layer] for array in arrays), strict=True))
        return found

    def read(self, group: str, blocks: Sequence[int]) -> NDArray[np.float32]:
        """Blocks in the canonical layout."""
        chosen = self._numbers(group, blocks)
        keys, values = (array[:, chosen] for array in self._group(group))
        keys, values = keys.transpose(0, 1, 4, 2, 3), values.transpose(0, 1, 3, 2, 4)
        data = np.zeros((len(keys), 2, *keys.shape[1:-1], max(keys.shape[-1], values.shape[-1])), np.float32)
        data[:, 0, ..., : keys.shape[-1]] = keys
        data[:, 1, ..., : values.shape[-1]] = values
        return data

    def write(self, group: str, blocks: Sequence[int], data: NDArray[np.float32]) -> None:
        """Fill blocks from the canonical layout."""
        chosen = self._numbers(group, blocks)
        keys, values = self._group(group)
        wanted = (len(keys), 2, len(chosen), values.shape[3], values.shape[2], max(keys.shape[3], values.shape[4]))
        if data.shape != wanted:
            raise GraphError(f"blocks of group '{group}' were given as {data.shape}, the canonical layout is {wanted}")
        keys[:, chosen] = data[:, 0, ..., : keys.shape[3]].transpose(0, 1, 3, 4, 2)
        values[:, chosen] = data[:, 1, ..., : values.shape[4]].transpose(0, 1, 3, 2, 4)

    def copy(self, group: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks; all are read before any is written."""
        sources, targets = (self._numbers(group, [pair[side] for pair in pairs]) for side in (0, 1))
        for array in self._group(group):
            array[:, targets] = array[:, sources]

    def memory_bytes(self) -> int:
        """Bytes of all tiles; none once it is closed."""
        return self._region.nbytes if self._parts else 0

    def close(self) -> None:
        """Give the tiles back."""
        self._parts = {}
        self._arena.give_back(self._region)

    def _group(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        self._require_open()
        if name not in self._parts:
            raise GraphError(f"the cache has no group '{name}', only {', '.join(self._parts)}")
        return self._parts[name]

    def _numbers(self, group: str, blocks: Sequence[int]) -> NDArray[np.int64]:
        """Block numbers as an index; numpy alone would take negative ones for blocks counted from the end."""
        count = self._group(group)[0].shape[1]
        unknown = [block for block in blocks if not 0 <= block < count]
        if unknown:
            raise GraphError(f"group '{group}' has no block {unknown[0]}, only 0 to {count - 1}")
        return np.asarray(blocks, np.int64)

    def _require_open(self) -> None:
        if not self._parts and self.layout.groups:
            raise MidspanError("The cache was closed.")
