"""Linear kernels that multiply pairs of bfloat16: right, each row by itself, refused where there are none."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from midspan.errors import PluginError
from midspan_cpu.native_interface import DENSE_FORMATS, ELEMENT_TYPES

BFLOAT16 = ELEMENT_TYPES["bfloat16"]
WITH_PAIRS = ("amx", "amx_emulated", "avx512bf16")


def random(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)


@pytest.fixture
def with_pairs(kernels: Any) -> Any:
    """The kernels, where they have products of pairs."""
    if kernels.library.instruction_set not in WITH_PAIRS:
        pytest.skip("an instruction set without products of pairs")
    return kernels


def test_pairs_are_the_fastest_format_of_bfloat16_where_there_are_any(kernels: Any) -> None:
    has_pairs = kernels.library.instruction_set in WITH_PAIRS
    assert kernels.library.dense_format(BFLOAT16, BFLOAT16) == DENSE_FORMATS["pairs" if has_pairs else "bfloat16"]
    for name, code in ELEMENT_TYPES.items():
        if name != "bfloat16":
            assert kernels.library.dense_format(code, BFLOAT16) == code
            assert kernels.library.dense_format(BFLOAT16, code) == BFLOAT16


def test_other_sets_and_other_inputs_refuse_pairs(kernels: Any, rng: np.random.Generator) -> None:
    packed = kernels.pack(random(rng, 40, 64), "pairs")
    inputs = random(rng, 3, 64)
    with pytest.raises(PluginError):
        kernels.linear(inputs.astype(np.float32), packed)
    if kernels.library.instruction_set not in WITH_PAIRS:
        with pytest.raises(PluginError):
            kernels.linear(inputs, packed)


@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 32, 64), (5, 33, 7), (13, 100, 300), (2, 1, 1), (17, 64, 96), (33, 31, 544), (200, 70, 530)],
)
def test_products_of_pairs_are_the_product_with_the_transposed_weight(
    with_pairs: Any, rng: np.random.Generator, rows: int, n: int, k: int
) -> None:
    x, weight, bias = random(rng, rows, k), random(rng, n, k), rng.standard_normal(n).astype(np.float32)
    packed = with_pairs.pack(weight, "pairs")
    y = with_pairs.linear(x, packed, bias=bias, output="float32")
    x64, weight64 = x.astype(np.float64), weight.astype(np.float64)
    expected = x64 @ weight64.T + bias
    # A chain of k multiply-adds in float32, in whatever order: k * 2^-24 of the sum of magnitudes.
    allowed = (k + 2) * 2**-23 * (np.abs(x64) @ np.abs(weight64).T + np.abs(bias))
    assert (np.abs(y - expected) <= allowed).all()
    rounded = with_pairs.linear(x, packed, bias=bias)
    assert rounded.tobytes() == y.astype(ml_dtypes.bfloat16).tobytes()


def test_a_row_has_the_same_bits_in_a_batch_of_any_size(with_pairs: Any, rng: np.random.Generator) -> None:
    x = random(rng, 333, 700)
    packed = with_pairs.pack(random(rng, 97, 700), "pairs")
    alone = np.concatenate([with_pairs.linear(x[row : row + 1], packed) for row in range(len(x))])
    for rows in [*range(1, 37), 47, 48, 49, 95, 96, 97, 98, 191, 192, 193, 333]:
        assert with_pairs.linear(x[:rows], packed).tobytes() == alone[:rows].tobytes(), rows


@pytest.mark.parametrize("columns", [50, 64])
def test_a_column_slice_of_a_wider_matrix_is_taken(with_pairs: Any, rng: np.random.Generator, columns: int) -> None:
    wide = random(rng, 40, 151)
    packed = with_pairs.pack(random(rng, 20, columns), "pairs")
    sliced = wide[:, 41 : 41 + columns]
    assert with_pairs.linear(sliced, packed).tobytes() == with_pairs.linear(sliced.copy(), packed).tobytes()
    assert with_pairs.linear(sliced[:1], packed).tobytes() == with_pairs.linear(sliced[:1].copy(), packed).tobytes()


def test_what_is_not_a_number_stays_in_its_row(with_pairs: Any, rng: np.random.Generator) -> None:
    x, packed = random(rng, 20, 70), with_pairs.pack(random(rng, 40, 70), "pairs")
    clean = with_pairs.linear(x, packed)
    x[3, 69] = np.nan
    y = with_pairs.linear(x, packed)
    assert np.isnan(y[3].astype(np.float32)).all()
    assert np.delete(y, 3, axis=0).tobytes() == np.delete(clean, 3, axis=0).tobytes()
