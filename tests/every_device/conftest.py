"""One tiny random model on disk, for every device that is installed here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 320
HIDDEN_SIZE = 32
HEAD_SIZE = 8
HEADS = 4
KV_HEADS = 2
MLP_SIZE = 48
CONTEXT = 1024

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"

DEVICES = ("reference", "cpu", "simulated")


@pytest.fixture(scope="session")
def device_names() -> tuple[str, ...]:
    """The devices of this repository."""
    return DEVICES


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of two layers whose logits stand far apart."""
    folder = tmp_path_factory.mktemp("model")
    random = np.random.default_rng(11)

    def matrix(rows: int, columns: int, scale: float = 2.0) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * scale / columns**0.5).astype(np.float32)

    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN_SIZE),
        "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN_SIZE),
        "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN_SIZE),
        "self_attn.o_proj": (HIDDEN_SIZE, HEADS * HEAD_SIZE),
        "mlp.gate_proj": (MLP_SIZE, HIDDEN_SIZE),
        "mlp.up_proj": (MLP_SIZE, HIDDEN_SIZE),
        "mlp.down_proj": (HIDDEN_SIZE, MLP_SIZE),
    }
    weights = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN_SIZE, 4.0),
        "model.norm.weight": np.ones(HIDDEN_SIZE, np.float32),
        "lm_head.weight": matrix(VOCAB_SIZE, HIDDEN_SIZE, 3.0),
    }
    for layer in range(2):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(HIDDEN_SIZE, np.float32)
    save_file(weights, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": MLP_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*alphabet, "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
