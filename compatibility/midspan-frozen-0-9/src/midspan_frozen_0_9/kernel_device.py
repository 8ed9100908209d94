"""A device that stands on the reference: its own arrays, its own cache, one kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.interface import CacheLayout, Capabilities, DeviceInfo, Kernel, KernelSite, No, Support, Yes
from midspan.runtimes.reference import ArrayLibrary, ReferenceCache, ReferenceDevice

CAPABILITIES = Capabilities(
    dtypes=("float32", "bfloat16"), cache_dtypes=("float32", "bfloat16"), block_sizes=(12, 16), deterministic=True
)


class Slab:
    """An array that nobody but this device can read.

    Args:
        content: copied.
    """

    __array__ = None

    def __init__(self, content: NDArray[Any]) -> None:
        self.content = content.copy()


class MirroredCache:
    """Keeps its blocks in the reverse order.

    Args:
        layout: groups, block size and element type.
        blocks: for each group, the padding block included.
    """

    def __init__(self, layout: CacheLayout, blocks: tuple[int, ...]) -> None:
        self.layout = layout
        self.blocks = blocks
        self._inner = ReferenceCache(layout, blocks)
        self._last = {group.name: count - 1 for group, count in zip(layout.groups, blocks, strict=True)}

    def read(self, group: str, blocks: Sequence[int]) -> NDArray[np.float32]:
        """Blocks in the canonical layout."""
        return self._inner.read(group, [self._last[group] - block for block in blocks])

    def write(self, group: str, blocks: Sequence[int], data: NDArray[np.float32]) -> None:
        """Fill blocks from the canonical layout."""
        self._inner.write(group, [self._last[group] - block for block in blocks], data)

    def copy(self, group: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks."""
        last = self._last[group]
        self._inner.copy(group, [(last - source, last - target) for source, target in pairs])

    def memory_bytes(self) -> int:
        """Bytes of all blocks."""
        return self._inner.memory_bytes()

    def close(self) -> None:
        """Give the memory back."""
        self._inner.close()


def _supports_add(site: KernelSite) -> Support:
    return Yes() if site.dtype == "float32" else No(f"adds float32 only, and this is {site.dtype}")


def _prepare_add(site: KernelSite) -> Callable[..., Any]:
    def add(a: Slab, b: Slab) -> Slab:
        return Slab(a.content + b.content)

    return add


def open_kernel_device(info: DeviceInfo) -> ReferenceDevice:
    """Open the device.

    Args:
        info: from the probe.
    """
    return ReferenceDevice(
        info,
        capabilities=CAPABILITIES,
        kernels=[Kernel(name="slabs", op="add", prepare=_prepare_add, supports=_supports_add, priority=1)],
        arrays=ArrayLibrary(to_device=Slab, to_host=lambda slab: slab.content),
        make_cache=MirroredCache,
    )
