"""Mixtures of experts by the native library: ``route`` and ``experts``.

Each expert's gate, up and down are packed by themselves, as a linear's weight is; a step reads those that were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import addressof
from dataclasses import dataclass

import torch

from midspan.interface import Kernel, KernelSite, No, Support, Yes
from midspan.interface.graph import ACTIVATION
from midspan.interface.weights import DENSE
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import integer, number, optional_number, text
from midspan_cpu.kernels.native_operation import NativeOperation, Operands
from midspan_cpu.kernels.weight_rows import WeightRows, supports_weight
from midspan_cpu.native_interface import (
    ELEMENT_TYPES,
    GATE_FUNCTIONS,
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


def kernels(preparation: Preparation, library: NativeLibrary) -> tuple[Kernel, ...]:
    """Kernels named ``native``."""

    def prepare_route(site: KernelSite) -> NativeOperation:
        return _route(site, preparation, library)

    def prepare_experts(site: KernelSite) -> NativeOperation:
        return _experts(site, preparation, library)

    def supports_experts(site: KernelSite) -> Support:
        return _supports_experts(site, library)

    return (
        _kernel("route", prepare_route, _supports_route),
        _kernel("experts", prepare_experts, supports_experts),
    )


def _kernel(
    op: str, prepare: Callable[[KernelSite], Callable[..., object]], supports: Callable[[KernelSite], Support]
) -> Kernel:
    return Kernel(name="native", op=op, prepare=prepare, supports=supports, priority=PRIORITY)


def _supports_route(site: KernelSite) -> Support:
    bias, logits = site.weights.get("bias"), site.inputs[0]
    if logits.dtype != ACTIVATION:
        return No(f"takes logits of the activation type, not {logits.dtype}")
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


def _supports_experts(site: KernelSite, library: NativeLibrary) -> Support:
    function = text(site, "function")
    if function not in GATE_FUNCTIONS:
        return No(f"has no function '{function}'")
    for role in ("gate_up", "down"):
        weight = site.weights[role]
        if "order" in weight.parts:
            return No(f"takes the columns of {role} in their order only")
        support = supports_weight(weight, site.dtype, library)
        if isinstance(support, No):
            return support
    return Yes()


def _experts(site: KernelSite, preparation: Preparation, library: NativeLibrary) -> NativeOperation:
    dtype = torch_type(site.dtype)
    experts, hidden, inner = site.weights["down"].shape
    matrices = []
    for role, parts in (("gate_up", 2), ("down", 1)):
        rows = WeightRows.of(site.weights[role], site.dtype, preparation, library)
        stored = site.weights.get(f"{role}_bias")
        bias = None if stored is None else preparation.vector(stored, dtype)
        matrices += [_Matrices(rows, experts, parts, part, bias) for part in range(parts)]
    packed = [each.pack(library, preparation) for each in matrices]
    gate, up, down = (each.config(memory, library) for each, memory in zip(matrices, packed, strict=True))
    limit = optional_number(site, "limit")
    config = ExpertsConfig(
        gate=gate,
        up=up,
        down=down,
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

    keep = (config, packed, [each.bias for each in matrices])
    return NativeOperation(library=library, emit=emit, outputs=((hidden, dtype),), keep=keep)


@dataclass(frozen=True)
class _Matrices:
    """One matrix of each expert, packed by itself.

    Attributes:
        source: rows of all experts.
        experts: how many there are.
        parts: equal parts of an expert's rows, and
        part: which of them this matrix is.
        bias: float32 [experts, an expert's rows], or None.
    """

    source: WeightRows
    experts: int
    parts: int
    part: int
    bias: torch.Tensor | None

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return len(self.source.rows) // (self.experts * self.parts)

    def pack(self, library: NativeLibrary, preparation: Preparation) -> torch.Tensor:
        """Every expert's matrix; they lie one behind the other."""
        step = self.step(library)
        packed = torch.empty(self.experts * step, dtype=torch.uint8)
        library.advise_huge_pages(packed.data_ptr(), packed.nbytes)
        for expert in range(self.experts):
            matrix = self.source.matrix((expert * self.parts + self.part) * self.outputs, self.outputs)
            library.pack_linear(matrix, packed.data_ptr() + expert * step)
        preparation.account(packed.nbytes)
        return packed

    def step(self, library: NativeLibrary) -> int:
        """Bytes from one packed matrix to the next, a multiple of 64."""
        return -(-library.packed_linear_bytes(self.source.matrix(0, self.outputs)) // 64) * 64

    def config(self, packed: torch.Tensor, library: NativeLibrary) -> MatricesConfig:
        """What the library must know of them."""
        return MatricesConfig(
            packed=packed.data_ptr(),
            bytes=self.step(library),
            strip_bytes=library.packed_linear_bytes(self.source.matrix(0, STRIP)),
            bias=None if self.bias is None else self.bias.data_ptr() + 4 * self.part * self.outputs,
            bias_stride=self.parts * self.outputs,
            format=self.source.code,
            group=self.source.group,
        )
