"""Cases whose weights come packed, in the formats of ``midspan.weights.quantization``.

The blocks hold random integers and moderate scales; what they mean is what the unpacking
of the core says. Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.operation_case import OperationCase
from midspan.conformance.random_values import grid
from midspan.interface.weights import PackedTensor
from midspan.weights.quantization import FORMATS, dequantize

SCALE_FIELDS = ("d", "m", "dmin")
"""Fields of a block that are float16 factors or offsets."""


def packed_cases(name: str) -> Iterator[OperationCase]:
    """Products, logits and a table of one format.

    Args:
        name: a key of ``FORMATS``.
    """
    random = np.random.default_rng(31)
    values = FORMATS[name].values
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
        format_name: a key of ``FORMATS``.
        rows, outputs, columns: sizes; columns a multiple of the format's block.
        random: where everything random comes from.
    """
    return _case(name, "linear", grid(random, (rows, columns)), _packed(format_name, (outputs, columns), random))


def _case(name: str, op: str, x: NDArray[np.float32] | NDArray[np.int32], weight: PackedTensor) -> OperationCase:
    return OperationCase(
        name=name, op=op, inputs=(x,), weights={"weight": dequantize(weight)}, packed={"weight": weight}
    )


def _packed(name: str, shape: tuple[int, int], random: np.random.Generator) -> PackedTensor:
    layout = FORMATS[name]
    blocks = random.integers(0, 256, (shape[0], shape[1] // layout.values, layout.layout.itemsize), np.uint8)
    fields = blocks.view(layout.layout)
    for field in SCALE_FIELDS:
        if field in (layout.layout.names or ()):
            fields[field] = random.uniform(2.0**-8, 2.0**-6, fields.shape).astype(np.float16)
    content = blocks.reshape(shape[0], -1)
    content.flags.writeable = False
    return PackedTensor(name="weight", shape=shape, format=name, parts={"blocks": content})
