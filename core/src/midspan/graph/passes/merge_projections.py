"""Merges linears that read the same value into one, followed by a split.

Query, key and value become one matrix product, gate and up another: fewer and
larger products, on every device. Published tensors stay apart in the checkpoint;
the merged weight lists them as its ``sources``.

Left alone: linears that are split over devices in different ways, or by their rows (their sum over devices belongs to
them), and weights that several nodes share. Linears with and without bias are merged apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from midspan.graph.rewriting import weight_users, with_nodes
from midspan.interface.graph import Attribute, Graph, Node, Weight

_Key = tuple[str, Attribute, tuple[str, ...], str]


def merge_projections(graph: Graph) -> Graph:
    """The graph with parallel linears merged; their results keep their names."""
    groups: dict[_Key, list[Node]] = {}
    users = weight_users(graph)
    for node in graph.nodes:
        if _mergeable(node, users):
            key = (node.inputs[0], node.attributes["split"], tuple(sorted(node.weights)), node.scope)
            groups.setdefault(key, []).append(node)
    first = {members[0].name: members for members in groups.values() if len(members) > 1}
    merged_away = {node.name for members in first.values() for node in members[1:]}
    nodes: list[Node] = []
    weights: dict[str, Weight] = {}
    for node in graph.nodes:
        if node.name in first:
            nodes += _merge(graph, first[node.name], weights)
        elif node.name not in merged_away:
            nodes.append(node)
    return with_nodes(graph, nodes, weights)


def _mergeable(node: Node, users: dict[str, int]) -> bool:
    return (
        node.op == "linear"
        and node.attributes["split"] != "rows"
        and all(users[name] == 1 for name in node.weights.values())
    )


def _merge(graph: Graph, members: Sequence[Node], weights: dict[str, Weight]) -> tuple[Node, Node]:
    name = _joined_name([node.name for node in members])
    merged: dict[str, str] = {}
    for role in members[0].weights:
        weight = _stack([graph.weights[node.weights[role]] for node in members], f"{name}.{role}")
        weights[weight.name] = weight
        merged[role] = weight.name
    sizes = tuple(graph.weights[node.weights["weight"]].shape[0] for node in members)
    linear = replace(members[0], name=name, outputs=(name,), weights=merged)
    outputs = tuple(node.outputs[0] for node in members)
    split = Node(
        name=f"{name}.split",
        op="split",
        inputs=(name,),
        outputs=outputs,
        attributes={"sizes": sizes},
        scope=members[0].scope,
    )
    return linear, split


def _joined_name(names: Sequence[str]) -> str:
    """``a.q_proj``, ``a.k_proj`` -> ``a.q_proj+k_proj``."""
    columns = list(zip(*(name.split(".")[:-1] for name in names), strict=False))
    common = next((depth for depth, parts in enumerate(columns) if len(set(parts)) > 1), len(columns))
    prefix = ".".join([*names[0].split(".")[:common], ""])
    return prefix + "+".join(name[len(prefix) :] for name in names)


def _stack(weights: Sequence[Weight], name: str) -> Weight:
    rows = sum(weight.shape[0] for weight in weights)
    sources = tuple(source for weight in weights for source in (weight.sources or (weight.name,)))
    return Weight(name=name, shape=(rows, *weights[0].shape[1:]), sources=sources)
