"""A whole step in few native calls.

Instructions of native operations are put one behind the other into plans, with
their values at fixed places of one piece of memory, and run without coming back
to Python. Nodes that other kernels serve run between them on tensors. Knows no
request, and no operation but ``split``, whose outputs are columns of its input and
cost nothing.

Invariants: a value's place is not given to another while somebody still reads it;
what leaves the step does not share that memory. One step runs at a time; the caller sees to it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch

from midspan.errors import MidspanError
from midspan.interface import Bounds, Graph, Node
from midspan.runtimes.torch.cache import TorchCache
from midspan_cpu.kernels.native_operation import IntegerTable, NativeOperation, Operands
from midspan_cpu.native_interface import OPERATIONS, SAMPLED_ROWS, TOKEN_ROWS, Instruction, Matrix, Step
from midspan_cpu.native_library import NativeLibrary
from midspan_cpu.value_places import Arena, place_values

OPERATION_NAMES = {code: name for name, code in OPERATIONS.items()}

ROWS = {"T": TOKEN_ROWS, "S": SAMPLED_ROWS}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Native:
    """Instructions ``begin`` to ``end`` of the plan."""

    begin: int
    end: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _OnTensors:
    """A node that a function on tensors serves."""

    node: Node
    function: Any


class NativeStep:
    """What a program calls for each step: the graph's inputs and the cache go in, its outputs come out.

    Args:
        graph: whose nodes run.
        functions: what serves each node, native operations and others.
        bounds: the largest step.
        library: runs the plan.
    """

    def __init__(self, graph: Graph, functions: Sequence[Any], bounds: Bounds, library: NativeLibrary) -> None:
        self._graph = graph
        self._library = library
        self._bounds = bounds
        self._inputs = {name: number for number, name in enumerate(graph.inputs)}
        self._caching = [
            function.on_cache
            for function in functions
            if isinstance(function, NativeOperation) and function.on_cache is not None
        ]
        self._functions = functions  # instructions hold addresses of what these keep alive
        native = {
            node.name
            for node, function in zip(graph.nodes, functions, strict=True)
            if isinstance(function, NativeOperation) and self._has_integers(node, function)
        }
        self._arena: Arena = place_values(graph, native, bounds)
        self._places = self._arena.places
        self._placed_inputs = [name for name in graph.inputs if name in self._places]
        self._pieces: list[_Native | _OnTensors] = []
        self._nodes: list[str] = []
        self._instructions = self._assemble(functions, native)
        self._integers = IntegerTable(len(graph.inputs))

    def __call__(self, *inputs: Any) -> tuple[torch.Tensor, ...]:
        """Run a step: the graph's inputs in order, then the cache."""
        return self._run(inputs, None)

    def node_times(self, *inputs: Any) -> dict[str, int]:
        """Run a step as a call does; nanoseconds that each node took, 0 for one that needs no instruction."""
        times = {node.name: 0 for node in self._graph.nodes}
        self._run(inputs, times)
        return times

    def _run(self, inputs: tuple[Any, ...], times: dict[str, int] | None) -> tuple[torch.Tensor, ...]:
        *arguments, cache = inputs
        values: dict[str, Any] = dict(zip(self._inputs, arguments, strict=True))
        step = self._step(values)
        for name in self._placed_inputs:
            self._view(name, step).copy_(values[name])
        for work_on in self._caching:
            work_on(cache)
        for piece in self._pieces:
            if isinstance(piece, _OnTensors):
                spent = self._run_on_tensors(piece, values, step, cache)
                if times is not None:
                    times[piece.node.name] += spent
            elif times is None:
                self._library.run_plan(self._instructions, step, piece.begin, piece.end)
            else:
                found = self._library.time_plan(self._instructions, step, piece.begin, piece.end)
                for name, spent in zip(self._nodes[piece.begin : piece.end], found, strict=True):
                    times[name] += spent
        return tuple(self._result(name, values, step) for name in self._graph.outputs)

    def listing(self) -> str:
        """The plan for people: one line for each instruction, and for each node between."""
        lines = []
        for piece in self._pieces:
            if isinstance(piece, _OnTensors):
                lines.append(f"on tensors: {piece.node.name} ({piece.node.op})")
                continue
            for index in range(piece.begin, piece.end):
                at = self._instructions[index]
                operands = (("x", at.x), ("x2", at.x2), ("y", at.y), ("y2", at.y2))
                places = [f"{role} +{matrix.data - self._arena.address}" for role, matrix in operands if matrix.data]
                lines.append(f"{OPERATION_NAMES[at.op]:<13} {' '.join(places):<44} {self._nodes[index]}")
        return "\n".join(lines)

    def _assemble(self, functions: Sequence[Any], native: set[str]) -> ctypes.Array[Instruction]:
        found: list[Instruction] = []
        begin = 0
        for node, function in zip(self._graph.nodes, functions, strict=True):
            if node.name in native:
                emitted = function.emit(self._operands(node, function))
                found += emitted
                self._nodes += [node.name] * len(emitted)
            elif node.op != "split" or node.inputs[0] not in self._places:
                self._close_piece(begin, len(found))
                begin = len(found)
                self._pieces.append(_OnTensors(node=node, function=function))
        self._close_piece(begin, len(found))
        return (Instruction * len(found))(*found)

    def _close_piece(self, begin: int, end: int) -> None:
        if end > begin:
            self._pieces.append(_Native(begin=begin, end=end))

    def _has_integers(self, node: Node, operation: NativeOperation) -> bool:
        integers = node.inputs[len(node.inputs) - operation.integers :]
        return all(name in self._inputs for name in integers)

    def _operands(self, node: Node, operation: NativeOperation) -> Operands:
        split = len(node.inputs) - operation.integers
        rows = self._graph.values[node.outputs[0]].shape[0]
        return Operands(
            matrices=tuple(self._matrix(name) for name in node.inputs[:split]),
            integers=tuple(self._inputs[name] for name in node.inputs[split:]),
            outputs=tuple(self._matrix(name) for name in node.outputs),
            rows=ROWS[str(rows)],
        )

    def _matrix(self, name: str) -> Matrix:
        place = self._places[name]
        return Matrix(self._arena.address + place.offset, place.stride)

    def _step(self, values: dict[str, Any]) -> Step:
        counts = {"T": 0, "B": 0, "S": 0}
        for name, number in self._inputs.items():
            tensor = values[name]
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.dtype == torch.int32:
                self._integers.put(number, tensor)
            counts[str(self._graph.values[name].shape[0])] = tensor.shape[0]
        tokens, requests, sampled = counts["T"], counts["B"], counts["S"]
        if tokens > self._bounds.max_tokens or sampled > self._bounds.max_sampled_rows:
            raise MidspanError(
                f"A step of {tokens} tokens and {sampled} rows exceeds what the program was compiled for.",
                remedy="Compile it with larger bounds.",
            )
        return Step(
            tokens=tokens,
            requests=requests,
            sampled=sampled,
            integers=self._integers.addresses,
            strides=self._integers.distances,
        )

    def _run_on_tensors(self, piece: _OnTensors, values: dict[str, Any], step: Step, cache: TorchCache | None) -> int:
        """Run one node's function; the nanoseconds that it took."""
        node = piece.node
        arguments = [values[name] if name in values else self._view(name, step) for name in node.inputs]
        if node.op == "attention":
            arguments.append(cache)
        start = perf_counter_ns()
        result = piece.function(*arguments)
        spent = perf_counter_ns() - start
        results = result if isinstance(result, tuple) else (result,)
        for name, tensor in zip(node.outputs, results, strict=True):
            if name in self._places:
                self._view(name, step).copy_(tensor)
            else:
                values[name] = tensor
        return spent

    def _result(self, name: str, values: dict[str, Any], step: Step) -> torch.Tensor:
        tensor: torch.Tensor = values[name] if name in values else self._view(name, step).clone()
        return tensor

    def _view(self, name: str, step: Step) -> torch.Tensor:
        place = self._places[name]
        rows = step.sampled if place.rows == "S" else step.tokens
        return self._arena.view(place, rows)
