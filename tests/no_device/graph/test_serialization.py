"""A graph survives the way to JSON and back; damage is an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midspan.errors import GraphError
from midspan.graph.passes import apply_passes
from midspan.graph.serialization import graph_from_json, graph_to_json
from midspan.interface import Graph
from midspan.models.catalogue import build_graph


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_graph_comes_back_equal(data: st.DataObject, random_graphs: st.SearchStrategy[Graph]) -> None:
    graph = data.draw(random_graphs)
    if data.draw(st.booleans()):
        graph = apply_passes(graph)
    text = graph_to_json(graph)
    again = graph_from_json(text)
    assert again == graph
    assert graph_to_json(again) == text


def test_numbers_keep_their_kind_and_their_bits(tiny_config: Any) -> None:
    graph = build_graph(tiny_config())
    again = graph_from_json(graph_to_json(graph))
    for before, after in zip(graph.nodes, again.nodes, strict=True):
        for name, value in before.attributes.items():
            assert repr(after.attributes[name]) == repr(value)


def test_text_that_is_no_json_is_an_error() -> None:
    with pytest.raises(GraphError, match="no JSON"):
        graph_from_json("{")


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "midspan.graph/99"}', "3"])
def test_another_format_is_an_error(text: str) -> None:
    with pytest.raises(GraphError, match="format"):
        graph_from_json(text)


@pytest.mark.parametrize("damage", ["nodes", "weights", "vocab_size", "cache"])
def test_a_graph_with_a_part_missing_is_an_error(damage: str, tiny_config: Any) -> None:
    content = json.loads(graph_to_json(build_graph(tiny_config())))
    del content[damage]
    with pytest.raises(GraphError, match=damage):
        graph_from_json(json.dumps(content))


def test_a_graph_with_strange_parts_is_an_error(tiny_config: Any) -> None:
    content = json.loads(graph_to_json(build_graph(tiny_config())))
    content["nodes"][0]["surprise"] = 1
    with pytest.raises(GraphError, match="surprise"):
        graph_from_json(json.dumps(content))
    content["nodes"] = [3]
    with pytest.raises(GraphError, match="damaged"):
        graph_from_json(json.dumps(content))


def test_what_is_read_is_validated(tiny_config: Any) -> None:
    text = graph_to_json(build_graph(tiny_config())).replace('"op": "rms_norm"', '"op": "mystery"', 1)
    with pytest.raises(GraphError, match="mystery") as caught:
        graph_from_json(text)
    assert caught.value.node == "model.layers.0.input_layernorm"
