"""Checkpoints with 8-bit floating weights (e4m3): per block as DeepSeek publishes them, per row, per tensor.

For each layer ``weight`` float8 ``[out, in]`` and its scale: ``weight_scale_inv`` float32, one for each block of
128 x 128; or ``weight_scale``, one for the tensor or one for each row. w = weight * scale in all of them, whatever
the name says. Scales of activations (``input_scale``) are not used: inputs of products keep 16 or 32 bits, which is
closer to the model than what it was published with. Source: ``FineGrainedFP8Config`` and the config of DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.weights.array_formats import BLOCK, FP8
from midspan.weights.published.module_tensors import (
    DAMAGED,
    Parts,
    Tensors,
    modules_with,
    numbers,
    packed_tensor,
    tensor_of,
    with_packed,
)
from midspan.weights.stored_tensor import StoredTensor

SCALE_NAMES = ("weight_scale_inv", "weight_scale")


def read_float8(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors of such a checkpoint as a graph asks for them.

    Args:
        config: ``quantization_config``.
        tensors: as the files hold them.

    Raises:
        UnsupportedModel: another type or blocks of another size.
        CheckpointError: a scale is missing or has a shape that means nothing.
    """
    fmt = config.get("fmt") or "e4m3"
    if fmt != "e4m3":
        raise UnsupportedModel(
            f"The model's weights are of the type float8 {fmt}.", remedy="Take it in e4m3, or in 16 bits."
        )
    made: list[StoredTensor] = []
    consumed: list[StoredTensor] = []
    for module in modules_with(tensors, "weight"):
        weight = tensors[f"{module}.weight"]
        if weight.dtype != FP8.name:
            continue
        name = next((name for name in SCALE_NAMES if f"{module}.{name}" in tensors), None)
        if name is None:
            raise CheckpointError(
                f"The layer '{module}' is quantized and has no tensor '{' or '.join(SCALE_NAMES)}'.", remedy=DAMAGED
            )
        scale = tensors[f"{module}.{name}"]
        made.append(float8_tensor(module, tensors, scale, config.get("weight_block_size")))
        consumed += [weight, scale]
    return with_packed(tensors, made, consumed)


def float8_tensor(module: str, tensors: Tensors, scale: StoredTensor, block: object) -> StoredTensor:
    """The packed weight of a layer.

    Args:
        module: whose.
        tensors: of the checkpoint.
        scale: of the weight.
        block: rows and columns of a block, as the config states them; None: scales are of rows or of the tensor.

    Raises:
        UnsupportedModel: blocks of another size than 128 x 128.
        CheckpointError: the scale has a shape that means nothing.
    """
    weight = tensor_of(tensors, module, "weight", FP8.name)
    rows, columns = weight.shape
    if block is not None:
        if not isinstance(block, (list, tuple)) or list(block) != [BLOCK, BLOCK]:
            raise UnsupportedModel(
                f"The model's scales belong to blocks of {block}, and {BLOCK} x {BLOCK} can be read here.",
                remedy="Take the model in 16 bits and quantize it while it is loaded: --quantization fp8.",
            )
        if scale.shape == (-(-rows // BLOCK), -(-columns // BLOCK)):
            read = partial(_block_parts, weight, scale)
            return packed_tensor(module, (rows, columns), "fp8.block", read, [weight, scale])
    elif scale.shape in ((), (1,), (1, 1), (rows,), (rows, 1)):
        return packed_tensor(
            module, (rows, columns), "fp8.channel", partial(_channel_parts, weight, scale), [weight, scale]
        )
    raise CheckpointError(
        f"'{scale.name}' has the shape {list(scale.shape)}, which does not fit a weight of {rows} x {columns}.",
        remedy=DAMAGED,
    )


def channel_scale(scale: StoredTensor, rows: int) -> NDArray[np.float32]:
    """Scales of rows, or of the whole tensor, as float32 ``[rows]``."""
    flat = numbers(scale).reshape(-1).astype(np.float32)
    return np.ascontiguousarray(np.broadcast_to(flat, (rows,)))


def _channel_parts(weight: StoredTensor, scale: StoredTensor) -> Parts:
    return {"data": numbers(weight), "scale": channel_scale(scale, weight.shape[0])}


def _block_parts(weight: StoredTensor, scale: StoredTensor) -> Parts:
    return {"data": numbers(weight), "scale": numbers(scale).astype(np.float32)}
