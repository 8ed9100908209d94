"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3.

One algebra: pre-norm blocks of grouped-query attention with rotary positions,
and a gated MLP. The members differ in biases, head norms, windows and defaults,
which ``LlamaVariant`` states. Knows published configs and nothing about
devices or weights' content.

Sources: the models' published ``config.json`` files and papers (Llama 2, arXiv
2307.09288; Llama 3, 2407.21783; Mistral, 2310.06825; Qwen2, 2407.10671; Qwen3,
2505.09388).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.graph.builder import CacheLayer, GraphBuilder, Rotary
from midspan.interface.graph import Graph, Value
from midspan.models.config_reader import REMEDY, ConfigReader
from midspan.models.rotary_scaling import read_rotary

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}
"""Published names (``hidden_act``) -> names of the activation operation."""

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class LlamaVariant:
    """What sets one member of the family apart, beyond its config.

    Attributes:
        qkv_bias: query, key and value have biases; None: the config's ``attention_bias``
            says so, for the output projection too.
        head_norms: query and key heads are RMS-normed before rotation.
        windows: how the config states windows: None (never), ``"all"`` (``sliding_window`` holds
            for all layers), ``"by layer"`` (``use_sliding_window`` and ``layer_types``).
        head_size: when the config has no ``head_dim``; None: hidden_size / heads.
        kv_heads: when the config has no ``num_key_value_heads``; None: as many as query heads.
        window: when the config has no ``sliding_window`` at all; None: no window.
    """

    qkv_bias: bool | None = None
    head_norms: bool = False
    windows: str | None = None
    head_size: int | None = None
    kv_heads: int | None = None
    window: int | None = None


LLAMA = LlamaVariant()
MISTRAL = LlamaVariant(qkv_bias=False, windows="all", kv_heads=8, window=4096)
QWEN2 = LlamaVariant(qkv_bias=True, windows="by layer", window=4096)
QWEN3 = LlamaVariant(head_norms=True, windows="by layer", head_size=128, window=4096)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A member's config, checked. Sizes in elements; ``windows`` has an entry for each layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    max_position: int
    epsilon: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    tied: bool
    rotary: Rotary
    windows: tuple[int | None, ...]


def read_llama_config(fields: Mapping[str, Any], variant: LlamaVariant) -> LlamaConfig:
    """Check a published config.

    Raises:
        CheckpointError: a field is missing or absurd; the message names it.
        UnsupportedModel: an activation or a rotary scaling that is not known here.
    """
    config = ConfigReader(fields)
    hidden_size = config.integer("hidden_size")
    heads = config.integer("num_attention_heads", high=2**16)
    kv_heads = config.integer("num_key_value_heads", default=variant.kv_heads or heads, high=2**16)
    if heads % kv_heads:
        raise CheckpointError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}.", remedy=REMEDY
        )
    head_size = _head_size(config, variant, hidden_size, heads)
    layers = config.integer("num_hidden_layers", high=2**12)
    max_position = config.integer("max_position_embeddings")
    attention_bias = variant.qkv_bias is None and config.flag("attention_bias", default=False)
    return LlamaConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        max_position=max_position,
        epsilon=config.number("rms_norm_eps", default=1e-6, high=1.0),
        activation=_activation(config),
        qkv_bias=attention_bias or variant.qkv_bias is True,
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", default=False),
        head_norms=variant.head_norms,
        tied=config.flag("tie_word_embeddings", default=False),
        rotary=read_rotary(config, head_size=head_size, max_position=max_position),
        windows=_windows(config, variant, layers, max_position),
    )


def _head_size(config: ConfigReader, variant: LlamaVariant, hidden_size: int, heads: int) -> int:
    if config.has("head_dim") or variant.head_size is not None:
        return config.integer("head_dim", default=variant.head_size, high=2**16)
    if hidden_size % heads:
        raise CheckpointError(
            f"The model's config has no head_dim, and hidden_size {hidden_size} is no multiple of "
            f"num_attention_heads {heads}.",
            remedy=REMEDY,
        )
    return hidden_size // heads


def _activation(config: ConfigReader) -> str:
    name = config.text("hidden_act", default="silu")
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"The activation '{name}' (hidden_act) is not known.",
            remedy=f"Known activations: {', '.join(sorted(ACTIVATIONS))}.",
        )
    return ACTIVATIONS[name]


