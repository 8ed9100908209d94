"""The formats that are arrays beside each other: what they mean, number by number, and how they are joined."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from midspan.conformance.packed_cases import packed_cases
from midspan.errors import CheckpointError
from midspan.interface import PackedTensor
from midspan.weights.array_formats import ARRAY_FORMATS
from midspan.weights.quantization import dequantize, join_packed

Parts = dict[str, NDArray[Any]]
FP8 = ml_dtypes.float8_e4m3fn


def random_parts(name: str, rows: int, columns: int, group: int = 8, *, seed: int = 0, ordered: bool = False) -> Parts:
    random = np.random.default_rng(seed)
    scale = random.uniform(0.5, 2.0, (rows,)).astype(np.float32)
    if name in ("int8.channel", "int8.dynamic"):
        return {"data": random.integers(-128, 128, (rows, columns)).astype(np.int8), "scale": scale}
    if name.startswith("fp8"):
        if name == "fp8.block":
            scale = random.uniform(0.5, 2.0, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
        return {"data": random.standard_normal((rows, columns)).astype(FP8), "scale": scale}
    scale = random.uniform(0.5, 2.0, (rows, columns // group)).astype(np.float16)
    zero = random.integers(0, 17, scale.shape)
    stored = (rows, columns // 2) if name == "int4.group" else (rows, columns)
    parts: Parts = {"data": random.integers(0, 256, stored).astype(np.uint8), "scale": scale}
    parts["zero"] = zero.astype(np.uint8 if name == "int4.group" else np.int16)
    if ordered:
        parts["order"] = random.permutation(columns).astype(np.int32)
    return parts


def number(name: str, parts: Parts, row: int, column: int) -> np.float32:
    """One number of the matrix, straight from the format's definition."""
    data, scale = parts["data"], parts["scale"].astype(np.float32)
    if "order" in parts:
        column = int(np.flatnonzero(parts["order"] == column)[0])
    if name == "fp8.block":
        return np.float32(data[row, column]) * scale[row // 128, column // 128]
    if not name.endswith("group"):
        return np.float32(data[row, column]) * scale[row]
    if name == "int4.group":
        byte = int(data[row, column // 2])
        integer = byte >> 4 if column % 2 else byte & 15
        columns = 2 * data.shape[1]
    else:
        integer, columns = int(data[row, column]), data.shape[1]
    group = column // (columns // scale.shape[1])
    return np.float32(integer - int(parts["zero"][row, group])) * scale[row, group]


def tensor(name: str, parts: Parts, shape: tuple[int, ...]) -> PackedTensor:
    return PackedTensor(name="w", shape=shape, format=name, parts=parts)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", ARRAY_FORMATS)
def test_every_number_is_what_the_definition_says(name: str, ordered: bool) -> None:
    shape = (131, 136)  # beyond one block of 128 in both directions
    parts = random_parts(name, *shape, ordered=ordered)
    found = dequantize(tensor(name, parts, shape))
    assert found.dtype == np.float32
    wanted = [[number(name, parts, row, column) for column in range(shape[1])] for row in range(0, shape[0], 13)]
    np.testing.assert_array_equal(found[::13], np.array(wanted))


@pytest.mark.parametrize("name", ARRAY_FORMATS)
def test_numbers_of_another_type_are_rounded_once(name: str) -> None:
    found = tensor(name, random_parts(name, 40, 24), (40, 24))
    np.testing.assert_array_equal(dequantize(found, "bfloat16"), dequantize(found).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", ARRAY_FORMATS)
def test_joined_matrices_unpack_to_the_joined_numbers(name: str) -> None:
    sizes = (256, 128, 40)
    pieces = [random_parts(name, rows, 32, seed=rows) for rows in sizes]
    parts = join_packed(name, pieces)
    assert parts is not None
    apart = [dequantize(tensor(name, piece, (rows, 32))) for piece, rows in zip(pieces, sizes, strict=True)]
    np.testing.assert_array_equal(dequantize(tensor(name, parts, (sum(sizes), 32))), np.concatenate(apart))


def test_what_shares_no_groups_no_order_or_half_a_block_is_not_joined() -> None:
    a, b = random_parts("int4.group", 4, 32, ordered=True), random_parts("int4.group", 4, 32, seed=1, ordered=True)
    assert join_packed("int4.group", [a, b]) is None
    same = join_packed("int4.group", [a, {**b, "order": a["order"]}])
    assert same is not None
    assert same["order"].shape == (32,)
    assert join_packed("int4.group", [a, random_parts("int4.group", 4, 32)]) is None
    assert join_packed("int4.group", [random_parts("int4.group", 4, 32, group) for group in (8, 16)]) is None
    block = [random_parts("fp8.block", rows, 32) for rows in (64, 128)]
    assert join_packed("fp8.block", block) is None
    assert join_packed("fp8.block", block[::-1]) is not None


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("int8.channel", {"scale": np.ones(3, np.float32)}, r"'scale' has the shape \[3\] instead of \[4\]"),
        ("int8.channel", {"data": np.ones((4, 32), np.uint8)}, "'data' holds uint8 instead of int8"),
        ("fp8.channel", {"data": np.ones((4, 32), np.int8)}, "instead of float8_e4m3fn"),
        ("fp8.block", {"scale": np.ones((1, 2), np.float32)}, r"\[1, 2\] instead of \[1, 1\]"),
        ("int4.group", {"scale": np.ones((4, 5), np.float32)}, "32 columns cannot lie in 5 groups"),
        ("int4.group", {"zero": np.ones((4, 1), np.uint8)}, r"'zero' has the shape \[4, 1\]"),
        ("int4.group", {"order": np.zeros(32, np.int32)}, "does not name each column once"),
        ("int8.group", {"data": np.ones((4, 16), np.uint8)}, r"\[4, 16\] instead of \[4, 32\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_what_is_wrong(name: str, change: Parts, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        dequantize(tensor(name, {**random_parts(name, 4, 32), **change}, (4, 32)))
    assert caught.value.remedy


def test_a_missing_part_is_named() -> None:
    parts = random_parts("int4.group", 4, 32)
    del parts["zero"]
    with pytest.raises(CheckpointError, match="no part 'zero'"):
        dequantize(tensor("int4.group", parts, (4, 32)))


def test_the_conformance_suite_has_cases_of_every_format_and_some_with_ordered_columns() -> None:
    for name in ARRAY_FORMATS:
        cases = list(packed_cases(name))
        assert {case.op for case in cases} == {"linear", "logits", "embedding"}
        assert all(case.packed["weight"].format == name for case in cases)
    assert any("order" in case.packed["weight"].parts for case in packed_cases("int4.group"))
