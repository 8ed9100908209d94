"""Sums and products of rows by the native library: ``add``, ``multiply``, ``scale`` and ``scale_rows``."""

from __future__ import annotations

from collections.abc import Callable

from midspan.interface import Kernel, KernelSite, No, Support, Yes
from midspan.interface.graph import ACTIVATION
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.site_attributes import number
from midspan_cpu.kernels.native_operation import NativeOperation, Operands
from midspan_cpu.native_interface import ELEMENT_TYPES, OPERATIONS, Instruction
from midspan_cpu.native_library import NativeLibrary

PRIORITY = 20


def kernels(library: NativeLibrary) -> tuple[Kernel, ...]:
    """Kernels named ``native``."""

    def prepare(site: KernelSite) -> NativeOperation:
        return _operation(site, library)

    return (
        _kernel("add", prepare, _takes),
        _kernel("multiply", prepare, _takes),
        _kernel("scale", prepare, _takes),
        _kernel("scale_rows", prepare, _takes_function),
    )


def _kernel(
    op: str, prepare: Callable[[KernelSite], NativeOperation], supports: Callable[[KernelSite], Support]
) -> Kernel:
    return Kernel(name="native", op=op, prepare=prepare, supports=supports, priority=PRIORITY)


def _takes(site: KernelSite) -> Support:
    other = next((value for value in site.inputs if value.dtype != ACTIVATION or len(value.shape) != 2), None)
    return Yes() if other is None else No(f"takes rows of activations, not {other.dtype} {other.shape}")


def _takes_function(site: KernelSite) -> Support:
    function = site.node.attributes["function"]
    return _takes(site) if function in (None, "sigmoid") else No(f"has no function '{function}'")


def _operation(site: KernelSite, library: NativeLibrary) -> NativeOperation:
    op, columns = site.node.op, int(site.inputs[0].shape[-1])
    factor = number(site, "factor") if op == "scale" else 1.0
    sigmoid = site.node.attributes.get("function") == "sigmoid"

    def emit(operands: Operands) -> tuple[Instruction, ...]:
        instruction = Instruction(
            op=OPERATIONS[op],
            rows=operands.rows,
            type=ELEMENT_TYPES[site.dtype],
            code=int(sigmoid),
            columns=columns,
            real=factor,
            y=operands.outputs[0],
            **dict(zip(("x", "x2"), operands.matrices, strict=False)),
        )
        return (instruction,)

    return NativeOperation(library=library, emit=emit, outputs=((columns, torch_type(site.dtype)),))
