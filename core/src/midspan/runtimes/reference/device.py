"""The reference device: numpy on the host, always there, right before fast.

Everything it computes is a definition, so it is what other devices are held
against, and what the core's own tests run on. Knows no vendor library.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Union

import numpy as np

from midspan.errors import OutOfDeviceMemory, SettingsError
from midspan.graph.validation import validate
from midspan.interface.cache import CacheLayout
from midspan.interface.capabilities import Capabilities
from midspan.interface.collectives import Collectives
from midspan.interface.device import Bounds, DeviceInfo, MemoryReport
from midspan.interface.graph import Graph
from midspan.interface.plugin import DevicePlugin, Found, Unavailable
from midspan.interface.version import INTERFACE_VERSION
from midspan.interface.weights import WeightSource
from midspan.runtimes.placement import choose_kernels
from midspan.runtimes.reference.cache import ReferenceCache
from midspan.runtimes.reference.element_types import ELEMENT_TYPES
from midspan.runtimes.reference.kernels import KERNELS
from midspan.runtimes.reference.program import ReferenceProgram

NAME = "reference"

CAPABILITIES = Capabilities(
    dtypes=tuple(ELEMENT_TYPES),
    cache_dtypes=tuple(ELEMENT_TYPES),
    block_sizes=(16, 8, 4, 1, 32, 64, 128),
    batch_invariant=True,
    deterministic=True,
    shares_host_memory=True,
)


class ReferenceDevice:
    """Numpy on the host; see ``interface.device.Device``."""

    capabilities: Capabilities = CAPABILITIES
    collectives: Collectives | None = None

    def __init__(self, info: DeviceInfo) -> None:
        self.info = info
        self._programs: list[ReferenceProgram] = []
        self._caches: list[ReferenceCache] = []

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> ReferenceProgram:
        """Validate the graph, load its weights and prepare each node."""
        validate(graph)
        _check_bounds(bounds)
        tensors = {name: weights.load(weight) for name, weight in graph.weights.items()}
        placement, chosen = choose_kernels(graph, KERNELS, (), tensors, bounds, self.info.id)
        weights_bytes = sum(tensor.nbytes() for tensor in tensors.values())
        program = ReferenceProgram(graph, placement, chosen, weights_bytes, bounds)
        self._programs.append(program)
        return program

    def allocate_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> ReferenceCache:
        """Allocate arrays of zero pages."""
        element = ELEMENT_TYPES[layout.dtype].itemsize if layout.dtype in ELEMENT_TYPES else 4
        wanted = sum(
            group.values_per_token() * layout.block_size * count * element
            for group, count in zip(layout.groups, blocks, strict=True)
        )
        total = self.memory().total_bytes
        if wanted > total:
            raise OutOfDeviceMemory(
                f"A cache of {wanted} bytes does not fit into {total} bytes of memory.", remedy="Take fewer blocks."
            )
        cache = ReferenceCache(layout, blocks)
        self._caches.append(cache)
        return cache

    def memory(self) -> MemoryReport:
        """The host's memory; used: programs and caches that are open."""
        total, free = _host_memory()
        used = sum(program.memory_bytes() for program in self._programs)
        used += sum(cache.memory_bytes() for cache in self._caches)
        return MemoryReport(total_bytes=total, free_bytes=free, used_bytes=used)

    def synchronize(self) -> None:
        """Nothing to wait for: a step has finished when it returns."""

    def close(self) -> None:
        """Close all programs and caches."""
        for program in self._programs:
            program.close()
        for cache in self._caches:
            cache.close()
        self._programs, self._caches = [], []


def _check_bounds(bounds: Bounds) -> None:
    for name, value, claimed in (
        ("dtype", bounds.dtype, CAPABILITIES.dtypes),
        ("cache_dtype", bounds.cache_dtype, CAPABILITIES.cache_dtypes),
    ):
        if value not in claimed:
            raise SettingsError(f"The reference device has no {name} '{value}'.", remedy=f"Take {', '.join(claimed)}.")


def _host_memory() -> tuple[int, int]:
    """Bytes of memory in all, and those that can still be taken."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return _kilobytes(fields["MemTotal"]), _kilobytes(fields["MemAvailable"])
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    names = os.sysconf_names
    free = page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in names else total // 2
    return total, free


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024


def _probe() -> Union[Found, Unavailable]:
    try:
        total, _ = _host_memory()
    except (OSError, KeyError, ValueError, AttributeError) as error:
        return Unavailable(reason=f"the amount of memory could not be read ({error})", remedy="Run on a POSIX system.")
    description = f"numpy {np.__version__} on {platform.machine() or 'the host'}, {total / 2**30:.0f} GiB"
    return Found((DeviceInfo(id=NAME, description=description, memory_bytes=total, preference=0),))


def _open(info: DeviceInfo, options: Mapping[str, str]) -> ReferenceDevice:
    if options:
        raise SettingsError(
            f"The reference device has no option '{next(iter(options))}'.", remedy="It takes no device options."
        )
    return ReferenceDevice(info)


PLUGIN = DevicePlugin(
    name=NAME,
    interface=INTERFACE_VERSION,
    probe=_probe,
    open=_open,
    description="numpy, the definition of every operation; slow and exact",
)
