"""The builder keeps names, shapes, weights and cache groups straight."""

from __future__ import annotations

from typing import Any

import pytest

from midspan.errors import GraphError
from midspan.graph.builder import GraphBuilder, Rotary
from midspan.interface.batch import graph_input_names


def _with_embedding() -> GraphBuilder:
    g = GraphBuilder("Test")
    g.embedding(g.token_ids, "embed", 11, 8)
    return g


def test_scopes_nest_in_the_names_of_nodes_and_weights() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    with g.scope("model"), g.scope("layers.3"):
        y = g.linear(x, "mlp.up", 16, bias=True, split="columns")
        z = g.add(y, y)
    g.sample(g.logits(g.rows_to_sample(z), "head", 11))
    graph = g.finish(max_position=8)
    node = graph.nodes[1]
    assert (node.name, node.scope) == ("model.layers.3.mlp.up", "model.layers.3")
    assert node.weights == {"weight": "model.layers.3.mlp.up.weight", "bias": "model.layers.3.mlp.up.bias"}
    assert graph.weights["model.layers.3.mlp.up.weight"].shape == (16, 8)
    assert graph.values["model.layers.3.add"].shape == ("T", 16)
    assert graph.nodes[2].scope == "model.layers.3"
    assert graph.nodes[-1].scope == ""


def test_operations_without_weights_are_numbered_within_their_scope() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    assert [g.add(x, x).name for _ in range(3)] == ["add", "add_2", "add_3"]


def test_cache_groups_count_their_layers_and_give_the_graph_its_inputs() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    caches = [
        g.window_cache(4, kv_heads=1, key_size=8),
        g.full_cache(kv_heads=2, key_size=4),
        g.window_cache(4, kv_heads=1, key_size=8),
    ]
    assert [(cache.group, cache.layer) for cache in caches] == [("window.4", 0), ("full", 0), ("window.4", 1)]
    for cache in caches:
        x = g.attention(x, x, x, cache=cache, heads=cache.kv_heads, scale=1.0)
    g.sample(g.logits(g.rows_to_sample(x), "head", 11))
    graph = g.finish(max_position=8)
    assert [(group.name, group.layers, group.window) for group in graph.cache] == [
        ("window.4", 2, 4),
        ("full", 1, None),
    ]
    assert graph.inputs == graph_input_names(graph.cache)
    assert graph.values["block_tables.window.4"].shape == ("B", "M.window.4")


def test_a_graph_without_attention_has_no_block_tables() -> None:
    g = GraphBuilder("Test")
    g.sample(g.logits(g.rows_to_sample(g.embedding(g.token_ids, "embed", 11, 8)), "head", 11))
    assert g.finish(max_position=8).inputs == graph_input_names(())


def test_tied_logits_use_the_embedding_table_under_its_published_name() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    g.sample(g.logits(g.rows_to_sample(x), "head", 11, tied_to="embed"))
    graph = g.finish(max_position=8)
    assert list(graph.weights) == ["embed.weight"]
    assert graph.nodes[-2].name == "head"
    assert graph.nodes[-2].weights == {"weight": "embed.weight"}


def test_the_graph_is_named_for_its_architecture_and_size() -> None:
    g = GraphBuilder("Test")
    g.sample(g.logits(g.rows_to_sample(g.embedding(g.token_ids, "embed", 500, 8)), "head", 500))
    assert g.finish(max_position=8).name == "Test 8K"


def test_attributes_hold_their_defaults_too() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    turned, _ = g.rotary(x, x, g.positions, Rotary(head_size=4, rotary_size=4, inverse_frequencies=(1.0, 0.5)))
    g.sample(g.logits(g.rows_to_sample(turned), "head", 11))
    nodes = g.finish(max_position=8).nodes
    assert nodes[1].attributes["amplitude"] == 1.0
    assert nodes[0].attributes == {"scale": 1.0}


def test_a_wrong_shape_is_an_error_that_names_the_node() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    wide = g.linear(x, "wide", 16)
    with g.scope("layers.0"), pytest.raises(GraphError, match="shapes differ") as caught:
        g.add(x, wide, name="sum")
    assert caught.value.node == "layers.0.sum"


def test_the_same_name_twice_is_an_error() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    g.linear(x, "up", 16)
    with pytest.raises(GraphError, match="exists already"):
        g.linear(x, "up", 16)


def test_a_weight_used_with_two_shapes_is_an_error() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    with pytest.raises(GraphError, match=r"embed\.weight"):
        g.logits(x, "head", 12, tied_to="embed")


def test_layers_of_one_group_must_have_the_same_heads() -> None:
    g = _with_embedding()
    g.full_cache(kv_heads=2, key_size=4)
    with pytest.raises(GraphError, match="full"):
        g.full_cache(kv_heads=1, key_size=4)


def test_an_unfinished_graph_says_what_it_lacks() -> None:
    with pytest.raises(GraphError, match="logits"):
        _with_embedding().finish(max_position=8)


def test_experts_are_put_together_from_each_experts_tensors() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    with g.scope("layers.0"):
        ids, shares = g.route(g.linear(x, "gate", 4), 2)
        y = g.experts(x, (ids, shares), "experts", count=4, inner=6, function="silu", bias=True)
    g.sample(g.logits(g.rows_to_sample(y), "head", 11))
    graph = g.finish(max_position=8)
    assert (ids.shape, ids.dtype, shares.dtype) == (("T", 2), "int32", "float32")
    gate_up, down_bias = graph.weights["layers.0.experts.gate_up"], graph.weights["layers.0.experts.down_bias"]
    assert gate_up.shape == (4, 12, 8)
    assert gate_up.sources[:3] == tuple(
        f"layers.0.experts.{name}.weight" for name in ("0.gate_proj", "0.up_proj", "1.gate_proj")
    )
    assert (down_bias.shape, len(down_bias.sources)) == ((4, 8), 4)
    assert graph.values[y.name].shape == ("T", 8)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"top_k": 9}, "top_k must be between 1 and 8"),
        ({"top_k": 5, "groups": 4, "top_groups": 2}, "top_k must be between 1 and 4"),
        ({"top_k": 1, "groups": 3}, "do not divide into 3 groups"),
        ({"top_k": 1, "groups": 8, "group_scoring": "two_largest"}, "two experts"),
        ({"top_k": 1, "scoring": "best"}, "'softmax' or 'sigmoid'"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(attributes: dict[str, Any], message: str) -> None:
    g = _with_embedding()
    logits = g.embedding(g.token_ids, "logits", 11, 8)
    with pytest.raises(GraphError, match=message):
        g.route(logits, **attributes)


def test_experts_refuse_rows_of_another_width_and_choices_of_other_rows() -> None:
    g = GraphBuilder("Test")
    x, wide = g.embedding(g.token_ids, "embed", 11, 8), g.embedding(g.token_ids, "wide", 11, 16)
    chosen = g.route(wide, 2)
    with pytest.raises(GraphError, match="int32"):
        g.experts(x, (chosen[1], chosen[0]), "swapped", count=16, inner=6, function="silu")
    with pytest.raises(GraphError, match="factors must have shape"):
        g.scale_rows(x, wide)
    with pytest.raises(GraphError, match="choices"):
        g.experts(g.rows_to_sample(x), chosen, "other", count=16, inner=6, function="silu")
