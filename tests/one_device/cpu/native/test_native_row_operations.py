"""Norms, gates, rotary, embedding and argmax, against their definitions."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midspan.runtimes.reference import operations

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# One unit in the last place: both sides round once, from float32 values that differ by a few of float32's units,
# which can put them on two sides of a tie. For float32 itself: 16 of those units.
STEP = {"float32": 2**-20, "bfloat16": 2**-7, "float16": 2**-10}


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def assert_near(actual: Any, expected: Any, dtype: str) -> None:
    assert actual.dtype == expected.dtype
    # the absolute part: sums of two terms that cancel, and half the smallest float16
    np.testing.assert_allclose(actual.astype(np.float32), expected.astype(np.float32), rtol=STEP[dtype], atol=2**-20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 576, 576), (7, 37, 37), (300, 128, 64), (3, 1, 1)])
def test_rms_norm_is_as_defined(
    kernels: Any, rng: np.random.Generator, dtype: str, rows: int, columns: int, width: int
) -> None:
    x, weight = random(rng, (rows, columns), dtype), random(rng, (width,), "float32")
    expected = operations.rms_norm(x, weight, epsilon=1e-5, offset=1.0)
    assert_near(kernels.rms_norm(x, weight, epsilon=1e-5, offset=1.0), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_rounds_the_sum_before_it_norms(kernels: Any, rng: np.random.Generator, dtype: str) -> None:
    x, residual = random(rng, (70, 100), dtype), random(rng, (70, 100), dtype)
    weight = random(rng, (100,), "float32")
    y, total = kernels.add_rms_norm(x, residual, weight, epsilon=1e-6)
    expected, expected_total = operations.add_rms_norm(x, residual, weight, epsilon=1e-6, offset=0.0)
    assert total.tobytes() == expected_total.tobytes()
    assert_near(y, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh"])
def test_gated_is_as_defined(kernels: Any, rng: np.random.Generator, dtype: str, function: str) -> None:
    pair = random(rng, (9, 2 * 45), dtype)
    pair[0, :8] = [0.0, -0.0, 20.0, -20.0, 200.0, -200.0, 1e-3, -1e-3]
    y = kernels.gated(pair[:, :45], pair[:, 45:], function)
    with np.errstate(over="ignore"):  # e^200 on the way to 0
        expected = operations.gated_pair(pair, function=function)
    assert_near(y, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_size", "rotary_size"), [(64, 64), (64, 32), (20, 6)])
def test_rotary_is_as_defined(
    kernels: Any, rng: np.random.Generator, dtype: str, interleaved: bool, head_size: int, rotary_size: int
) -> None:
    merged = random(rng, (50, 5 * head_size), dtype)
    query, key = merged[:, : 3 * head_size], merged[:, 3 * head_size :]
    positions = rng.integers(0, 4000, 50).astype(np.int32)
    frequencies = tuple(float(f) for f in 10000.0 ** -(np.arange(0, rotary_size, 2) / rotary_size))
    angles = np.arange(4000, dtype=np.float32)[:, None] * np.array(frequencies, np.float32)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    outputs = kernels.rotary(query, key, positions, table, head_size=head_size, interleaved=interleaved)
    expected = operations.rotary(
        query,
        key,
        positions,
        head_size=head_size,
        rotary_size=rotary_size,
        inverse_frequencies=frequencies,
        amplitude=1.0,
        interleaved=interleaved,
    )
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_near(actual, wanted, dtype)


def test_rotary_refuses_positions_outside_its_table(kernels: Any, rng: np.random.Generator) -> None:
    x, table = random(rng, (1, 8), "float32"), random(rng, (10, 8), "float32")
    with pytest.raises(Exception, match="position"):
        kernels.rotary(x, x, np.array([10], np.int32), table, head_size=8, interleaved=False)


@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_embedding_gathers_and_converts_rows(kernels: Any, rng: np.random.Generator, output: str, stored: str) -> None:
    table = random(rng, (40, 37), stored)
    ids = rng.integers(0, 40, 100).astype(np.int32)
    expected = table[ids].astype(np.float32).astype(DTYPES[output])
    assert kernels.embedding(ids, table, output=output).tobytes() == expected.tobytes()


@pytest.mark.parametrize("bad", [-1, 40])
def test_embedding_refuses_ids_outside_its_table(kernels: Any, rng: np.random.Generator, bad: int) -> None:
    with pytest.raises(Exception, match="token id"):
        kernels.embedding(np.array([3, bad], np.int32), random(rng, (40, 8), "float32"), output="float32")


@pytest.mark.parametrize("columns", [1, 7, 32, 33, 49152, 40001])
def test_argmax_finds_the_lowest_of_the_largest(kernels: Any, rng: np.random.Generator, columns: int) -> None:
    logits = rng.integers(-50, 50, (20, columns)).astype(np.float32)
    ids, failed = kernels.argmax(logits)
    assert ids.tolist() == logits.argmax(axis=1).tolist()
    assert not failed.any()


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([-np.inf, np.inf, np.nan, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38]), min_size=1, max_size=40
    )
)
def test_argmax_marks_rows_that_cannot_be_sampled(kernels: Any, values: list[float]) -> None:
    row = np.array([values], np.float32)
    ids, failed = kernels.argmax(row)
    unusable = bool(np.isnan(row).any() or np.isposinf(row).any() or np.isneginf(row).all())
    assert bool(failed[0]) == unusable
    assert ids[0] == (0 if unusable else row[0].argmax())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_number_survives_the_way_to_float32_and_back(kernels: Any, dtype: str) -> None:
    table = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).reshape(256, 256)
    ids = np.arange(256, dtype=np.int32)
    wide = kernels.embedding(ids, table, output="float32")
    np.testing.assert_array_equal(wide, table.astype(np.float32))
    back = kernels.embedding(ids, wide, output=dtype)
    np.testing.assert_array_equal(back.astype(np.float32), wide)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_is_rounded_to_nearest_even(kernels: Any, rng: np.random.Generator, dtype: str) -> None:
    bits = rng.integers(0, 2**32, (256, 1000), dtype=np.uint64).astype(np.uint32)
    bits[::2] &= np.uint32(0xFFFF0000 if dtype == "bfloat16" else 0xFFFFE000)
    bits[::4] |= np.uint32(0x8000 if dtype == "bfloat16" else 0x1000)  # ties
    bits[::3] = (bits[::3] & np.uint32(0x807FFFFF)) | (rng.integers(95, 145, (86, 1000)).astype(np.uint32) << 23)
    values = bits.view(np.float32)
    rounded = kernels.embedding(np.arange(256, dtype=np.int32), values, output=dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(DTYPES[dtype])
    np.testing.assert_array_equal(rounded.astype(np.float32), expected.astype(np.float32))
