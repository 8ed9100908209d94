"""Linear kernels with weights of bytes and a scale for each output, and with inputs rounded to bytes too."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

TYPES: dict[str, Any] = {"int8.channel": np.int8, "fp8.channel": ml_dtypes.float8_e4m3fn}
SHAPES = [(1, 32, 64), (5, 33, 7), (13, 100, 300), (2, 1, 1), (17, 64, 96), (33, 31, 544), (200, 70, 530)]


def weights(rng: np.random.Generator, n: int, k: int, name: str) -> tuple[Any, Any]:
    """All bytes that are numbers, and scales."""
    bits = rng.integers(0, 256, (n, k)).astype(np.uint8)
    if name == "fp8.channel":
        bits[(bits & 127) == 127] = 0x7E
    if name == "int8.dynamic":
        bits[bits == 128] = 129  # -128 is not among the integers of symmetric rounding
    scales = rng.uniform(0.5, 2.0, n).astype(np.float32)
    return bits.view(TYPES.get(name, np.int8)), scales


def rounded(x: Any) -> tuple[Any, Any]:
    """Integers and scales of rows, as ``int8.dynamic`` defines them."""
    x32 = x.astype(np.float32)
    scales = (np.abs(x32).max(axis=1) / np.float32(127)).astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        quants = np.where(scales[:, None] > 0, np.rint(x32 / scales[:, None]), 0)
    return quants.astype(np.int64), scales


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("activation", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_scaled_linear_is_the_product_with_the_weight_times_its_scale(
    kernels: Any, rng: np.random.Generator, name: str, activation: str, rows: int, n: int, k: int
) -> None:
    weight, scales = weights(rng, n, k, name)
    x = rng.standard_normal((rows, k)).astype(ml_dtypes.bfloat16 if activation == "bfloat16" else np.float32)
    y = kernels.linear(x, kernels.pack(weight, name, scales=scales), output="float32")
    x64, weight64 = x.astype(np.float64), weight.astype(np.float64) * scales[:, None]
    allowed = (k + 3) * 2**-23 * (np.abs(x64) @ np.abs(weight64).T)
    assert (np.abs(y - x64 @ weight64.T) <= allowed).all()


def test_a_weight_that_is_not_a_number_spoils_its_output_and_no_other(kernels: Any, rng: np.random.Generator) -> None:
    weight, scales = weights(rng, 40, 50, "fp8.channel")
    x = rng.standard_normal((3, 50)).astype(np.float32)
    clean = kernels.linear(x, kernels.pack(weight, "fp8.channel", scales=scales))
    weight[7, 12] = np.nan
    y = kernels.linear(x, kernels.pack(weight, "fp8.channel", scales=scales))
    assert np.isnan(y[:, 7]).all()
    assert np.delete(y, 7, axis=1).tobytes() == np.delete(clean, 7, axis=1).tobytes()


@pytest.mark.parametrize("activation", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_dynamic_linear_sums_integers_exactly(
    kernels: Any, rng: np.random.Generator, activation: Any, rows: int, n: int, k: int
) -> None:
    weight, scales = weights(rng, n, k, "int8.dynamic")
    x = rng.standard_normal((rows, k)).astype(activation)
    x[rows // 2] = 0.0
    bias = rng.standard_normal(n).astype(np.float32)
    y = kernels.linear(x, kernels.pack(weight, "int8.dynamic", scales=scales), bias=bias, output="float32")
    quants, input_scales = rounded(x)
    sums = (quants @ weight.astype(np.int64).T).astype(np.float32)
    expected = sums * input_scales[:, None] * scales + bias
    assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", [*TYPES, "int8.dynamic"])
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(kernels: Any, rng: np.random.Generator, name: str) -> None:
    weight, scales = weights(rng, 70, 500, name)
    packed = kernels.pack(weight, name, scales=scales)
    x = rng.standard_normal((200, 500)).astype(np.float32)
    alone = np.concatenate([kernels.linear(x[row : row + 1], packed) for row in range(len(x))])
    for rows in [*range(1, 37), 95, 96, 97, 98, 191, 192, 193, 200]:
        assert kernels.linear(x[:rows], packed).tobytes() == alone[:rows].tobytes(), rows


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_finite_spoils_its_row_and_no_other(
    kernels: Any, rng: np.random.Generator, bad: float
) -> None:
    weight, scales = weights(rng, 40, 50, "int8.dynamic")
    packed = kernels.pack(weight, "int8.dynamic", scales=scales)
    x = rng.standard_normal((20, 50)).astype(np.float32)
    clean = kernels.linear(x, packed)
    x[3, 49] = bad
    y = kernels.linear(x, packed)
    assert np.isnan(y[3]).all()
    assert np.delete(y, 3, axis=0).tobytes() == np.delete(clean, 3, axis=0).tobytes()
