"""Matrix products by the native library: dense weights of every type, and packed ones as they are.

A weight is packed once, see ``weight_rows``.
"""

from __future__ import annotations

from ctypes import addressof

import numpy as np
import torch

from midspan.interface import Kernel, KernelSite, Support
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import number, optional_number
from midspan_cpu.kernels.native_operation import NativeOperation, Operands
from midspan_cpu.kernels.weight_rows import WeightRows, supports_weight
from midspan_cpu.native_interface import OPERATIONS, Instruction
from midspan_cpu.native_library import ELEMENT_TYPES, LinearConfig, NativeLibrary

PRIORITY = 20


def kernels(preparation: Preparation, library: NativeLibrary) -> tuple[Kernel, ...]:
    """Kernels named ``native`` for ``linear`` and ``logits``."""

    def supports(site: KernelSite) -> Support:
        return supports_weight(site.weights["weight"], site.dtype, library)

    def prepare_linear(site: KernelSite) -> NativeOperation:
        return _product(site, preparation, library, output="input", scale=1.0, soft_cap=0.0)

    def prepare_logits(site: KernelSite) -> NativeOperation:
        scale, soft_cap = number(site, "scale"), optional_number(site, "soft_cap") or 0.0
        return _product(site, preparation, library, output="float32", scale=scale, soft_cap=soft_cap)

    return (
        Kernel(name="native", op="linear", prepare=prepare_linear, supports=supports, priority=PRIORITY),
        Kernel(name="native", op="logits", prepare=prepare_logits, supports=supports, priority=PRIORITY),
    )


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
    outputs, inputs = weight.shape
    rows = WeightRows.of(weight, site.dtype, preparation, library)
    packed = _pack(rows, outputs, preparation, library)
    bias = None if stored is None else preparation.vector(stored, dtype)
    config = LinearConfig(
        packed=packed.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        n=outputs,
        k=inputs,
        format=rows.code,
        input_type=ELEMENT_TYPES[site.dtype],
        output_type=ELEMENT_TYPES["float32" if output == "float32" else site.dtype],
        scale=scale,
        soft_cap=soft_cap,
        group=rows.group,
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


def _pack(rows: WeightRows, outputs: int, preparation: Preparation, library: NativeLibrary) -> torch.Tensor:
    config = rows.matrix(0, outputs)
    size = library.packed_linear_bytes(config)
    packed = torch.empty(size, dtype=torch.uint8)
    library.advise_huge_pages(packed.data_ptr(), size)
    library.pack_linear(config, packed.data_ptr())
    preparation.account(size)
    return packed
