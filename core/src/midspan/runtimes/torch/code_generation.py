"""A graph as straight-line Python: one line for each node, values freed after their last use.

Works on names only and knows no tensor. Names in the generated source are made
here (``v12``, ``k7``) and never taken from a model, so that no published file
can put text into code that is run.

Invariants: each line calls one kernel; a value is deleted in the line after its
last use; graph outputs are returned in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from midspan.interface.graph import Graph, Node

CACHE = "cache"
"""The name of the argument that holds the KV cache."""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One node in the generated code.

    Attributes:
        node: the node.
        kernel: the generated name of its function.
        arguments: generated names of what it is called with.
        targets: generated names of what it returns.
        released: generated names that are not read again.
    """

    node: Node
    kernel: str
    arguments: tuple[str, ...]
    targets: tuple[str, ...]
    released: tuple[str, ...]

    def lines(self) -> tuple[str, ...]:
        """The instruction as Python."""
        call = f"{', '.join(self.targets)} = {self.kernel}({', '.join(self.arguments)})"
        return (call, f"del {', '.join(self.released)}") if self.released else (call,)


@dataclass(frozen=True, kw_only=True)
class StepCode:
    """The code of a whole step.

    Attributes:
        inputs: graph input -> generated name of the argument, in order.
        instructions: in execution order.
        results: generated names of the graph's outputs.
        source: a Python module that defines ``step(kernels) -> function``.
    """

    inputs: Mapping[str, str]
    instructions: tuple[Instruction, ...]
    results: tuple[str, ...]
    source: str

    def listing(self, kernels: Mapping[str, str]) -> str:
        """The step with each node's name and kernel beside its line, for people.

        Args:
            kernels: node name -> name of the kernel that serves it.
        """
        lines = []
        for instruction in self.instructions:
            first, *rest = instruction.lines()
            lines.append(f"{first:<60}  # {instruction.node.name}: {kernels[instruction.node.name]}")
            lines += rest
        return "\n".join(lines)


def generate(graph: Graph) -> StepCode:
    """Straight-line code for a valid graph.

    Args:
        graph: checked by ``midspan.graph.validation``.

    Returns:
        Source whose ``bind`` takes the kernels' functions, in the order of the graph's
        nodes, and returns ``step(inputs..., cache)``.
    """
    names = {value: f"v{number}" for number, value in enumerate(graph.values)}
    inputs = {value: names[value] for value in graph.inputs}
    last_use = _last_uses(graph)
    instructions = []
    for index, node in enumerate(graph.nodes):
        arguments = tuple(names[value] for value in node.inputs)
        touched = dict.fromkeys((*node.inputs, *node.outputs))
        released = (value for value in touched if last_use.get(value, index) == index and value not in graph.outputs)
        instruction = Instruction(
            node=node,
            kernel=f"k{index}",
            arguments=(*arguments, CACHE) if node.op == "attention" else arguments,
            targets=tuple(names[value] for value in node.outputs),
            released=tuple(names[value] for value in released),
        )
        instructions.append(instruction)
    results = tuple(names[value] for value in graph.outputs)
    source = _source(tuple(inputs.values()), tuple(instructions), results)
    return StepCode(inputs=inputs, instructions=tuple(instructions), results=results, source=source)


def live_bytes(graph: Graph, sizes: Mapping[str, int], activation_bytes: int) -> int:
    """Most bytes that a step's values take at one time.

    Args:
        graph: whose values are counted, graph inputs left out.
        sizes: a number for each symbol in the shapes.
        activation_bytes: bytes of one element of the activation type.
    """
    last_use = _last_uses(graph)
    alive: dict[str, int] = {}
    most = 0
    for index, node in enumerate(graph.nodes):
        for name in node.outputs:
            value, count = graph.values[name], 1
            for size in value.shape:
                count *= sizes.get(size, 1) if isinstance(size, str) else size
            alive[name] = count * (activation_bytes if value.dtype == "activation" else 4)
        most = max(most, sum(alive.values()))
        for name in (*node.inputs, *node.outputs):
            if last_use.get(name, index) <= index and name not in graph.outputs:
                alive.pop(name, None)
    return most


def _last_uses(graph: Graph) -> dict[str, int]:
    return {value: index for index, node in enumerate(graph.nodes) for value in node.inputs}


def _source(inputs: tuple[str, ...], instructions: tuple[Instruction, ...], results: tuple[str, ...]) -> str:
    kernels = [instruction.kernel for instruction in instructions]
    lines = [f"def bind({', '.join(kernels)}):"]
    lines.append(f"    def step({', '.join((*inputs, CACHE))}):")
    lines += [f"        {line}" for instruction in instructions for line in instruction.lines()]
    lines.append(f"        return ({', '.join(results)},)")
    lines.append("    return step")
    return "\n".join(lines) + "\n"
