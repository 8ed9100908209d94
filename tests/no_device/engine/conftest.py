"""Engines of the tiny model on the reference device, or on a device that misbehaves as a test asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice, load_plugins
from midspan.engine.llm import LLM
from midspan.interface import (
    Batch,
    Bounds,
    Cache,
    CacheLayout,
    Device,
    DevicePlugin,
    Found,
    Graph,
    MemoryReport,
    Program,
    StepOutput,
    WeightSource,
)
from midspan.interface.version import INTERFACE_VERSION
from midspan.runtimes.reference.device import PLUGIN as REFERENCE

BLOCK_SIZE = 4
BLOCK_BYTES = 1024
"""Of the tiny model: 2 layers, 2 heads, keys and values of 8 float32 each, 4 tokens."""

Run = Callable[[Batch, Cache, Program], StepOutput]
MakeLLM = Callable[..., LLM]


@pytest.fixture
def make_llm(tiny_model: Path, reference_only: DeviceCatalogue) -> Iterator[MakeLLM]:
    """``make_llm(blocks=4000, **settings)``: the tiny model, with so many cache blocks of four tokens."""
    made: list[LLM] = []

    def make(*, blocks: int = 4000, model: Path = tiny_model, **settings: Any) -> LLM:
        chosen = {"catalogue": reference_only, "block_size": BLOCK_SIZE, **settings}
        llm = LLM(str(model), kv_cache_memory_bytes=blocks * BLOCK_BYTES, **chosen)
        made.append(llm)
        return llm

    yield make
    for llm in made:
        llm.close()


class WrappedProgram:
    """The reference's program, its runs passed through a function of the test."""

    def __init__(self, program: Program, run: Run) -> None:
        self._program = program
        self._run = run
        self.placement = program.placement

    def run(self, batch: Batch, cache: Cache) -> StepOutput:
        return self._run(batch, cache, self._program)

    def evaluate(self, inputs: Any, cache: Cache | None = None) -> tuple[Any, ...]:
        return self._program.evaluate(inputs, cache)

    def memory_bytes(self) -> int:
        return self._program.memory_bytes()

    def close(self) -> None:
        self._program.close()


class WrappedDevice:
    """A device of its own that computes on the reference."""

    def __init__(self, device: Device, run: Run) -> None:
        self._device = device
        self._run = run
        self.info = device.info
        self.capabilities = dataclasses.replace(device.capabilities, max_world_size=1)  # it joins no group

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> Program:
        return WrappedProgram(self._device.compile(graph, weights, bounds), self._run)

    def allocate_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> Cache:
        return self._device.allocate_cache(layout, blocks)

    def block_bytes(self, layout: CacheLayout) -> tuple[int, ...]:
        return self._device.block_bytes(layout)

    def memory(self) -> MemoryReport:
        return self._device.memory()

    def synchronize(self) -> None:
        self._device.synchronize()

    def close(self) -> None:
        self._device.close()


@pytest.fixture
def wrapping() -> Callable[[Run], DeviceCatalogue]:
    """``wrapping(run)``: a catalogue whose only device runs every batch through ``run(batch, cache, program)``."""

    def catalogue(run: Run) -> DeviceCatalogue:
        found = REFERENCE.probe()
        assert isinstance(found, Found)
        info = dataclasses.replace(found.devices[0], id="wrapped")
        plugin = DevicePlugin(
            name="wrapped",
            interface=INTERFACE_VERSION,
            probe=lambda: Found((info,)),
            open=lambda info, options: WrappedDevice(REFERENCE.open(info, options), run),
        )
        discovered = DiscoveredDevice(plugin=plugin, distribution="tests", version="1", probe=plugin.probe())
        return DeviceCatalogue(plugins={"wrapped": discovered}, failures=(), registry=load_plugins([]))

    return catalogue
