"""Unpacking of packed formats, held against the gguf package's own, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.gguf_file import TENSOR_TYPES, read_gguf
from midspan.interface import PackedTensor
from midspan.weights.quantization import FORMATS, dequantize


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random bytes, except that the float16 scales are finite."""
    random = np.random.default_rng(seed)
    layout = FORMATS[name].layout
    raw = random.integers(0, 256, (rows, blocks * layout.itemsize), dtype=np.uint8)
    view = raw.reshape(-1).view(layout)
    for field in {"d", "m", "dmin"} & set(layout.names or ()):
        view[field] = random.standard_normal(view.shape).astype(np.float16)
    return raw


def packed(name: str, raw: NDArray[np.uint8]) -> PackedTensor:
    values = raw.shape[1] // FORMATS[name].layout.itemsize * FORMATS[name].values
    return PackedTensor(name="w", shape=(raw.shape[0], values), format=name, parts={"blocks": raw})


def theirs(name: str, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    kind = gguf.GGMLQuantizationType[name.removeprefix("gguf.").upper()]
    result: NDArray[np.float32] = gguf.quants.dequantize(raw, kind)
    return result


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_random_blocks_unpack_to_the_same_bits_as_the_gguf_package(name: str) -> None:
    raw = random_blocks(name, rows=37, blocks=5)
    np.testing.assert_array_equal(dequantize(packed(name, raw)), theirs(name, raw))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_more_blocks_than_one_chunk_unpack_the_same(name: str) -> None:
    raw = random_blocks(name, rows=600, blocks=1024 // FORMATS[name].values, seed=1)
    np.testing.assert_array_equal(dequantize(packed(name, raw)), theirs(name, raw))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_unpacking_to_bfloat16_is_the_rounded_float32(name: str) -> None:
    tensor = packed(name, random_blocks(name, rows=9, blocks=3, seed=2))
    small = dequantize(tensor, "bfloat16")
    assert small.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        small.astype(np.float32), dequantize(tensor).astype(ml_dtypes.bfloat16).astype(np.float32)
    )


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_dense_types_become_float32_exactly(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    numbers = np.random.default_rng(3).standard_normal((6, 64)).astype(np.float32)
    stored = gguf.quants.quantize(numbers, kind)
    data = stored.view(ml_dtypes.bfloat16) if name == "BF16" else stored
    tensor = PackedTensor(name="w", shape=(6, 64), format="dense", parts={"data": data})
    np.testing.assert_array_equal(dequantize(tensor), gguf.quants.dequantize(stored, kind))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_infinite_scales_unpack_without_a_warning(name: str) -> None:
    raw = random_blocks(name, rows=2, blocks=1)
    raw.reshape(-1).view(FORMATS[name].layout)["d"] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not np.isfinite(dequantize(packed(name, raw), "float16")).all()


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        known = TENSOR_TYPES.get(int(kind))
        assert known is None or (known.name, known.values, known.size) == (kind.name, *sizes)
    for name, entry in FORMATS.items():
        kind = gguf.GGMLQuantizationType[name.removeprefix("gguf.").upper()]
        assert gguf.GGML_QUANT_SIZES[kind] == (entry.values, entry.layout.itemsize)


def test_bytes_that_do_not_fit_the_shape_are_an_error() -> None:
    raw = random_blocks("gguf.q8_0", rows=4, blocks=2)
    tensor = PackedTensor(name="layer.w", shape=(5, 64), format="gguf.q8_0", parts={"blocks": raw})
    with pytest.raises(CheckpointError, match=r"layer\.w"):
        dequantize(tensor)


def test_an_unknown_format_names_the_known_ones() -> None:
    tensor = PackedTensor(name="w", shape=(1, 32), format="gguf.q9_9", parts={"blocks": np.zeros((1, 34), np.uint8)})
    with pytest.raises(UnsupportedModel, match=r"gguf\.q9_9.*gguf\.q4_1"):
        dequantize(tensor)


def test_the_real_model_unpacks_to_the_same_bits_as_with_the_gguf_package(smollm2: Path) -> None:
    file = read_gguf(smollm2)
    seen = set()
    for tensor in file.tensors.values():
        if len(tensor.shape) < 2 or (tensor.type.name in seen and "blk.29." not in tensor.name):
            continue
        seen.add(tensor.type.name)
        name = f"gguf.{tensor.type.name.lower()}"
        ours = dequantize(PackedTensor(name="w", shape=tensor.shape, format=name, parts={"blocks": tensor.data}))
        np.testing.assert_array_equal(ours, theirs(name, tensor.data))
    assert seen == {"Q8_0", "Q4_1"}
