"""Linear kernels with dense weights: right, and each row by itself."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Unit roundoff (24, 8 and 11 bits of precision): what rounding the output costs.
ROUNDING = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def assert_is_product(y: Any, x: Any, weight: Any, bias: Any = 0.0, activation: str = "float32") -> None:
    """|error| of a chain of k multiply-adds is below k * 2^-24 of the sum of magnitudes; then one rounding."""
    x64, weight64 = x.astype(np.float64), weight.astype(np.float64)
    expected = x64 @ weight64.T + bias
    magnitude = np.abs(x64) @ np.abs(weight64).T + np.abs(bias)
    allowed = (x.shape[1] + 2) * 2**-23 * magnitude + ROUNDING[activation] * np.abs(expected) + 2**-24
    assert (np.abs(y.astype(np.float64) - expected) <= allowed).all()


@pytest.mark.parametrize("weight_type", DTYPES)
@pytest.mark.parametrize("activation", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 32, 64), (5, 33, 7), (13, 100, 300), (2, 1, 1), (200, 70, 530)])
def test_linear_is_the_product_with_the_transposed_weight(
    kernels: Any, rng: np.random.Generator, rows: int, n: int, k: int, activation: str, weight_type: str
) -> None:
    x, weight = random(rng, (rows, k), activation), random(rng, (n, k), weight_type)
    y = kernels.linear(x, kernels.pack(weight))
    assert y.dtype == x.dtype
    assert_is_product(y, x, weight, activation=activation)


def test_linear_adds_bias_and_gives_float32_when_asked(kernels: Any, rng: np.random.Generator) -> None:
    x, weight = random(rng, (9, 96), "bfloat16"), random(rng, (45, 96), "bfloat16")
    bias = random(rng, (45,), "float32")
    y = kernels.linear(x, kernels.pack(weight), bias=bias, output="float32")
    assert y.dtype == np.float32
    assert_is_product(y, x, weight, bias=bias)


def test_linear_scales_and_caps_logits(kernels: Any, rng: np.random.Generator) -> None:
    x, weight = random(rng, (4, 64), "float32"), random(rng, (50, 64), "float32")
    y = kernels.linear(x, kernels.pack(weight), scale=0.5, soft_cap=3.0)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64) * 0.5
    # The product's own error is below 1e-5 here; tanh is right to 2e-7, times the cap.
    np.testing.assert_allclose(y, 3.0 * np.tanh(exact / 3.0), rtol=0, atol=2e-5)


@pytest.mark.parametrize("weight_type", DTYPES)
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(
    kernels: Any, rng: np.random.Generator, weight_type: str
) -> None:
    k, n = 700, 97
    x = random(rng, (333, k), "float32")
    packed = kernels.pack(random(rng, (n, k), weight_type))
    alone = np.concatenate([kernels.linear(x[row : row + 1], packed) for row in range(len(x))])
    for rows in [*range(1, 71), 95, 96, 97, 98, 191, 192, 193, 333]:
        together = kernels.linear(x[:rows], packed)
        assert together.tobytes() == alone[:rows].tobytes(), rows


def test_linear_takes_a_column_slice_of_a_wider_matrix(kernels: Any, rng: np.random.Generator) -> None:
    wide = random(rng, (10, 150), "bfloat16")
    weight = random(rng, (20, 50), "bfloat16")
    packed = kernels.pack(weight)
    sliced, copied = wide[:, 40:90], np.ascontiguousarray(wide[:, 40:90])
    assert kernels.linear(sliced, packed).tobytes() == kernels.linear(copied, packed).tobytes()


def test_a_nan_stays_in_its_row(kernels: Any, rng: np.random.Generator) -> None:
    x, weight = random(rng, (8, 64), "float32"), random(rng, (40, 64), "float32")
    clean = kernels.linear(x, kernels.pack(weight))
    x[3, 5] = np.nan
    y = kernels.linear(x, kernels.pack(weight))
    assert np.isnan(y[3]).all()
    assert np.delete(y, 3, axis=0).tobytes() == np.delete(clean, 3, axis=0).tobytes()


def test_packing_does_not_depend_on_the_instruction_set(kernels: Any, rng: np.random.Generator) -> None:
    weight = np.arange(3 * 5, dtype=np.float32).reshape(3, 5)
    expected = np.zeros((5, 32), np.float32)
    expected[:, :3] = weight.T
    assert kernels.pack(weight).memory.view(np.float32).tobytes() == expected.tobytes()
