"""Computes the end of the model for the rows to sample only.

A builder selects rows just before the final norm. Everything row by row that
only feeds that selection is moved behind it: after the last attention, the
output projection and the MLP run for S rows and not for T. Rows do not mix in
what is moved, so no bit changes.
"""

from __future__ import annotations

from dataclasses import replace

from midspan.graph.inference import operation_of
from midspan.graph.rewriting import readers, with_nodes
from midspan.interface.graph import Graph, Node

ROWS = "rows_to_sample"


def keep_rows_to_sample(graph: Graph) -> Graph:
    """The graph with the selection of rows moved up as far as it goes."""
    moved = _movable(graph)
    if not moved:
        return graph
    made_by_moved = {name for node in moved.values() for name in node.outputs}
    selects = {node.outputs[0]: node for node in graph.nodes if _is_select(node)}
    replaced = {output: node.inputs[0] for output, node in selects.items() if node.inputs[0] in made_by_moved}
    existing = {node.inputs[0]: output for output, node in selects.items() if output not in replaced}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name in moved:
            inputs = []
            for name in node.inputs:
                if name not in made_by_moved and name not in existing:
                    nodes.append(_select(name, node.scope))
                    existing[name] = nodes[-1].outputs[0]
                inputs.append(existing.get(name, name))
            nodes.append(replace(node, inputs=tuple(inputs)))
        elif node.outputs[0] not in replaced:
            nodes.append(replace(node, inputs=tuple(replaced.get(name, name) for name in node.inputs)))
    return with_nodes(graph, _selects_where_they_are_ready(graph, nodes))


def _movable(graph: Graph) -> dict[str, Node]:
    """Row-wise nodes all of whose results are read by selections and by other such nodes, and by somebody."""
    read_by = readers(graph)
    moved: dict[str, Node] = {}
    for node in reversed(graph.nodes):
        read = [reader for name in node.outputs for reader in read_by[name]]
        if (
            operation_of(node).row_wise
            and graph.values[node.outputs[0]].shape[0] == "T"
            and not set(node.outputs).intersection(graph.outputs)
            and read
            and all(_is_select(reader) or reader.name in moved for reader in read)
        ):
            moved[node.name] = node
    return moved


def _is_select(node: Node) -> bool:
    return node.op == "select_rows" and node.inputs[1] == ROWS


def _select(value: str, scope: str) -> Node:
    name = f"{value}.{ROWS}"
    return Node(name=name, op="select_rows", inputs=(value, ROWS), outputs=(name,), scope=scope)


def _selects_where_they_are_ready(graph: Graph, nodes: list[Node]) -> list[Node]:
    """The same nodes with each selection right after the node that makes what it selects."""
    by_source: dict[str, list[Node]] = {}
    for node in nodes:
        if _is_select(node):
            by_source.setdefault(node.inputs[0], []).append(node)
    ordered = [select for name in graph.inputs for select in by_source.get(name, [])]
    for node in nodes:
        if not _is_select(node):
            ordered.append(node)
            ordered += [select for name in node.outputs for select in by_source.get(name, [])]
    return ordered
