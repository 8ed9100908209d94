"""A weight's rows as the native library packs them, of one matrix or of one for each expert.

Straight from the checkpoint's bytes where their type allows it. A weight of 16 bits
stays so even when activations are float32: its values are the same, and half the
bytes are read. Knows no operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from midspan.interface import No, PackedTensor, Support, Yes
from midspan.interface.weights import DENSE
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan_cpu.native_interface import ELEMENT_TYPES, GGUF_FORMATS, SCALED_FORMATS, WeightConfig
from midspan_cpu.native_library import NativeLibrary

PACKED_FORMATS = {**GGUF_FORMATS, **SCALED_FORMATS}
"""Codes of the packed formats that the products read as they are."""

INT4_GROUP = "int4.group"

_NUMPY_TYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def supports_weight(weight: PackedTensor, dtype: str, library: NativeLibrary) -> Support:
    """Whether the library packs a weight ``[out, in]``, or ``[experts, out, in]``, for activations of a type."""
    if weight.format != DENSE and weight.format not in PACKED_FORMATS:
        return No(f"takes dense weights and {', '.join(PACKED_FORMATS)}, not {weight.format}")
    outputs, columns = weight.shape[-2:]
    code, group = PACKED_FORMATS.get(weight.format, ELEMENT_TYPES[dtype]), _group(weight)
    if not library.packed_linear_bytes(WeightConfig(format=code, n=outputs, k=columns, group=group)):
        return No(f"does not pack {weight.format} weights with {columns} columns, {group} to a group")
    return Yes()


def _group(weight: PackedTensor) -> int:
    """Columns of a scale; 0 for formats whose groups are their own matter."""
    return weight.shape[-1] // weight.parts["scale"].shape[-1] if weight.format == INT4_GROUP else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightRows:
    """All rows of a weight, those of experts one behind the other.

    Attributes:
        rows: ``[rows, ...]``, contiguous.
        columns: of the weight.
        code: of the format.
        scales: float32 ``[rows]`` or ``[rows, groups]``, where the format has them.
        zeros: uint8 ``[rows, groups]``, where the format has them.
        group: columns of a scale, where the weight says it.
    """

    rows: NDArray[Any]
    columns: int
    code: int
    scales: NDArray[np.float32] | None = None
    zeros: NDArray[np.uint8] | None = None
    group: int = 0

    @staticmethod
    def of(weight: PackedTensor, dtype: str, preparation: Preparation, library: NativeLibrary) -> WeightRows:
        """The rows of a weight that ``supports_weight`` accepts, for activations of a type."""
        columns, scales, zeros = weight.shape[-1], None, None
        if weight.format == DENSE:
            data, code = _dense_rows(weight, dtype, preparation, library)
            data = data.reshape(-1, columns)
        else:
            code = PACKED_FORMATS[weight.format]
            data = weight.parts["blocks" if weight.format in GGUF_FORMATS else "data"]
            if weight.format in SCALED_FORMATS:
                scales = np.ascontiguousarray(weight.parts["scale"], dtype=np.float32)
            if weight.format == INT4_GROUP:
                zeros = np.ascontiguousarray(weight.parts["zero"], dtype=np.uint8)
        rows = np.ascontiguousarray(data)
        return WeightRows(rows=rows, columns=columns, code=code, scales=scales, zeros=zeros, group=_group(weight))

    def matrix(self, first: int, outputs: int) -> WeightConfig:
        """Rows ``first`` and on as a matrix for the library, which holds addresses of this object's arrays."""
        row_bytes = self.rows.strides[0]
        return WeightConfig(
            rows=self.rows.ctypes.data + first * row_bytes,
            row_bytes=row_bytes,
            scales=_row_address(self.scales, first),
            zeros=_row_address(self.zeros, first),
            n=outputs,
            k=self.columns,
            format=self.code,
            group=self.group,
        )


def _row_address(array: NDArray[Any] | None, row: int) -> int | None:
    return None if array is None else int(array.ctypes.data + row * array.strides[0])


def _dense_rows(
    weight: PackedTensor, dtype: str, preparation: Preparation, library: NativeLibrary
) -> tuple[NDArray[Any], int]:
    """A dense weight's content in a type that the kernels take, and the format code."""
    data = weight.parts["data"]
    # Exact types stay as they are; others are rounded to the activation type, as the definition has it.
    name = next((name for name, kind in _NUMPY_TYPES.items() if kind == data.dtype), dtype)
    if name != dtype and dtype != "float32":
        name = dtype
    code = library.dense_format(ELEMENT_TYPES[name], ELEMENT_TYPES[dtype])
    if _NUMPY_TYPES[name] == data.dtype:
        return data, code
    rounded = preparation.tensor(weight, torch_type(name))
    same_size = {2: torch.int16, 4: torch.int32}[rounded.element_size()]
    return rounded.view(same_size).numpy(), code
