"""A device: memory, and a compiler from graphs to programs.

That is all that the core needs of hardware. The core has one model runner for
all devices; a device never sees a request.

The core calls a device, its programs and its caches from one thread at a time, not
always the same one. It closes caches and programs before their device. One call may come in
between: ``Device.close`` while another thread runs a step, to end a process; that step finishes
or raises, and later ones raise. A plugin may be asked to open a device while another that it
opened is still in use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from midspan.interface.cache import Cache, CacheLayout
from midspan.interface.capabilities import Capabilities
from midspan.interface.collectives import Collectives, DeviceGroup
from midspan.interface.graph import Graph
from midspan.interface.program import Program
from midspan.interface.weights import WeightSource


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """One device that a probe found.

    Attributes:
        id: what people write after ``--device``: the plugin's name, or ``name:index``.
        description: for people: product and size, in one line without control characters.
        memory_bytes: memory that the device has in all.
        preference: ``--device auto`` takes the highest; the portable fallback has 0 and is taken
            before others that have 0. Other equals are taken by the names of their packages,
            then in the package's own order.
    """

    id: str
    description: str
    memory_bytes: int
    preference: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Memory of a device now, in bytes.

    Attributes:
        total_bytes: all that the device has.
        free_bytes: what can still be taken without harm to others.
        used_bytes: what this process took through this device.
    """

    total_bytes: int
    free_bytes: int
    used_bytes: int


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits that a program is compiled for; a batch never exceeds them.

    Attributes:
        max_tokens: T of a step.
        max_requests: B of a step.
        max_context: tokens of one request.
        max_sampled_rows: S of a step.
        block_size: tokens per cache block.
        dtype: what ``"activation"`` stands for, one of ``Capabilities.dtypes``.
        cache_dtype: one of ``Capabilities.cache_dtypes``.
        kernels: operation -> kernel name that must serve it, where it supports the node.
        strict: a portable fallback is an error.
    """

    max_tokens: int
    max_requests: int
    max_context: int
    max_sampled_rows: int
    block_size: int
    dtype: str
    cache_dtype: str
    kernels: dict[str, str] = field(default_factory=dict)
    strict: bool = False


class Device(Protocol):
    """An opened device."""

    info: DeviceInfo
    """What the probe found and the plugin opened."""

    capabilities: Capabilities
    """What it claims; the same as long as it is open."""

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> Program:
        """Turn a graph into a program, with its weights on the device.

        The core has checked the graph against the rules of ``interface.graph``. It is a whole
        model, or a part of one: conformance compiles graphs of one node, whose inputs are
        not a batch's and which are evaluated and never run.

        Raises:
            UnsupportedOperation: a node that nothing here can execute.
            OutOfDeviceMemory: the weights do not fit.
            CheckpointError: from the weight source.
            SettingsError: the bounds ask for a type or a block size that is not claimed, or
                ``Bounds.kernels`` names an operation or a kernel that there is not; so it is for a
                device that compiles whole graphs and has no table of kernels.
        """
        ...

    def allocate_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> Cache:
        """Allocate blocks for each group of the layout, the padding block included.

        Raises:
            OutOfDeviceMemory: they do not fit.
            SettingsError: the layout's type or block size is not claimed.
        """
        ...

    def block_bytes(self, layout: CacheLayout) -> tuple[int, ...]:
        """Bytes of one block of each group as this device lays it out, its own padding included.

        ``interface.cache.block_bytes`` counts a block without padding.
        """
        ...

    def memory(self) -> MemoryReport:
        """Memory now."""
        ...

    def synchronize(self) -> None:
        """Wait until everything that was started has finished."""
        ...

    def close(self) -> None:
        """Release all; programs and caches of this device are invalid afterwards. May be called again."""
        ...


class GroupDevice(Device, Protocol):
    """A device whose ``Capabilities.max_world_size`` is above 1."""

    def join(self, group: DeviceGroup) -> Collectives:
        """Form a group with other devices, each opened in a process or thread of its own.

        Programs that are compiled afterwards communicate in this group.

        Raises:
            SettingsError: the group is larger than ``max_world_size``.
            DeviceLost: the others did not come in time.
        """
        ...
