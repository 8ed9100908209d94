"""The reference device: numpy on the host, always there, right before fast.

Everything it computes is a definition, so it is what other devices are held
against, and what the core's own tests run on. A new device starts from the same
class: with its own capabilities, arrays and cache, and with as many kernels as it has
by now; the definitions serve the rest. Knows no vendor library.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np

from midspan.errors import OutOfDeviceMemory, SettingsError
from midspan.interface.cache import Cache, CacheLayout, packed_block_bytes
from midspan.interface.capabilities import Capabilities
from midspan.interface.collectives import DeviceGroup
from midspan.interface.device import Bounds, DeviceInfo, MemoryReport
from midspan.interface.graph import Graph
from midspan.interface.kernel import Kernel, Placement
from midspan.interface.plugin import DevicePlugin, Found, Unavailable
from midspan.interface.version import INTERFACE_VERSION
from midspan.interface.weights import PackedTensor, WeightSource
from midspan.runtimes.placement import Choice, choose_kernels
from midspan.runtimes.reference.array_library import HOST_ARRAYS, ArrayLibrary
from midspan.runtimes.reference.cache import ReferenceCache
from midspan.runtimes.reference.cached_rows import CACHE_TYPES, cache_type
from midspan.runtimes.reference.element_types import ELEMENT_TYPES
from midspan.runtimes.reference.kernels import KERNELS
from midspan.runtimes.reference.program import ReferenceProgram, working_bytes
from midspan.weights.array_formats import ARRAY_FORMATS

if TYPE_CHECKING:
    from midspan.runtimes.reference.socket_collectives import SocketCollectives

NAME = "reference"

CAPABILITIES = Capabilities(
    dtypes=tuple(ELEMENT_TYPES),
    cache_dtypes=tuple(CACHE_TYPES),
    block_sizes=(16, 8, 4, 1, 32, 64, 128),
    quantizations=tuple(ARRAY_FORMATS),
    max_world_size=8,
    batch_invariant=True,
    deterministic=True,
    shares_host_memory=True,
)


class ReferenceDevice:
    """Implements ``interface.device.Device`` with the definitions, and with kernels that the caller brings.

    Args:
        info: from the probe.
        capabilities: claims. Where ``shares_host_memory`` is set, memory is the host's;
            elsewhere it is ``info.memory_bytes`` less what was taken through this device.
        kernels: the device's own. ``prepare`` gets the site with weights on the host; the
            function that it returns takes and returns the device's arrays. Nodes that
            none of them serves fall back to the definitions.
        arrays: how arrays cross between host and device.
        make_cache: the device's own cache, made of a layout and block counts; nodes that
            the definition of attention serves read and write it in the canonical layout.
    """

    def __init__(
        self,
        info: DeviceInfo,
        *,
        capabilities: Capabilities = CAPABILITIES,
        kernels: Sequence[Kernel] = (),
        arrays: ArrayLibrary = HOST_ARRAYS,
        make_cache: Callable[[CacheLayout, tuple[int, ...]], Cache] = ReferenceCache,
    ) -> None:
        self.info = info
        self.capabilities = capabilities
        self._kernels = tuple(kernels)
        self._arrays = arrays
        self._make_cache = make_cache
        self._programs: list[ReferenceProgram] = []
        self._caches: list[Cache] = []
        self._groups: list[SocketCollectives] = []

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> ReferenceProgram:
        """Load the graph's weights and prepare each node."""
        self._check_claims(
            dtype=(bounds.dtype, self.capabilities.dtypes),
            cache_dtype=(bounds.cache_dtype, self.capabilities.cache_dtypes),
            block_size=(bounds.block_size, self.capabilities.block_sizes),
        )
        tensors = {name: weights.load(weight) for name, weight in graph.weights.items()}
        placement, chosen = self._place(graph, tensors, bounds)
        weights_bytes = sum(tensor.nbytes() for tensor in tensors.values())
        self._require_room(weights_bytes + working_bytes(graph, bounds), "A program")
        program = ReferenceProgram(
            graph,
            placement,
            chosen,
            own=self._kernels,
            arrays=self._arrays,
            foreign_cache=self._make_cache is not ReferenceCache,
            weights_bytes=weights_bytes,
            bounds=bounds,
        )
        self._programs.append(program)
        return program

    def allocate_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> Cache:
        """Allocate blocks; the reference's own are arrays of zero pages."""
        self._check_claims(
            cache_dtype=(layout.dtype, self.capabilities.cache_dtypes),
            block_size=(layout.block_size, self.capabilities.block_sizes),
        )
        wanted = sum(count * size for count, size in zip(blocks, self.block_bytes(layout), strict=True))
        self._require_room(wanted, "A cache")
        cache = self._make_cache(layout, blocks)
        self._caches.append(cache)
        return cache

    def block_bytes(self, layout: CacheLayout) -> tuple[int, ...]:
        """Bytes of a block of each group, without padding."""
        cache_type(layout.dtype)  # refuses a type that is not defined, and says which are
        return packed_block_bytes(layout)

    def memory(self) -> MemoryReport:
        """Memory of the host or of the device; used: programs and caches that are open."""
        used = sum(program.memory_bytes() for program in self._programs)
        used += sum(cache.memory_bytes() for cache in self._caches)
        if self.capabilities.shares_host_memory:
            total, free = _host_memory()
        else:
            total, free = self.info.memory_bytes, max(self.info.memory_bytes - used, 0)
        return MemoryReport(total_bytes=total, free_bytes=free, used_bytes=used)

    def synchronize(self) -> None:
        """Nothing to wait for: a step has finished when it returns."""

    def join(self, group: DeviceGroup) -> SocketCollectives:
        """Form a group over TCP, see ``GroupDevice``; arrays cross to the host and back.

        Raises:
            SettingsError: the group is larger than is claimed, or its settings cannot be right.
            DeviceLost: the others did not come in time.
        """
        if group.world_size > self.capabilities.max_world_size:
            raise SettingsError(
                f"The device '{self.info.id}' works in groups of {self.capabilities.max_world_size} at most, not of "
                f"{group.world_size}.",
                remedy="Spread the model over fewer devices.",
            )
        from midspan.runtimes.reference.socket_collectives import SocketCollectives  # few devices ever join a group

        collectives = SocketCollectives(group, arrays=self._arrays)
        self._groups.append(collectives)
        return collectives

    def close(self) -> None:
        """Close all programs and caches, and leave all groups."""
        for program in self._programs:
            program.close()
        for cache in self._caches:
            cache.close()
        for group in self._groups:
            group.close()
        self._programs, self._caches, self._groups = [], [], []

    def _place(
        self, graph: Graph, tensors: Mapping[str, PackedTensor], bounds: Bounds
    ) -> tuple[Placement, dict[str, Choice]]:
        return choose_kernels(graph, self._kernels, KERNELS, tensors, bounds, self.info.id)

    def _require_room(self, wanted: int, what: str) -> None:
        memory = self.memory()
        room = memory.total_bytes if self.capabilities.shares_host_memory else memory.free_bytes
        if wanted > room:
            raise OutOfDeviceMemory(
                f"{what} of {wanted} bytes does not fit into the {room} bytes that device '{self.info.id}' has.",
                remedy="Take a smaller model, fewer tokens per step, or fewer cache blocks.",
            )

    def _check_claims(self, **asked: tuple[object, tuple[object, ...]]) -> None:
        for name, (value, claimed) in asked.items():
            if value not in claimed:
                raise SettingsError(
                    f"The device '{self.info.id}' has no {name} '{value}'.",
                    remedy=f"Take {', '.join(str(item) for item in claimed)}.",
                )


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
    return ReferenceDevice(info, kernels=KERNELS)


PLUGIN = DevicePlugin(
    name=NAME,
    interface=INTERFACE_VERSION,
    probe=_probe,
    open=_open,
    description="numpy, the definition of every operation; slow and exact",
)
