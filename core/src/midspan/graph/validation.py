"""Checks that a graph keeps the rules of the graph language.

Run on what a builder made, after each pass and on what came from a file. Knows
the signatures of operations and nothing about what they compute.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from midspan.errors import GraphError
from midspan.graph.inference import infer_outputs, input_values
from midspan.interface.graph import Attribute, Graph, Node, Value


def validate(graph: Graph) -> None:
    """Check every rule of ``interface.graph``.

    Raises:
        GraphError: the first broken rule; its ``node`` names the node at fault, if one is.
    """
    _check_sizes(graph)
    known = _check_inputs(graph)
    _check_unique((node.name for node in graph.nodes), "node")
    used_weights: set[str] = set()
    for node in graph.nodes:
        _check_attributes(node)
        _check_cache(graph, node)
        for value in infer_outputs(node, known, graph.weights):
            _check_output(graph, node, value, known)
            known[value.name] = value
        used_weights.update(node.weights.values())
    _check_leftovers(graph, known, used_weights)


def _check_sizes(graph: Graph) -> None:
    for name in ("vocab_size", "hidden_size", "max_position"):
        if getattr(graph, name) < 1:
            raise GraphError(f"{name} must be at least 1, not {getattr(graph, name)}")
    _check_unique((group.name for group in graph.cache), "cache group")
    for name, weight in graph.weights.items():
        if weight.name != name:
            raise GraphError(f"weight '{weight.name}' is listed as '{name}'")
        if not weight.shape or any(not isinstance(size, int) or size < 1 for size in weight.shape):
            raise GraphError(f"weight '{name}' has the shape {weight.shape}; all sizes must be at least 1")
        _check_unique(weight.sources, f"source of weight '{name}':")


def _check_inputs(graph: Graph) -> dict[str, Value]:
    expected = input_values(graph.cache)
    names = tuple(value.name for value in expected)
    if graph.inputs != names:
        raise GraphError(f"inputs are {graph.inputs}, the cache groups ask for {names}")
    for value in expected:
        if graph.values.get(value.name) != value:
            raise GraphError(f"graph input '{value.name}' must be {value.dtype} {value.shape}")
    return {value.name: value for value in expected}


def _check_attributes(node: Node) -> None:
    for name, attribute in node.attributes.items():
        if not _is_plain(attribute):
            raise GraphError(
                f"attribute '{name}' has the value {attribute!r}, which no graph can carry", node=node.name
            )


def _is_plain(attribute: Attribute) -> bool:
    items = attribute if isinstance(attribute, tuple) else (attribute,)
    if isinstance(attribute, tuple) and any(item is None or isinstance(item, (bool, tuple)) for item in attribute):
        return False
    return all(
        item is None or isinstance(item, (bool, int, str)) or (isinstance(item, float) and math.isfinite(item))
        for item in items
    )


def _check_cache(graph: Graph, node: Node) -> None:
    if node.op != "attention" or "group" not in node.attributes:
        return
    attributes = node.attributes
    group = next((group for group in graph.cache if group.name == attributes["group"]), None)
    if group is None:
        known = ", ".join(group.name for group in graph.cache) or "none"
        raise GraphError(f"cache group '{attributes['group']}' does not exist (there are: {known})", node=node.name)
    layer = attributes.get("layer")
    if not isinstance(layer, int) or not 0 <= layer < group.layers:
        raise GraphError(f"layer {layer} is outside of group '{group.name}' with {group.layers} layers", node=node.name)
    for name in ("kv_heads", "key_size", "value_size", "window"):
        if attributes.get(name) != getattr(group, name):
            raise GraphError(
                f"{name} is {attributes.get(name)}, the cache group '{group.name}' has {getattr(group, name)}",
                node=node.name,
            )
    tables = (f"block_tables.{group.name}", f"slots.{group.name}")
    if node.inputs[-2:] != tables:
        raise GraphError(f"reads {node.inputs[-2:]}, its cache group asks for {tables}", node=node.name)


def _check_output(graph: Graph, node: Node, value: Value, known: dict[str, Value]) -> None:
    if value.name in known:
        raise GraphError(f"value '{value.name}' is produced twice", node=node.name)
    stated = graph.values.get(value.name)
    if stated is None:
        raise GraphError(f"output '{value.name}' is not among the graph's values", node=node.name)
    if stated != value:
        raise GraphError(
            f"output '{value.name}' is stated as {stated.dtype} {stated.shape}, "
            f"the operation gives {value.dtype} {value.shape}",
            node=node.name,
        )


def _check_leftovers(graph: Graph, known: dict[str, Value], used_weights: set[str]) -> None:
    for name in graph.outputs:
        if name not in known:
            raise GraphError(f"graph output '{name}' is produced by no node")
    for name in graph.values:
        if name not in known:
            raise GraphError(f"value '{name}' is produced by no node")
    for name in graph.weights:
        if name not in used_weights:
            raise GraphError(f"weight '{name}' is used by no node")
    layers = Counter(
        (node.attributes["group"], node.attributes["layer"]) for node in graph.nodes if node.op == "attention"
    )
    for (group, layer), count in layers.items():
        if count > 1:
            raise GraphError(f"layer {layer} of cache group '{group}' is written by {count} attention nodes")


def _check_unique(names: Iterable[str], kind: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise GraphError(f"{kind} '{name}' occurs {count} times")
