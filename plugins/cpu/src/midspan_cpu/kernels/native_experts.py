"""Mixtures of experts by the native library: ``route``, ``experts`` and ``scale_rows``.

Each expert's gate, up and down are packed by themselves, as a linear's weight is; a step reads those that were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import addressof
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from midspan.interface import Kernel, KernelSite, No, PackedTensor, Support, Yes
from midspan.interface.weights import DENSE
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import integer, number, optional_number, text
from midspan_cpu.kernels.native_operation import NativeOperation, Operands
from midspan_cpu.native_interface import (
    ELEMENT_TYPES,
    GATE_FUNCTIONS,
    GGUF_FORMATS,
    OPERATIONS,
    ExpertsConfig,
    Instruction,
    MatricesConfig,
    RouteConfig,
)
from midspan_cpu.native_library import NativeLibrary

PRIORITY = 20

STRIP = 64
"""Outputs whose packed weights lie in one piece in every format."""

_NUMPY_TYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def kernels(preparation: Preparation, library: NativeLibrary) -> tuple[Kernel, ...]:
    """Kernels named ``native``."""

    def prepare_route(site: KernelSite) -> NativeOperation:
        return _route(site, preparation, library)

    def prepare_experts(site: KernelSite) -> NativeOperation:
        return _experts(site, preparation, library)

    def prepare_scale_rows(site: KernelSite) -> NativeOperation:
        return _scale_rows(site, library)

    def supports_experts(site: KernelSite) -> Support:
        return _supports_experts(site, library)

    return (
        _kernel("route", prepare_route, _supports_route),
        _kernel("experts", prepare_experts, supports_experts),
        _kernel("scale_rows", prepare_scale_rows, _supports_scale_rows),
    )


def _kernel(
    op: str, prepare: Callable[[KernelSite], Callable[..., object]], supports: Callable[[KernelSite], Support]
) -> Kernel:
    return Kernel(name="native", op=op, prepare=prepare, supports=supports, priority=PRIORITY)


def _supports_route(site: KernelSite) -> Support:
    bias = site.weights.get("bias")
    return Yes() if bias is None or bias.format == DENSE else No(f"takes a dense correction, not {bias.format}")


def _route(site: KernelSite, preparation: Preparation, library: NativeLibrary) -> NativeOperation:
    # Ranks are decided by differences that 16 bits would not keep.
    bias = preparation.tensor(site.weights["bias"], torch.float32) if "bias" in site.weights else None
    chosen = integer(site, "top_k")
    config = RouteConfig(
        bias=None if bias is None else bias.data_ptr(),
        experts=int(site.inputs[0].shape[-1]),
        chosen=chosen,
        groups=integer(site, "groups"),
        top_groups=integer(site, "top_groups"),
        type=ELEMENT_TYPES[site.dtype],
        sigmoid=int(text(site, "scoring") == "sigmoid"),
        two_largest=int(text(site, "group_scoring") == "two_largest"),
        normalize=int(bool(site.node.attributes["normalize"])),
        scale=number(site, "scale"),
    )
    address = addressof(config)

    def emit(operands: Operands) -> tuple[Instruction, ...]:
        (logits,), (ids, shares) = operands.matrices, operands.outputs
        return (Instruction(op=OPERATIONS["route"], rows=operands.rows, config=address, x=logits, y=ids, y2=shares),)

    outputs = ((chosen, torch.int32), (chosen, torch.float32))
    return NativeOperation(library=library, emit=emit, outputs=outputs, keep=(config, bias))


def _supports_scale_rows(site: KernelSite) -> Support:
    function = site.node.attributes["function"]
    return Yes() if function in (None, "sigmoid") else No(f"has no function '{function}'")


def _scale_rows(site: KernelSite, library: NativeLibrary) -> NativeOperation:
    columns, code = int(site.inputs[0].shape[-1]), int(site.node.attributes["function"] == "sigmoid")

    def emit(operands: Operands) -> tuple[Instruction, ...]:
        (x, factor), (y,) = operands.matrices, operands.outputs
        return (
            Instruction(
                op=OPERATIONS["scale_rows"],
                rows=operands.rows,
                type=ELEMENT_TYPES[site.dtype],
                code=code,
                columns=columns,
                x=x,
                x2=factor,
                y=y,
            ),
        )

    return NativeOperation(library=library, emit=emit, outputs=((columns, torch_type(site.dtype)),))


def _supports_experts(site: KernelSite, library: NativeLibrary) -> Support:
    function = text(site, "function")
    if function not in GATE_FUNCTIONS:
        return No(f"has no function '{function}'")
    for role in ("gate_up", "down"):
        weight = site.weights[role]
        if weight.format != DENSE and weight.format not in GGUF_FORMATS:
            return No(f"takes dense weights and {', '.join(GGUF_FORMATS)}, not {weight.format}")
        code = GGUF_FORMATS.get(weight.format, ELEMENT_TYPES[site.dtype])
        if not library.packed_linear_bytes(code, *weight.shape[1:]):
            return No(f"does not pack {weight.format} weights with {weight.shape[2]} columns")
    return Yes()


def _experts(site: KernelSite, preparation: Preparation, library: NativeLibrary) -> NativeOperation:
    dtype = torch_type(site.dtype)
    experts, hidden, inner = site.weights["down"].shape
    rows = {role: _Rows.of(site.weights[role], site.dtype, preparation) for role in ("gate_up", "down")}
    biases = {
        role: preparation.vector(site.weights[role], dtype)
        for role in ("gate_up_bias", "down_bias")
        if role in site.weights
    }
    parts = {
        "gate": _Matrices(rows["gate_up"], 0, inner, hidden, biases.get("gate_up_bias")),
        "up": _Matrices(rows["gate_up"], inner, inner, hidden, biases.get("gate_up_bias")),
        "down": _Matrices(rows["down"], 0, hidden, inner, biases.get("down_bias")),
    }
    packed = {name: part.pack(experts, library, preparation) for name, part in parts.items()}
    limit = optional_number(site, "limit")
    config = ExpertsConfig(
        **{name: parts[name].config(packed[name], library) for name in parts},
        experts=experts,
        chosen=int(site.inputs[1].shape[-1]),
        hidden=hidden,
        inner=inner,
        type=ELEMENT_TYPES[site.dtype],
        function=GATE_FUNCTIONS[text(site, "function")],
        limit=math.inf if limit is None else limit,
        slope=number(site, "slope"),
        up_offset=number(site, "up_offset"),
    )
    address = addressof(config)

    def emit(operands: Operands) -> tuple[Instruction, ...]:
        (x, ids, shares), (y,) = operands.matrices, operands.outputs
        return (Instruction(op=OPERATIONS["experts"], rows=operands.rows, config=address, x=x, x2=ids, y=y, y2=shares),)

    return NativeOperation(library=library, emit=emit, outputs=((hidden, dtype),), keep=(config, packed, biases))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The rows of all experts' matrices, one behind the other, in a format that the library packs.

    Attributes:
        code: of the format.
        address: of the first row.
        row_bytes: from row to row.
        of_expert: rows of one expert.
        keep: what holds them.
    """

    code: int
    address: int
    row_bytes: int
    of_expert: int
    keep: object

    @staticmethod
    def of(weight: PackedTensor, dtype: str, preparation: Preparation) -> _Rows:
        """Dense weights of an exact type and GGUF blocks as they are; others rounded to the activation type."""
        experts, rows, columns = weight.shape
        if weight.format == DENSE:
            data = weight.parts["data"]
            name = next((name for name, kind in _NUMPY_TYPES.items() if kind == data.dtype), dtype)
            if name != dtype and dtype != "float32":
                name = dtype
            code, row_bytes = ELEMENT_TYPES[name], columns * _NUMPY_TYPES[name].itemsize
            if _NUMPY_TYPES[name] != data.dtype:
                rounded = preparation.tensor(weight, torch_type(name))
                return _Rows(
                    code=code, address=rounded.data_ptr(), row_bytes=row_bytes, of_expert=rows, keep=(weight, rounded)
                )
        else:
            data, code = weight.parts["blocks"], GGUF_FORMATS[weight.format]
            row_bytes = data.nbytes // (experts * rows)
        data = np.ascontiguousarray(data)
        return _Rows(code=code, address=data.ctypes.data, row_bytes=row_bytes, of_expert=rows, keep=data)


