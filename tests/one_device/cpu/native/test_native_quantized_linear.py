"""Linear kernels with GGUF weights, against products with the unpacked weight."""

from __future__ import annotations

from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from midspan_cpu.native_interface import WeightConfig

TYPES = {
    "gguf.q4_0": gguf.GGMLQuantizationType.Q4_0,
    "gguf.q4_1": gguf.GGMLQuantizationType.Q4_1,
    "gguf.q8_0": gguf.GGMLQuantizationType.Q8_0,
    "gguf.q5_0": gguf.GGMLQuantizationType.Q5_0,
    "gguf.q5_1": gguf.GGMLQuantizationType.Q5_1,
}
OF_256 = {
    "gguf.q4_k": (gguf.GGMLQuantizationType.Q4_K, 144, (0, 2)),
    "gguf.q5_k": (gguf.GGMLQuantizationType.Q5_K, 176, (0, 2)),
    "gguf.q6_k": (gguf.GGMLQuantizationType.Q6_K, 210, (208,)),
}
"""Formats of blocks of 256 columns: the package's name, bytes of a block, where its fp16 numbers are."""


def quantized(rng: np.random.Generator, n: int, k: int, name: str) -> tuple[Any, Any]:
    """The file's bytes and what they stand for, in float64."""
    blocks = quantize(rng.standard_normal((n, k)).astype(np.float32), TYPES[name])
    return blocks, dequantize(blocks, TYPES[name]).astype(np.float64)


