"""Fuses the steps of a gated MLP's middle into one operation.

``multiply(activation(gate), up)`` becomes ``gated(gate, up)``, and ``gated`` of the
two halves that a split made becomes ``gated_pair`` of the whole. The first rounds
once where two operations rounded twice (no difference in float32); the second
changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from midspan.graph.passes.eliminate_dead import eliminate_dead
from midspan.graph.rewriting import producers, with_nodes
from midspan.interface.graph import Graph, Node


def fuse_gated(graph: Graph) -> Graph:
    """The graph with gated activations fused; results keep their names."""
    for rewrite in (_gate_of_product, _pair_of_halves):
        made_by = producers(graph)
        graph = with_nodes(graph, [rewrite(node, made_by) for node in graph.nodes])
    return eliminate_dead(graph)


def _gate_of_product(node: Node, made_by: Mapping[str, Node]) -> Node:
    if node.op != "multiply":
        return node
    for gate, up in (node.inputs, node.inputs[::-1]):
        maker = made_by.get(gate)
        if maker is not None and maker.op == "activation":
            return replace(node, op="gated", inputs=(maker.inputs[0], up), attributes=maker.attributes)
    return node


def _pair_of_halves(node: Node, made_by: Mapping[str, Node]) -> Node:
    if node.op != "gated":
        return node
    maker = made_by.get(node.inputs[0])
    if maker is None or maker.op != "split" or maker.outputs != node.inputs:
        return node
    return replace(node, op="gated_pair", inputs=maker.inputs)
