"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, Granite-MoE, GLM-4.5 and gpt-oss.

Each is Llama's decoder with experts in the place of some or all MLPs; what differs are the choice of experts, what
stands beside them, and defaults. Knows published configs and nothing about devices or weights' content.

Sources: the models' published ``config.json`` files and papers (Mixtral, arXiv 2401.04088; Qwen2-MoE, 2407.10671;
Qwen3-MoE, 2505.09388; OLMoE, 2409.02060; Granite 3.0; GLM-4.5, 2508.06471; gpt-oss, 2508.10925).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.graph.builder import GraphBuilder
from midspan.interface.graph import Graph, Value
from midspan.models.config_reader import REMEDY, ConfigReader
from midspan.models.llama import FULL, SLIDING, LlamaConfig, LlamaVariant, read_llama_config
from midspan.models.mixture_blocks import Mixture, Traits, build_decoder, dense_mlp, mixture


def build_mixtral(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """Mixtral: every MLP is a mixture; the shares of the chosen add up to one."""
    windows = "all" if fields.get("sliding_window") is not None else None
    llama = read_llama_config(fields, LlamaVariant(qkv_bias=False, windows=windows, kv_heads=8))
    reader = ConfigReader(fields)
    layer = Mixture(
        experts=_experts(reader, "num_local_experts", 8),
        top_k=reader.integer("num_experts_per_tok", default=2),
        inner=llama.intermediate_size,
        function=llama.activation,
        normalize=True,
    )
    return build_decoder(llama, g, lambda g, x, _: mixture(g, x, layer))


def build_qwen2_moe(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """Qwen2-MoE: beside the routed experts a shared one, weighted by a gate of its own; some layers may be dense."""
    fields = {**fields, "layer_types": fields.get("layer_types") or _qwen2_windows(fields)}
    qkv_bias = ConfigReader(fields).flag("qkv_bias", default=True)
    llama = read_llama_config(fields, LlamaVariant(qkv_bias=qkv_bias, windows="by layer", window=4096))
    reader = ConfigReader(fields)
    layer = _qwen_mixture(reader, llama)
    shared = reader.integer("shared_expert_intermediate_size", default=5632)
    sparse = _sparse_layers(reader, llama)

    def feed_forward(g: GraphBuilder, x: Value, number: int) -> Value:
        if number not in sparse:
            return dense_mlp(g, x, llama)
        always = dense_mlp(g, x, llama, "mlp.shared_expert", shared)
        factor = g.linear(x, "mlp.shared_expert_gate", 1)
        always = g.scale_rows(always, factor, function="sigmoid", name="mlp.shared_expert.scaled")
        return g.add(mixture(g, x, layer), always, name="mlp.sum")

    return build_decoder(llama, g, feed_forward)


def build_qwen3_moe(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """Qwen3-MoE: normed heads; some layers may be dense."""
    reader = ConfigReader(fields)
    windows = "all" if reader.flag("use_sliding_window", default=False) else None
    llama = read_llama_config(fields, LlamaVariant(head_norms=True, windows=windows, window=4096))
    layer, sparse = _qwen_mixture(reader, llama), _sparse_layers(reader, llama)

    def feed_forward(g: GraphBuilder, x: Value, number: int) -> Value:
        return mixture(g, x, layer) if number in sparse else dense_mlp(g, x, llama)

    return build_decoder(llama, g, feed_forward)


def build_olmoe(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """OLMoE: query and key are normed over all heads together."""
    reader = ConfigReader(fields)
    if reader.has("clip_qkv"):
        raise UnsupportedModel(
            "The model's config asks for clipped queries, keys and values (clip_qkv).",
            remedy="OLMoE without clip_qkv is supported, as its published checkpoints are.",
        )
    llama = read_llama_config(fields, LlamaVariant())
    layer = Mixture(
        experts=_experts(reader, "num_experts", 64),
        top_k=reader.integer("num_experts_per_tok", default=8),
        inner=llama.intermediate_size,
        function=llama.activation,
        normalize=reader.flag("norm_topk_prob", default=False),
    )
    return build_decoder(llama, g, lambda g, x, _: mixture(g, x, layer), Traits(whole_norms=True))


def build_granite_moe(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """Granite-MoE: scaled embeddings, residuals, scores and logits."""
    llama = read_llama_config(fields, LlamaVariant())
    reader = ConfigReader(fields)
    layer = Mixture(
        experts=_experts(reader, "num_local_experts", 8),
        top_k=reader.integer("num_experts_per_tok", default=2),
        inner=llama.intermediate_size,
        function=llama.activation,
        router="router",
        normalize=True,
    )
    traits = Traits(
        attention_scale=reader.number("attention_multiplier", default=1.0),
        residual_scale=reader.number("residual_multiplier", default=1.0),
        embedding_scale=reader.number("embedding_multiplier", default=1.0),
        logits_scale=1.0 / reader.number("logits_scaling", default=1.0),
    )
    return build_decoder(llama, g, lambda g, x, _: mixture(g, x, layer), traits)


def build_glm4_moe(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """GLM-4.5: sigmoid scores, ranked with a correction, in groups; experts for all rows; dense first layers."""
    fields = {**fields, "partial_rotary_factor": fields.get("partial_rotary_factor", 0.5)}
    reader = ConfigReader(fields)
    head_norms = reader.flag("use_qk_norm", default=False)
    llama = read_llama_config(fields, LlamaVariant(head_norms=head_norms, kv_heads=8))
    inner = reader.integer("moe_intermediate_size", default=1408)
    layer = Mixture(
        experts=_experts(reader, "n_routed_experts", 128),
        top_k=reader.integer("num_experts_per_tok", default=8),
        inner=inner,
        function=llama.activation,
        scoring="sigmoid",
        normalize=reader.flag("norm_topk_prob", default=True),
        groups=reader.integer("n_group", default=1),
        top_groups=reader.integer("topk_group", default=1),
        group_scoring="two_largest",
        scale=reader.number("routed_scaling_factor", default=1.0),
        correction="mlp.gate.e_score_correction_bias",
    )
    shared = inner * reader.integer("n_shared_experts", default=1, low=0)
    dense = reader.integer("first_k_dense_replace", default=1, low=0)

    def feed_forward(g: GraphBuilder, x: Value, number: int) -> Value:
        if number < dense:
            return dense_mlp(g, x, llama)
        routed = mixture(g, x, layer)
        return routed if not shared else g.add(routed, dense_mlp(g, x, llama, "mlp.shared_experts", shared))

    return build_decoder(llama, g, feed_forward, Traits(output_bias=False))


def build_gpt_oss(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """gpt-oss: sinks, biases everywhere, every other layer windowed, clamped gates."""
    layers = ConfigReader(fields).integer("num_hidden_layers", high=2**12)
    fields = {
        "attention_bias": True,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        **fields,
        "use_sliding_window": fields.get("sliding_window", 128) is not None,
        "layer_types": fields.get("layer_types") or [FULL if layer % 2 else SLIDING for layer in range(layers)],
    }
    reader = ConfigReader(fields)
    llama = read_llama_config(fields, LlamaVariant(windows="by layer", head_size=64, kv_heads=8))
    layer = Mixture(
        experts=_experts(reader, "num_local_experts", 128),
        top_k=reader.integer("num_experts_per_tok", default=4),
        inner=llama.intermediate_size,
        function="silu",
        router="router",
        router_bias=True,
        normalize=True,
        bias=True,
        limit=reader.number("swiglu_limit", default=7.0),
        slope=reader.number("swiglu_alpha", default=1.702),
        up_offset=1.0,
    )
    return build_decoder(llama, g, lambda g, x, _: mixture(g, x, layer), Traits(sinks=True))


def _qwen_mixture(reader: ConfigReader, llama: LlamaConfig) -> Mixture:
    return Mixture(
        experts=_experts(reader, "num_experts", 60),
        top_k=reader.integer("num_experts_per_tok", default=4),
        inner=reader.integer("moe_intermediate_size"),
        function=llama.activation,
        normalize=reader.flag("norm_topk_prob", default=False),
    )


def _experts(reader: ConfigReader, name: str, default: int) -> int:
    """How many experts there are; some configs call them otherwise than the files that were published."""
    for other in (name, "num_local_experts", "num_experts"):
        if reader.has(other):
            return reader.integer(other, high=2**12)
    return default


def _sparse_layers(reader: ConfigReader, llama: LlamaConfig) -> frozenset[int]:
    """Layers with experts: every ``decoder_sparse_step``-th, without ``mlp_only_layers``."""
    step = reader.integer("decoder_sparse_step", default=1)
    dense = reader.fields.get("mlp_only_layers") or []
    if not isinstance(dense, (list, tuple)) or not all(isinstance(layer, int) for layer in dense):
        raise CheckpointError("The model's config field 'mlp_only_layers' must be a list of layers.", remedy=REMEDY)
    return frozenset(layer for layer in range(llama.layers) if (layer + 1) % step == 0 and layer not in dense)


def _qwen2_windows(fields: Mapping[str, Any]) -> list[str]:
    """Every other one of the first ``max_window_layers`` layers has the window, if any has."""
    reader = ConfigReader(fields)
    windowed = reader.integer("max_window_layers", default=28, low=0)
    layers = reader.integer("num_hidden_layers", high=2**12)
    if not reader.flag("use_sliding_window", default=False):
        windowed = 0
    return [SLIDING if layer % 2 == 0 and layer < windowed else FULL for layer in range(layers)]
