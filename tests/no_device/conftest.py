"""A tiny random model on disk, as a real one lies there: config, safetensors, tokenizer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice, discover, load_plugins
from midspan.engine.llm import LLM
from midspan.errors import GraphError
from midspan.interface import (
    INTERFACE_VERSION,
    Batch,
    Bounds,
    Cache,
    DeviceInfo,
    DevicePlugin,
    FinishedStep,
    Found,
    Graph,
    Placement,
    StepResult,
    WeightSource,
)
from midspan.runtimes.reference.device import CAPABILITIES, ReferenceDevice

VOCAB_SIZE = 320
HIDDEN_SIZE = 32
HEAD_SIZE = 8
HEADS = 4
KV_HEADS = 2
MLP_SIZE = 48
LAYERS = 2
CONTEXT = 256

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a tale of two cities and of three bears",
    "to be or not to be that is the question",
    "naïve café, zwölf Boxkämpfer, 東京 🎉",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WriteModel = Callable[..., Path]


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|im_start|>", "<|im_end|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _weights(seed: int, layers: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray[Any, Any]:
        return (random.standard_normal((rows, columns)) * scale / columns**0.5).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN_SIZE, 4.0),
        "model.norm.weight": np.ones(HIDDEN_SIZE, np.float32),
        # Large logits: greedy choices then stand far apart, and a random model does not repeat itself at once.
        "lm_head.weight": matrix(VOCAB_SIZE, HIDDEN_SIZE, 3.0),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}"
        weights[f"{name}.input_layernorm.weight"] = np.ones(HIDDEN_SIZE, np.float32)
        weights[f"{name}.post_attention_layernorm.weight"] = np.ones(HIDDEN_SIZE, np.float32)
        weights[f"{name}.self_attn.q_proj.weight"] = matrix(HEADS * HEAD_SIZE, HIDDEN_SIZE, 2.0)
        weights[f"{name}.self_attn.k_proj.weight"] = matrix(KV_HEADS * HEAD_SIZE, HIDDEN_SIZE, 2.0)
        weights[f"{name}.self_attn.v_proj.weight"] = matrix(KV_HEADS * HEAD_SIZE, HIDDEN_SIZE, 2.0)
        weights[f"{name}.self_attn.o_proj.weight"] = matrix(HIDDEN_SIZE, HEADS * HEAD_SIZE, 2.0)
        weights[f"{name}.mlp.gate_proj.weight"] = matrix(MLP_SIZE, HIDDEN_SIZE, 2.0)
        weights[f"{name}.mlp.up_proj.weight"] = matrix(MLP_SIZE, HIDDEN_SIZE, 2.0)
        weights[f"{name}.mlp.down_proj.weight"] = matrix(HIDDEN_SIZE, MLP_SIZE, 2.0)
    return weights


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> WriteModel:
    """Write a random Llama into a folder of its own.

    ``write_model(seed=0, generation_config=None, **config)``: more fields of config.json by name.
    """

    def write(*, seed: int = 0, generation_config: dict[str, Any] | None = None, **config: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        fields = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": MLP_SIZE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_SIZE,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            **config,
        }
        (folder / "config.json").write_text(json.dumps(fields))
        if generation_config is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation_config))
        save_file(_weights(seed, fields["num_hidden_layers"]), folder / "model.safetensors")
        _write_tokenizer(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_model(write_model: WriteModel) -> Path:
    """The folder of a random Llama of two layers, 320 tokens and 256 positions."""
    return write_model()


@pytest.fixture(scope="session")
def reference_only() -> DeviceCatalogue:
    """The built-in device alone, whatever is installed."""
    return discover([])


STEP_SECONDS, TOKEN_SECONDS, CONTEXT_SECONDS = 2**-9, 2**-16, 2**-20
"""A step of the ticking device, and each token and each token of context in it; powers of two, so sums are exact."""


class TickingProgram:
    """Computes nothing: token 0 for each row, and the seconds that its device would take."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def run(self, batch: Batch, cache: Cache) -> FinishedStep:
        seconds = STEP_SECONDS + TOKEN_SECONDS * len(batch.token_ids)
        seconds += CONTEXT_SECONDS * int(batch.context_lengths.sum())
        tokens = np.zeros(len(batch.rows_to_sample), np.int32)
        return FinishedStep(step_result=StepResult(token_ids=tokens, device_seconds=seconds))

    def evaluate(self, inputs: Any, cache: Cache | None = None) -> tuple[Any, ...]:
        raise GraphError("The ticking device computes nothing.")

    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing to release."""


class TickingDevice(ReferenceDevice):
    """A device with a clock of its own, which never asks for a weight."""

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> Any:
        return TickingProgram(Placement(device=self.info.id, nodes=()))


@pytest.fixture(scope="session")
def ticking() -> DeviceCatalogue:
    """A catalogue whose only device is ``ticking``: a virtual clock, and no numbers."""
    info = DeviceInfo(id="ticking", description="a clock", memory_bytes=2**30, preference=1)
    capabilities = dataclasses.replace(CAPABILITIES, virtual_clock=True, shares_host_memory=False)
    plugin = DevicePlugin(
        name="ticking",
        interface=INTERFACE_VERSION,
        probe=lambda: Found((info,)),
        open=lambda info, options: TickingDevice(info, capabilities=capabilities),
    )
    discovered = DiscoveredDevice(plugin=plugin, distribution="tests", version="1", probe=plugin.probe())
    return DeviceCatalogue(plugins={"ticking": discovered}, failures=(), registry=load_plugins([]))


@pytest.fixture
def config_only(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> Path:
    """A folder with a tiny Llama's config.json and nothing else."""
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config(torch_dtype="bfloat16")))
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tiny_model: Path, reference_only: DeviceCatalogue) -> LLM:
    """The tiny model on the reference device. Shared: leave nothing in it."""
    return LLM(str(tiny_model), catalogue=reference_only, kv_cache_memory_bytes=4 * 2**20, block_size=4)
