"""Blocks of decoders whose MLPs are mixtures of experts.

A decoder is what ``LlamaConfig`` says, with the traits below; what stands in the place of a layer's MLP is handed in.
Knows published names and nothing about devices or weights' content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from midspan.graph.builder import GraphBuilder
from midspan.interface.graph import Graph, Value
from midspan.models.llama import LlamaConfig

FeedForward = Callable[[GraphBuilder, Value, int], Value]
"""(builder inside of the layer's scope, normed rows, number of the layer) -> what is added to them."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One layer of experts.

    Attributes:
        experts: how many there are.
        top_k: chosen for each row.
        inner: width of an expert's middle.
        function: of the gate.
        router: published name of the router, below ``mlp``.
        router_bias: the router is a linear with bias.
        scoring, normalize, groups, top_groups, group_scoring, scale: see the operation ``route``.
        correction: published name of what is added to scores to rank experts.
        bias, limit, slope, up_offset: see the operation ``experts``.
    """

    experts: int
    top_k: int
    inner: int
    function: str
    router: str = "gate"
    router_bias: bool = False
    scoring: str = "softmax"
    normalize: bool = False
    groups: int = 1
    top_groups: int = 1
    group_scoring: str = "largest"
    scale: float = 1.0
    correction: str | None = None
    bias: bool = False
    limit: float | None = None
    slope: float = 1.0
    up_offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What sets a decoder apart from Llama's.

    Attributes:
        whole_norms: query and key are RMS-normed over all heads together.
        sinks: attention has them.
        output_bias: of the attention's output projection; None: as the config says.
        attention_scale: of scores; None: 1 / sqrt(head size).
        residual_scale: of what is added to the residual stream.
        embedding_scale, logits_scale: of embedded tokens and of logits.
    """

    whole_norms: bool = False
    sinks: bool = False
    output_bias: bool | None = None
    attention_scale: float | None = None
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    logits_scale: float = 1.0


PLAIN = Traits()


def mixture(g: GraphBuilder, x: Value, layer: Mixture) -> Value:
    """Routed experts under ``mlp``: [N, hidden] -> [N, hidden]."""
    logits = g.linear(x, f"mlp.{layer.router}", layer.experts, bias=layer.router_bias)
    chosen = g.route(
        logits,
        layer.top_k,
        scoring=layer.scoring,
        normalize=layer.normalize,
        bias=layer.correction,
        groups=layer.groups,
        top_groups=layer.top_groups,
        group_scoring=layer.group_scoring,
        scale=layer.scale,
        name="mlp.route",
    )
    return g.experts(
        x,
        chosen,
        "mlp.experts",
        count=layer.experts,
        inner=layer.inner,
        function=layer.function,
        bias=layer.bias,
        limit=layer.limit,
        slope=layer.slope,
        up_offset=layer.up_offset,
    )


def dense_mlp(g: GraphBuilder, x: Value, config: LlamaConfig, name: str = "mlp", inner: int | None = None) -> Value:
    """A gated MLP for all rows under ``name``; ``inner`` wide, or as the config says."""
    size = config.intermediate_size if inner is None else inner
    gate = g.linear(x, f"{name}.gate_proj", size, bias=config.mlp_bias, split="columns")
    up = g.linear(x, f"{name}.up_proj", size, bias=config.mlp_bias, split="columns")
    middle = g.gated(gate, up, config.activation, name=f"{name}.gated")
    return g.linear(middle, f"{name}.down_proj", config.hidden_size, bias=config.mlp_bias, split="rows")


def build_decoder(config: LlamaConfig, g: GraphBuilder, feed_forward: FeedForward, traits: Traits = PLAIN) -> Graph:
    """The graph from token ids to sampled tokens."""
    hidden = g.embedding(
        g.token_ids, "model.embed_tokens", config.vocab_size, config.hidden_size, scale=traits.embedding_scale
    )
    for layer in range(config.layers):
        with g.scope(f"model.layers.{layer}"):
            x = g.rms_norm(hidden, "input_layernorm", config.epsilon)
            x = _scaled(g, _attention(config, g, x, config.windows[layer], traits), traits, "attention_scale")
            hidden = g.add(hidden, x, name="attention_residual")
            x = g.rms_norm(hidden, "post_attention_layernorm", config.epsilon)
            x = _scaled(g, feed_forward(g, x, layer), traits, "mlp_scale")
            hidden = g.add(hidden, x, name="mlp_residual")
    x = g.rms_norm(g.rows_to_sample(hidden), "model.norm", config.epsilon)
    tied_to = "model.embed_tokens" if config.tied else None
    g.sample(g.logits(x, "lm_head", config.vocab_size, tied_to=tied_to, scale=traits.logits_scale))
    return g.finish(max_position=config.max_position)


def _scaled(g: GraphBuilder, x: Value, traits: Traits, name: str) -> Value:
    return x if traits.residual_scale == 1.0 else g.scale(x, traits.residual_scale, name=name)


def _attention(config: LlamaConfig, g: GraphBuilder, x: Value, window: int | None, traits: Traits) -> Value:
    q_size, kv_size = config.heads * config.head_size, config.kv_heads * config.head_size
    q = g.linear(x, "self_attn.q_proj", q_size, bias=config.qkv_bias, split="columns")
    k = g.linear(x, "self_attn.k_proj", kv_size, bias=config.qkv_bias, split="columns")
    v = g.linear(x, "self_attn.v_proj", kv_size, bias=config.qkv_bias, split="columns")
    if config.head_norms or traits.whole_norms:
        size = None if traits.whole_norms else config.head_size
        q = g.rms_norm(q, "self_attn.q_norm", config.epsilon, size=size)
        k = g.rms_norm(k, "self_attn.k_norm", config.epsilon, size=size)
    q, k = g.rotary(q, k, g.positions, config.rotary, name="self_attn.rotary")
    sizes = {"kv_heads": config.kv_heads, "key_size": config.head_size}
    scale = config.head_size**-0.5 if traits.attention_scale is None else traits.attention_scale
    x = g.attention(
        q,
        k,
        v,
        cache=g.full_cache(**sizes) if window is None else g.window_cache(window, **sizes),
        heads=config.heads,
        scale=scale,
        sinks="self_attn.sinks" if traits.sinks else None,
        name="self_attn.attention",
    )
    bias = config.output_bias if traits.output_bias is None else traits.output_bias
    return g.linear(x, "self_attn.o_proj", config.hidden_size, bias=bias, split="rows")
