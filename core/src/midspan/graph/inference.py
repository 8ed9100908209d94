"""Shapes of a node's outputs, and of a graph's inputs.

The one place where a node meets its operation's signature: the builder, the
validation and the passes all ask here. Knows nothing about a node's neighbours
or about order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from midspan.errors import GraphError
from midspan.interface.batch import graph_input_names
from midspan.interface.cache import CacheGroup
from midspan.interface.graph import Dim, Node, Value, Weight
from midspan.interface.operations import OPERATIONS, REQUIRED, Operation

Found = TypeVar("Found", Value, Weight)

SAMPLING = "sampling"
"""Name and dtype of the graph input that carries the step's sampling numbers."""

_INPUT_SHAPES: Mapping[str, tuple[Dim, ...]] = {
    "token_ids": ("T",),
    "positions": ("T",),
    "query_starts": ("B+1",),
    "context_lengths": ("B",),
    "slots": ("T",),
    "rows_to_sample": ("S",),
    SAMPLING: ("S",),
}


def input_value(name: str) -> Value:
    """The value of a graph input by name, see ``interface.batch.graph_input_names``.

    Raises:
        GraphError: a batch has no such field.
    """
    field, _, group = name.partition(".")
    if field == "block_tables":
        return Value(name=name, shape=("B", f"M.{group}"), dtype="int32")
    shape = _INPUT_SHAPES.get(field)
    if shape is None:
        raise GraphError(f"graph input '{name}' is no field of a batch")
    return Value(name=name, shape=shape, dtype=SAMPLING if field == SAMPLING else "int32")


def input_values(groups: tuple[CacheGroup, ...]) -> tuple[Value, ...]:
    """All inputs of a graph with these cache groups, in order."""
    return tuple(input_value(name) for name in graph_input_names(groups))


def operation_of(node: Node) -> Operation:
    """The operation that a node applies.

    Raises:
        GraphError: there is none of that name; the message lists those that exist.
    """
    operation = OPERATIONS.get(node.op)
    if operation is None:
        known = ", ".join(sorted(OPERATIONS))
        raise GraphError(f"operation '{node.op}' does not exist", node=node.name, remedy=f"Known operations: {known}.")
    return operation


def infer_outputs(node: Node, values: Mapping[str, Value], weights: Mapping[str, Weight]) -> tuple[Value, ...]:
    """Check a node against its operation's signature and derive its output values.

    Args:
        node: with all attributes, defaults included.
        values: at least the node's inputs, by name.
        weights: at least the node's weights, by name.

    Returns:
        One value for each of ``node.outputs``.

    Raises:
        GraphError: naming the node, when anything about it does not fit.
    """
    operation = operation_of(node)
    _check_roles(node, operation)
    inputs = [_lookup(values, name, "value", node) for name in node.inputs]
    given = {role: _lookup(weights, name, "weight", node) for role, name in node.weights.items()}
    try:
        shapes = operation.infer(inputs, given, node.attributes)
    except GraphError as error:
        raise GraphError(error.message, node=node.name) from error
    if len(shapes) != len(node.outputs):
        raise GraphError(f"'{node.op}' has {len(shapes)} outputs, the node names {len(node.outputs)}", node=node.name)
    return tuple(
        Value(name=name, shape=tuple(shape), dtype=dtype)
        for name, (shape, dtype) in zip(node.outputs, shapes, strict=True)
    )


def _lookup(table: Mapping[str, Found], name: str, kind: str, node: Node) -> Found:
    found = table.get(name)
    if found is None:
        raise GraphError(f"{kind} '{name}' does not exist or comes later", node=node.name)
    return found


def _check_roles(node: Node, operation: Operation) -> None:
    if len(node.inputs) != len(operation.inputs):
        wanted = ", ".join(operation.inputs)
        raise GraphError(f"'{node.op}' takes ({wanted}), the node gives {len(node.inputs)} inputs", node=node.name)
    _check_names("weight", node.weights, operation.weights, operation.optional_weights, node)
    _check_names("attribute", node.attributes, tuple(operation.attributes), (), node)
    for name, value in node.attributes.items():
        if value == REQUIRED:
            raise GraphError(f"attribute '{name}' was not given", node=node.name)


def _check_names(
    kind: str, given: Mapping[str, object], required: Sequence[str], optional: Sequence[str], node: Node
) -> None:
    missing = [name for name in required if name not in given]
    if missing:
        raise GraphError(f"{kind} '{missing[0]}' of '{node.op}' is missing", node=node.name)
    unknown = [name for name in given if name not in required and name not in optional]
    if unknown:
        raise GraphError(f"'{node.op}' has no {kind} '{unknown[0]}'", node=node.name)
