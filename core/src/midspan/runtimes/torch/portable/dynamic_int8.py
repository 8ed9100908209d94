"""The product with 8-bit weights and inputs that are rounded to 8 bits, by its definition.

The definition is that of the format ``int8.dynamic`` in ``midspan.interface.weights``. The sum of products is
exact: floating products of few enough columns hold every integer that can occur, and their sums are added as
integers. Right everywhere and fast nowhere; a device that has integer products brings a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from midspan.interface.weights import PackedTensor
from midspan.runtimes.torch.element_types import copy_in
from midspan.runtimes.torch.preparation import Preparation
from midspan.weights.quantization import check_parts

Unary = Callable[[torch.Tensor], torch.Tensor]

EXACT_COLUMNS = 1024
"""Columns of which the sum of products stays an exact float32: 1024 * 127 * 128 < 2^24."""

LARGEST = 127.0


def dynamic_product(weight: PackedTensor, bias: torch.Tensor | None, preparation: Preparation) -> Unary:
    """A function ``[N, in]`` -> float32 ``[N, out]``.

    Args:
        weight: of the format ``int8.dynamic``.
        bias: float32 ``[out]``, or None.
        preparation: where the weight is put.
    """
    check_parts(weight)
    data = copy_in(np.ascontiguousarray(weight.parts["data"]), torch.int8, preparation.device)
    scale = copy_in(weight.parts["scale"], torch.float32, preparation.device)
    preparation.account(data.nbytes + scale.nbytes)

    def product(x: torch.Tensor) -> torch.Tensor:
        rows, steps = rounded_rows(x)
        total = torch.zeros((x.shape[0], data.shape[0]), dtype=torch.int32, device=x.device)
        for start in range(0, data.shape[1], EXACT_COLUMNS):
            columns = slice(start, start + EXACT_COLUMNS)
            total += (rows[:, columns] @ data[:, columns].float().t()).to(torch.int32)
        result = total.float() * steps * scale
        return result if bias is None else result.add_(bias)

    return product


def rounded_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows rounded to the integers from -127 to 127, as float32, and the step of each.

    Args:
        x: ``[N, in]``, any floating type.

    Returns:
        float32 ``[N, in]`` of whole numbers, and float32 ``[N, 1]``; a row of zeros has a step of 0.
    """
    wide = x.float()
    steps = wide.abs().amax(dim=1, keepdim=True) / LARGEST
    return torch.round(wide / torch.where(steps == 0.0, 1.0, steps)), steps
