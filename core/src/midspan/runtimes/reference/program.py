"""Runs a graph: prepared functions, called one after the other.

A node is served by the device's own kernel, on the device's arrays, or by the
definition, on numpy's; values cross between them when they are asked for. Knows no
request and no block's owner. Values are dropped after their last use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from midspan.errors import GraphError, MidspanError, OutOfDeviceMemory
from midspan.interface.batch import Batch, SamplingBatch
from midspan.interface.cache import Cache
from midspan.interface.device import Bounds
from midspan.interface.graph import ACTIVATION, Dim, Graph, Value
from midspan.interface.kernel import Kernel, KernelSite, Placement
from midspan.interface.program import FinishedStep, StepOutput
from midspan.runtimes.reference.array_library import ArrayLibrary
from midspan.runtimes.reference.element_types import element_type
from midspan.runtimes.reference.foreign_cache import through_copies
from midspan.runtimes.reference.sample_outputs import result_of
from midspan.runtimes.reference.step_values import StepValues


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One node, ready to run.

    Attributes:
        run: the prepared function.
        node: the node's name.
        inputs, outputs: names of values.
        takes_cache: whether the cache is passed after the inputs.
        on_device: takes and returns the device's arrays, and not numpy's.
        last_used: values that nothing reads afterwards.
    """

    run: Callable[..., Any]
    node: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    takes_cache: bool
    on_device: bool
    last_used: tuple[str, ...]


class ReferenceProgram:
    """A compiled graph, see ``interface.program.Program``.

    Args:
        graph: validated.
        placement: which kernel serves each node.
        chosen: the kernel and the site of each node.
        own: the device's own kernels, which work on its arrays.
        arrays: how values cross.
        foreign_cache: the cache is not the reference's own.
        weights_bytes: bytes that the weights occupy.
        bounds: what it was compiled for.
    """

    def __init__(
        self,
        graph: Graph,
        placement: Placement,
        chosen: Mapping[str, tuple[Kernel, KernelSite]],
        *,
        own: Collection[Kernel],
        arrays: ArrayLibrary,
        foreign_cache: bool,
        weights_bytes: int,
        bounds: Bounds,
    ) -> None:
        self.placement = placement
        self._graph = graph
        self._dtype = element_type(bounds.dtype)
        self._arrays = arrays
        self._steps = _straight_line(graph, chosen, {id(kernel) for kernel in own}, foreign_cache)
        self._samples = any(node.op == "sample" and node.outputs == graph.outputs for node in graph.nodes)
        self._memory_bytes = weights_bytes + working_bytes(graph, bounds)

    def run(self, batch: Batch, cache: Cache) -> StepOutput:
        """Execute one step; finished when it returns."""
        if not self._samples:
            raise GraphError("the graph's outputs are not those of a sample node; use evaluate()")
        found = self.values(batch, cache, self._graph.outputs)
        outputs = [found[name] for name in self._graph.outputs]
        return FinishedStep(step_result=result_of(outputs, batch.sampling))

    def values(self, batch: Batch, cache: Cache, names: Iterable[str]) -> dict[str, Any]:
        """Execute one step and return any of the graph's values, for tests and for people who look inside.

        Args:
            batch: the step.
            cache: a cache of the same device.
            names: of graph values.

        Returns:
            Host arrays by name.
        """
        return self._execute({name: batch.graph_input(name) for name in self._graph.inputs}, cache, set(names))

    def evaluate(
        self, inputs: Mapping[str, NDArray[Any] | SamplingBatch], cache: Cache | None = None
    ) -> tuple[NDArray[Any], ...]:
        """Execute the graph on any values, see ``Program``."""
        typed = {
            name: value.astype(self._dtype)
            if isinstance(value, np.ndarray) and self._graph.values[name].dtype == ACTIVATION
            else value
            for name, value in inputs.items()
        }
        found = self._execute(typed, cache, set(self._graph.outputs))
        return tuple(
            found[name].astype(np.float32) if self._graph.values[name].dtype == ACTIVATION else found[name]
            for name in self._graph.outputs
        )

    def memory_bytes(self) -> int:
        """Bytes of weights, and of values and intermediate results of the largest step."""
        return self._memory_bytes

    def close(self) -> None:
        """Let go of the weights."""
        self._steps = ()
        self._memory_bytes = 0

    def _execute(self, inputs: Mapping[str, Any], cache: Cache | None, wanted: set[str]) -> dict[str, Any]:
        if not self._steps:
            raise MidspanError("The program was closed.")
        values = StepValues(self._arrays)
        for name in self._graph.inputs:
            values.put_on_host(name, inputs[name])
        try:
            with np.errstate(all="ignore"):
                for step in self._steps:
                    _execute(step, values, cache, wanted)
        except MemoryError as error:
            raise OutOfDeviceMemory("A step did not fit into memory.", remedy="Allow fewer tokens per step.") from error
        return {name: values.on_host(name) for name in wanted}


