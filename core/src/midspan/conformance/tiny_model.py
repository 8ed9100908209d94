"""Random models small enough for every step to be looked at, and their weights in memory.

They go the way of published ones: a config, a builder, all passes. Knows no device.

Invariants: weights are a function of the model's name, and of numbers that float32, bfloat16 and
float16 all hold exactly, so that only what is computed can differ; logits lie far enough
apart for a greedy choice to mean something.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.random_values import grid
from midspan.graph.passes import apply_passes
from midspan.interface import Graph, WeightSource
from midspan.interface.weights import DENSE
from midspan.models.catalogue import build_graph
from midspan.weights.store import CheckpointWeights
from midspan.weights.stored_tensor import Checkpoint, StoredTensor

MAX_POSITION = 4096

_SHAPE: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_POSITION,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "plain": {**_SHAPE, "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "tie_word_embeddings": False},
    "windowed": {
        **_SHAPE,
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 300,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 11,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
"""Name -> published config. Together they have grouped heads, biases, two cache groups, and embeddings of
their own as well as shared ones; sizes are no powers of two where they need not be."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TinyModel:
    """A model without files.

    Attributes:
        name: a key of ``CONFIGS``.
        graph: after all passes.
        checkpoint: all published tensors; none of their numbers is made yet.
    """

    name: str
    graph: Graph
    checkpoint: Checkpoint

    def weights(self) -> WeightSource:
        """What a device compiles the graph with."""
        return CheckpointWeights(self.checkpoint, quantizations=())

    def with_tensor(self, name: str, content: NDArray[np.float32]) -> TinyModel:
        """The same model with another content of one published tensor."""
        tensor = _stored(name, content.shape, lambda: content)
        tensors = {**self.checkpoint.tensors, name: tensor}
        return replace(self, checkpoint=replace(self.checkpoint, tensors=tensors))

    def without_tensor(self, name: str) -> TinyModel:
        """The same model with one published tensor missing."""
        tensors = {key: tensor for key, tensor in self.checkpoint.tensors.items() if key != name}
        return replace(self, checkpoint=replace(self.checkpoint, tensors=tensors))

    def tensor(self, name: str) -> NDArray[Any]:
        """The content of a published tensor."""
        return self.checkpoint.tensors[name].read()["data"]


def tiny_model(name: str, **fields: Any) -> TinyModel:
    """Make a model.

    Args:
        name: a key of ``CONFIGS``.
        fields: fields of the config to replace.
    """
    config = {**CONFIGS[name], **fields}
    graph = build_graph(config)
    tensors = {
        weight.name: _stored(weight.name, weight.shape, partial(_numbers, f"{name} {weight.name}", weight.shape))
        for weight in graph.weights.values()
    }
    checkpoint = Checkpoint(path=Path(f"tiny-{name}"), config=config, generation_config={}, tensors=tensors)
    return TinyModel(name=name, graph=apply_passes(graph), checkpoint=checkpoint)


def _stored(name: str, shape: tuple[int, ...], read: Callable[[], NDArray[np.float32]]) -> StoredTensor:
    return StoredTensor(
        name=name,
        shape=shape,
        format=DENSE,
        dtype="float32",
        nbytes=4 * math.prod(shape),
        read=lambda: {"data": read()},
    )


def _numbers(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A tensor's content: a function of its name and shape."""
    digest = hashlib.sha256(name.encode()).digest()
    numbers: NDArray[Any] = grid(np.random.default_rng(int.from_bytes(digest[:8], "little")), shape)
    if len(shape) == 1:
        # Around 1 for norms and around 0 for biases, in steps that have few bits.
        middle = 1.0 if "norm" in name else 0.0
        numbers = middle + np.round(numbers * 4) / 64
    else:
        # A power of two near 1 / sqrt(columns) keeps the size of what is multiplied, and numbers their few bits.
        size = 4.0 if "embed_tokens" in name or "lm_head" in name else 1.0
        numbers = numbers * size * 2.0 ** -round(math.log2(shape[-1]) / 2)
    return numbers.astype(np.float32)
