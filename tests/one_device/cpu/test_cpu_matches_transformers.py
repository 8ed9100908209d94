"""Random tiny models on the cpu device: logits and greedy tokens equal those of transformers, alone and in any batch.

Tolerance of logprobs, 1e-4: both compute in float32 and differ in the order of sums;
a sum of n products has a relative error of about sqrt(n) * 6e-8, which over three
layers of widths up to 128 gives some 1e-6 on logits of size 1 to 5. A wrong
frequency, window or bias misses by more than 1e-2.
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
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral with a window": ("Mistral", {"sliding_window": 21}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3 with wide heads": ("Qwen3", {"head_dim": 32}),
}

PORTABLE = {
    "attention": "portable",
    "linear": "portable",
    "logits": "portable",
    "rotary": "portable",
    "add_rms_norm": "portable",
    "rms_norm": "portable",
    "gated_pair": "portable",
    "embedding": "portable",
    "sample": "portable",
}


def tiny_model(kind: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(**SIZES, **fields, attn_implementation="eager", eos_token_id=None, bos_token_id=None)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.mul_(20.0 if "lm_head" in name or "embed_tokens" in name else 6.0)
    return model


def published(model: Any) -> dict[str, Any]:
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def arrays(model: Any) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [[int(token) for token in random.integers(0, SIZES["vocab_size"], length)] for length in lengths]


def next_logits(model: Any, tokens: list[int], first: int) -> Any:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, first:].numpy()


@pytest.mark.parametrize("kernels", ["best", "portable"])
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_of_mixed_chunked_batches_equal_transformers(
    case: str, kernels: str, drive: Callable[..., Any], open_cpu: Callable[[int], Device]
) -> None:
    model = tiny_model(*CASES[case])
    graph = apply_passes(build_graph(published(model)))
    # Torch's threads wait for each other by spinning: while another process of tests runs, two take ten times as long.
    threads, chosen = (1, PORTABLE) if kernels == "portable" else (2, {})
    driver = drive(open_cpu(threads), graph, arrays(model), kernels=chosen)
    asked = prompts((1, 7, 33, 90))

    sequences = driver.generate(asked, 64, budget=40, arrivals=(2, 0, 1, 0), num_logprobs=20)

    for prompt, sequence in zip(asked, sequences, strict=True):
        # Fed with our own tokens, transformers must find each of them the best: then its greedy tokens are the same.
        logits = next_logits(model, sequence.tokens[:-1], len(prompt) - 1)
        assert sequence.generated == logits.argmax(-1).tolist()
        shifted = logits - logits.max(-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        for row, top in enumerate(sequence.logprobs):
            assert max(abs(logprobs[row, token] - value) for token, value in top.items()) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_has_the_same_bits_alone_and_among_others_in_chunks_of_any_size(
    dtype: str, drive: Callable[..., Any], cpu_device: Device
) -> None:
    assert cpu_device.capabilities.batch_invariant
    model = tiny_model("Llama", {})
    graph = apply_passes(build_graph(published(model)))
    asked = prompts(tuple(range(3, 67)))
    driver = drive(cpu_device, graph, arrays(model), dtype=dtype, cache_dtype=dtype)

    together = driver.generate(asked, 12, budget=500, num_logprobs=5)
    picked = (0, 17, 63)
    alone = [
        driver.generate([asked[index]], 12, budget=budget, num_logprobs=5)[0] for index in picked for budget in (7, 500)
    ]

    for place, index in enumerate(picked):
        for other in alone[2 * place : 2 * place + 2]:
            assert other.tokens == together[index].tokens
            assert other.logprobs == together[index].logprobs


def test_after_losing_its_blocks_a_sequence_is_computed_again_to_the_same_bits(
    drive: Callable[..., Any], cpu_device: Device
) -> None:
    model = tiny_model("Qwen3", {"head_dim": 32})
    graph = apply_passes(build_graph(published(model)))
    driver = drive(cpu_device, graph, arrays(model), dtype="bfloat16", cache_dtype="bfloat16")
    (prompt,) = prompts((29,))
    undisturbed = driver.generate([prompt], 20, num_logprobs=5)[0]

    preempted = driver.generate([prompt], 9, num_logprobs=5)[0]
    driver.release(preempted)
    while len(preempted.generated) < 20:
        driver.step([(preempted, len(preempted.tokens) - preempted.computed)], num_logprobs=5)

    assert preempted.tokens == undisturbed.tokens
    assert preempted.logprobs == undisturbed.logprobs
