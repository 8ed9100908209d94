"""Matrix products by the native library: dense weights of every type, and packed ones as they are.

A weight is packed once, straight from the checkpoint's bytes where their type
allows it. A weight of 16 bits stays so even when activations are float32: its
values are the same, and half the bytes are read.
"""

from __future__ import annotations

from ctypes import addressof
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from midspan.interface import Kernel, KernelSite, No, PackedTensor, Support, Yes
from midspan.interface.weights import DENSE
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import number, optional_number
from midspan_cpu.kernels.native_operation import NativeOperation, Operands
from midspan_cpu.native_interface import GGUF_FORMATS, OPERATIONS, SCALED_FORMATS, Instruction
from midspan_cpu.native_library import ELEMENT_TYPES, LinearConfig, NativeLibrary, WeightConfig

PRIORITY = 20

PACKED_FORMATS = {**GGUF_FORMATS, **SCALED_FORMATS}
"""Codes of the packed formats that the products read as they are."""

INT4_GROUP = "int4.group"

_NUMPY_TYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def kernels(preparation: Preparation, library: NativeLibrary) -> tuple[Kernel, ...]:
    """Kernels named ``native`` for ``linear`` and ``logits``."""

    def supports(site: KernelSite) -> Support:
        return _supports(site, library)

    def prepare_linear(site: KernelSite) -> NativeOperation:
        return _product(site, preparation, library, output="input", scale=1.0, soft_cap=0.0)

    def prepare_logits(site: KernelSite) -> NativeOperation:
        scale, soft_cap = number(site, "scale"), optional_number(site, "soft_cap") or 0.0
        return _product(site, preparation, library, output="float32", scale=scale, soft_cap=soft_cap)

    return (
        Kernel(name="native", op="linear", prepare=prepare_linear, supports=supports, priority=PRIORITY),
        Kernel(name="native", op="logits", prepare=prepare_logits, supports=supports, priority=PRIORITY),
    )


def _supports(site: KernelSite, library: NativeLibrary) -> Support:
    weight = site.weights["weight"]
    if weight.format != DENSE and weight.format not in PACKED_FORMATS:
        return No(f"takes dense weights and {', '.join(PACKED_FORMATS)}, not {weight.format}")
    rows, columns = weight.shape
    code, group = PACKED_FORMATS.get(weight.format, ELEMENT_TYPES[site.dtype]), _group(weight)
    if not library.packed_linear_bytes(WeightConfig(format=code, n=rows, k=columns, group=group)):
        return No(f"does not pack {weight.format} weights with {columns} columns, {group} to a group")
    return Yes()


def _group(weight: PackedTensor) -> int:
    """Columns of a scale; 0 for formats whose groups are their own matter."""
    return weight.shape[1] // weight.parts["scale"].shape[1] if weight.format == INT4_GROUP else 0


def _product(
    site: KernelSite,
    preparation: Preparation,
    library: NativeLibrary,
    *,
    output: str,
    scale: float,
    soft_cap: float,
) -> NativeOperation:
    weight, stored = site.weights["weight"], site.weights.get("bias")
    dtype = torch_type(site.dtype)
    result_type = torch.float32 if output == "float32" else dtype
    code, packed = _pack(weight, site.dtype, preparation, library)
    bias = None if stored is None else preparation.vector(stored, dtype)
    outputs, inputs = weight.shape
    config = LinearConfig(
        packed=packed.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        n=outputs,
        k=inputs,
        format=code,
        input_type=ELEMENT_TYPES[site.dtype],
        output_type=ELEMENT_TYPES["float32" if output == "float32" else site.dtype],
        scale=scale,
        soft_cap=soft_cap,
        group=_group(weight),
    )
    address = addressof(config)
    order = weight.parts.get("order")
    if order is not None:
        order = np.ascontiguousarray(order, dtype=np.int32)
        config.order = order.ctypes.data

    def emit(operands: Operands) -> tuple[Instruction, ...]:
        (x,), (y,) = operands.matrices, operands.outputs
        return (Instruction(op=OPERATIONS["linear"], rows=operands.rows, config=address, x=x, y=y),)

    return NativeOperation(
        library=library, emit=emit, outputs=((outputs, result_type),), keep=(config, packed, bias, order)
    )


def _pack(
    weight: PackedTensor, dtype: str, preparation: Preparation, library: NativeLibrary
) -> tuple[int, torch.Tensor]:
    """The weight's format code, and its packed bytes."""
    outputs, inputs = weight.shape
    scales = zeros = None
    if weight.format == DENSE:
        rows, code = _dense_rows(weight, dtype, preparation, library)
    else:
        rows, code = weight.parts["blocks" if weight.format in GGUF_FORMATS else "data"], PACKED_FORMATS[weight.format]
        if weight.format in SCALED_FORMATS:
            scales = np.ascontiguousarray(weight.parts["scale"], dtype=np.float32)
        if weight.format == INT4_GROUP:
            zeros = np.ascontiguousarray(weight.parts["zero"], dtype=np.uint8)
    rows = np.ascontiguousarray(rows)
    config = WeightConfig(
        rows=rows.ctypes.data,
        row_bytes=rows.nbytes // outputs,
        scales=None if scales is None else scales.ctypes.data,
        zeros=None if zeros is None else zeros.ctypes.data,
        n=outputs,
        k=inputs,
        format=code,
        group=_group(weight),
    )
    size = library.packed_linear_bytes(config)
    packed = torch.empty(size, dtype=torch.uint8)
    library.advise_huge_pages(packed.data_ptr(), size)
    library.pack_linear(config, packed.data_ptr())
    preparation.account(size)
    return code, packed


def _dense_rows(
    weight: PackedTensor, dtype: str, preparation: Preparation, library: NativeLibrary
) -> tuple[NDArray[Any], int]:
    """A dense weight's rows in a type that the kernels take, and the format code."""
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
