"""A graph as text for people: one line a node, with shapes.

Nodes stand under a line that names their scope; inside, a name that begins with
the scope is written without it: ``.self_attn.q_proj``. A weight named for its
node is written by its role alone. Knows no operation in particular. The text is
stable, so two graphs can be compared with a text diff; it is not meant to be read
back, see ``serialization``.
"""

from __future__ import annotations

from midspan.graph.inference import operation_of
from midspan.interface.cache import CacheGroup
from midspan.interface.graph import ACTIVATION, Attribute, Graph, Node, Value, Weight

LONGEST_TUPLE = 4
"""Longer tuples show their first two items, their last one and their length."""


def format_graph(graph: Graph) -> str:
    """The whole graph, ending with a newline."""
    lines = [
        f"graph {graph.name}",
        f"architecture {graph.architecture}, vocabulary {graph.vocab_size}, hidden {graph.hidden_size}, "
        f"positions {graph.max_position}",
        *(_format_group(group) for group in graph.cache),
        *(f"input {_format_value(graph.values[name], '')}" for name in graph.inputs),
    ]
    scope = None
    for node in graph.nodes:
        if node.scope != scope:
            scope = node.scope
            lines.append(f"scope {scope}" if scope else "scope (whole model)")
        lines.append(f"  {format_node(node, graph)}")
    lines.append(f"return {', '.join(graph.outputs)}")
    return "\n".join(lines) + "\n"


def format_node(node: Node, graph: Graph) -> str:
    """One node: results with shapes, operation, inputs, weights, attributes that differ from their defaults."""
    outputs = ", ".join(_format_value(graph.values[name], node.scope) for name in node.outputs)
    inputs = ", ".join(_within(name, node.scope) for name in node.inputs)
    weights = ", ".join(_format_weight(role, graph.weights[name], node) for role, name in node.weights.items())
    defaults = operation_of(node).attributes
    attributes = ", ".join(
        f"{name}={_format_attribute(value)}" for name, value in node.attributes.items() if value != defaults.get(name)
    )
    return f"{outputs} = {node.op}({'; '.join(part for part in (inputs, weights, attributes) if part)})"


def _within(name: str, scope: str) -> str:
    return name[len(scope) :] if scope and name.startswith(f"{scope}.") else name


def _format_group(group: CacheGroup) -> str:
    window = "" if group.window is None else f", window {group.window}"
    return (
        f"cache {group.name}: {group.layers} layers, {group.kv_heads} kv heads, key {group.key_size}, "
        f"value {group.value_size}{window}"
    )


def _format_value(value: Value, scope: str) -> str:
    dtype = "" if value.dtype == ACTIVATION else f" {value.dtype}"
    return f"{_within(value.name, scope)}{dtype} [{', '.join(str(size) for size in value.shape)}]"


def _format_weight(role: str, weight: Weight, node: Node) -> str:
    name = role if weight.name == f"{node.name}.{role}" else f"{role}={_within(weight.name, node.scope)}"
    sources = f" of {len(weight.sources)} tensors" if weight.sources else ""
    return f"{name} [{', '.join(str(size) for size in weight.shape)}]{sources}"


def _format_attribute(value: Attribute) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        items = [_format_attribute(item) for item in value]
        if len(items) > LONGEST_TUPLE:
            return f"({items[0]}, {items[1]}, ... {items[-1]}: {len(items)} items)"
        return f"({', '.join(items)})"
    return str(value)
