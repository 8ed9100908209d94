"""A device with an array type, a cache and one kernel of its own; the definitions serve the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from midspan.conformance.operation_case import OperationCase
from midspan.conformance.operation_cases import operation_cases
from midspan.conformance.operation_check import disagreement
from midspan.errors import OutOfDeviceMemory
from midspan.interface import Bounds, CacheLayout, Capabilities, DeviceInfo, Kernel, KernelSite
from midspan.runtimes.reference import ArrayLibrary, ReferenceCache, ReferenceDevice

INFO = DeviceInfo(id="tiny", description="a device of its own", memory_bytes=64 * 2**20)


class Tile:
    """An array that numpy cannot read."""

    __array__ = None

    def __init__(self, content: NDArray[Any]) -> None:
        self.content = content.copy()


ARRAYS = ArrayLibrary(to_device=Tile, to_host=lambda tile: tile.content)


class BackwardCache:
    """Keeps its blocks from the last to the first, and only the interface's methods."""

    def __init__(self, layout: CacheLayout, blocks: tuple[int, ...]) -> None:
        self.layout, self.blocks = layout, blocks
        self._inner = ReferenceCache(layout, blocks)

    def _turned(self, blocks: Sequence[int]) -> list[int]:
        return [self.blocks[0] - 1 - block for block in blocks]

    def read(self, group: str, blocks: Sequence[int]) -> NDArray[np.float32]:
        return self._inner.read(group, self._turned(blocks))

    def write(self, group: str, blocks: Sequence[int], data: NDArray[np.float32]) -> None:
        self._inner.write(group, self._turned(blocks), data)

    def copy(self, group: str, pairs: Sequence[tuple[int, int]]) -> None:
        self._inner.copy(group, [tuple(self._turned(pair)) for pair in pairs])  # type: ignore[misc]

    def memory_bytes(self) -> int:
        return self._inner.memory_bytes()

    def close(self) -> None:
        self._inner.close()


def _add(site: KernelSite) -> Any:
    def run(a: Tile, b: Tile) -> Tile:
        return Tile(a.content + b.content)

    return run


def _device(capabilities: Capabilities) -> ReferenceDevice:
    kernels = [Kernel(name="tiles", op="add", prepare=_add, priority=1)]
    return ReferenceDevice(INFO, capabilities=capabilities, kernels=kernels, arrays=ARRAYS, make_cache=BackwardCache)


def _bounds(dtype: str, block_size: int) -> Bounds:
    return Bounds(
        max_tokens=512,
        max_requests=64,
        max_context=1024,
        max_sampled_rows=64,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=dtype,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", operation_cases(block_size=12), ids=str)
def test_every_operation_is_served_by_the_kernel_or_by_its_definition(case: OperationCase, dtype: str) -> None:
    device = _device(Capabilities(dtypes=(dtype,), cache_dtypes=(dtype,), block_sizes=(12,)))
    graph = case.graph()
    program = device.compile(graph, case, _bounds(dtype, 12))
    (placed,) = program.placement.nodes
    assert (placed.kernel, placed.fallback) == (("tiles", False) if case.op == "add" else ("numpy", True))
    cache = after = None
    if case.cache is not None:
        cache = device.allocate_cache(case.cache.layout(dtype), (case.cache.blocks,))
        cache.write("full", range(case.cache.blocks), case.cache.data)
    outputs = program.evaluate(dict(zip(graph.inputs, case.inputs, strict=True)), cache)
    if cache is not None:
        after = cache.read("full", range(cache.blocks[0]))
    assert disagreement(case, dtype, dtype, list(outputs), after) is None
    device.close()


def test_memory_of_its_own_is_counted_and_runs_out() -> None:
    device = _device(Capabilities(block_sizes=(12,)))
    case = next(case for case in operation_cases(block_size=12) if case.cache is not None)
    assert case.cache is not None
    layout = case.cache.layout("float32")
    cache = device.allocate_cache(layout, (100,))
    memory = device.memory()
    assert memory.used_bytes == cache.memory_bytes() == 100 * device.block_bytes(layout)[0]
    assert memory.free_bytes == INFO.memory_bytes - memory.used_bytes
    with pytest.raises(OutOfDeviceMemory, match="does not fit"):
        device.allocate_cache(layout, (10**6,))
    device.close()
    assert device.memory().used_bytes == 0
