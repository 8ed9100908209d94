"""BitNet checkpoints: weights of -1, 0 and 1, four in a byte, multiplied with inputs of 8 bits.

A layer has ``weight`` uint8 ``[out / 4, in]`` and ``weight_scale`` of one number. The lowest two bits of row r are
the weights of output r, plus 1; the next two those of output out / 4 + r, and so on. The matrix is divided by the scale
where the config's ``linear_class`` is ``bitlinear``, and multiplied with it where it is ``autobitlinear``.
Source: ``transformers.integrations.bitnet``.

Knows no file and no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.interface import StoredTensor

IN_A_BYTE = 4


def read_ternary(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a BitNet checkpoint as a graph asks for them.

    Args:
        config: ``quantization_config``.
        tensors: as the files hold them.

    Raises:
        UnsupportedModel: layers do more than multiply.
        CheckpointError: a layer's tensors do not fit together.
    """
    kind = config.get("linear_class", "bitlinear")
    if kind not in ("bitlinear", "autobitlinear") or config.get("use_rms_norm"):
        raise UnsupportedModel(
            f"The model has linear layers of the class {kind} that normalize their inputs, or are unknown here.",
            remedy="Take a BitNet model without 'use_rms_norm', or the model in 16 bits.",
        )
    if config.get("quantization_mode") == "online":
        raise UnsupportedModel(
            "The model's weights are stored in 16 bits, to be rounded while it runs.",
            remedy="Take the model in its packed form ('quantization_mode': 'offline').",
        )
    made = dict(tensors)
    for name, weight in tensors.items():
        if weight.dtype == "uint8" and name.endswith(".weight"):
            scale = made.pop(f"{name.removesuffix('.weight')}.weight_scale", None)
            made[name] = _packed(weight, scale, divides=kind == "bitlinear")
    return made


def _packed(weight: StoredTensor, scale: StoredTensor | None, *, divides: bool) -> StoredTensor:
    if scale is None or scale.shape not in ((), (1,)) or len(weight.shape) != 2:
        raise CheckpointError(
            f"The ternary layer of '{weight.name}' {list(weight.shape)} has no 'weight_scale' of one number.",
            remedy="The files are damaged, or config.json belongs to others: download the model again.",
        )
    rows, columns = weight.shape
    return StoredTensor(
        name=weight.name,
        shape=(IN_A_BYTE * rows, columns),
        format="int8.dynamic",
        dtype=None,
        nbytes=weight.nbytes + scale.nbytes,
        read=_Reader(weight=weight, scale=scale, divides=divides),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reader:
    """Gives the parts of ``int8.dynamic``, when a weight is loaded."""

    weight: StoredTensor
    scale: StoredTensor
    divides: bool

    def __call__(self) -> dict[str, NDArray[Any]]:
        packed = self.weight.read()["data"]
        quarters = [(packed >> np.uint8(2 * place) & np.uint8(3)).view(np.int8) - np.int8(1) for place in range(4)]
        factor = self.scale.read()["data"].astype(np.float32).reshape(1)
        data = np.concatenate(quarters)
        return {"data": data, "scale": np.repeat(1 / factor if self.divides else factor, len(data))}