def _straight_line(
    graph: Graph, chosen: Mapping[str, tuple[Kernel, KernelSite]], own: set[int], foreign_cache: bool
) -> tuple[_Step, ...]:
    last = {name: index for index, node in enumerate(graph.nodes) for name in (*node.inputs, *node.outputs)}
    steps = []
    for index, node in enumerate(graph.nodes):
        kernel, site = chosen[node.name]
        names = dict.fromkeys((*node.inputs, *node.outputs))
        on_device = id(kernel) in own
        run = kernel.prepare(site)
        if node.op == "attention" and foreign_cache and not on_device:
            run = through_copies(run, str(node.attributes["group"]), cast("int", node.attributes["layer"]))
        steps.append(
            _Step(
                run=run,
                node=node.name,
                inputs=node.inputs,
                outputs=node.outputs,
                takes_cache=node.op == "attention",
                on_device=on_device,
                last_used=tuple(name for name in names if last[name] == index),
            )
        )
    return tuple(steps)


def _execute(step: _Step, values: StepValues, cache: Cache | None, wanted: set[str]) -> None:
    take, put = (values.on_device, values.put_on_device) if step.on_device else (values.on_host, values.put_on_host)
    arguments = [take(name) for name in step.inputs]
    if step.takes_cache:
        arguments.append(cache)
    result = step.run(*arguments)
    results = (result,) if len(step.outputs) == 1 else result
    for name, value in zip(step.outputs, results, strict=True):
        put(name, value)
    for name in step.last_used:
        if name not in wanted:
            values.drop(name)


def working_bytes(graph: Graph, bounds: Bounds) -> int:
    """Bytes of values that live at the same time in the largest step, at most."""
    sizes = _symbol_sizes(graph, bounds)
    element = element_type(bounds.dtype).itemsize
    last = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    alive: dict[str, int] = {name: _value_bytes(graph.values[name], sizes, element) for name in graph.inputs}
    peak = 0
    for index, node in enumerate(graph.nodes):
        alive.update({name: _value_bytes(graph.values[name], sizes, element) for name in node.outputs})
        wide = [graph.values[name] for name in (*node.inputs, *node.outputs)]
        intermediate = 2 * max(_value_bytes(value, sizes, 4) for value in wide)
        peak = max(peak, sum(alive.values()) + intermediate + _gathered_bytes(node.attributes, bounds))
        for name in [name for name in alive if last.get(name, -1) <= index and name not in graph.outputs]:
            del alive[name]
    return peak


def _gathered_bytes(attributes: Mapping[str, Any], bounds: Bounds) -> int:
    """What attention copies of one request's keys and values."""
    if "kv_heads" not in attributes:
        return 0
    size = int(attributes["key_size"]) + int(attributes["value_size"])
    return 4 * bounds.max_context * int(attributes["kv_heads"]) * size


def _symbol_sizes(graph: Graph, bounds: Bounds) -> dict[str, int]:
    sizes = {
        "T": bounds.max_tokens,
        "B": bounds.max_requests,
        "B+1": bounds.max_requests + 1,
        "S": bounds.max_sampled_rows,
        "L": 20,
    }
    blocks = -(-bounds.max_context // bounds.block_size)
    return {**sizes, **{f"M.{group.name}": blocks for group in graph.cache}}


def _value_bytes(value: Value, sizes: Mapping[str, int], activation_bytes: int) -> int:
    count = 1
    for size in _numbers(value.shape, sizes):
        count *= size
    return count * (activation_bytes if value.dtype == ACTIVATION else 4)


def _numbers(shape: Sequence[Dim], sizes: Mapping[str, int]) -> list[int]:
    return [size if isinstance(size, int) else sizes[size] for size in shape]
