"""Experts' tensors have one set of names, however they are published."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from midspan.interface import Weight
from midspan.interface.weights import DENSE, PackedTensor
from midspan.weights.expert_tensors import with_expert_names
from midspan.weights.quantization import FORMATS, dequantize
from midspan.weights.store import CheckpointWeights
from midspan.weights.stored_tensor import Checkpoint, StoredTensor

EXPERTS, INNER, HIDDEN = 3, 4, 6
LAYER = "model.layers.2"


def stored(name: str, array: Any) -> StoredTensor:
    return StoredTensor(
        name=name,
        shape=array.shape,
        format=DENSE,
        dtype="float32",
        nbytes=array.nbytes,
        read=lambda: {"data": array},
    )


def experts() -> dict[str, np.ndarray]:
    """Gate, up and down of all experts, [experts, out, in], and biases of gate, up and down."""
    random = np.random.default_rng(0)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    weights = {part: random.standard_normal((EXPERTS, *shape)).astype(np.float32) for part, shape in shapes.items()}
    biases = {
        f"{part}_bias": random.standard_normal((EXPERTS, shape[0])).astype(np.float32) for part, shape in shapes.items()
    }
    return {**weights, **biases}


def turns(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.stack((gate, up), axis=-1).reshape(*gate.shape[:-1], -1)


def published(style: str) -> dict[str, np.ndarray]:
    all_of = experts()
    gate, up, down = (all_of[part] for part in ("gate_proj", "up_proj", "down_proj"))
    if style == "mixtral":
        parts = {"w1": gate, "w3": up, "w2": down}
        return {
            f"{LAYER}.block_sparse_moe.experts.{expert}.{part}.weight": array[expert]
            for part, array in parts.items()
            for expert in range(EXPERTS)
        }
    if style == "gpt-oss":
        return {
            f"{LAYER}.mlp.experts.gate_up_proj": turns(gate.swapaxes(1, 2), up.swapaxes(1, 2)),
            f"{LAYER}.mlp.experts.gate_up_proj_bias": turns(all_of["gate_proj_bias"], all_of["up_proj_bias"]),
            f"{LAYER}.mlp.experts.down_proj": np.ascontiguousarray(down.swapaxes(1, 2)),
            f"{LAYER}.mlp.experts.down_proj_bias": all_of["down_proj_bias"],
        }
    if style == "dbrx":
        return {
            f"{LAYER}.mlp.experts.mlp.w1": gate.reshape(-1, HIDDEN),
            f"{LAYER}.mlp.experts.mlp.v1": up.reshape(-1, HIDDEN),
            f"{LAYER}.mlp.experts.mlp.w2": np.ascontiguousarray(down.swapaxes(1, 2)).reshape(-1, HIDDEN),
        }
    together = np.concatenate((gate, up), axis=1)
    if style == "granite":
        prefix = f"{LAYER}.block_sparse_moe"
        return {f"{prefix}.input_linear.weight": together, f"{prefix}.output_linear.weight": down}
    return {f"{LAYER}.mlp.experts.gate_up_proj": together, f"{LAYER}.mlp.experts.down_proj": down}


def opened(tensors: dict[str, StoredTensor]) -> Checkpoint:
    from pathlib import Path

    return Checkpoint(path=Path("model"), config={}, generation_config={}, tensors=tensors)


def weight(parts: tuple[str, ...], kind: str = "weight") -> Weight:
    sources = tuple(f"{LAYER}.mlp.experts.{expert}.{part}.{kind}" for expert in range(EXPERTS) for part in parts)
    sizes = {"gate_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}[parts[0]]
    shape = (EXPERTS, *sizes) if kind == "weight" else (EXPERTS, sizes[0])
    return Weight(name="experts", shape=shape, sources=sources)


@pytest.mark.parametrize("style", ["mixtral", "granite", "together", "gpt-oss", "dbrx"])
def test_every_published_layout_gives_the_same_experts(style: str) -> None:
    arrays = published(style)
    tensors = with_expert_names({name: stored(name, array) for name, array in arrays.items()}, stacked=EXPERTS)
    checkpoint = opened(tensors)
    assert checkpoint.nbytes == sum(array.nbytes for array in arrays.values())
    source, all_of = CheckpointWeights(checkpoint, quantizations=()), experts()
    gate_up = source.load(weight(("gate_proj", "up_proj"))).parts["data"]
    assert np.array_equal(gate_up, np.concatenate((all_of["gate_proj"], all_of["up_proj"]), axis=1))
    assert np.array_equal(source.load(weight(("down_proj",))).parts["data"], all_of["down_proj"])
    if style == "gpt-oss":
        biases = source.load(weight(("gate_proj", "up_proj"), "bias")).parts["data"]
        assert np.array_equal(biases, np.concatenate((all_of["gate_proj_bias"], all_of["up_proj_bias"]), axis=1))
        assert np.array_equal(source.load(weight(("down_proj",), "bias")).parts["data"], all_of["down_proj_bias"])


def test_packed_experts_stay_packed_where_the_device_takes_their_format() -> None:
    layout = FORMATS["gguf.q8_0"]
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (EXPERTS * 2 * INNER, 2 * layout.layout.itemsize), np.uint8)
    blocks.view(layout.layout)["d"] = np.float16(0.01)
    shape = (EXPERTS, 2 * INNER, 64)
    together = StoredTensor(
        name=f"{LAYER}.mlp.experts.gate_up_proj",
        shape=shape,
        format="gguf.q8_0",
        dtype=None,
        nbytes=blocks.nbytes,
        read=lambda: {"blocks": blocks},
    )
    checkpoint = opened(with_expert_names({together.name: together}))
    wanted = Weight(name="experts", shape=shape, sources=weight(("gate_proj", "up_proj")).sources)
    packed = CheckpointWeights(checkpoint, quantizations=("gguf.q8_0",)).load(wanted)
    assert packed.format == "gguf.q8_0"
    assert np.array_equal(packed.parts["blocks"], blocks)
    plain = CheckpointWeights(checkpoint, quantizations=()).load(wanted)
    expected = dequantize(PackedTensor(name="x", shape=shape, format="gguf.q8_0", parts={"blocks": blocks}))
    assert np.array_equal(plain.parts["data"], expected)


def test_other_tensors_are_left_as_they_are() -> None:
    names = ("model.embed_tokens.weight", f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.experts.0.gate_proj.weight")
    tensors = {name: stored(name, np.zeros((2, 2), np.float32)) for name in names}
    assert tuple(with_expert_names(tensors)) == names
