"""A compiled graph: one plan for each bucket that came up, all over the same working memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import GraphError, MidspanError
from midspan.interface import (
    Batch,
    Bounds,
    Cache,
    FinishedStep,
    Graph,
    NodePlacement,
    PackedTensor,
    Placement,
    SamplingBatch,
    StepResult,
)
from midspan.runtimes.reference.sampling import sample
from midspan_lattice.arena import Arena, Region
from midspan_lattice.buckets import Sizes, fill, largest, measure, padded, rounded, shape
from midspan_lattice.cache import LatticeCache
from midspan_lattice.expression import FLOAT
from midspan_lattice.planning import Plan, execute, plan
from midspan_lattice.sampling_outputs import outputs_of
from midspan_lattice.tracing import Split, trace

KERNEL = "lattice"


class LatticeProgram:
    """See ``midspan.interface.Program``.

    Args:
        graph: checked.
        parts: what of it runs on the device.
        content: the weights.
        bounds: sizes of the largest step, and element types.
        arena: where weights and working memory are put.
        device_id: for the placement.
    """

    def __init__(
        self,
        graph: Graph,
        parts: Split,
        content: Mapping[str, PackedTensor],
        *,
        bounds: Bounds,
        arena: Arena,
        device_id: str,
    ) -> None:
        nodes = tuple(NodePlacement(node=n.name, op=n.op, kernel=KERNEL, fallback=False) for n in graph.nodes)
        self.placement = Placement(device=device_id, nodes=nodes)
        self._graph, self._parts, self._bounds, self._arena = graph, parts, bounds, arena
        self._most = largest(graph, bounds)
        self._plans: dict[tuple[tuple[str, int], ...], Plan] = {}
        self._regions: list[Region] = []
        self._work: Region | None = None
        self._weights: dict[str, NDArray[Any]] = {}
        try:
            for name, tensor in content.items():
                self._weights[name] = self._put(tensor)
            self._plan(self._most)
        except BaseException:
            self.close()
            raise

    def run(self, batch: Batch, cache: Cache) -> FinishedStep:
        """Execute one step."""
        if not self._parts.host or self._parts.host[-1].outputs != self._graph.outputs:
            raise GraphError("the graph's outputs are not those of a sample node; use evaluate()")
        found = self._step({name: batch.graph_input(name) for name in self._graph.inputs}, cache)
        logits = found[self._parts.host[-1].inputs[0]]
        return FinishedStep(step_result=sample(logits, batch.sampling))

    def evaluate(
        self, inputs: Mapping[str, NDArray[Any] | SamplingBatch], cache: Cache | None = None
    ) -> tuple[NDArray[Any], ...]:
        """Execute the graph on any values."""
        found: dict[str, Any] = {**inputs, **self._step(inputs, cache)}
        for node in self._parts.host:
            logits, sampling = (found[name] for name in node.inputs)
            result: StepResult = sample(logits, sampling)
            found.update(zip(node.outputs, outputs_of(result), strict=True))
        return tuple(found[name] for name in self._graph.outputs)

    def memory_bytes(self) -> int:
        """Bytes of weights and working memory."""
        work = 0 if self._work is None else self._work.nbytes
        return work + sum(region.nbytes for region in self._regions)

    def close(self) -> None:
        """Give all tiles back."""
        for region in (*self._regions, *([self._work] if self._work else [])):
            self._arena.give_back(region)
        self._regions, self._work, self._weights, self._plans = [], None, {}, {}

    def _put(self, tensor: PackedTensor) -> NDArray[Any]:
        region = self._arena.take(FLOAT.itemsize * int(np.prod(tensor.shape)), f"The weight '{tensor.name}'")
        self._regions.append(region)
        array = self._arena.array(region, 0, tensor.shape, FLOAT)
        array[...] = rounded(tensor.parts["data"].astype(np.float32), self._bounds.dtype)
        return array

    def _plan(self, sizes: Sizes) -> Plan:
        """The plan of a bucket, made when the bucket first comes up; working memory grows to hold it."""
        key = tuple(sorted(sizes.items()))
        if key not in self._plans:
            made = plan(
                trace(self._graph, self._parts, sizes, dtype=self._bounds.dtype, block_size=self._bounds.block_size)
            )
            if self._work is None or made.nbytes > self._work.nbytes:
                old, self._work = self._work, self._arena.take(made.nbytes, "Working memory")
                if old is not None:
                    self._arena.give_back(old)
            self._plans[key] = made
        return self._plans[key]

    def _step(self, inputs: Mapping[str, Any], cache: Cache | None) -> dict[str, NDArray[Any]]:
        """Pad, run, and cut: the fetched values in the step's own sizes."""
        if self._work is None:
            raise MidspanError("The program was closed.")
        sizes = measure(self._graph, inputs)
        made = self._plan(padded(sizes, self._most))
        pages = cache.pages() if isinstance(cache, LatticeCache) else {}
        registers: list[NDArray[Any] | None] = [None] * made.registers
        for place, item in made.leaves.items():
            name = item.leaf
            registers[place] = name if not isinstance(name, str) else self._weights.get(name, pages.get(name))
        for place, (offset, item) in made.buffers.items():
            buffer = self._arena.array(self._work, offset, item.shape, item.dtype)
            registers[place] = buffer
            if item.kind == "input" and isinstance(item.leaf, str):
                fill(buffer, self._graph.values[item.leaf], inputs[item.leaf], self._bounds.dtype)
        execute(made, registers)
        found = {}
        for name, place in zip(self._parts.fetched, made.outputs, strict=True):
            actual, array = shape(self._graph.values[name].shape, sizes), registers[place]
            found[name] = np.array(array)[tuple(slice(0, size) for size in actual)]
        return found
