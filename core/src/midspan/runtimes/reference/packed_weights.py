"""Packed weights as the definitions of operations take them.

Knows which formats mean more than their numbers: a product with an ``int8.dynamic`` weight rounds its inputs
too, so it has a definition of its own. All others are unpacked. Knows nothing of graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from midspan.interface.weights import DENSE, PackedTensor
from midspan.runtimes.reference.element_types import element_type
from midspan.weights.array_formats import ARRAY_FORMATS, DYNAMIC
from midspan.weights.quantization import check_parts, dequantize

READABLE: tuple[str, ...] = (DENSE, *ARRAY_FORMATS)
"""Formats that the definitions take."""

MULTIPLYING = ("linear", "logits")
"""Operations that multiply with their weight."""

LARGEST = np.float32(127.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicInt8:
    """A matrix whose products round their inputs to 8 bits.

    Attributes:
        data: int8 ``[out, in]``.
        scale: float32 ``[out]``.
    """

    data: NDArray[np.int8]
    scale: NDArray[np.float32]

    def product(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """``[N, in]`` -> float32 ``[N, out]``: each row rounded, an exact sum of integers, and both scales."""
        rows, steps = rounded_rows(x)
        # float64 holds these sums exactly: up to 2^39 columns of 127 times 128.
        sums = rows.astype(np.float64) @ self.data.astype(np.float64).T
        result: NDArray[np.float32] = sums.astype(np.float32) * steps[:, None] * self.scale
        return result


WeightOperand = Union[NDArray[Any], DynamicInt8]
"""A weight as a definition gets it."""


def rounded_rows(x: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows as 8-bit integers and the step of each.

    Args:
        x: ``[N, in]``, any floating type.

    Returns:
        int8 ``[N, in]``, halves rounded to even, and float32 ``[N]``: the largest magnitude / 127. A row of
        zeros stays zeros, with a step of 0.
    """
    wide = x.astype(np.float32, copy=False)
    steps = np.abs(wide).max(axis=1, initial=0.0).astype(np.float32) / LARGEST
    divisors = np.where(steps == 0.0, np.float32(1.0), steps)
    with np.errstate(invalid="ignore"):
        return np.rint(wide / divisors[:, None]).astype(np.int8), steps


def weight_operand(tensor: PackedTensor, dtype: str, op: str) -> WeightOperand:
    """A weight for the definition of an operation.

    Args:
        tensor: in one of ``READABLE``.
        dtype: the activation type, to which numbers are rounded.
        op: the operation.
    """
    if tensor.format == DYNAMIC and op in MULTIPLYING:
        check_parts(tensor)
        return DynamicInt8(data=tensor.parts["data"], scale=tensor.parts["scale"])
    if tensor.format != DENSE:
        return dequantize(tensor, dtype)
    rounded: NDArray[Any] = tensor.parts["data"].astype(element_type(dtype), copy=False)
    return rounded
