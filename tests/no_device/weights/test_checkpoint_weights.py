"""Weights as a graph asks for them: joined, unpacked where nobody claimed the format, and checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.interface import PackedTensor, Weight
from midspan.weights.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from midspan.weights.quantization import dequantize
from midspan.weights.store import CheckpointWeights, LoadProgress

QKV = tuple(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")


def checkpoint_of(**arrays: NDArray[Any]) -> Checkpoint:
    """A checkpoint over arrays."""

    def stored(name: str, array: NDArray[Any]) -> StoredTensor:
        return StoredTensor(
            name=name,
            shape=array.shape,
            format="dense",
            dtype=array.dtype.name,
            nbytes=array.nbytes,
            read=lambda: {"data": array},
        )

    return Checkpoint(
        path=Path("memory"),
        config={},
        generation_config={},
        tensors={name: stored(name, array) for name, array in arrays.items()},
    )


@pytest.fixture
def quantized(tmp_path: Path, write_gguf: Callable[..., Path], published_tensors: Any) -> Checkpoint:
    return open_checkpoint(write_gguf(tmp_path / "m.gguf", published_tensors, kind="Q8_0"))


def dense(tensor: PackedTensor) -> NDArray[Any]:
    assert tensor.format == "dense"
    return tensor.parts["data"]


def test_a_claimed_format_stays_packed_and_joined_rows_unpack_to_the_joined_tensors(quantized: Checkpoint) -> None:
    weight = Weight(name="qkv", shape=(128, 64), sources=QKV)
    joined = CheckpointWeights(quantized, quantizations=("gguf.q8_0",)).load(weight)
    assert (joined.format, joined.shape, joined.parts["blocks"].shape) == ("gguf.q8_0", (128, 64), (128, 68))
    apart = np.concatenate([dequantize(quantized.tensors[name].packed()) for name in QKV])
    np.testing.assert_array_equal(dequantize(joined), apart)
    unpacked = CheckpointWeights(quantized, quantizations=("gguf.q4_1",)).load(weight)
    np.testing.assert_array_equal(dense(unpacked), apart)


def test_one_packed_tensor_is_not_copied(quantized: Checkpoint) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights = CheckpointWeights(quantized, quantizations=("gguf.q8_0",))
    first, second = (weights.load(Weight(name=name, shape=(96, 64))).parts["blocks"] for _ in range(2))
    assert np.shares_memory(first, second)


def test_unpacked_weights_have_the_type_that_was_asked_for_and_stored_ones_keep_theirs(quantized: Checkpoint) -> None:
    weights = CheckpointWeights(quantized, quantizations=(), dtype="bfloat16")
    assert dense(weights.load(Weight(name=QKV[0], shape=(64, 64)))).dtype == ml_dtypes.bfloat16
    assert dense(weights.load(Weight(name="model.norm.weight", shape=(64,)))).dtype == np.float32


def test_sources_of_several_formats_are_unpacked_and_joined_as_float32(tmp_path: Path, quantized: Checkpoint) -> None:
    mixed = Checkpoint(
        path=tmp_path,
        config={},
        generation_config={},
        tensors={**quantized.tensors, **checkpoint_of(half=np.ones((2, 64), np.float16)).tensors},
    )
    weights = CheckpointWeights(mixed, quantizations=("gguf.q8_0",))
    data = dense(weights.load(Weight(name="w", shape=(66, 64), sources=(QKV[0], "half"))))
    assert data.dtype == np.float32
    np.testing.assert_array_equal(data[:64], dequantize(quantized.tensors[QKV[0]].packed()))
    np.testing.assert_array_equal(data[64:], 1)


def test_joined_tensors_of_one_type_keep_it_and_joined_biases_are_dense(as_bfloat16: Any) -> None:
    a, b = as_bfloat16(np.arange(3.0)), as_bfloat16(np.arange(2.0))
    weights = CheckpointWeights(checkpoint_of(a=a, b=b), quantizations=("gguf.q8_0",))
    data = dense(weights.load(Weight(name="bias", shape=(5,), sources=("a", "b"))))
    assert data.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(data.astype(np.float32), [0, 1, 2, 0, 1])


def test_float64_is_rounded_and_integers_are_no_weights() -> None:
    weights = CheckpointWeights(
        checkpoint_of(wide=np.array([0.1, 0.2]), packed=np.zeros((2, 2), np.int32)), quantizations=()
    )
    assert dense(weights.load(Weight(name="wide", shape=(2,)))).dtype == np.float32
    with pytest.raises(UnsupportedModel, match="'packed' holds int32"):
        weights.load(Weight(name="packed", shape=(2, 2)))


def test_a_mapped_safetensors_weight_is_given_as_a_view(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    weights = CheckpointWeights(open_checkpoint(tmp_path), quantizations=())
    first, second = (dense(weights.load(Weight(name="w", shape=(4, 4)))) for _ in range(2))
    assert np.shares_memory(first, second)


def test_a_missing_tensor_is_named_with_what_it_is_a_part_of_and_near_names(quantized: Checkpoint) -> None:
    weights = CheckpointWeights(quantized, quantizations=())
    weight = Weight(name="qkv", shape=(128, 64), sources=(*QKV[:2], "model.layers.0.self_attn.v_prj.weight"))
    with pytest.raises(CheckpointError) as caught:
        weights.load(weight)
    assert "'model.layers.0.self_attn.v_prj.weight', a part of 'qkv'" in caught.value.message
    assert "model.layers.0.self_attn.v_proj.weight" in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (Weight(name="a", shape=(3, 2)), r"'a' must have the shape \[3, 2\] .* 'a' \[2, 3\]"),
        (Weight(name="a", shape=(6,)), r"\[6\]"),
        (Weight(name="ab", shape=(4, 3), sources=("a", "b")), r"'a' \[2, 3\] \+ 'b' \[2, 4\]"),
        (Weight(name="aa", shape=(5, 3), sources=("a", "a")), r"\[5, 3\]"),
        (Weight(name="as", shape=(3, 3), sources=("a", "s")), r"'s' \[\]"),
    ],
)
def test_a_wrong_shape_names_the_tensor_and_both_shapes(weight: Weight, says: str) -> None:
    checkpoint = checkpoint_of(a=np.zeros((2, 3)), b=np.zeros((2, 4)), s=np.zeros(()))
    with pytest.raises(CheckpointError, match=says):
        CheckpointWeights(checkpoint, quantizations=()).load(weight)


def test_progress_counts_each_stored_byte_once_and_ends_with_all(quantized: Checkpoint) -> None:
    reports: list[LoadProgress] = []
    weights = CheckpointWeights(quantized, quantizations=(), report=reports.append)
    for name, tensor in [*quantized.tensors.items(), *quantized.tensors.items()]:
        weights.load(Weight(name=name, shape=tensor.shape))
    done = [report.bytes_done for report in reports]
    assert done == sorted(done)
    assert done[len(quantized.tensors) - 1] == done[-1] == quantized.nbytes == reports[-1].bytes_total
