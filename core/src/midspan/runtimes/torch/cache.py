"""The KV cache as torch tensors.

Each layer of a group has two tensors, keys and values, of shape ``[blocks,
kv_heads, block_size, head_size]``: the tokens of one head of a block lie
together, as an attention kernel reads them. A device may want the keys of a
block transposed in memory; the tensors then are views of the same shape with
other strides, and all that works through torch need not know. What a row becomes in
a cache type is ``CachedRows``' matter. Knows no request.

Invariants: memory is taken from the system when it is first written to, never
filled beforehand, so slots that were never written hold anything, and kernels
must not let them reach a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from midspan.errors import MidspanError, OutOfDeviceMemory
from midspan.interface.cache import CacheGroup, CacheLayout, packed_block_bytes
from midspan.runtimes.torch.cached_rows import CachedRows
from midspan.runtimes.torch.element_types import copy_out

LayerTensors = tuple[torch.Tensor, torch.Tensor]
LayerRows = tuple[CachedRows, CachedRows]


class TorchCache:
    """Implements ``midspan.interface.cache.Cache``.

    Attributes:
        layout: what was asked for.
        blocks: blocks of each group.
        identity: an object that no other open cache has; closing changes it, so that
            whoever remembers addresses of this cache sees that they are void.
    """

    def __init__(
        self, layout: CacheLayout, blocks: tuple[int, ...], device: torch.device, *, transposed_keys: bool = False
    ) -> None:
        self.layout = layout
        self.blocks = blocks
        self.identity = object()
        self._device = device
        self._groups = {group.name: group for group in layout.groups}
        self._rows: Mapping[str, tuple[LayerRows, ...]] = {
            group.name: _allocate(group, layout, count, device, transposed_keys)
            for group, count in zip(layout.groups, blocks, strict=True)
        }

    def rows(self, group: str, layer: int) -> LayerRows:
        """Keys and values of one layer, with the way from and to numbers.

        Raises:
            MidspanError: the cache was closed, or has no such layer.
        """
        return self._layers(group)[layer]

    def layer(self, group: str, layer: int) -> LayerTensors:
        """The numbers of one layer's keys and values as they are kept, for kernels that convert them themselves.

        Raises:
            MidspanError: the cache was closed, or has no such layer.
        """
        keys, values = self.rows(group, layer)
        return keys.data, values.data

    def read(self, group: str, blocks: Sequence[int]) -> NDArray[np.float32]:
        """Copy blocks to the host, see ``Cache``: float32 [layers, 2, blocks, block_size, kv_heads, head_size]."""
        layers = self._layers(group)
        result = np.zeros(self._canonical_shape(self._groups[group], len(blocks)), np.float32)
        index = self._index(group, blocks)
        for layer, pair in enumerate(layers):
            for side, rows in enumerate(pair):
                chosen = rows.blocks(index).permute(0, 2, 1, 3)
                result[layer, side, ..., : chosen.shape[-1]] = copy_out(chosen)
        return result

    def write(self, group: str, blocks: Sequence[int], data: NDArray[np.float32]) -> None:
        """Fill blocks from the layout that ``read`` gives.

        Raises:
            ValueError: the data has another shape.
        """
        layers = self._layers(group)
        expected = self._canonical_shape(self._groups[group], len(blocks))
        if data.shape != expected:
            raise ValueError(f"blocks of group '{group}' have shape {expected}, the data has {data.shape}")
        index = self._index(group, blocks)
        for layer, pair in enumerate(layers):
            for side, rows in enumerate(pair):
                part = np.array(data[layer, side, ..., : rows.data.shape[-1]].swapaxes(1, 2), np.float32, order="C")
                rows.put(index, torch.from_numpy(part).to(self._device))

    def copy(self, group: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, each pair (from, to), in all layers; sources are read before anything is written."""
        if not pairs:
            return
        layers = self._layers(group)
        sources, targets = zip(*pairs, strict=True)
        source, target = self._index(group, sources), self._index(group, targets)
        for layer in layers:
            for rows in layer:
                rows.copy(source, target)

    def memory_bytes(self) -> int:
        """Bytes that the cache comes to occupy when every block was written once."""
        return sum(rows.memory.nbytes for layers in self._rows.values() for pair in layers for rows in pair)

    def close(self) -> None:
        """Give the memory back; every later use is an error."""
        self._rows = {}
        self.identity = object()

    def _layers(self, group: str) -> tuple[LayerRows, ...]:
        if not self._rows:
            raise MidspanError("The cache was closed.")
        if group not in self._rows:
            raise MidspanError(f"The cache has no group '{group}', only {', '.join(self._rows)}.")
        return self._rows[group]

    def _canonical_shape(self, group: CacheGroup, count: int) -> tuple[int, ...]:
        width = max(group.key_size, group.value_size)
        return (group.layers, 2, count, self.layout.block_size, group.kv_heads, width)

    def _index(self, group: str, blocks: Sequence[int]) -> torch.Tensor:
        limit = self.blocks[list(self._groups).index(group)]
        for block in blocks:
            if not 0 <= block < limit:
                raise IndexError(f"group '{group}' has blocks 0 to {limit - 1}, not {block}")
        return torch.tensor(list(blocks), dtype=torch.long, device=self._device)


def _allocate(
    group: CacheGroup, layout: CacheLayout, blocks: int, device: torch.device, transposed_keys: bool
) -> tuple[LayerRows, ...]:
    def rows_of(size: int, transposed: bool) -> CachedRows:
        return CachedRows.allocate(
            layout.dtype, blocks, group.kv_heads, layout.block_size, size, device, transposed=transposed
        )

    try:
        return tuple(
            (rows_of(group.key_size, transposed_keys), rows_of(group.value_size, False)) for _ in range(group.layers)
        )
    except RuntimeError as error:  # torch has no type of its own for a refusal by the host's allocator
        each = CacheLayout(groups=(group,), block_size=layout.block_size, dtype=layout.dtype)
        needed = blocks * packed_block_bytes(each)[0]
        raise OutOfDeviceMemory(
            f"{blocks} cache blocks of group '{group.name}' take {needed / 2**30:.1f} GiB, which the system refuses: "
            f"{error}",
            remedy="Ask for a smaller cache with --kv-cache-memory-bytes.",
        ) from error
