"""AWQ checkpoints in the layout ``gemm``, as AutoAWQ writes them, of 4 bits.

For each layer: ``qweight`` int32 ``[in, out / 8]`` and ``qzeros`` int32 ``[groups, out / 8]``, whose words hold
eight neighbouring outputs in an order of their own, and ``scales`` ``[groups, out]``. w = (q - zero) * scale.
Source: AutoAWQ's ``WQLinear_GEMM``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.weights.published.module_tensors import (
    DAMAGED,
    Parts,
    Tensors,
    check_groups,
    group_scale,
    modules_with,
    nibbles,
    numbers,
    packed_tensor,
    paired,
    row_bytes,
    tensor_of,
    with_packed,
)
from midspan.weights.stored_tensor import StoredTensor

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which half-byte of a word, from the lowest, each of its eight outputs lies."""


def read_awq(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors of an AWQ checkpoint as a graph asks for them.

    Args:
        config: ``quantization_config``.
        tensors: as the files hold them.

    Raises:
        UnsupportedModel: another layout, or another number of bits.
        CheckpointError: tensors are missing or contradict each other.
    """
    named = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    version, bits = str(named).lower(), config.get("bits", config.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise UnsupportedModel(
            f"The model is stored in the AWQ layout '{version}' with {bits} bits.",
            remedy="Take it in the layout gemm with 4 bits, which is what most are published in.",
        )
    group_size = config.get("group_size", config.get("q_group_size"))
    made: list[StoredTensor] = []
    consumed: list[StoredTensor] = []
    for module in modules_with(tensors, "qweight"):
        qweight, qzeros = (tensor_of(tensors, module, name, "int32") for name in ("qweight", "qzeros"))
        scales = tensor_of(tensors, module, "scales")
        columns, (groups, rows) = qweight.shape[0], scales.shape
        if qweight.shape[1] * 8 != rows or qzeros.shape != (groups, qweight.shape[1]):
            raise CheckpointError(
                f"The layer '{module}' has the tensors qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and "
                f"scales {list(scales.shape)}, which do not fit together.",
                remedy=DAMAGED,
            )
        check_groups(module, columns, groups, group_size)
        stored = [qweight, qzeros, scales]
        made.append(packed_tensor(module, (rows, columns), "int4.group", partial(_parts, *stored), stored))
        consumed += stored
    return with_packed(tensors, made, consumed)


def _parts(qweight: StoredTensor, qzeros: StoredTensor, scales: StoredTensor) -> Parts:
    return {
        "data": paired(np.ascontiguousarray(_outputs(qweight).T)),
        "scale": np.ascontiguousarray(group_scale(numbers(scales)).T),
        "zero": np.ascontiguousarray(_outputs(qzeros).T),
    }


def _outputs(words: StoredTensor) -> NDArray[np.uint8]:
    """``[n, out / 8]`` words -> the integers ``[n, out]`` of the outputs in their order."""
    halves = nibbles(row_bytes(numbers(words))).reshape(words.shape[0], -1, 8)
    return halves[:, :, list(_PLACES)].reshape(words.shape[0], -1)
