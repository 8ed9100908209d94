"""Random graphs, and a fixed run of a graph that looks at logits and cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from midspan.graph.builder import GraphBuilder, Rotary
from midspan.interface import Graph, Value

HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 4, 2, 6, 37
HIDDEN = 20


@pytest.fixture(scope="session")
def random_graphs() -> st.SearchStrategy[Graph]:
    """Graphs of one to three blocks out of everything a decoder may have, not only what Llama has."""
    return _random_graph()


@st.composite
def _random_graph(draw: st.DrawFn) -> Graph:
    g = GraphBuilder("RandomForCausalLM")
    hidden = g.embedding(g.token_ids, "embed", VOCABULARY, HIDDEN, scale=draw(st.sampled_from([1.0, 2.5])))
    for layer in range(draw(st.integers(1, 3))):
        with g.scope(f"layers.{layer}"):
            hidden = _attention_block(draw, g, hidden)
            for part in range(draw(st.integers(0, 2))):
                with g.scope(f"mlp.{part}"):
                    block = _mixture_block if draw(st.integers(0, 3)) == 0 else _mlp_block
                    hidden = block(draw, g, hidden)
    final = _norm(draw, g, g.rows_to_sample(hidden), "norm")
    cap = draw(st.sampled_from([None, 5.0]))
    g.sample(g.logits(final, "lm_head", VOCABULARY, bias=draw(st.booleans()), soft_cap=cap))
    return g.finish(max_position=64)


def _norm(draw: st.DrawFn, g: GraphBuilder, x: Value, name: str) -> Value:
    if draw(st.booleans()):
        return g.rms_norm(x, name, 1e-5, offset=draw(st.sampled_from([0.0, 1.0])))
    return g.layer_norm(x, name, 1e-5, bias=draw(st.booleans()))


def _residual(draw: st.DrawFn, g: GraphBuilder, hidden: Value, x: Value) -> Value:
    kind = draw(st.sampled_from(["after", "before", "scaled", "none"]))
    if kind == "none":
        return x
    if kind == "scaled":
        x = g.scale(x, 0.5)
    return g.add(x, hidden) if kind == "before" else g.add(hidden, x)


def _attention_block(draw: st.DrawFn, g: GraphBuilder, hidden: Value) -> Value:
    x = _norm(draw, g, hidden, "norm") if draw(st.booleans()) else hidden
    biases = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    sizes = (HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE)
    q, k, v = (
        g.linear(x, name, size, bias=bias, split="columns")
        for name, size, bias in zip("qkv", sizes, biases, strict=True)
    )
    rotary = Rotary(head_size=HEAD_SIZE, rotary_size=4, inverse_frequencies=(1.0, 0.1), interleaved=draw(st.booleans()))
    if draw(st.booleans()):
        q, k = g.rotary(q, k, g.positions, rotary)
    window = draw(st.sampled_from([None, 3, 7]))
    shape = {"kv_heads": KV_HEADS, "key_size": HEAD_SIZE}
    x = g.attention(
        q,
        k,
        v,
        cache=g.full_cache(**shape) if window is None else g.window_cache(window, **shape),
        heads=HEADS,
        scale=0.4,
        soft_cap=draw(st.sampled_from([None, 3.0])),
        alibi_slopes=draw(st.sampled_from([None, (0.5, 0.25, 0.125, 0.0625)])),
        sinks=draw(st.sampled_from([None, "sinks"])),
    )
    return _residual(draw, g, hidden, g.linear(x, "o", HIDDEN, split="rows"))


def _mlp_block(draw: st.DrawFn, g: GraphBuilder, hidden: Value) -> Value:
    x = _norm(draw, g, hidden, "norm") if draw(st.booleans()) else hidden
    function = draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "sigmoid", "tanh"]))
    kind = draw(st.sampled_from(["gated", "product", "product swapped", "up first", "plain"]))
    bias = draw(st.booleans())
    if kind == "plain":
        x = g.activation(g.linear(x, "up", 16, bias=bias, split="columns"), function)
        return _residual(draw, g, hidden, g.linear(x, "down", HIDDEN, split="rows"))
    if kind == "up first":
        up, gate = (g.linear(x, name, 16, bias=bias, split="columns") for name in ("up", "gate"))
    else:
        gate, up = (g.linear(x, name, 16, bias=bias, split="columns") for name in ("gate", "up"))
    if kind == "product":
        x = g.multiply(g.activation(gate, function), up)
    elif kind == "product swapped":
        x = g.multiply(up, g.activation(gate, function))
    else:
        x = g.gated(gate, up, function)
    return _residual(draw, g, hidden, g.linear(x, "down", HIDDEN, split="rows"))


def _mixture_block(draw: st.DrawFn, g: GraphBuilder, hidden: Value) -> Value:
    x = _norm(draw, g, hidden, "norm") if draw(st.booleans()) else hidden
    scoring = draw(st.sampled_from(["softmax", "sigmoid"]))
    chosen = g.route(g.linear(x, "gate", 4), draw(st.integers(1, 3)), scoring=scoring, normalize=draw(st.booleans()))
    made = g.experts(x, chosen, "experts", count=4, inner=10, function="silu", bias=draw(st.booleans()))
    if draw(st.booleans()):
        shared = g.linear(g.gated(g.linear(x, "shared_gate", 16), g.linear(x, "shared_up", 16), "silu"), "down", HIDDEN)
        made = g.add(made, g.scale_rows(shared, g.linear(x, "factor", 1), function="sigmoid"))
    return _residual(draw, g, hidden, made)


@pytest.fixture
def run_logits(drive: Callable[..., Any]) -> Callable[..., list[NDArray[Any]]]:
    """Feed fixed tokens in given chunks; the logits of each step, then the cache's content, as arrays."""

    def run(
        device: Any, graph: Graph, weights: Any, plan: Sequence[Sequence[int]], **options: Any
    ) -> list[NDArray[Any]]:
        driver = drive(device, graph, weights, block_size=4, max_context=64, max_requests=4, **options)
        random = np.random.default_rng(0)
        sequences = [driver.sequence(random.integers(0, graph.vocab_size, 64).tolist()) for _ in plan[0]]
        rows = np.random.default_rng(1)
        found = []
        for counts in plan:
            chunks = [(sequence, count) for sequence, count in zip(sequences, counts, strict=True) if count]
            total = sum(count for _, count in chunks)
            chosen = np.flatnonzero(rows.random(total) < 0.5).astype(np.int32)
            batch, _ = driver.batch(chunks)
            batch = _with_rows(batch, chosen, driver.greedy([sequences[0]] * len(chosen)))
            found.append(driver.program.values(batch, driver.cache, ["lm_head"])["lm_head"])
            for sequence, count in chunks:
                sequence.computed += count
        for group, blocks in zip(graph.cache, driver.cache.blocks, strict=True):
            found.append(driver.cache.read(group.name, range(blocks)))
        return found

    return run


def _with_rows(batch: Any, rows: NDArray[np.int32], sampling: Any) -> Any:
    return replace(batch, rows_to_sample=rows, sampling=sampling)
