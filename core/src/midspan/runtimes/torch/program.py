"""Graphs compiled for a torch device: the runtime and the programs that it makes.

Knows no hardware: which torch device to use and which kernels it has are handed
in. A program knows nothing of requests.

Invariants: a weight is loaded, prepared and dropped node by node, so that a
checkpoint never stands in memory twice; nothing is chosen in a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from midspan.errors import GraphError, MidspanError, OutOfDeviceMemory
from midspan.interface.batch import Batch, SamplingBatch
from midspan.interface.cache import Cache, CacheLayout
from midspan.interface.device import Bounds
from midspan.interface.graph import ACTIVATION, Graph, Node
from midspan.interface.kernel import Kernel, KernelSite, NodePlacement, Placement
from midspan.interface.program import StepResult
from midspan.interface.weights import PackedTensor, WeightSource
from midspan.runtimes.placement import choose_kernels
from midspan.runtimes.reference.sample_outputs import result_of
from midspan.runtimes.torch.cache import TorchCache
from midspan.runtimes.torch.code_generation import CACHE, Instruction, StepCode, generate, live_bytes
from midspan.runtimes.torch.element_types import borrow, copy_in, copy_out, torch_type
from midspan.runtimes.torch.portable import portable_kernels
from midspan.runtimes.torch.preparation import Preparation

KernelTable = Callable[[Preparation], Sequence[Kernel]]
StepFunction = Callable[..., Any]


class BoundStep(Protocol):
    """A whole step as one function of the graph's inputs and the cache; never called by two threads at once."""

    def __call__(self, *inputs: Any) -> tuple[torch.Tensor, ...]:
        """The graph's outputs; they share no memory with the next step's."""
        ...

    def node_times(self, *inputs: Any) -> Mapping[str, int]:
        """Run the step; nanoseconds by node."""
        ...


BindStep = Callable[[Graph, Sequence[StepFunction], Bounds], BoundStep]
"""(graph, what serves each of its nodes, bounds) -> the step."""


def no_kernels(preparation: Preparation) -> Sequence[Kernel]:
    """The table of a device that has no kernels of its own."""
    return ()


@dataclass(frozen=True, kw_only=True)
class TorchRuntime:
    """Compiles graphs for one torch device.

    Attributes:
        device: torch's name of the device, given by the plugin.
        device_id: the device's id, for the placement report.
        kernels: makes the device's kernels for one program.
        widens_products: see ``Preparation``.
        transposed_keys: the device's attention wants the cached keys of a block transposed,
            see ``TorchCache``.
        bind: makes one function of the functions of all nodes; None: the generated code.
    """

    device: str
    device_id: str
    kernels: KernelTable = no_kernels
    widens_products: bool = False
    transposed_keys: bool = False
    bind: BindStep | None = None

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> TorchProgram:
        """Choose a kernel for each node, prepare it with its weights, and generate the step's code.

        Raises:
            UnsupportedOperation: no kernel serves a node, or only a portable one and ``bounds.strict``.
            CheckpointError: from the weight source.
            OutOfDeviceMemory: the weights do not fit.
        """
        preparation = Preparation(device=torch.device(self.device), bounds=bounds, widens_products=self.widens_products)
        table, portable = self.kernels(preparation), portable_kernels(preparation)
        loader = _Loader(graph, weights)
        functions: list[StepFunction] = []
        placed: list[NodePlacement] = []
        for node in graph.nodes:
            content = {name: loader.take(name) for name in node.weights.values()}
            alone = replace(graph, nodes=(node,))
            placement, chosen = choose_kernels(alone, table, portable, content, bounds, self.device_id)
            placed += placement.nodes
            functions.append(_prepare(*chosen[node.name]))
        return TorchProgram(
            graph=graph,
            bounds=bounds,
            preparation=preparation,
            functions=functions,
            placement=Placement(device=self.device_id, nodes=tuple(placed)),
            bind=self.bind,
        )

    def allocate_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> TorchCache:
        """Blocks for each group of the layout.

        Raises:
            OutOfDeviceMemory: they do not fit.
        """
        return TorchCache(layout, blocks, torch.device(self.device), transposed_keys=self.transposed_keys)