def random_blocks(rng: np.random.Generator, n: int, k: int, name: str) -> tuple[Any, Any]:
    """Blocks of any bits with numbers of usual size, and what they stand for, in float64."""
    kind, size, halves = OF_256[name]
    blocks = rng.integers(0, 256, (n, k // 256, size)).astype(np.uint8)
    for at in halves:
        blocks[..., at : at + 2] = rng.uniform(0.001, 0.02, (n, k // 256, 1)).astype(np.float16).view(np.uint8)
    blocks = blocks.reshape(n, -1)
    return blocks, dequantize(blocks, kind).astype(np.float64)


def int4_groups(rng: np.random.Generator, n: int, k: int, group: int) -> tuple[Any, Any, Any, Any]:
    """Nibbles, scales and zeros, and what they stand for, in float64."""
    quants = rng.integers(0, 16, (n, k)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (n, k // group)).astype(np.float32)
    zeros = rng.integers(0, 17, (n, k // group)).astype(np.uint8)
    wide = np.repeat(scales, group, axis=1), np.repeat(zeros, group, axis=1).astype(np.float64)
    weight = (quants - wide[1]) * wide[0].astype(np.float64)
    return quants[:, ::2] | quants[:, 1::2] << 4, scales, zeros, weight


def allowed_error(x: Any, weight: Any, rounding: float) -> Any:
    """Each input is off by 2^-16 of the largest of its 32 at most; float32 sums and one rounding are added."""
    x64 = np.abs(x.astype(np.float64))
    largest = np.repeat(x64.reshape(len(x), -1, 32).max(axis=2), 32, axis=1)
    from_inputs = 2**-16 * largest @ np.abs(weight).T
    # d * q + m is summed as two products, either of which can be larger than the weight: at most 15 d + |m|
    from_sums = (x.shape[1] / 16 + 4) * 2**-23 * 4 * (x64 @ np.full(weight.T.shape, np.abs(weight).max()))
    return from_inputs + from_sums + rounding * np.abs(x.astype(np.float64) @ weight.T)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 32), (3, 17, 64), (7, 50, 576), (70, 33, 160), (1, 1, 1536)])
def test_quantized_linear_is_the_product_with_the_unpacked_weight(
    kernels: Any, rng: np.random.Generator, name: str, rows: int, n: int, k: int
) -> None:
    blocks, weight = quantized(rng, n, k, name)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    y = kernels.linear(x, kernels.pack(blocks, name, k))
    expected = x.astype(np.float64) @ weight.T
    assert (np.abs(y - expected) <= allowed_error(x, weight, 2**-24)).all()


@pytest.mark.parametrize("name", OF_256)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 256), (3, 17, 512), (70, 33, 1536)])
def test_blocks_of_256_are_multiplied_without_unpacking(
    kernels: Any, rng: np.random.Generator, name: str, rows: int, n: int, k: int
) -> None:
    blocks, weight = random_blocks(rng, n, k, name)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    packed = kernels.pack(blocks, name, k)
    y = kernels.linear(x, packed)
    # The product of a scale and its block's is rounded; scale * q and the minimum are up to 31 times the weight's size.
    allowed = allowed_error(x, weight, 2**-24) * 8
    assert (np.abs(y - x.astype(np.float64) @ weight.T) <= allowed).all()
    alone = np.concatenate([kernels.linear(x[row : row + 1], packed) for row in range(rows)])
    assert y.tobytes() == alone.tobytes()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("rows", "n"), [(1, 16), (3, 17), (70, 33)])
def test_groups_of_four_bits_are_multiplied_without_unpacking(
    kernels: Any, rng: np.random.Generator, rows: int, n: int, group: int
) -> None:
    k = 3 * 128
    nibbles, scales, zeros, weight = int4_groups(rng, n, k, group)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    packed = kernels.pack(nibbles, "int4.group", k, scales=scales, zeros=zeros)
    y = kernels.linear(x, packed)
    assert (np.abs(y - x.astype(np.float64) @ weight.T) <= allowed_error(x, weight, 2**-24)).all()
    alone = np.concatenate([kernels.linear(x[row : row + 1], packed) for row in range(rows)])
    assert y.tobytes() == alone.tobytes()
    order = rng.permutation(k).astype(np.int32)
    mixed = np.empty_like(x)
    mixed[:, order] = x
    assert kernels.linear(mixed, packed, order=order).tobytes() == y.tobytes()


@pytest.mark.parametrize(("group", "k"), [(16, 64), (48, 96), (64, 96), (0, 64)])
def test_groups_that_do_not_fit_are_not_packed(kernels: Any, group: int, k: int) -> None:
    assert kernels.library.packed_linear_bytes(WeightConfig(format=35, n=16, k=k, group=group)) == 0


@pytest.mark.parametrize("name", OF_256)
def test_embedding_unpacks_blocks_of_256_exactly(kernels: Any, rng: np.random.Generator, name: str) -> None:
    blocks, weight = random_blocks(rng, 30, 512, name)
    ids = np.array([0, 29, 7, 7, 13], np.int32)
    y = kernels.embedding(ids, blocks, output="float32", weight_format=name, columns=512)
    assert y.tobytes() == weight[ids].astype(np.float32).tobytes()


@pytest.mark.parametrize("name", TYPES)
def test_quantized_linear_takes_bfloat16_and_outlying_inputs(kernels: Any, rng: np.random.Generator, name: str) -> None:
    blocks, weight = quantized(rng, 40, 320, name)
    x = rng.standard_normal((6, 320))
    x[:, 100] = 1000.0
    x[2, 32:64] = 0.0
    inputs = x.astype(ml_dtypes.bfloat16)
    y = kernels.linear(inputs, kernels.pack(blocks, name, 320), output="float32")
    assert (np.abs(y - inputs.astype(np.float64) @ weight.T) <= allowed_error(inputs, weight, 2**-24)).all()
    rounded = kernels.linear(inputs, kernels.pack(blocks, name, 320))
    assert rounded.tobytes() == y.astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("name", TYPES)
def test_a_quantized_row_has_the_same_bits_in_a_batch_of_any_size(
    kernels: Any, rng: np.random.Generator, name: str
) -> None:
    blocks, _ = quantized(rng, 49, 576, name)
    packed = kernels.pack(blocks, name, 576)
    x = rng.standard_normal((200, 576)).astype(np.float32)
    alone = np.concatenate([kernels.linear(x[row : row + 1], packed) for row in range(len(x))])
    for rows in [*range(1, 71), 127, 128, 129, 200]:
        assert kernels.linear(x[:rows], packed).tobytes() == alone[:rows].tobytes(), rows


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_finite_spoils_its_row_and_no_other(
    kernels: Any, rng: np.random.Generator, name: str, bad: float
) -> None:
    blocks, _ = quantized(rng, 20, 96, name)
    packed = kernels.pack(blocks, name, 96)
    x = rng.standard_normal((5, 96)).astype(np.float32)
    clean = kernels.linear(x, packed)
    x[2, 40] = bad
    y = kernels.linear(x, packed)
    assert np.isnan(y[2]).all()
    assert np.delete(y, 2, axis=0).tobytes() == np.delete(clean, 2, axis=0).tobytes()


def test_a_width_that_is_no_multiple_of_32_is_not_packed(kernels: Any) -> None:
    assert kernels.library.packed_linear_bytes(WeightConfig(format=17, n=16, k=48)) == 0


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("output", ["float32", "bfloat16"])
def test_embedding_unpacks_rows_of_the_file_exactly(
    kernels: Any, rng: np.random.Generator, name: str, output: str
) -> None:
    blocks, weight = quantized(rng, 30, 96, name)
    ids = np.array([0, 29, 7, 7, 13], np.int32)
    y = kernels.embedding(ids, blocks, output=output, weight_format=name, columns=96, scale=2.0)
    expected = (weight[ids].astype(np.float32) * np.float32(2.0)).astype(y.dtype)
    assert y.tobytes() == expected.tobytes()
