"""The simulated device.

With numerics it is the reference device on arrays, kernels and a cache of its own; without, it
counts what would be there. Time comes from a data sheet where the device has one. Knows no request.

Invariants: memory that is reported as used is what open programs and caches occupy; ``close`` ends
every wait, from whatever thread it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from midspan.errors import MidspanError, OutOfDeviceMemory, SettingsError
from midspan.interface.batch import Batch
from midspan.interface.cache import CacheLayout
from midspan.interface.collectives import DeviceGroup
from midspan.interface.device import Bounds, DeviceInfo, MemoryReport
from midspan.interface.graph import Graph, Weight
from midspan.interface.program import Program
from midspan.interface.weights import DENSE, PackedTensor, WeightSource
from midspan.runtimes.reference import ReferenceDevice
from midspan_simulated.array_space import ArraySpace
from midspan_simulated.cache import SimulatedCache
from midspan_simulated.claims import claims
from midspan_simulated.collectives import TimedCollectives
from midspan_simulated.data_sheet_table import DATA_SHEETS
from midspan_simulated.fault_injector import FaultInjector
from midspan_simulated.kernels import device_kernels
from midspan_simulated.node_work import graph_work
from midspan_simulated.options import SimulatedOptions, refuse_sheet_options
from midspan_simulated.planned_memory import activation_bytes, cache_block_bytes, weights_bytes
from midspan_simulated.planned_program import PlannedProgram
from midspan_simulated.program import SimulatedProgram
from midspan_simulated.ring import Ring
from midspan_simulated.roofline import rates_of, shape_of, step_seconds
from midspan_simulated.step_queue import StepQueue
from midspan_simulated.stored_weights import stored_bytes


class SimulatedDevice:
    """Implements ``interface.device.GroupDevice``.

    Args:
        info: from the probe; ``simulated:NAME`` has the data sheet NAME.
        options: of the device.

    Raises:
        SettingsError: options that this device cannot have.
    """

    def __init__(self, info: DeviceInfo, options: SimulatedOptions) -> None:
        _, _, name = info.id.partition(":")
        self._sheet = DATA_SHEETS[name] if name else None
        if self._sheet is None:
            refuse_sheet_options(options, info.id)
        elif self._sheet.link_bandwidth is None and max(options.devices, options.world_size) > 1:
            raise SettingsError(
                f"No link of {self._sheet.product} to others is published, so a group of them cannot be modelled.",
                remedy="Take one device, or another data sheet.",
            )
        self._options = options
        self.capabilities = claims(options, self._sheet)
        self.info = replace(info, memory_bytes=(options.memory or info.memory_bytes) * options.devices)
        self._faults = FaultInjector(info.id, options.fault, options.fault_once)
        self._queue = StepQueue(asynchronous=options.asynchronous)
        self._space = ArraySpace(info.id)
        self._groups: list[TimedCollectives] = []
        self._programs: list[PlannedProgram] = []
        self._caches: list[SimulatedCache] = []
        self._inner = ReferenceDevice(
            self.info,
            capabilities=self.capabilities,
            kernels=device_kernels(
                self._space,
                quantizations=options.quantizations,
                refused=options.refuse,
                corrupt_linear=self._faults.corrupts_kernels(),
            ),
            arrays=self._space.library(),
            make_cache=self._make_cache,
        )

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> SimulatedProgram:
        """Turn a graph into a program; without numerics no weight is asked for."""
        self._faults.before_compile(graph)
        stored = stored_bytes(graph, bounds.dtype, self._options.weights)
        program: Program
        if self._options.numerics:
            source = _PackedSizes(weights)
            program = self._inner.compile(graph, source, bounds)
            stored |= source.packed
        else:
            program = self._plan(graph, stored, bounds)
        return SimulatedProgram(
            program,
            vocab_size=graph.vocab_size,
            queue=self._queue,
            faults=self._faults,
            clock=self._clock(graph, stored, bounds),
        )

    def allocate_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> SimulatedCache:
        """Allocate blocks; each takes the host's memory when it is first written, and the device's at once."""
        self._faults.before_allocation()
        if self._options.numerics:
            cache = self._inner.allocate_cache(layout, blocks)
            if not isinstance(cache, SimulatedCache):
                raise MidspanError("The runtime made a cache that is not this device's.")
            return cache
        self._check_layout(layout)
        wanted = sum(count * size for count, size in zip(blocks, self.block_bytes(layout), strict=True))
        self._require_room(wanted, "A cache")
        planned = self._make_cache(layout, blocks)
        self._caches.append(planned)
        return planned

    def block_bytes(self, layout: CacheLayout) -> tuple[int, ...]:
        """Bytes of a block of each group, on all devices that share it."""
        return cache_block_bytes(layout, self._options.devices)

    def memory(self) -> MemoryReport:
        """Memory of the device, or of all that it plans for."""
        if self._options.numerics:
            return self._inner.memory()
        used = sum(program.memory_bytes() for program in self._programs)
        used += sum(cache.memory_bytes() for cache in self._caches)
        total = self.info.memory_bytes
        return MemoryReport(total_bytes=total, free_bytes=max(total - used, 0), used_bytes=used)

    def synchronize(self) -> None:
        """Run all steps that were started."""
        self._queue.finish()

    def join(self, group: DeviceGroup) -> TimedCollectives:
        """Form a group over the host's sockets; its time is that of the data sheet's links.

        Raises:
            SettingsError: the group is larger than ``world_size``.
            DeviceLost: the others did not come in time.
        """
        ring = None
        if self._sheet is not None and self._sheet.link_bandwidth is not None:
            bandwidth = self._sheet.link_bandwidth * self._options.bandwidth_efficiency
            ring = Ring(devices=group.world_size, bandwidth=bandwidth)
        collectives = TimedCollectives(self._inner.join(group), ring)
        self._groups.append(collectives)
        return collectives

    def close(self) -> None:
        """Let go of everything, and of whoever waits for a step that hangs."""
        self._faults.release()
        self._queue.close()
        for program in self._programs:
            program.close()
        for cache in self._caches:
            cache.close()
        self._programs, self._caches, self._groups = [], [], []
        self._inner.close()

    def _plan(self, graph: Graph, stored: dict[str, int], bounds: Bounds) -> PlannedProgram:
        if bounds.kernels:
            raise SettingsError(
                f"A kernel was asked for, and device '{self.info.id}' computes nothing with numerics=off.",
                remedy="Leave the kernel choice or the option out.",
            )
        self._check_layout(
            CacheLayout(groups=graph.cache, block_size=bounds.block_size, dtype=bounds.cache_dtype), bounds.dtype
        )
        devices = self._options.devices
        wanted = weights_bytes(graph, stored, devices) + activation_bytes(graph, bounds, devices)
        self._require_room(wanted, f"The model {graph.name}" if graph.name else "The model")
        program = PlannedProgram(graph, device_id=self.info.id, memory_bytes=wanted)
        self._programs.append(program)
        return program

    def _clock(self, graph: Graph, stored: dict[str, int], bounds: Bounds) -> Callable[[Batch], float] | None:
        if self._sheet is None:
            return None
        options = self._options
        work = graph_work(graph, stored, dtype=bounds.dtype, cache_dtype=bounds.cache_dtype, devices=options.devices)
        rates = rates_of(
            self._sheet,
            bounds.dtype,
            devices=options.devices,
            compute_efficiency=options.compute_efficiency,
            bandwidth_efficiency=options.bandwidth_efficiency,
            captures_graphs=options.captures_graphs,
        )

        def seconds(batch: Batch) -> float:
            exchanged = sum(group.take_seconds() for group in self._groups)
            return step_seconds(work, rates, shape_of(batch)) + exchanged

        return seconds

    def _make_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> SimulatedCache:
        return SimulatedCache(
            layout,
            blocks,
            block_bytes=self.block_bytes(layout),
            holds_data=self._options.numerics,
            before_access=self._queue.finish,
        )

    def _check_layout(self, layout: CacheLayout, dtype: str | None = None) -> None:
        asked = (
            ("dtype", dtype or self.capabilities.dtypes[0], self.capabilities.dtypes),
            ("cache_dtype", layout.dtype, self.capabilities.cache_dtypes),
            ("block_size", layout.block_size, self.capabilities.block_sizes),
        )
        for name, value, claimed in asked:
            if value not in claimed:
                raise SettingsError(
                    f"The device '{self.info.id}' has no {name} '{value}'.",
                    remedy=f"Take {', '.join(str(item) for item in claimed)}.",
                )

    def _require_room(self, wanted: int, what: str) -> None:
        free = self.memory().free_bytes
        if wanted > free:
            raise OutOfDeviceMemory(
                f"{what} takes {wanted / 1e9:.1f} GB, and device '{self.info.id}' has {free / 1e9:.1f} GB free.",
                remedy="Plan for more devices (devices=N), smaller weights (weights=int4), or another accelerator.",
            )


class _PackedSizes:
    """A weight source that remembers how large what stayed packed is."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.packed: dict[str, int] = {}

    def load(self, weight: Weight) -> PackedTensor:
        tensor = self._source.load(weight)
        if tensor.format != DENSE:
            self.packed[weight.name] = tensor.nbytes()
        return tensor
