"""Fuses a residual addition and the RMS norm that reads the sum.

Both results stay: the normed one and the sum, which the next addition reads. The
sum is rounded as before, so no bit changes.
"""

from __future__ import annotations

from midspan.graph.rewriting import readers, with_nodes
from midspan.interface.graph import Graph, Node


def fuse_add_norm(graph: Graph) -> Graph:
    """The graph with ``add`` + ``rms_norm`` as ``add_rms_norm``; results keep their names."""
    read_by = readers(graph)
    fused: dict[str, Node] = {}
    norms: set[str] = set()
    for node in graph.nodes:
        norm = next((reader for reader in _sum_readers(node, read_by) if reader.op == "rms_norm"), None)
        if norm is not None:
            fused[node.name] = _fuse(node, norm)
            norms.add(norm.name)
    nodes = [fused.get(node.name, node) for node in graph.nodes if node.name not in norms]
    return with_nodes(graph, nodes)


def _sum_readers(node: Node, read_by: dict[str, list[Node]]) -> list[Node]:
    return read_by[node.outputs[0]] if node.op == "add" else []


def _fuse(add: Node, norm: Node) -> Node:
    residual, x = add.inputs
    return Node(
        name=norm.name,
        op="add_rms_norm",
        inputs=(x, residual),
        outputs=(norm.outputs[0], add.outputs[0]),
        weights=norm.weights,
        attributes=norm.attributes,
        scope=norm.scope,
    )
