"""The KV cache as the core sees it: numbered blocks in groups.

The core counts blocks and hands out their numbers; what a block looks like on
the device is the device's own choice. Data leaves and enters only in the
canonical layout, which is how a request moves between devices.

Block 0 of every group is the padding block: the core never gives it to a
request, tables are padded with it, and a device may write rubbish there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

PADDING_BLOCK = 0
"""The block that belongs to nobody, in every group."""

CACHE_ELEMENT_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1, "int8": 1}
"""Bytes of one key or value number in each cache type that is defined here, see ``CacheLayout``."""

CACHE_SCALE_BYTES: Mapping[str, int] = {"int8": 2}
"""Bytes of the scale that a cache type keeps for each token, kv head and side; types without scales are not named."""


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Layers that keep the same tokens and so share block tables.

    Attributes:
        name: ``"full"``, ``"window.4096"``; part of graph input names.
        layers: number of attention layers in the group; a node's ``layer`` is
            an index below it.
        kv_heads: key/value heads of each layer.
        key_size: width of one key head.
        value_size: width of one value head.
        window: a token sees this many tokens at most, itself included; None means all.
    """

    name: str
    layers: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None = None

    def values_per_token(self) -> int:
        """Numbers kept for one token over all layers of the group."""
        return self.layers * self.kv_heads * (self.key_size + self.value_size)


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """What to allocate.

    Defined element types are ``float32``, ``bfloat16``, ``float16`` and two of 8 bits; a device may
    have others of its own. A *row* is what one token keeps for one kv head: its key, or its value.

    * ``float8_e4m3``: one sign, four exponent and three mantissa bits, no infinity (OCP 8-bit floating
      point, E4M3). A number is rounded to the nearest, ties to even; beyond 448 it becomes 448 of its
      sign; not-a-number stays. No scale.
    * ``int8``: whole numbers q from -127 to 127 and a scale s for each row, which is a bfloat16 number; the
      row is q * s, which float32 holds exactly. When a row x is written, s is max |x| / 127 in float32,
      rounded to bfloat16 to nearest even, and q is x / s in float32, rounded to a whole number, ties to
      even. Where s is below 2^-126 the row is zeros; a row with a number that is not finite becomes
      not-a-number in whole.

    Reading blocks and writing them again, here or on another device, changes nothing in any of them.

    Attributes:
        groups: from the graph.
        block_size: tokens per block, the same in all groups.
        dtype: element type, one of the device's ``cache_dtypes``.
    """

    groups: tuple[CacheGroup, ...]
    block_size: int
    dtype: str


class Cache(Protocol):
    """Blocks on a device. Made by ``Device.allocate_cache``.

    What a slot holds before a token was written to it is anything at all, not-a-numbers
    included: whoever reads a block leaves out the slots beyond a request's context.

    Canonical layout, for reading and writing: ``[layers, 2, blocks, block_size,
    kv_heads, head_size]``, float32, keys at index 0 and values at index 1 of the
    second axis (for groups whose key and value sizes differ, the smaller is padded
    with zeros at its end).

    A group or a block that does not exist is a ``LookupError`` or a ``MidspanError`` in each
    method, block -1 included; so is data of another shape, or a ``ValueError``.
    """

    layout: CacheLayout
    """What was asked for."""

    blocks: tuple[int, ...]
    """Blocks allocated for each group, the padding block included."""

    def read(self, group: str, blocks: Sequence[int]) -> NDArray[np.float32]:
        """Copy blocks to the host in the canonical layout: a new array each time, that is the caller's."""
        ...

    def write(self, group: str, blocks: Sequence[int], data: NDArray[np.float32]) -> None:
        """Fill blocks from the canonical layout."""
        ...

    def copy(self, group: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks on the device, each pair (from, to), all layers; all are read before any is written."""
        ...

    def memory_bytes(self) -> int:
        """Bytes that the cache may come to occupy."""
        ...

    def close(self) -> None:
        """Give the memory back. May be called again; reading afterwards is an error."""
        ...


def block_bytes(group: CacheGroup, block_size: int, element_bytes: int) -> int:
    """Bytes of one block of a group, for a device that adds no padding of its own."""
    return group.values_per_token() * block_size * element_bytes


def packed_block_bytes(layout: CacheLayout) -> tuple[int, ...]:
    """Bytes of one block of each group in a defined cache type, scales included, for a device that adds no padding.

    Raises:
        KeyError: the layout's type is not defined here.
    """
    element, scale = CACHE_ELEMENT_BYTES[layout.dtype], CACHE_SCALE_BYTES.get(layout.dtype, 0)
    return tuple(
        block_bytes(group, layout.block_size, element) + group.layers * group.kv_heads * 2 * layout.block_size * scale
        for group in layout.groups
    )
