"""Each broken rule of the graph language is found, and the node at fault is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from midspan.errors import GraphError
from midspan.graph.validation import validate
from midspan.interface import Graph, Node, Value, Weight
from midspan.models.catalogue import build_graph

NODE = "model.layers.1.mlp.down_proj"
ATTENTION = "model.layers.1.self_attn.attention"


def _change(graph: Graph, target: str, **changes: Any) -> Graph:
    nodes = tuple(replace(node, **changes) if node.name == target else node for node in graph.nodes)
    return replace(graph, nodes=nodes)


def _node(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)


def _attributes(name: str, **changes: Any) -> Callable[[Graph], Graph]:
    return lambda graph: _change(graph, name, attributes={**_node(graph, name).attributes, **changes})


def _without_attribute(graph: Graph) -> Graph:
    kept = {key: value for key, value in _node(graph, ATTENTION).attributes.items() if key != "scale"}
    return _change(graph, ATTENTION, attributes=kept)


def _moved_to_front(graph: Graph) -> Graph:
    node = _node(graph, NODE)
    return replace(graph, nodes=(node, *(other for other in graph.nodes if other is not node)))


def _narrow_weight(graph: Graph) -> Graph:
    name = f"{NODE}.weight"
    return replace(graph, weights={**graph.weights, name: Weight(name=name, shape=(32, 47))})


def _wrong_value(graph: Graph) -> Graph:
    return replace(graph, values={**graph.values, NODE: Value(name=NODE, shape=("T", 31))})


BROKEN: dict[str, tuple[Callable[[Graph], Graph], str, str]] = {
    "unknown operation": (lambda graph: _change(graph, NODE, op="convolve"), NODE, "convolve"),
    "unknown input": (lambda graph: _change(graph, NODE, inputs=("nowhere",)), NODE, "nowhere"),
    "too many inputs": (lambda graph: _change(graph, NODE, inputs=("token_ids",) * 2), NODE, "2 inputs"),
    "unknown weight": (lambda graph: _change(graph, NODE, weights={"weight": "lost"}), NODE, "lost"),
    "missing weight": (lambda graph: _change(graph, NODE, weights={}), NODE, "weight"),
    "unknown role": (
        lambda graph: _change(graph, NODE, weights={**_node(graph, NODE).weights, "scales": "model.norm.weight"}),
        NODE,
        "scales",
    ),
    "missing attribute": (_without_attribute, ATTENTION, "scale"),
    "unknown attribute": (_attributes(NODE, color="red"), NODE, "color"),
    "attribute that is no number": (_attributes(ATTENTION, scale=float("nan")), ATTENTION, "nan"),
    "attribute that is nested": (_attributes(NODE, split=((1,),)), NODE, "split"),
    "wrong split": (_attributes(NODE, split="diagonal"), NODE, "split"),
    "too many outputs": (lambda graph: _change(graph, NODE, outputs=(NODE, "more")), NODE, "outputs"),
    "input from later": (_moved_to_front, NODE, "comes later"),
    "weight that does not fit": (_narrow_weight, NODE, "47"),
    "stated shape is wrong": (_wrong_value, NODE, "31"),
    "output made twice": (lambda graph: _change(graph, NODE, outputs=("model.embed_tokens",)), NODE, "twice"),
    "unknown cache group": (_attributes(ATTENTION, group="window.3"), ATTENTION, "full"),
    "layer outside of its group": (_attributes(ATTENTION, layer=2), ATTENTION, "layer 2"),
    "heads unlike the group's": (_attributes(ATTENTION, kv_heads=4), ATTENTION, "kv_heads"),
    "block table of nobody": (
        lambda graph: _change(
            graph, ATTENTION, inputs=(*_node(graph, ATTENTION).inputs[:-2], "positions", "token_ids")
        ),
        ATTENTION,
        "slots",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_found_and_its_node_named(case: str, tiny_config: Any) -> None:
    breaking, node, message = BROKEN[case]
    graph = build_graph(tiny_config())
    validate(graph)
    with pytest.raises(GraphError, match=message) as caught:
        validate(breaking(graph))
    assert caught.value.node == node
    assert node in str(caught.value)


GRAPH_WIDE: dict[str, tuple[Callable[[Graph], Graph], str]] = {
    "node name twice": (lambda graph: _change(graph, NODE, name="lm_head"), "lm_head"),
    "layer written twice": (_attributes(ATTENTION, layer=0), "layer 0"),
    "output of nobody": (lambda graph: replace(graph, outputs=("lost",)), "lost"),
    "inputs out of order": (lambda graph: replace(graph, inputs=graph.inputs[::-1]), "inputs"),
    "weight of nobody": (
        lambda graph: replace(graph, weights={**graph.weights, "lost": Weight(name="lost", shape=(1,))}),
        "lost",
    ),
    "value of nobody": (
        lambda graph: replace(graph, values={**graph.values, "lost": Value(name="lost", shape=("T",))}),
        "lost",
    ),
    "weight of size 0": (
        lambda graph: replace(graph, weights={**graph.weights, "lost": Weight(name="lost", shape=(0,))}),
        "at least 1",
    ),
    "no vocabulary": (lambda graph: replace(graph, vocab_size=0), "vocab_size"),
}


@pytest.mark.parametrize("case", GRAPH_WIDE)
def test_a_broken_rule_of_the_whole_graph_is_found(case: str, tiny_config: Any) -> None:
    breaking, message = GRAPH_WIDE[case]
    with pytest.raises(GraphError, match=message):
        validate(breaking(build_graph(tiny_config())))
