"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them, of 4 and 8 bits.

For each layer: ``qweight`` int32 ``[in * bits / 32, out]``, the lowest bits of a word the first of its rows;
``qzeros`` int32 ``[groups, out * bits / 32]`` likewise along its columns; ``scales`` ``[groups, out]``; and
``g_idx`` int32 ``[in]``, the group of each input column. w = (q - zero) * scale. The second version of the layout
(``gptq_v2``) stores zero, the first zero - 1: AutoGPTQ took the 1 from each number, and GPTQModel takes it from each
number of the packed word, where a zero of 0 borrows from its neighbour. Sources: AutoGPTQ's ``QuantLinear.pack``,
GPTQModel's conversion between both.

With ``desc_act`` neighbouring columns are of different groups: they are sorted by their groups here, and the part
``order`` says which is which. 8 bits with one group and zero points in the middle are ``int8.channel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.weights.published.module_tensors import (
    DAMAGED,
    Parts,
    Tensors,
    check_groups,
    column_order,
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

_LAYOUTS = ("gptq", "gptq_v2")
"""Values of ``checkpoint_format``."""

_ONES = {4: 0x11111111, 8: 0x01010101}
"""Number of bits -> a word of ones."""

_MIDDLE = 128
"""The zero point of symmetric 8-bit integers."""


def read_gptq(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors of a GPTQ checkpoint as a graph asks for them.

    Args:
        config: ``quantization_config``.
        tensors: as the files hold them.

    Raises:
        UnsupportedModel: another layout, or another number of bits.
        CheckpointError: tensors are missing or contradict each other.
    """
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in _LAYOUTS:
        raise UnsupportedModel(
            f"The model is stored in the GPTQ layout '{layout}', which is made for one kind of device.",
            remedy=f"Take it in one of the layouts {', '.join(_LAYOUTS)}.",
        )
    # Where layers have settings of their own, the groups that they have are taken for granted.
    group_size = None if config.get("dynamic") else config.get("group_size")
    zeros = _stored_zeros(layout, config)
    layers = [_Layer.find(module, tensors, zeros, group_size) for module in modules_with(tensors, "qweight")]
    return with_packed(
        tensors, [layer.weight() for layer in layers], [one for layer in layers for one in layer.stored()]
    )


class _Zeros(Enum):
    """How zero points are stored."""

    AS_THEY_ARE = "as they are"
    EACH_LESS_ONE = "each less one"
    WORDS_LESS_ONES = "words less a word of ones"


def _stored_zeros(layout: str, config: Mapping[str, Any]) -> _Zeros:
    if layout == "gptq_v2":
        return _Zeros.AS_THEY_ARE
    meta = config.get("meta")
    writer = str(meta.get("quantizer")) if isinstance(meta, dict) else ""
    return _Zeros.WORDS_LESS_ONES if "gptqmodel" in writer else _Zeros.EACH_LESS_ONE


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """One layer's tensors, their shapes in agreement."""

    module: str
    bits: int
    shape: tuple[int, int]
    stored_zeros: _Zeros
    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    group_of: StoredTensor | None

    @classmethod
    def find(cls, module: str, tensors: Tensors, stored_zeros: _Zeros, group_size: object) -> _Layer:
        qweight, qzeros = (tensor_of(tensors, module, name, "int32") for name in ("qweight", "qzeros"))
        scales = tensor_of(tensors, module, "scales")
        groups, rows = scales.shape
        bits, left = divmod(qzeros.shape[1] * 32, rows) if rows else (0, 0)
        if bits not in (4, 8) and not left:
            raise UnsupportedModel(
                f"The layer '{module}' has {bits} bits a number, and GPTQ can be read here with 4 and 8.",
                remedy="Take the model quantized to 4 or 8 bits.",
            )
        columns = qweight.shape[0] * 32 // max(bits, 1)
        if left or qweight.shape[1] != rows or qzeros.shape[0] != groups:
            raise CheckpointError(
                f"The layer '{module}' has the tensors qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and "
                f"scales {list(scales.shape)}, which do not fit together.",
                remedy=DAMAGED,
            )
        check_groups(module, columns, groups, group_size)
        group_of = tensor_of(tensors, module, "g_idx", dimensions=1) if f"{module}.g_idx" in tensors else None
        if group_of is not None and group_of.shape != (columns,):
            raise CheckpointError(f"'{group_of.name}' does not name {columns} columns.", remedy=DAMAGED)
        return cls(
            module=module,
            bits=bits,
            shape=(rows, columns),
            stored_zeros=stored_zeros,
            qweight=qweight,
            qzeros=qzeros,
            scales=scales,
            group_of=group_of,
        )

    def stored(self) -> list[StoredTensor]:
        """The tensors in the files."""
        found = [self.qweight, self.qzeros, self.scales]
        return found if self.group_of is None else [*found, self.group_of]

    def weight(self) -> StoredTensor:
        """The packed weight."""
        if self.bits == 8 and self.scales.shape[0] == 1 and (self.zeros() == _MIDDLE).all():
            return packed_tensor(self.module, self.shape, "int8.channel", self.channel_parts, self.stored())
        kind = "int4.group" if self.bits == 4 else "int8.group"
        return packed_tensor(self.module, self.shape, kind, self.group_parts, self.stored())

    def zeros(self) -> NDArray[np.int16]:
        """Zero points ``[out, groups]``."""
        words = numbers(self.qzeros)
        if self.stored_zeros is _Zeros.WORDS_LESS_ONES:
            words = (words.view(np.uint32) + np.uint32(_ONES[self.bits])).view(np.int32)
        stored = row_bytes(words)
        wide = (nibbles(stored) if self.bits == 4 else stored).astype(np.int16)
        wide += np.int16(self.stored_zeros is _Zeros.EACH_LESS_ONE)
        return np.ascontiguousarray(wide.T)

    def channel_parts(self) -> Parts:
        """Of ``int8.channel``."""
        data = row_bytes(numbers(self.qweight).T) ^ np.uint8(_MIDDLE)
        return {"data": data.view(np.int8), "scale": numbers(self.scales)[0].astype(np.float32)}

    def group_parts(self) -> Parts:
        """Of ``int4.group`` or ``int8.group``."""
        # A word's lowest bits are its first row, so a column's words, one after the other, are bytes as wanted.
        data = row_bytes(numbers(self.qweight).T)
        zero = self.zeros()
        parts = {
            "data": data,
            "scale": np.ascontiguousarray(group_scale(numbers(self.scales)).T),
            "zero": zero.astype(np.uint8) if self.bits == 4 else zero,
        }
        groups = self.scales.shape[0]
        order = None if self.group_of is None else column_order(self.module, numbers(self.group_of), groups)
        if order is None:
            return parts
        integers = nibbles(data)[:, order] if self.bits == 4 else data[:, order]
        return {**parts, "data": paired(integers) if self.bits == 4 else integers, "order": order}