class _Loader:
    """Loads each weight when its first node needs it and forgets it after its last."""

    def __init__(self, graph: Graph, source: WeightSource) -> None:
        self._graph = graph
        self._source = source
        self._held: dict[str, PackedTensor] = {}
        self._uses: dict[str, int] = {}
        for node in graph.nodes:
            for name in node.weights.values():
                self._uses[name] = self._uses.get(name, 0) + 1

    def take(self, name: str) -> PackedTensor:
        tensor = self._held.pop(name, None) or self._source.load(self._graph.weights[name])
        self._uses[name] -= 1
        if self._uses[name]:
            self._held[name] = tensor
        return tensor


def _prepare(kernel: Kernel, site: KernelSite) -> StepFunction:
    try:
        with torch.inference_mode():
            return kernel.prepare(site)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfDeviceMemory(
            f"the weights of node '{site.node.name}' do not fit: {error}",
            remedy="Take a smaller model, a smaller --dtype or another device.",
        ) from error


@dataclass(frozen=True, kw_only=True)
class NodeTime:
    """What one node cost.

    Attributes:
        node: its name.
        op: its operation.
        kernel: the kernel that served it.
        nanoseconds: the shortest of the repetitions.
    """

    node: str
    op: str
    kernel: str
    nanoseconds: int


