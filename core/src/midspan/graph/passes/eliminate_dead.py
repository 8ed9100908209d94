"""Removes nodes whose results nobody reads, and what only they used.

Attention stays: it writes the cache, which later steps read.
"""

from __future__ import annotations

from midspan.graph.rewriting import with_nodes
from midspan.interface.graph import Graph, Node


def eliminate_dead(graph: Graph) -> Graph:
    """The graph without dead nodes, values and weights."""
    wanted = set(graph.outputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if node.op == "attention" or wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return with_nodes(graph, reversed(kept))
