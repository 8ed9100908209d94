"""Rows of keys or values in a cache type, as torch tensors.

A row is one token's key or value of one kv head; what it becomes in each type
stands in ``interface.cache.CacheLayout``. Float8 numbers are kept as bytes, because
torch indexes those everywhere. In types with scales a block's numbers of one head are
followed by its tokens' scales, so that a kernel finds both in one place:

    [blocks, kv_heads, (size * block_size numbers, block_size scales)]

Knows neither requests nor layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from midspan.interface.cache import CACHE_SCALE_BYTES
from midspan.runtimes.torch.element_types import torch_type

FLOAT8 = "float8_e4m3"
INT8 = "int8"

FLOAT8_LARGEST = 448.0
INT8_LARGEST = 127.0
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedRows:
    """One side of a layer: all keys, or all values.

    Attributes:
        dtype: the cache type.
        memory: what the other tensors are views of; its bytes are the cache's.
        data: numbers [blocks, kv_heads, block_size, size]; float8 as uint8.
        scales: bfloat16 [blocks, kv_heads, block_size], or None.
    """

    dtype: str
    memory: torch.Tensor
    data: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def allocate(
        cls, dtype: str, blocks: int, kv_heads: int, block_size: int, size: int, device: torch.device, transposed: bool
    ) -> CachedRows:
        """Memory for rows, not filled.

        Args:
            dtype: a cache type.
            blocks, kv_heads, block_size, size: the shape.
            device: where.
            transposed: the numbers of a block's head lie in memory as [size, block_size].

        Raises:
            RuntimeError: the allocator refuses.
            SettingsError: there is no such type.
        """
        element = cache_element(dtype)
        scale_bytes = CACHE_SCALE_BYTES.get(dtype, 0)
        numbers = size * block_size
        padding = block_size * scale_bytes // element.itemsize
        memory = torch.empty((blocks, kv_heads, numbers + padding), dtype=element, device=device)
        shape = (size, block_size) if transposed else (block_size, size)
        data = memory[..., :numbers].view(blocks, kv_heads, *shape)
        scales = memory[..., numbers:].view(torch.bfloat16) if scale_bytes else None
        return cls(dtype=dtype, memory=memory, data=data.transpose(2, 3) if transposed else data, scales=scales)

    def put(self, index: Any, rows: torch.Tensor) -> None:
        """Write rows [..., size] over those that an index into [blocks, kv_heads, block_size] names."""
        numbers, scales = _encoded(rows, self.dtype)
        self.data[index] = numbers
        if self.scales is not None and scales is not None:
            self.scales[index] = scales

    def blocks(self, numbers: torch.Tensor) -> torch.Tensor:
        """Some blocks as float32 [count, kv_heads, block_size, size], new; ``numbers`` is int64."""
        chosen = self.data.index_select(0, numbers)
        if self.dtype == FLOAT8:
            return chosen.view(torch.float8_e4m3fn).float()
        if self.scales is None:
            return chosen.float()
        return chosen.float().mul_(self.scales.index_select(0, numbers).float().unsqueeze(-1))

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy whole blocks; all are read before any is written."""
        self.memory[targets] = self.memory[sources]


def cache_element(dtype: str) -> torch.dtype:
    """The torch type that holds the numbers of a cache type.

    Raises:
        SettingsError: there is no such type.
    """
    if dtype == FLOAT8:
        return torch.uint8
    return torch.int8 if dtype == INT8 else torch_type(dtype)


def _encoded(rows: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    if dtype == FLOAT8:
        return rows.float().clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8), None
    if dtype != INT8:
        return rows.to(torch_type(dtype)), None
    wide = rows.float()
    largest = wide.abs().amax(dim=-1)  # not-a-number wherever there is one
    scales = (largest / INT8_LARGEST).to(torch.bfloat16)
    scales = torch.where(scales < SMALLEST_SCALE, torch.zeros_like(scales), scales)
    scales = torch.where(largest.isfinite(), scales, torch.full_like(scales, torch.nan))
    whole = (wide / scales.float().unsqueeze(-1)).round_()
    return whole.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).to(torch.int8), scales
