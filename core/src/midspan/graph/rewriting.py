"""What passes share: who reads a value, and a graph with other nodes.

Knows no operation in particular. Nothing here changes a graph; new ones are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from midspan.graph.inference import infer_outputs
from midspan.interface.graph import Graph, Node, Value, Weight


def readers(graph: Graph) -> dict[str, list[Node]]:
    """For each value the nodes that read it, in execution order; a node that reads it twice stands once."""
    found: dict[str, list[Node]] = {name: [] for name in graph.values}
    for node in graph.nodes:
        for name in dict.fromkeys(node.inputs):
            found[name].append(node)
    return found


def producers(graph: Graph) -> dict[str, Node]:
    """For each value that is no graph input the node that makes it."""
    return {name: node for node in graph.nodes for name in node.outputs}


def weight_users(graph: Graph) -> dict[str, int]:
    """For each weight how many nodes use it."""
    count = dict.fromkeys(graph.weights, 0)
    for node in graph.nodes:
        for name in node.weights.values():
            count[name] += 1
    return count


def with_nodes(graph: Graph, nodes: Iterable[Node], new_weights: Mapping[str, Weight] | None = None) -> Graph:
    """The graph with other nodes: values derived anew, weights that nothing uses dropped.

    Args:
        graph: where inputs, outputs and everything else comes from.
        nodes: in an order in which each value is made before it is read.
        new_weights: weights that the graph does not have yet.

    Raises:
        GraphError: the nodes do not fit together.
    """
    nodes = tuple(nodes)
    weights = {**graph.weights, **(new_weights or {})}
    values: dict[str, Value] = {name: graph.values[name] for name in graph.inputs}
    used: dict[str, Weight] = {}
    for node in nodes:
        values.update({value.name: value for value in infer_outputs(node, values, weights)})
        used.update({name: weights[name] for name in node.weights.values()})
    return replace(graph, nodes=nodes, values=values, weights=used)
