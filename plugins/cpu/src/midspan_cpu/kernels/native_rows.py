"""Operations on rows by the native library: norms, gates, rotary, embedding.

Inputs may be column slices of a wider tensor: rows must be contiguous, their
distance is passed on.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof
from typing import Any

import ml_dtypes
import numpy as np
import torch

from midspan.interface import Kernel, KernelSite, No, Support, Yes
from midspan.interface.graph import ACTIVATION
from midspan.interface.weights import DENSE
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import integer, number, numbers, text
from midspan_cpu.kernels.native_operation import NativeOperation, Operands
from midspan_cpu.native_interface import OPERATIONS, Instruction, Matrix
from midspan_cpu.native_library import ELEMENT_TYPES, GATE_FUNCTIONS, GGUF_FORMATS, NativeLibrary, RotaryConfig

PRIORITY = 20

_DENSE_CODES = {
    np.dtype(np.float32): ELEMENT_TYPES["float32"],
    np.dtype(ml_dtypes.bfloat16): ELEMENT_TYPES["bfloat16"],
    np.dtype(np.float16): ELEMENT_TYPES["float16"],
}


class NativeRows:
    """Makes the kernels of one program."""

    def __init__(self, preparation: Preparation, library: NativeLibrary) -> None:
        self._preparation = preparation
        self._library = library

    def kernels(self) -> tuple[Kernel, ...]:
        """Kernels named ``native``."""
        return (
            _kernel("rms_norm", self._rms_norm),
            _kernel("add_rms_norm", self._rms_norm),
            _kernel("gated", self._gated, _has_function),
            _kernel("gated_pair", self._gated_pair, _has_function),
            _kernel("rotary", self._rotary),
            _kernel("embedding", self._embedding, _has_table),
            _kernel("select_rows", self._select_rows, _has_activation_rows),
        )

    def _rms_norm(self, site: KernelSite) -> NativeOperation:
        """The norm of x, or of x and a residual; then their sum is an output too."""
        weight = self._preparation.vector(site.weights["weight"], torch_type(site.dtype))
        epsilon, offset = number(site, "epsilon"), number(site, "offset")
        columns, op = int(site.inputs[0].shape[-1]), site.node.op

        def emit(operands: Operands) -> tuple[Instruction, ...]:
            matrices = dict(zip(("x", "x2"), operands.matrices, strict=False))
            matrices.update(zip(("y", "y2"), operands.outputs, strict=False))
            instruction = _instruction(
                op,
                site,
                operands,
                columns=columns,
                config=weight.data_ptr(),
                config_columns=weight.shape[0],
                real=epsilon,
                offset=offset,
                **matrices,
            )
            return (instruction,)

        return self._operation(site, emit, *[columns] * len(site.outputs), keep=weight)

    def _gated(self, site: KernelSite) -> NativeOperation:
        function, columns = GATE_FUNCTIONS[text(site, "function")], int(site.inputs[0].shape[-1])

        def emit(operands: Operands) -> tuple[Instruction, ...]:
            (gate, up), (y,) = operands.matrices, operands.outputs
            return (_instruction("gated", site, operands, code=function, columns=columns, x=gate, x2=up, y=y),)

        return self._operation(site, emit, columns)

    def _gated_pair(self, site: KernelSite) -> NativeOperation:
        function, columns = GATE_FUNCTIONS[text(site, "function")], int(site.inputs[0].shape[-1]) // 2
        half_bytes = columns * torch_type(site.dtype).itemsize

        def emit(operands: Operands) -> tuple[Instruction, ...]:
            (gate,), (y,) = operands.matrices, operands.outputs
            up = Matrix((gate.data or 0) + half_bytes, gate.stride)
            return (_instruction("gated", site, operands, code=function, columns=columns, x=gate, x2=up, y=y),)

        return self._operation(site, emit, columns)

    def _rotary(self, site: KernelSite) -> NativeOperation:
        head_size = integer(site, "head_size")
        query_columns, key_columns = (int(value.shape[-1]) for value in site.inputs[:2])
        table = self._rotary_table(site)
        config = RotaryConfig(
            table=table.data_ptr(),
            table_rows=table.shape[0],
            head_size=head_size,
            rotary_size=integer(site, "rotary_size"),
            query_heads=query_columns // head_size,
            key_heads=key_columns // head_size,
            type=ELEMENT_TYPES[site.dtype],
            interleaved=int(bool(site.node.attributes["interleaved"])),
        )
        address = addressof(config)

        def emit(operands: Operands) -> tuple[Instruction, ...]:
            (query, key), (turned, turned_key) = operands.matrices, operands.outputs
            return (_instruction("rotary", site, operands, config=address, x=query, x2=key, y=turned, y2=turned_key),)

        return self._operation(site, emit, query_columns, key_columns, integers=1, keep=(config, table))

    def _rotary_table(self, site: KernelSite) -> torch.Tensor:
        """float32 [max_context, rotary_size]: cosines then sines of each position; equal sites share it."""
        frequencies, amplitude = numbers(site, "inverse_frequencies"), number(site, "amplitude")
        rows = self._preparation.bounds.max_context

        def make() -> torch.Tensor:
            angles = torch.arange(rows, dtype=torch.float32).unsqueeze(1) * torch.tensor(frequencies)
            table = torch.cat((angles.cos() * amplitude, angles.sin() * amplitude), dim=1).contiguous()
            self._preparation.account(table.nbytes)
            return table

        return self._preparation.shared(("rotary table", frequencies, amplitude), make)

    def _embedding(self, site: KernelSite) -> NativeOperation:
        weight, scale, dtype = site.weights["weight"], number(site, "scale"), torch_type(site.dtype)
        rows_of_table, columns = weight.shape
        # The table is read where the checkpoint has it, row by row, so a mapped file costs only what is looked up.
        array = np.ascontiguousarray(weight.parts["data" if weight.format == DENSE else "blocks"])
        code = _DENSE_CODES[array.dtype] if weight.format == DENSE else GGUF_FORMATS[weight.format]
        source: object = array
        address, row_bytes = array.ctypes.data, array.nbytes // rows_of_table
        if scale != 1.0 and weight.format == DENSE and code != ELEMENT_TYPES[site.dtype]:
            # Scaled rows are rounded to the activation type before and after, as the definition has it.
            source = rounded = self._preparation.tensor(weight, dtype)
            code, address, row_bytes = ELEMENT_TYPES[site.dtype], rounded.data_ptr(), columns * dtype.itemsize

        def emit(operands: Operands) -> tuple[Instruction, ...]:
            (y,) = operands.outputs
            return (
                _instruction(
                    "embedding",
                    site,
                    operands,
                    code=code,
                    config=address,
                    config_columns=rows_of_table,
                    row_bytes=row_bytes,
                    columns=columns,
                    real=scale,
                    y=y,
                ),
            )

        return self._operation(site, emit, columns, integers=1, selects=True, keep=source)

    def _select_rows(self, site: KernelSite) -> NativeOperation:
        # The rows of an activation are looked up as those of a table are.
        columns = int(site.inputs[0].shape[-1])

        def emit(operands: Operands) -> tuple[Instruction, ...]:
            (x,), (y,) = operands.matrices, operands.outputs
            return (_instruction("select_rows", site, operands, columns=columns, x=x, y=y),)

        return self._operation(site, emit, columns, integers=1, selects=True)

    def _operation(
        self,
        site: KernelSite,
        emit: Callable[[Operands], tuple[Instruction, ...]],
        *columns: int,
        integers: int = 0,
        selects: bool = False,
        keep: object = None,
    ) -> NativeOperation:
        dtype = torch_type(site.dtype)
        return NativeOperation(
            library=self._library,
            emit=emit,
            outputs=tuple((count, dtype) for count in columns),
            integers=integers,
            selects=selects,
            keep=keep,
        )


def _instruction(op: str, site: KernelSite, operands: Operands, **fields: Any) -> Instruction:
    return Instruction(
        op=OPERATIONS[op],
        rows=operands.rows,
        type=ELEMENT_TYPES[site.dtype],
        integers=operands.integers,
        **fields,
    )


def _kernel(
    op: str,
    prepare: Callable[[KernelSite], Callable[..., object]],
    supports: Callable[[KernelSite], Support] | None = None,
) -> Kernel:
    return Kernel(name="native", op=op, prepare=prepare, supports=supports or _yes, priority=PRIORITY)


def _yes(site: KernelSite) -> Support:
    return Yes()


def _has_function(site: KernelSite) -> Support:
    function = text(site, "function")
    return Yes() if function in GATE_FUNCTIONS else No(f"has no function '{function}'")


def _has_activation_rows(site: KernelSite) -> Support:
    value = site.inputs[0]
    if value.dtype == ACTIVATION and len(value.shape) == 2:
        return Yes()
    return No(f"takes rows of activations, not {value.dtype} {value.shape}")


def _has_table(site: KernelSite) -> Support:
    weight = site.weights["weight"]
    if weight.format == DENSE or weight.format in GGUF_FORMATS:
        return Yes()
    return No(f"does not read tables packed as {weight.format}")
