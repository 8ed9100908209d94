"""A device that implements the whole interface by itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from midspan.errors import OutOfDeviceMemory, SettingsError, UnsupportedOperation
from midspan.interface import (
    Bounds,
    CacheLayout,
    Capabilities,
    DeviceInfo,
    Graph,
    MemoryReport,
    Weight,
    WeightSource,
    block_bytes,
)
from midspan_frozen_0_9.whole_cache import WholeCache
from midspan_frozen_0_9.whole_operations import FUNCTIONS, OPERATIONS
from midspan_frozen_0_9.whole_program import WholeProgram

CAPABILITIES = Capabilities(block_sizes=(16, 12), batch_invariant=True, deterministic=True)


class WholeDevice:
    """An opened device.

    Args:
        info: from the probe.
    """

    def __init__(self, info: DeviceInfo) -> None:
        self.info = info
        self.capabilities = CAPABILITIES
        self._programs: list[WholeProgram] = []
        self._caches: list[WholeCache] = []

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> WholeProgram:
        """Check every node, and bring the weights here."""
        self._require_claimed(bounds.dtype, bounds.cache_dtype, bounds.block_size)
        for op, kernel in bounds.kernels.items():
            if kernel != "frozen":
                raise SettingsError(f"There is no kernel '{kernel}' for '{op}' here.", remedy="Take 'frozen'.")
        for node in graph.nodes:
            function = node.attributes.get("function")
            if node.op not in OPERATIONS or (function is not None and function not in FUNCTIONS):
                reason = f"frozen: it knows no '{node.op}' of this kind"
                raise UnsupportedOperation(
                    f"The device '{self.info.id}' cannot run node '{node.name}': {reason}.",
                    node=node.name,
                    reasons=(reason,),
                    remedy="Take another device.",
                )
        content = {name: _content(weight, weights) for name, weight in graph.weights.items()}
        working = _working_bytes(graph, bounds)
        self._require_room(working + sum(array.nbytes for array in content.values()))
        program = WholeProgram(graph, content, working, self.info.id)
        self._programs.append(program)
        return program

    def allocate_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> WholeCache:
        """Allocate blocks."""
        self._require_claimed("float32", layout.dtype, layout.block_size)
        wanted = zip(blocks, self.block_bytes(layout), strict=True)
        self._require_room(sum(count * size for count, size in wanted))
        cache = WholeCache(layout, blocks)
        self._caches.append(cache)
        return cache

    def block_bytes(self, layout: CacheLayout) -> tuple[int, ...]:
        """Bytes of a block of each group."""
        return tuple(block_bytes(group, layout.block_size, 4) for group in layout.groups)

    def memory(self) -> MemoryReport:
        """Memory of the device, as far as this process took it."""
        used = sum(program.memory_bytes() for program in self._programs)
        used += sum(cache.memory_bytes() for cache in self._caches)
        total = self.info.memory_bytes
        return MemoryReport(total_bytes=total, free_bytes=max(0, total - used), used_bytes=used)

    def synchronize(self) -> None:
        """Every step has finished when it returns."""

    def close(self) -> None:
        """Close programs and caches."""
        for program in self._programs:
            program.close()
        for cache in self._caches:
            cache.close()
        self._programs, self._caches = [], []

    def _require_room(self, wanted: int) -> None:
        if wanted > self.memory().free_bytes:
            raise OutOfDeviceMemory(
                f"{wanted} bytes do not fit into the {self.memory().free_bytes} that '{self.info.id}' has.",
                remedy="Take a smaller model or fewer cache blocks.",
            )

    def _require_claimed(self, dtype: str, cache_dtype: str, block_size: int) -> None:
        claims = self.capabilities
        if dtype not in claims.dtypes or cache_dtype not in claims.cache_dtypes or block_size not in claims.block_sizes:
            raise SettingsError(
                f"The device '{self.info.id}' has no {dtype} with {cache_dtype} blocks of {block_size}.",
                remedy=f"Take float32, and blocks of {' or '.join(map(str, claims.block_sizes))}.",
            )


def _content(weight: Weight, source: WeightSource) -> NDArray[np.float32]:
    return np.ascontiguousarray(source.load(weight).parts["data"].astype(np.float32))


def _working_bytes(graph: Graph, bounds: Bounds) -> int:
    """All values of the largest step, as if none were ever dropped."""
    sizes = {"T": bounds.max_tokens, "B": bounds.max_requests, "B+1": bounds.max_requests + 1}
    sizes.update({"S": bounds.max_sampled_rows, "L": 20})
    blocks = -(-bounds.max_context // bounds.block_size)
    total = 0
    for value in graph.values.values():
        count = 1
        for size in value.shape:
            count *= size if isinstance(size, int) else sizes.get(size, blocks)
        total += 4 * count
    return total
