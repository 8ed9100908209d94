"""The host's processor as a device: the torch runtime with this package's kernels.

Knows no request and no model. Importing it imports torch.

Invariants: what was opened through a device is closed with it; the number of
torch's threads is set once, when the device is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch

from midspan.errors import OutOfDeviceMemory, PluginError, SettingsError
from midspan.interface import (
    Bounds,
    CacheLayout,
    Capabilities,
    DeviceInfo,
    Graph,
    MemoryReport,
    WeightSource,
    packed_block_bytes,
)
from midspan.runtimes.torch.cache import TorchCache
from midspan.runtimes.torch.program import TorchProgram, TorchRuntime
from midspan_cpu.capabilities import capabilities
from midspan_cpu.kernels.table import KernelSet
from midspan_cpu.machine import memory_state, usable_cores
from midspan_cpu.native_step import NativeStep
from midspan_cpu.options import CpuOptions
from midspan_cpu.settings import read_cpu_environment


class CpuDevice:
    """Implements ``midspan.interface.Device``.

    Attributes:
        info: from the probe.
        threads: threads that compute together.
    """

    def __init__(self, info: DeviceInfo, options: CpuOptions) -> None:
        self.info = info
        self.threads = options.threads or usable_cores()
        torch.set_num_threads(self.threads)
        environment = read_cpu_environment()
        self._kernels = KernelSet(threads=self.threads, instruction_set=environment.instruction_set)
        self.capabilities: Capabilities = capabilities(native=self._kernels.native is not None)
        self._programs: WeakSet[TorchProgram] = WeakSet()
        self._caches: WeakSet[TorchCache] = WeakSet()
        self._runtime = TorchRuntime(
            device="cpu",
            device_id=info.id,
            kernels=self._kernels.kernels,
            widens_products=not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            transposed_keys=True,
            bind=None if self._kernels.native is None else self._bind,
        )

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> TorchProgram:
        """Turn a graph into a program, see ``Device``."""
        self._check("dtype", bounds.dtype, self.capabilities.dtypes)
        self._check("cache_dtype", bounds.cache_dtype, self.capabilities.cache_dtypes)
        program = self._runtime.compile(graph, weights, bounds)
        self._programs.add(program)
        return program

    def allocate_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> TorchCache:
        """Allocate blocks; pages are taken from the system when they are first written to."""
        self._check("cache_dtype", layout.dtype, self.capabilities.cache_dtypes)
        wanted = sum(count * size for count, size in zip(blocks, self.block_bytes(layout), strict=True))
        total = memory_state().total
        if wanted > total:
            raise OutOfDeviceMemory(
                f"a KV cache of {wanted / 2**30:.1f} GiB does not fit into {total / 2**30:.1f} GiB of memory.",
                remedy="Ask for less with --kv-cache-memory-bytes.",
            )
        cache = self._runtime.allocate_cache(layout, blocks)
        self._caches.add(cache)
        return cache

    def block_bytes(self, layout: CacheLayout) -> tuple[int, ...]:
        """Bytes of a block of each group, without padding; scales included."""
        return packed_block_bytes(layout)

    def memory(self) -> MemoryReport:
        """The host's memory, cut to this process's limits; used: open programs and caches, touched or not."""
        state = memory_state()
        used = sum(program.memory_bytes() for program in self._programs)
        used += sum(cache.memory_bytes() for cache in self._caches)
        return MemoryReport(total_bytes=state.total, free_bytes=state.available, used_bytes=used)

    def synchronize(self) -> None:
        """Nothing to wait for: a step has finished when it returns."""

    def close(self) -> None:
        """Close all programs and caches, and end the kernels' threads."""
        for program in list(self._programs):
            program.close()
        for cache in list(self._caches):
            cache.close()
        self._programs.clear()
        self._caches.clear()
        self._kernels.close()

    def _bind(self, graph: Graph, functions: Sequence[Any], bounds: Bounds) -> NativeStep:
        if self._kernels.native is None:
            raise PluginError("the device was closed.", plugin="cpu")
        return NativeStep(graph, functions, bounds, self._kernels.native)

    def _check(self, setting: str, value: str, claimed: tuple[str, ...]) -> None:
        if value not in claimed:
            raise SettingsError(
                f"device '{self.info.id}' has no {setting} '{value}'.", remedy=f"Take one of {', '.join(claimed)}."
            )
