"""Cases whose weights come packed, in the formats of ``midspan.weights.quantization``.

They hold random integers and moderate scales; what they mean is what the unpacking of the
core says, and where products round their inputs too, what the reference says. Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.operation_case import OperationCase
from midspan.conformance.random_values import grid
from midspan.interface.weights import PackedTensor
from midspan.weights.array_formats import BLOCK, FP8
from midspan.weights.quantization import FORMATS, dequantize

GROUP = 32
"""Columns that share a scale in the cases of the group formats."""

Parts = dict[str, NDArray[Any]]

SCALE_FIELDS = ("d", "m", "dmin")
"""Fields of a block that are float16 factors or offsets."""


def packed_cases(name: str) -> Iterator[OperationCase]:
    """Products, logits and a table of one format.

    Args:
        name: one of ``KNOWN_FORMATS``.
    """
    random = np.random.default_rng(31)
    values = columns_together(name)
    for rows, blocks, outputs in ((1, 1, 32), (5, 2, 48), (0, 1, 16), (19, 3, 33)):
        weight = _packed(name, (outputs, blocks * values), random)
        x = grid(random, (rows, blocks * values))
        shape = f"[{rows}, {blocks * values}] x [{outputs}, {blocks * values}]"
        for op in ("linear", "logits"):
            yield _case(f"{op}, {name}, {shape}", op, x, weight)
    table = _packed(name, (40, 2 * values), random)
    ids = random.integers(0, 40, 7).astype(np.int32)
    yield _case(f"embedding, {name}", "embedding", ids, table)


def packed_product(
    name: str, format_name: str, rows: int, outputs: int, columns: int, random: np.random.Generator
) -> OperationCase:
    """A ``linear`` with a packed weight.

    Args:
        name: of the case.
        format_name: one of ``KNOWN_FORMATS``.
        rows, outputs, columns: sizes; columns a multiple of the format's block.
        random: where everything random comes from.
    """
    return _case(name, "linear", grid(random, (rows, columns)), _packed(format_name, (outputs, columns), random))


def _case(name: str, op: str, x: NDArray[np.float32] | NDArray[np.int32], weight: PackedTensor) -> OperationCase:
    return OperationCase(
        name=name, op=op, inputs=(x,), weights={"weight": dequantize(weight)}, packed={"weight": weight}
    )


def columns_together(name: str) -> int:
    """Columns that share a scale in the cases of a format, which come in multiples of so many."""
    return FORMATS[name].values if name in FORMATS else GROUP


def _packed(name: str, shape: tuple[int, int], random: np.random.Generator) -> PackedTensor:
    parts = {"blocks": _blocks(name, shape, random)} if name in FORMATS else _arrays(name, shape, random)
    for part in parts.values():
        part.flags.writeable = False  # as those of a mapped file
    return PackedTensor(name="weight", shape=shape, format=name, parts=parts)


def _blocks(name: str, shape: tuple[int, int], random: np.random.Generator) -> NDArray[np.uint8]:
    layout = FORMATS[name]
    blocks = random.integers(0, 256, (shape[0], shape[1] // layout.values, layout.layout.itemsize), np.uint8)
    fields = blocks.view(layout.layout)
    for field in SCALE_FIELDS:
        if field in (layout.layout.names or ()):
            fields[field] = _scales(random, fields.shape).astype(np.float16)
    return blocks.reshape(shape[0], -1)


def _arrays(name: str, shape: tuple[int, int], random: np.random.Generator) -> Parts:
    rows, columns = shape
    if name.startswith("fp8"):
        scales = (-(-rows // BLOCK), -(-columns // BLOCK)) if name == "fp8.block" else (rows,)
        return {"data": random.standard_normal(shape).astype(FP8), "scale": _scales(random, scales)}
    if not name.endswith("group"):
        return {"data": random.integers(-127, 128, shape).astype(np.int8), "scale": _scales(random, (rows,))}
    grid_shape = (rows, columns // GROUP)
    scale = _scales(random, grid_shape)
    if name == "int8.group":
        zero = random.integers(0, 257, grid_shape).astype(np.int16)
        return {"data": random.integers(0, 256, shape).astype(np.uint8), "scale": scale, "zero": zero}
    zero = random.integers(0, 17, grid_shape).astype(np.uint8)
    data = random.integers(0, 256, (rows, columns // 2)).astype(np.uint8)
    parts: Parts = {"data": data, "scale": scale.astype(np.float16), "zero": zero}
    if columns > GROUP:  # some with the columns in another order, as a published model may have them
        parts["order"] = random.permutation(columns).astype(np.int32)
    return parts


def _scales(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Factors that float16 holds, so that every format can have them."""
    return random.uniform(2.0**-8, 2.0**-6, shape).astype(np.float16).astype(np.float32)
