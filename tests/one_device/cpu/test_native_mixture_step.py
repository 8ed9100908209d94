"""Steps of mixtures of experts run as one native plan, and give the tokens of the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from midspan.graph.passes import apply_passes
from midspan.interface import Device
from midspan.models.catalogue import build_graph

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}

MODELS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": {
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
    },
    "GraniteMoeForCausalLM": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
    },
}


@pytest.mark.parametrize("architecture", MODELS)
def test_a_plan_runs_all_nodes_of_a_mixture_but_sampling_and_gives_the_tokens_of_the_definition(
    architecture: str,
    cpu_device: Device,
    reference_device: Device,
    drive: Callable[..., Any],
    random_weights: Callable[..., Any],
) -> None:
    graph = build_graph({"architectures": [architecture], **SIZES, **MODELS[architecture]})
    weights = random_weights(graph)
    graph = apply_passes(graph)
    driver = drive(cpu_device, graph, weights)
    others = [line for line in driver.program._step.listing().splitlines() if line.startswith("on tensors")]
    assert others == ["on tensors: sample (sample)"]

    prompts = [[5, 9, 2, 77, 30], list(range(1, 40)), [3]]
    expected = drive(reference_device, graph, weights).generate(prompts, 6, budget=16, num_logprobs=2)
    found = driver.generate(prompts, 6, budget=16)
    for sequence, wanted in zip(found, expected, strict=True):
        gaps = [abs(np.subtract(*list(pair.values())[:2])) for pair in wanted.logprobs]
        assert min(gaps) > 1e-4
        assert sequence.generated == wanted.generated
