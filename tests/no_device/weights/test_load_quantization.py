"""Weights quantized while they are loaded: how far numbers move, and which are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from midspan.errors import CheckpointError
from midspan.graph.passes import apply_passes
from midspan.interface import PackedTensor, Weight
from midspan.models.catalogue import build_graph
from midspan.weights.load_quantization import SCHEMES, QuantizingWeights, linear_weights, quantized
from midspan.weights.quantization import check_parts, dequantize


def dense(array: Any, name: str = "w") -> PackedTensor:
    return PackedTensor(name=name, shape=array.shape, format="dense", parts={"data": array})


@pytest.fixture
def matrix() -> Any:
    random = np.random.default_rng(3)
    return (random.standard_normal((37, 256)) * random.uniform(0.1, 10.0, (37, 1))).astype(np.float32)


@pytest.mark.parametrize(("name", "steps"), [("int8", 127), ("w8a16", 127)])
def test_eight_bits_are_off_by_half_a_step_of_the_row_at_most(matrix: Any, name: str, steps: int) -> None:
    result = quantized(dense(matrix), SCHEMES[name])
    check_parts(result)
    step = np.abs(matrix).max(axis=1, keepdims=True) / steps
    assert (np.abs(dequantize(result) - matrix) <= step * (0.5 + 1e-4)).all()
    assert (np.abs(result.parts["data"]).max(axis=1) == steps).all()


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (96, 32)])
def test_four_bits_are_off_by_one_step_of_the_group_at_most_and_zero_stays_zero(
    matrix: Any, columns: int, size: int
) -> None:
    part = matrix[:, :columns].copy()
    part[:, ::7] = 0.0
    result = quantized(dense(part), SCHEMES["int4"])
    check_parts(result)
    assert result.parts["scale"].shape == (37, columns // size)
    groups = part.reshape(37, -1, size)
    step = (groups.max(-1) - groups.min(-1)) / 15
    off = np.abs(dequantize(result) - part)
    # Half a step where it is rounded, and half a step where the zero point was.
    assert (off <= np.repeat(step, size, axis=1) * (1.0 + 1e-4)).all()
    assert (off[:, ::7] == 0.0).all()


def test_fp8_is_off_by_half_a_unit_of_its_three_bits(matrix: Any) -> None:
    result = quantized(dense(matrix), SCHEMES["fp8"])
    check_parts(result)
    scale = result.parts["scale"][:, None]
    # Three bits after the leading one; the smallest numbers are multiples of 2^-9.
    assert (np.abs(dequantize(result) - matrix) <= np.maximum(np.abs(matrix) * 2.0**-4, scale * 2.0**-10) * 1.001).all()
    assert np.isfinite(dequantize(result)).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_of_zeros_and_rows_of_one_number_stay_what_they_are(name: str) -> None:
    rows = np.repeat(np.array([[0.0], [3.0], [-5.0]], np.float32), 32, axis=1)
    np.testing.assert_allclose(dequantize(quantized(dense(rows), SCHEMES[name])), rows, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_joined_matrix_has_the_numbers_of_its_parts(matrix: Any, name: str) -> None:
    joined = dequantize(quantized(dense(matrix), SCHEMES[name]))
    apart = [dequantize(quantized(dense(part), SCHEMES[name])) for part in (matrix[:20], matrix[20:])]
    np.testing.assert_array_equal(joined, np.concatenate(apart))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused_and_not_hidden(matrix: Any, bad: float) -> None:
    matrix[5, 6] = bad
    with pytest.raises(CheckpointError, match="'w' holds numbers that are infinite or none"):
        quantized(dense(matrix), SCHEMES["int8"])


def test_linear_weights_are_meant_and_tables_and_output_layers_are_not(tiny_config: Callable[..., Any]) -> None:
    for tied in (True, False):
        graph = apply_passes(build_graph(tiny_config(tie_word_embeddings=tied)))
        left = {name for name, weight in graph.weights.items() if len(weight.shape) == 2} - linear_weights(graph)
        assert left == ({"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"}))
        assert len(linear_weights(graph)) == 4 * 2


class Ones:
    """A source of ones."""

    def load(self, weight: Weight) -> PackedTensor:
        return dense(np.ones(weight.shape, np.float32), weight.name)


def test_a_matrix_without_whole_groups_stays_dense_and_is_told(tiny_config: Callable[..., Any]) -> None:
    graph = apply_passes(build_graph(tiny_config()))
    weights = QuantizingWeights(Ones(), graph, SCHEMES["int4"])
    formats = {name: weights.load(weight).format for name, weight in graph.weights.items()}
    down = {name for name in formats if "down_proj" in name}  # 48 columns
    assert {name for name, kind in formats.items() if kind == "int4.group"} == linear_weights(graph) - down
    assert "6 linear weights became int4.group (int4); 2 have no groups of 128 or 32" in weights.summary()
    assert sorted(down)[0] in weights.summary()
