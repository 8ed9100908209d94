"""Each pass changes the graph and not what it computes, on random graphs and random batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midspan.errors import SettingsError
from midspan.graph.builder import GraphBuilder
from midspan.graph.passes import PASSES, apply_passes
from midspan.graph.passes.eliminate_dead import eliminate_dead
from midspan.graph.passes.fuse_add_norm import fuse_add_norm
from midspan.graph.passes.fuse_gated import fuse_gated
from midspan.graph.passes.keep_rows_to_sample import keep_rows_to_sample
from midspan.graph.passes.merge_projections import merge_projections
from midspan.graph.validation import validate
from midspan.interface import Device, Graph
from midspan.models.catalogue import build_graph

few_examples = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
plans = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)

BITWISE = ("fuse_gated", "keep_rows_to_sample", "fuse_add_norm", "eliminate_dead")
"""Passes that change no order of summation and, in float32, no rounding."""


@pytest.mark.parametrize("name", BITWISE)
@few_examples
@given(data=st.data(), plan=plans)
def test_a_pass_that_moves_no_rounding_changes_no_bit(
    name: str,
    data: st.DataObject,
    plan: list[tuple[int, ...]],
    random_graphs: st.SearchStrategy[Graph],
    run_logits: Callable[..., list[Any]],
    random_weights: Callable[..., Any],
    reference_device: Device,
) -> None:
    graph = data.draw(random_graphs)
    weights = random_weights(graph)
    if data.draw(st.booleans()):
        graph = merge_projections(graph)
    changed = PASSES[name](graph)
    validate(changed)
    before = run_logits(reference_device, graph, weights, plan)
    after = run_logits(reference_device, changed, weights, plan)
    for left, right in zip(before, after, strict=True):
        assert np.array_equal(left, right)


@few_examples
@given(data=st.data(), plan=plans)
def test_selecting_rows_early_and_fusing_norms_change_no_bit_in_bfloat16_either(
    data: st.DataObject,
    plan: list[tuple[int, ...]],
    random_graphs: st.SearchStrategy[Graph],
    run_logits: Callable[..., list[Any]],
    random_weights: Callable[..., Any],
    reference_device: Device,
) -> None:
    graph = data.draw(random_graphs)
    changed = fuse_add_norm(keep_rows_to_sample(graph))
    types = {"dtype": "bfloat16", "cache_dtype": "bfloat16"}
    before = run_logits(reference_device, graph, random_weights(graph), plan, **types)
    after = run_logits(reference_device, changed, random_weights(graph), plan, **types)
    for left, right in zip(before, after, strict=True):
        assert np.array_equal(left, right)


@pytest.mark.parametrize("until", ["merge_projections", None])
@few_examples
@given(data=st.data(), plan=plans)
def test_merged_projections_and_all_passes_together_compute_the_same(
    until: str | None,
    data: st.DataObject,
    plan: list[tuple[int, ...]],
    random_graphs: st.SearchStrategy[Graph],
    run_logits: Callable[..., list[Any]],
    random_weights: Callable[..., Any],
    reference_device: Device,
) -> None:
    graph = data.draw(random_graphs)
    weights = random_weights(graph)
    before = run_logits(reference_device, graph, weights, plan)
    after = run_logits(reference_device, apply_passes(graph, until=until), weights, plan)
    for left, right in zip(before, after, strict=True):
        # A product of n <= 24 terms may be summed in another order: 24 * 2^-24 = 1.4e-6 of the largest term. Some
        # twenty products and norms follow each other, each of which may double it where terms cancel.
        scale = max(1.0, float(np.abs(left).max(initial=0.0)))
        assert np.allclose(left, right, rtol=0, atol=2e-4 * scale)


def test_merging_puts_query_key_and_value_into_one_linear_that_lists_its_sources(tiny_config: Any) -> None:
    graph = merge_projections(build_graph(tiny_config(attention_bias=True)))
    node = next(node for node in graph.nodes if node.op == "linear")
    prefix = "model.layers.0.self_attn."
    assert node.name == prefix + "q_proj+k_proj+v_proj"
    weight, bias = graph.weights[node.weights["weight"]], graph.weights[node.weights["bias"]]
    assert weight.shape == (32 + 16 + 16, 32)
    assert weight.sources == tuple(prefix + name for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    assert bias.shape == (64,)
    assert bias.sources == tuple(prefix + name for name in ("q_proj.bias", "k_proj.bias", "v_proj.bias"))
    assert sum(node.op == "linear" for node in graph.nodes) == 4 * 2


def test_merging_keeps_linears_with_and_without_bias_apart() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    parts = [g.linear(x, f"part{index}", 8, bias=index % 2 == 0, split="columns") for index in range(4)]
    total = g.add(g.add(parts[0], parts[1]), g.add(parts[2], parts[3]))
    g.sample(g.logits(g.rows_to_sample(total), "head", 11))
    merged = merge_projections(g.finish(max_position=8))
    assert {node.name for node in merged.nodes if node.op == "linear"} == {"part0+part2", "part1+part3"}


def test_merging_leaves_row_split_linears_and_shared_weights_alone() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    rows = g.add(g.linear(x, "a", 8, split="rows"), g.linear(x, "b", 8, split="rows"))
    g.sample(g.logits(g.rows_to_sample(rows), "head", 11))
    graph = g.finish(max_position=8)
    assert merge_projections(graph) == graph
    a, b = (node for node in graph.nodes if node.op == "linear")
    shared = {**b.weights, "weight": a.weights["weight"]}
    nodes = tuple(
        replace(node, weights=shared if node is b else node.weights, attributes={"split": None})
        if node.op == "linear"
        else node
        for node in graph.nodes
    )
    weights = {name: weight for name, weight in graph.weights.items() if name != b.weights["weight"]}
    tied = replace(graph, nodes=nodes, weights=weights)
    validate(tied)
    assert merge_projections(tied) == tied


def test_the_last_layer_runs_its_output_projection_and_mlp_for_sampled_rows_only(tiny_config: Any) -> None:
    graph = apply_passes(build_graph(tiny_config()))
    rows = {node.name: graph.values[node.outputs[0]].shape[0] for node in graph.nodes}
    assert rows["model.layers.1.self_attn.attention"] == "T"
    assert rows["model.layers.1.self_attn.o_proj"] == "S"
    assert rows["model.layers.1.mlp.down_proj"] == "S"
    assert rows["model.layers.0.mlp.down_proj"] == "T"
    assert sum(node.op == "select_rows" for node in graph.nodes) == 2


def test_all_passes_leave_ten_nodes_for_each_layer(tiny_config: Any) -> None:
    graph = apply_passes(build_graph(tiny_config(num_hidden_layers=5)))
    layer = [node.op for node in graph.nodes if node.scope == "model.layers.2"]
    attention = ["add_rms_norm", "linear", "split", "rotary", "attention", "linear"]
    assert layer == [*attention, "add_rms_norm", "linear", "gated_pair", "linear"]


def test_gate_and_up_become_a_gated_pair_only_when_they_are_the_halves_in_order() -> None:
    def graph_with(first: str, second: str) -> Graph:
        g = GraphBuilder("Test")
        x = g.embedding(g.token_ids, "embed", 11, 8)
        parts = {name: g.linear(x, name, 8, split="columns") for name in (first, second)}
        g.sample(g.logits(g.rows_to_sample(g.gated(parts["gate"], parts["up"], "silu")), "head", 11))
        return fuse_gated(merge_projections(g.finish(max_position=8)))

    assert [node.op for node in graph_with("gate", "up").nodes].count("gated_pair") == 1
    assert [node.op for node in graph_with("up", "gate").nodes].count("gated_pair") == 0


def test_an_activation_that_others_read_stays_beside_the_fused_gate() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    gate = g.activation(x, "silu")
    g.sample(g.logits(g.rows_to_sample(g.add(g.multiply(gate, x), gate)), "head", 11))
    operations = [node.op for node in fuse_gated(g.finish(max_position=8)).nodes]
    assert "gated" in operations
    assert "activation" in operations


def test_dead_nodes_go_and_attention_stays_because_it_writes_the_cache() -> None:
    g = GraphBuilder("Test")
    x = g.embedding(g.token_ids, "embed", 11, 8)
    g.linear(x, "unread", 8)
    q = g.linear(x, "q", 8)
    g.attention(q, q, q, cache=g.full_cache(kv_heads=2, key_size=4), heads=2, scale=1.0)
    g.sample(g.logits(g.rows_to_sample(x), "head", 11))
    graph = eliminate_dead(g.finish(max_position=8))
    assert [node.op for node in graph.nodes] == ["embedding", "linear", "attention", "select_rows", "logits", "sample"]
    assert "unread.weight" not in graph.weights
    assert "unread" not in graph.values


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_applied_twice_does_nothing_more(name: str, tiny_config: Any) -> None:
    graph = apply_passes(build_graph(tiny_config()), until=name)
    assert PASSES[name](graph) == graph


def test_an_unknown_pass_is_refused_with_the_list_of_passes(tiny_config: Any) -> None:
    with pytest.raises(SettingsError, match="fuse_gated"):
        apply_passes(build_graph(tiny_config()), until="nonsense")