class TorchProgram:
    """Implements ``midspan.interface.program.Program``.

    Attributes:
        placement: which kernel serves each node.
        source: the generated code of a step, exactly as it is run.
    """

    def __init__(
        self,
        *,
        graph: Graph,
        bounds: Bounds,
        preparation: Preparation,
        functions: Sequence[StepFunction],
        placement: Placement,
        bind: BindStep | None = None,
    ) -> None:
        self.placement = placement
        self._graph = graph
        self._preparation = preparation
        self._functions = tuple(functions)
        self._code: StepCode = generate(graph)
        self.source = self._code.source
        self._bound = None if bind is None else bind(graph, functions, bounds)
        self._step: StepFunction = self._bound or _bind(self.source, self._functions)
        self._samples = any(node.op == "sample" and node.outputs == graph.outputs for node in graph.nodes)
        self._working_bytes = _working_bytes(graph, bounds)
        self._running = threading.Lock()

    def run(self, batch: Batch, cache: Cache) -> TorchStepOutput:
        """Execute one step, see ``Program``."""
        if not self._samples:
            raise GraphError("the graph's outputs are not those of a sample node; use evaluate()")
        device = self._preparation.device
        inputs = [_as_input(batch.graph_input(name), device) for name in self._graph.inputs]
        return TorchStepOutput(self._evaluate(inputs, cache), batch.sampling)

    def values(self, batch: Batch, cache: Cache, names: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """Execute one step and return any of the graph's values, for tests and for people who look inside.

        Args:
            batch: the step.
            cache: a cache of the same device.
            names: of values that nodes produce.

        Returns:
            float32 host arrays by name.
        """
        wanted, found = set(names), {}
        for instruction, _, values in self._walk(batch, cache):
            for name in wanted.intersection(instruction.node.outputs):
                place = instruction.node.outputs.index(name)
                found[name] = copy_out(values[instruction.targets[place]])
        return found

    def evaluate(
        self, inputs: Mapping[str, NDArray[Any] | SamplingBatch], cache: Cache | None = None
    ) -> tuple[NDArray[Any], ...]:
        """Execute the graph on any values, see ``Program``."""
        found = self._evaluate([self._given(name, inputs[name]) for name in self._graph.inputs], cache)
        return tuple(copy_out(tensor) if tensor.is_floating_point() else tensor.cpu().numpy() for tensor in found)

    def profile(self, batch: Batch, cache: Cache, *, repeat: int = 5) -> list[NodeTime]:
        """Run a batch node by node and time each.

        Args:
            batch: is run as often as asked; that leaves the cache as one run does.
            cache: the cache.
            repeat: at least 1.

        Returns:
            One entry for each node, in execution order. On a device that works behind the
            host's back the times are those of handing work over.
        """
        turns = [self._times(batch, cache) for _ in range(repeat)]
        return [
            NodeTime(node=placed.node, op=placed.op, kernel=placed.kernel, nanoseconds=min(times))
            for placed, times in zip(self.placement.nodes, zip(*turns, strict=True), strict=True)
        ]

    def _times(self, batch: Batch, cache: Cache) -> list[int]:
        if self._bound is None:
            return [spent for _, spent, _ in self._walk(batch, cache)]
        inputs = [_as_input(batch.graph_input(name), self._preparation.device) for name in self._graph.inputs]
        with self._running, torch.inference_mode():
            times = self._bound.node_times(*inputs, cache)
        return [times[node.name] for node in self._graph.nodes]

    def listing(self) -> str:
        """The generated code with each node's name and kernel, for people."""
        return self._code.listing({placed.node: placed.kernel for placed in self.placement.nodes})

    def memory_bytes(self) -> int:
        """Bytes of weights, and of the largest step's values."""
        return self._preparation.memory_bytes() + self._working_bytes

    def close(self) -> None:
        """Release weights and code, once a step that runs in another thread is over; running afterwards is an error."""
        self._step = _closed  # first, so that a thread that runs step after step lets go of the lock
        with self._running:
            self._functions = ()
            self._bound = None
            self._working_bytes = 0
            self._preparation.clear()

    def _given(self, name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray) and self._graph.values[name].dtype == ACTIVATION:
            return copy_in(value, torch_type(self._preparation.bounds.dtype), self._preparation.device)
        whole = value.copy(order="C") if isinstance(value, np.ndarray) else value  # it may lie in memory anyhow
        return _as_input(whole, self._preparation.device)

    def _walk(self, batch: Batch, cache: Cache) -> Iterator[tuple[Instruction, int, dict[str, Any]]]:
        """Runs a step node by node: each instruction, its nanoseconds, and all values that are alive."""
        values: dict[str, Any] = {CACHE: cache}
        for name, variable in self._code.inputs.items():
            values[variable] = _as_input(batch.graph_input(name), self._preparation.device)
        for instruction, function in zip(self._code.instructions, self._functions, strict=True):
            arguments = [values[name] for name in instruction.arguments]
            with torch.inference_mode():
                start = perf_counter_ns()
                returned = function(*arguments)
                spent = perf_counter_ns() - start
            several = returned if len(instruction.targets) > 1 else (returned,)
            values.update(zip(instruction.targets, several, strict=True))
            yield instruction, spent, values
            for name in instruction.released:
                del values[name]

    def _evaluate(self, inputs: Sequence[Any], cache: Cache | None) -> tuple[torch.Tensor, ...]:
        try:
            with self._running, torch.inference_mode():
                results: tuple[torch.Tensor, ...] = self._step(*inputs, cache)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfDeviceMemory(
                f"a step did not fit: {error}", remedy="Lower --max-num-batched-tokens or --max-num-seqs."
            ) from error
        return results


class TorchStepOutput:
    """Implements ``midspan.interface.program.StepOutput``: tensors that may still be in the making."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], sampling: SamplingBatch) -> None:
        self._tensors = tensors
        self._sampling = sampling
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        """Wait for the tensors and bring them to the host."""
        if self._result is None:
            self._result = result_of([tensor.cpu().numpy() for tensor in self._tensors], self._sampling)
            self._tensors = ()
        return self._result


def _as_input(value: Any, device: torch.device) -> Any:
    return borrow(value, device) if isinstance(value, np.ndarray) else value


def _bind(source: str, functions: tuple[StepFunction, ...]) -> StepFunction:
    namespace: dict[str, Any] = {"__builtins__": {}}
    exec(compile(source, "<generated step>", "exec"), namespace)
    step: StepFunction = namespace["bind"](*functions)
    return step


def _closed(*arguments: Any) -> Any:
    raise MidspanError("The program was closed.")


def _working_bytes(graph: Graph, bounds: Bounds) -> int:
    """Memory of the largest step: values between nodes, and float32 copies of the widest of them within one."""
    sizes = {
        "T": bounds.max_tokens,
        "B": bounds.max_requests,
        "B+1": bounds.max_requests + 1,
        "S": bounds.max_sampled_rows,
        "L": 1,
    }
    element = torch_type(bounds.dtype).itemsize
    widest = max((_columns(graph, node) for node in graph.nodes), default=0)
    return live_bytes(graph, sizes, element) + 2 * 4 * bounds.max_tokens * widest


def _columns(graph: Graph, node: Node) -> int:
    shapes = [graph.values[name].shape for name in (*node.inputs, *node.outputs)]
    return max((shape[-1] for shape in shapes if shape[:1] == ("T",) and isinstance(shape[-1], int)), default=0)
