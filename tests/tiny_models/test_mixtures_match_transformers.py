"""Random tiny mixtures of experts: logits and greedy tokens equal those of transformers, on the reference and on cpu.

Tolerance of logits, 1e-4: see ``test_reference_matches_transformers``. Experts are chosen by differences: a row
whose best refused expert is as good as its worst chosen one would be decided by rounding. Router weights are
large, so that none is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from midspan.graph.passes import apply_passes
from midspan.interface import Device
from midspan.models.catalogue import build_graph
from midspan.weights.checkpoint import open_checkpoint
from midspan.weights.store import CheckpointWeights
from midspan_cpu.plugin import PLUGIN

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

GPT_OSS = {"head_dim": 16, "sliding_window": 13, "num_local_experts": 6, "num_experts_per_tok": 2}
GLM = {
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "num_mtp_layers": 0,
    "routed_scaling_factor": 1.5,
}
GRANITE = {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "embedding_multiplier": 3.0, "logits_scaling": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral window": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 13}),
    "qwen2 moe": (
        "Qwen2Moe",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "qwen2 moe, some dense layers": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 33,
            "shared_expert_intermediate_size": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 17,
        },
    ),
    "qwen3 moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24},
    ),
    "qwen3 moe, every other layer": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe, normalized": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 8, "norm_topk_prob": True}),
    "granite moe": ("GraniteMoe", {"num_local_experts": 6, "num_experts_per_tok": 3, **GRANITE}),
    "glm 4.5": ("Glm4Moe", {**GLM, "use_qk_norm": True, "attention_bias": True}),
    "glm 4.5, groups": (
        "Glm4Moe",
        {**GLM, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 2},
    ),
    "gpt-oss": ("GptOss", {**GPT_OSS, "rope_parameters": {**YARN, "truncate": False}}),
    "gpt-oss, low limit": ("GptOss", {**GPT_OSS, "num_experts_per_tok": 4, "swiglu_limit": 0.5, "swiglu_alpha": 2.0}),
}

PROMPT_LENGTHS = (1, 7, 33, 60)


def _model(kind: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(
        **{**SIZES, **fields},
        attn_implementation="eager",
        experts_implementation="eager",
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            if not weight.is_floating_point() or "inv_freq" in name:
                continue
            if name.endswith(("bias", "sinks")) or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
            elif "lm_head" in name or "embed_tokens" in name:
                weight.copy_(torch.randn_like(weight) * 0.4)
            elif name.endswith(("gate.weight", "router.weight")):
                weight.copy_(torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * 0.12)
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any, CheckpointWeights]]:
    """``saved(case)``: the model, its graph before passes, and the weights of its folder under published names."""
    models: dict[str, tuple[Any, Path]] = {}

    def make(case: str) -> tuple[Any, Any, CheckpointWeights]:
        if case not in models:
            folder = tmp_path_factory.mktemp("mixture")
            model = _model(*CASES[case])
            model.save_pretrained(folder)
            models[case] = model, folder
        model, folder = models[case]
        checkpoint = open_checkpoint(folder)
        return model, build_graph(checkpoint.config), CheckpointWeights(checkpoint, quantizations=())

    return make


@pytest.fixture(params=["reference", "cpu", "portable"])
def device(request: pytest.FixtureRequest, reference_device: Device) -> Any:
    """(device, kernels that are asked for)."""
    if request.param == "reference":
        yield reference_device, {}
        return
    opened = PLUGIN.open(PLUGIN.probe().devices[0], {"threads": "1"})
    yield opened, dict.fromkeys(("route", "experts", "scale_rows"), "portable") if request.param == "portable" else {}
    opened.close()


def _prompts() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [[int(token) for token in random.integers(0, SIZES["vocab_size"], n)] for n in PROMPT_LENGTHS]


def _logits(model: Any, tokens: list[int], first: int) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([tokens]), use_cache=False).logits[0, first:].numpy()
    return logits


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_of_mixed_chunked_batches_equal_transformers(
    case: str, saved: Callable[..., Any], drive: Callable[..., Any], device: tuple[Device, dict[str, str]]
) -> None:
    model, graph, weights = saved(case)
    driver = drive(device[0], apply_passes(graph), weights, block_size=16, kernels=device[1])

    sequences = driver.generate(_prompts(), 32, budget=40, arrivals=(2, 0, 1, 0), num_logprobs=20)

    for prompt, sequence in zip(_prompts(), sequences, strict=True):
        # Fed with our own tokens, transformers must find each of them the best: then its greedy tokens are the same.
        logits = _logits(model, sequence.tokens[:-1], len(prompt) - 1)
        assert np.abs(logits).max() > 0.5
        assert sequence.generated == logits.argmax(-1).tolist()
        shifted = logits - logits.max(-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        for row, top in enumerate(sequence.logprobs):
            assert np.allclose(list(top.values()), logprobs[row][list(top)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["mixtral", "qwen2 moe", "granite moe", "gpt-oss"])
def test_a_folder_with_all_experts_in_one_tensor_gives_the_same_weights(
    case: str, saved: Callable[..., Any], tmp_path: Path
) -> None:
    model, graph, published = saved(case)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    together = CheckpointWeights(open_checkpoint(tmp_path), quantizations=())
    for weight in graph.weights.values():
        assert np.array_equal(together.load(weight).parts["data"], published.load(weight).parts["data"])
