"""The KV cache as torch tensors.

Each layer of a group has two tensors, keys and values, of shape ``[blocks,
kv_heads, block_size, head_size]``: the tokens of one head of a block lie
together, as an attention kernel reads them. A device may want the keys of a
block transposed in memory; the tensors then are views of the same shape with
other strides, and all that works through torch need not know. Knows no request.

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
from midspan.interface.cache import CacheGroup, CacheLayout
from midspan.runtimes.torch.element_types import copy_out, torch_type

LayerTensors = tuple[torch.Tensor, torch.Tensor]


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
        self._groups = {group.name: group for group in layout.groups}
        self._tensors: Mapping[str, tuple[LayerTensors, ...]] = {
            group.name: _allocate(group, layout, count, device, transposed_keys)
            for group, count in zip(layout.groups, blocks, strict=True)
        }

    def layer(self, group: str, layer: int) -> LayerTensors:
        """Keys and values of one layer.

        Raises:
            MidspanError: the cache was closed, or has no such layer.
        """
        return self._layers(group)[layer]

    def read(self, group: str, blocks: Sequence[int]) -> NDArray[np.float32]:
        """Copy blocks to the host, see ``Cache``: float32 [layers, 2, blocks, block_size, kv_heads, head_size]."""
        layers = self._layers(group)
        result = np.zeros(self._canonical_shape(self._groups[group], len(blocks)), np.float32)
        for layer, pair in enumerate(layers):
            for side, tensor in enumerate(pair):
                chosen = tensor[self._index(group, blocks, tensor.device)]
                result[layer, side, ..., : tensor.shape[-1]] = copy_out(chosen.permute(0, 2, 1, 3))
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
        for layer, pair in enumerate(layers):
            for side, tensor in enumerate(pair):
                part = np.array(data[layer, side, ..., : tensor.shape[-1]].swapaxes(1, 2), np.float32, order="C")
                source = torch.from_numpy(part).to(device=tensor.device, dtype=tensor.dtype)
                tensor[self._index(group, blocks, tensor.device)] = source

    def copy(self, group: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, each pair (from, to), in all layers; sources are read before anything is written."""
        if not pairs:
            return
        sources, targets = zip(*pairs, strict=True)
        for layer in self._layers(group):
            for tensor in layer:
                source = self._index(group, sources, tensor.device)
                tensor[self._index(group, targets, tensor.device)] = tensor[source]

    def memory_bytes(self) -> int:
        """Bytes that the cache comes to occupy when every block was written once."""
        return sum(tensor.nbytes for layers in self._tensors.values() for pair in layers for tensor in pair)

    def close(self) -> None:
        """Give the memory back; every later use is an error."""
        self._tensors = {}
        self.identity = object()

    def _layers(self, group: str) -> tuple[LayerTensors, ...]:
        if not self._tensors:
            raise MidspanError("The cache was closed.")
        if group not in self._tensors:
            raise MidspanError(f"The cache has no group '{group}', only {', '.join(self._tensors)}.")
        return self._tensors[group]

    def _canonical_shape(self, group: CacheGroup, count: int) -> tuple[int, ...]:
        width = max(group.key_size, group.value_size)
        return (group.layers, 2, count, self.layout.block_size, group.kv_heads, width)

    def _index(self, group: str, blocks: Sequence[int], device: torch.device) -> torch.Tensor:
        limit = self.blocks[list(self._groups).index(group)]
        for block in blocks:
            if not 0 <= block < limit:
                raise IndexError(f"group '{group}' has blocks 0 to {limit - 1}, not {block}")
        return torch.tensor(list(blocks), dtype=torch.long, device=device)


def _allocate(
    group: CacheGroup, layout: CacheLayout, blocks: int, device: torch.device, transposed_keys: bool
) -> tuple[LayerTensors, ...]:
    dtype = torch_type(layout.dtype)
    heads = (blocks, group.kv_heads)

    def tokens_of(size: int, transposed: bool) -> torch.Tensor:
        if transposed:
            return torch.empty((*heads, size, layout.block_size), dtype=dtype, device=device).transpose(2, 3)
        return torch.empty((*heads, layout.block_size, size), dtype=dtype, device=device)

    try:
        return tuple(
            (tokens_of(group.key_size, transposed_keys), tokens_of(group.value_size, False))
            for _ in range(group.layers)
        )
    except RuntimeError as error:  # torch has no type of its own for a refusal by the host's allocator
        needed = blocks * layout.block_size * group.values_per_token() * dtype.itemsize
        raise OutOfDeviceMemory(
            f"{blocks} cache blocks of group '{group.name}' take {needed / 2**30:.1f} GiB, which the system refuses: "
            f"{error}",
            remedy="Ask for a smaller cache with --kv-cache-memory-bytes.",
        ) from error