def _windows(config: ConfigReader, variant: LlamaVariant, layers: int, max_position: int) -> tuple[int | None, ...]:
    window = _window(config, variant)
    if window is None or window >= max_position:
        return (None,) * layers
    if variant.windows == "all":
        return (window,) * layers
    if config.has("layer_types"):
        kinds = config.texts("layer_types", layers)
        for kind in kinds:
            if kind not in (SLIDING, FULL):
                raise UnsupportedModel(f"layer_types holds '{kind}'.", remedy=f"Known: {SLIDING}, {FULL}.")
        return tuple(window if kind == SLIDING else None for kind in kinds)
    first = config.integer("max_window_layers", default=28, low=0)
    return tuple(window if layer >= first else None for layer in range(layers))


def _window(config: ConfigReader, variant: LlamaVariant) -> int | None:
    if variant.windows is None:
        return None
    if variant.windows == "by layer" and not config.flag("use_sliding_window", default=False):
        return None
    if "sliding_window" in config.fields and config.fields["sliding_window"] is None:
        return None
    return config.integer("sliding_window", default=variant.window)


def build_llama(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """Llama 2 and 3, SmolLM2."""
    return build_variant(read_llama_config(fields, LLAMA), g)


def build_mistral(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """Mistral: a sliding window in all layers, if any."""
    return build_variant(read_llama_config(fields, MISTRAL), g)


def build_qwen2(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """Qwen2 and Qwen2.5: biases of query, key and value."""
    return build_variant(read_llama_config(fields, QWEN2), g)


def build_qwen3(fields: Mapping[str, Any], g: GraphBuilder) -> Graph:
    """Qwen3: normed heads."""
    return build_variant(read_llama_config(fields, QWEN3), g)


def build_variant(config: LlamaConfig, g: GraphBuilder) -> Graph:
    """The graph of any member, from token ids to sampled tokens."""
    hidden = g.embedding(g.token_ids, "model.embed_tokens", config.vocab_size, config.hidden_size)
    for layer in range(config.layers):
        with g.scope(f"model.layers.{layer}"):
            x = g.rms_norm(hidden, "input_layernorm", config.epsilon)
            hidden = g.add(hidden, _attention(config, g, x, config.windows[layer]), name="attention_residual")
            x = g.rms_norm(hidden, "post_attention_layernorm", config.epsilon)
            hidden = g.add(hidden, _mlp(config, g, x), name="mlp_residual")
    x = g.rms_norm(g.rows_to_sample(hidden), "model.norm", config.epsilon)
    tied_to = "model.embed_tokens" if config.tied else None
    g.sample(g.logits(x, "lm_head", config.vocab_size, tied_to=tied_to))
    return g.finish(max_position=config.max_position)


def _attention(config: LlamaConfig, g: GraphBuilder, x: Value, window: int | None) -> Value:
    q_size, kv_size = config.heads * config.head_size, config.kv_heads * config.head_size
    q = g.linear(x, "self_attn.q_proj", q_size, bias=config.qkv_bias, split="columns")
    k = g.linear(x, "self_attn.k_proj", kv_size, bias=config.qkv_bias, split="columns")
    v = g.linear(x, "self_attn.v_proj", kv_size, bias=config.qkv_bias, split="columns")
    if config.head_norms:
        q = g.rms_norm(q, "self_attn.q_norm", config.epsilon, size=config.head_size)
        k = g.rms_norm(k, "self_attn.k_norm", config.epsilon, size=config.head_size)
    q, k = g.rotary(q, k, g.positions, config.rotary, name="self_attn.rotary")
    x = g.attention(
        q,
        k,
        v,
        cache=_cache(config, g, window),
        heads=config.heads,
        scale=config.head_size**-0.5,
        name="self_attn.attention",
    )
    return g.linear(x, "self_attn.o_proj", config.hidden_size, bias=config.output_bias, split="rows")


def _cache(config: LlamaConfig, g: GraphBuilder, window: int | None) -> CacheLayer:
    if window is None:
        return g.full_cache(kv_heads=config.kv_heads, key_size=config.head_size)
    return g.window_cache(window, kv_heads=config.kv_heads, key_size=config.head_size)


def _mlp(config: LlamaConfig, g: GraphBuilder, x: Value) -> Value:
    gate = g.linear(x, "mlp.gate_proj", config.intermediate_size, bias=config.mlp_bias, split="columns")
    up = g.linear(x, "mlp.up_proj", config.intermediate_size, bias=config.mlp_bias, split="columns")
    x = g.gated(gate, up, config.activation, name="mlp.gated")
    return g.linear(x, "mlp.down_proj", config.hidden_size, bias=config.mlp_bias, split="rows")