@dataclass(frozen=True)
class _Matrices:
    """One matrix of each expert: rows ``first`` and on of its rows.

    Attributes:
        source: where its rows are.
        first: of an expert's rows.
        outputs, inputs: its size.
        bias: float32 [experts, an expert's rows], or None.
    """

    source: _Rows
    first: int
    outputs: int
    inputs: int
    bias: torch.Tensor | None

    def pack(self, experts: int, library: NativeLibrary, preparation: Preparation) -> torch.Tensor:
        """Pack every expert's matrix; they lie one behind the other."""
        step = self.step(library)
        packed = torch.empty(experts * step, dtype=torch.uint8)
        library.advise_huge_pages(packed.data_ptr(), packed.nbytes)
        for expert in range(experts):
            row = expert * self.source.of_expert + self.first
            library.pack_linear(
                self.source.code,
                self.source.address + row * self.source.row_bytes,
                self.source.row_bytes,
                self.outputs,
                self.inputs,
                packed.data_ptr() + expert * step,
            )
        preparation.account(packed.nbytes)
        return packed

    def step(self, library: NativeLibrary) -> int:
        """Bytes from one packed matrix to the next."""
        return -(-library.packed_linear_bytes(self.source.code, self.outputs, self.inputs) // 64) * 64

    def config(self, packed: torch.Tensor, library: NativeLibrary) -> MatricesConfig:
        """What the library must know of them."""
        return MatricesConfig(
            packed=packed.data_ptr(),
            bytes=self.step(library),
            strip_bytes=library.packed_linear_bytes(self.source.code, STRIP, self.inputs),
            bias=None if self.bias is None else self.bias.data_ptr() + 4 * self.first,
            bias_stride=self.source.of_expert,
            format=self.source.code,
        )
