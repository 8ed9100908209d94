"""Random tiny models: logits and greedy tokens of the reference equal those of transformers.

Tolerance of logits, 1e-4: both compute in float32 and differ in the order of sums.
A sum of n products has a relative error of about sqrt(n) * 6e-8; with widths of at
most 128 and three layers that gives some 1e-6 on logits of size 1 to 5, and 1e-4
leaves room for it while a wrong frequency, window or bias misses by more than 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from midspan.graph.passes import apply_passes
from midspan.interface import Device
from midspan.models.catalogue import build_graph

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128)
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama linear": ("Llama", {"rope_parameters": _rope("linear", factor=2.5)}),
    "llama dynamic": ("Llama", {"rope_parameters": _rope("dynamic", factor=2.0)}),
    "llama llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("Llama", {"head_dim": 20, "hidden_act": "gelu"}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 13}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 mixed windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 mixed windows": (
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "layer_types": LAYERS},
    ),
}

PROMPT_LENGTHS = (1, 7, 33, 90)


def _model(kind: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(**SIZES, **fields, attn_implementation="eager", eos_token_id=None, bos_token_id=None)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
            elif "lm_head" in name or "embed_tokens" in name:
                weight.mul_(20.0)
            else:
                weight.mul_(6.0)
    return model


def _published(model: Any) -> dict[str, Any]:
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    if model.config.model_type == "qwen2":
        del config["layer_types"]  # as in published files, which state max_window_layers only
    return config


def _arrays(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def _prompts() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [[int(token) for token in random.integers(0, SIZES["vocab_size"], n)] for n in PROMPT_LENGTHS]


def _logits(model: Any, tokens: list[int], first: int) -> np.ndarray:
    """Logits [tokens, vocabulary] after each token from ``first`` on."""
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([tokens]), use_cache=False).logits[0, first:].numpy()
    return logits


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_of_mixed_chunked_batches_equal_transformers(
    case: str, drive: Callable[..., Any], reference_device: Device
) -> None:
    model = _model(*CASES[case])
    graph = apply_passes(build_graph(_published(model)))
    driver = drive(reference_device, graph, _arrays(model), block_size=8)

    sequences = driver.generate(_prompts(), 64, budget=40, arrivals=(2, 0, 1, 0), num_logprobs=20)

    for prompt, sequence in zip(_prompts(), sequences, strict=True):
        # Fed with our own tokens, transformers must find each of them the best: then its greedy tokens are the same.
        logits = _logits(model, sequence.tokens[:-1], len(prompt) - 1)
        assert sequence.generated == logits.argmax(-1).tolist()
        shifted = logits - logits.max(-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        for row, top in enumerate(sequence.logprobs):
            assert np.allclose(list(top.values()), logprobs[row][list(top)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, drive: Callable[..., Any], reference_device: Device) -> None:
    model = _model(*CASES[case])
    graph = build_graph(_published(model))
    driver = drive(reference_device, graph, _arrays(model))
    for prompt in _prompts():
        batch, _sampled = driver.batch([(driver.sequence(prompt), len(prompt))])
        logits = driver.program.values(batch, driver.cache, ["lm_head"])["lm_head"]
        expected = _logits(model, prompt, len(prompt) - 1)
        assert np.abs(expected).max() > 0.5
        assert np.allclose(logits, expected, rtol=0, atol=1e-4)
