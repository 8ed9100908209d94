"""Whether an operation leaves its inputs as they are: a second node of the graph reads them too.

Knows cases of one operation, and no device. What the second node computes is checked elsewhere; here
a value that was written to only has to be told from one that was not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.operation_case import OperationCase
from midspan.conformance.operation_run import Setting
from midspan.interface import Device, Graph, Node, Value
from midspan.interface.graph import ACTIVATION

Float32 = NDArray[np.float32]

SHARE = 1.0 / 16.0
"""By which, and by as much of one, twice an input may be off: far more than any type's rounding."""
LARGEST = 64.0
"""Of inputs, so that twice of them is a number in every type."""


def read_roles(case: OperationCase) -> tuple[str, ...]:
    """Inputs of a case that a second node can read: activations with rows, and nothing extreme in them.

    Sampling has none: there the second node is the operation once more.
    """
    graph = case.graph()
    return tuple(
        role
        for role, array in zip(graph.inputs, case.inputs, strict=True)
        if graph.values[role].dtype == ACTIVATION and isinstance(array, np.ndarray) and _is_plain(array)
    )


def _is_plain(array: NDArray[Any]) -> bool:
    """Whether there are numbers in it, and none of them extreme."""
    return array.size > 0 and bool((np.abs(array) <= LARGEST).all())


def changed_inputs(device: Device, case: OperationCase, setting: Setting) -> str | None:
    """Run the operation, and after it what reads the same inputs.

    Args:
        device: runs them.
        case: with ``read_roles``, or of ``sample``.
        setting: how they are compiled.

    Returns:
        Which input was changed, or None.

    Raises:
        UnsupportedOperation: the device refuses the graph.
    """
    graph = case.graph()
    roles = read_roles(case)
    own = len(graph.outputs)
    longer = _with_second(graph) if case.op == "sample" else _with_doubles(graph, roles)
    given = [array.copy() if isinstance(array, np.ndarray) else array for array in case.inputs]
    program = device.compile(longer, case, setting.bounds(device.capabilities, case))
    cache = None
    try:
        if case.cache is not None:
            cache = device.allocate_cache(case.cache.layout(setting.cache_dtype), (case.cache.blocks,))
            cache.write(case.cache.group.name, range(case.cache.blocks), case.cache.data)
        found = program.evaluate(dict(zip(graph.inputs, given, strict=True)), cache)
    finally:
        if cache is not None:
            cache.close()
        program.close()
    if case.op == "sample":
        same = all(np.array_equal(one, two) for one, two in zip(found[:own], found[own:], strict=True))
        return None if same else "a second sampling of the same logits gives something else"
    typed = dict(zip(graph.inputs, case.typed_inputs(setting.dtype), strict=True))
    for role, doubled in zip(roles, found[own:], strict=True):
        wanted = 2.0 * np.asarray(typed[role], np.float32)
        if doubled.shape != wanted.shape or not (np.abs(doubled - wanted) <= SHARE * (np.abs(wanted) + 1.0)).all():
            return f"a node after it finds something else in its input '{role}' than was given"
    return None


def _with_doubles(graph: Graph, roles: tuple[str, ...]) -> Graph:
    """And each of some inputs added to itself."""
    values, nodes = dict(graph.values), list(graph.nodes)
    for role in roles:
        output = f"{role}.doubled"
        values[output] = Value(name=output, shape=graph.values[role].shape, dtype=ACTIVATION)
        nodes.append(Node(name=f"read.{role}", op="add", inputs=(role, role), outputs=(output,)))
    outputs = (*graph.outputs, *(f"{role}.doubled" for role in roles))
    return replace(graph, values=values, nodes=tuple(nodes), outputs=outputs)


def _with_second(graph: Graph) -> Graph:
    """And the same node again."""
    (node,) = graph.nodes
    again = tuple(f"{name}.again" for name in node.outputs)
    values = dict(graph.values)
    for name, copy in zip(node.outputs, again, strict=True):
        values[copy] = replace(graph.values[name], name=copy)
    second = replace(node, name=f"{node.name}.again", outputs=again)
    return replace(graph, values=values, nodes=(node, second), outputs=(*graph.outputs, *again))
