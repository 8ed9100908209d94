"""A model's config.json, made from the metadata of a GGUF file.

It knows the metadata keys of the Llama family and the field names of the
published configs, and nothing of tensors' content, except for the rope factors
that this format keeps in a tensor. Source: the standardized keys of the GGUF
specification; the config fields of Hugging Face's Llama, Mistral, Qwen2 and Qwen3.

Llama 3's rope scaling is stored as a tensor with one factor for each pair of
columns. It is given as a ``longrope`` scaling with these factors for every length and
the amplitude 1, which divides each frequency by its factor and is nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.gguf_file import GgufFile

ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
"""``general.architecture`` -> (model_type, class name). Mistral models are stored as ``llama``."""

_DAMAGED = "The file is damaged or was written by a broken converter: download it again, or another version of it."
_DENSE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """Metadata with types checked."""

    file: GgufFile
    architecture: str

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one number for each layer, all equal
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._bad(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self._bad(key, value, "a number")
        return _shortest(value)

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata

    def _bad(self, key: str, value: object, wanted: str) -> CheckpointError:
        what = "is missing" if value is None else f"is {str(value)[:60]!r} and not {wanted}"
        return CheckpointError(f"{self.file.path}: metadata '{self.architecture}.{key}' {what}.", remedy=_DAMAGED)


def _shortest(value: float) -> float:
    """The decimal that a float32 was written from: 1e-05, where its exact value is 9.999999747e-06."""
    return float(str(np.float32(value)))


def config_from_metadata(file: GgufFile) -> dict[str, Any]:
    """The fields of config.json.

    Args:
        file: a file whose architecture is in ``ARCHITECTURES``.

    Returns:
        A config as the original model's, as far as the file keeps it. ``torch_dtype`` is there only
        when the embedding table is stored dense; a quantized file does not say what it was made from.

    Raises:
        CheckpointError: a key is missing or has a value that cannot be.
        UnsupportedModel: the model has a part that is not known here.
    """
    architecture = file.metadata["general.architecture"]
    keys = _Keys(file=file, architecture=architecture)
    if keys.has("expert_count") and file.metadata[f"{architecture}.expert_count"] != 0:
        raise UnsupportedModel(
            f"{file.path} is a mixture of experts, which cannot be read from GGUF.",
            remedy="Take the model as safetensors, if its architecture is supported.",
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} has no embedding table 'token_embd.weight'.", remedy=_DAMAGED)
    model_type, class_name = ARCHITECTURES[architecture]
    if model_type == "llama" and keys.has("attention.sliding_window"):
        model_type, class_name = "mistral", "MistralForCausalLM"
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config |= _attention(keys) | _rope(keys) | _special_tokens(file.metadata)
    if embedding.type.name in _DENSE_NAMES:
        config["torch_dtype"] = _DENSE_NAMES[embedding.type.name]
    _check_heads(keys, config)
    return config


def _attention(keys: _Keys) -> dict[str, Any]:
    heads = keys.integer("attention.head_count")
    hidden_size = keys.integer("embedding_length")
    sliding_window = keys.integer("attention.sliding_window") if keys.has("attention.sliding_window") else None
    fields: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": keys.integer("attention.key_length", max(1, hidden_size // heads)),
        "sliding_window": sliding_window,
    }
    if keys.architecture != "llama":
        fields["use_sliding_window"] = sliding_window is not None
    if keys.architecture != "qwen2":  # whose biases are a part of the architecture
        fields["attention_bias"] = "blk.0.attn_q.bias" in keys.file.tensors
    if keys.architecture == "llama":
        fields["mlp_bias"] = "blk.0.ffn_gate.bias" in keys.file.tensors
    return fields


def _check_heads(keys: _Keys, config: Mapping[str, Any]) -> None:
    head_dim, path = config["head_dim"], keys.file.path
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(
            f"{path} has value heads of another size than key heads, which cannot be read from GGUF."
        )
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(f"{path} rotates a part of each head only, which cannot be read from GGUF.")


def _rope(keys: _Keys) -> dict[str, Any]:
    scaling = _rope_scaling(keys)
    factors = _rope_factors(keys)
    if scaling is not None and factors is not None:
        raise UnsupportedModel(
            f"{keys.file.path} has rope factors beside another rope scaling, which is not known here."
        )
    theta = keys.number("rope.freq_base", 10000.0)
    return {"rope_theta": theta, "rope_scaling": scaling if factors is None else factors}


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.file.metadata.get(f"{keys.architecture}.rope.scaling.type")
    if kind is None and keys.has("rope.scale_linear"):
        return {"rope_type": "linear", "factor": keys.number("rope.scale_linear")}
    if kind is None or kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if kind != "yarn":
        raise UnsupportedModel(
            f"{keys.file.path} scales its positions by {kind!r}, which cannot be read from GGUF.",
            remedy="Rope scalings none, linear and yarn, and rope factors (Llama 3), can be read.",
        )
    return _yarn(keys)


def _yarn(keys: _Keys) -> dict[str, Any]:
    factor = keys.number("rope.scaling.factor")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", keys.integer("context_length")
        ),
    }
    for field, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if keys.has(f"rope.scaling.{key}"):
            scaling[field] = keys.number(f"rope.scaling.{key}")
    for key in ("rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor"):
        if keys.has(key):
            # The file's factor multiplies the usual amplitude; the config's replaces it.
            scaling["attention_factor"] = keys.number(key) * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
            break
    return scaling


def _rope_factors(keys: _Keys) -> dict[str, Any] | None:
    tensor = keys.file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.type.name != "F32":
        raise UnsupportedModel(f"{keys.file.path}: the rope factors are stored as {tensor.type.name}, not as F32.")
    factors = np.ascontiguousarray(tensor.data).view("<f4").reshape(-1)
    heads = keys.integer("attention.head_count")
    pairs = keys.integer("attention.key_length", max(1, keys.integer("embedding_length") // heads)) // 2
    if factors.shape != (pairs,) or not np.isfinite(factors).all() or not (factors > 0).all():
        raise CheckpointError(
            f"{keys.file.path}: 'rope_freqs.weight' must hold {pairs} positive factors.", remedy=_DAMAGED
        )
    exact = factors.tolist()
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": keys.integer("context_length"),
        "short_factor": exact,
        "long_factor": exact,
    }


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    fields = {}
    for field, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(value, int):
            fields[f"{field}_token_id"] = value
    return fields


def generation_config_from_metadata(file: GgufFile) -> dict[str, Any]:
    """The fields of generation_config.json: end tokens, and the sampling that the publisher recommends.

    ``eos_token_id`` is a list when the file names more than one token that ends a turn.
    """
    config: dict[str, Any] = {}
    for field, key in (
        ("temperature", "temp"),
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("repetition_penalty", "penalty_repeat"),
    ):
        value = file.metadata.get(f"general.sampling.{key}")
        if isinstance(value, (int, float)) and math.isfinite(value):
            config[field] = value if isinstance(value, int) else _shortest(value)
    config |= _special_tokens(file.metadata)
    ends = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    if len(distinct) > 1:
        config["eos_token_id"] = distinct
    return config
