"""A native kernel prepared for one node: alone on tensors, or as instructions of a plan.

Both ways run the same instructions, so what is tested alone is what a plan
runs. Knows operands as addresses; what an instruction computes stands in
``native/midspan_cpu.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import addressof, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from midspan.runtimes.torch.cache import TorchCache
from midspan_cpu.native_interface import SAMPLED_ROWS, TOKEN_ROWS, Instruction, Matrix, Step
from midspan_cpu.native_library import NativeLibrary


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Where an operation finds its inputs and puts its outputs.

    Attributes:
        matrices: inputs of activations.
        integers: numbers of the step's integer arrays, one for each integer input.
        outputs: one for each output.
        rows: ``TOKEN_ROWS`` or ``SAMPLED_ROWS``.
    """

    matrices: tuple[Matrix, ...]
    integers: tuple[int, ...]
    outputs: tuple[Matrix, ...]
    rows: int


@dataclass(frozen=True, kw_only=True, eq=False)
class NativeOperation:
    """What a native kernel's ``prepare`` returns.

    Attributes:
        library: runs the instructions.
        emit: the instructions for given operands.
        outputs: columns and type of each output.
        integers: how many of the last inputs are integer arrays.
        selects: the output's rows are counted by the integers and not by the first matrix.
        on_cache: tells the operation which cache its instructions work on; None: it has none.
        keep: what must live as long as the instructions, which hold addresses only.
    """

    library: NativeLibrary
    emit: Callable[[Operands], Sequence[Instruction]]
    outputs: tuple[tuple[int, torch.dtype], ...]
    integers: int = 0
    selects: bool = False
    on_cache: Callable[[TorchCache], None] | None = None
    keep: Any = None

    def __call__(self, *inputs: Any) -> Any:
        """Run the operation alone on tensors; a tuple when there are several outputs."""
        if self.on_cache is not None:
            *inputs, cache = inputs  # type: ignore[assignment]
            self.on_cache(cache)
        split = len(inputs) - self.integers
        matrices, integers = inputs[:split], inputs[split:]
        rows = (integers if self.selects else matrices)[0].shape[0]
        results = tuple(torch.empty(rows, columns, dtype=dtype) for columns, dtype in self.outputs)
        operands = Operands(
            matrices=tuple(matrix_of(tensor) for tensor in matrices),
            integers=tuple(range(len(integers))),
            outputs=tuple(matrix_of(tensor) for tensor in results),
            rows=SAMPLED_ROWS if self.selects and matrices else TOKEN_ROWS,
        )
        instructions = self.emit(operands)
        program = (Instruction * len(instructions))(*instructions)
        table = IntegerTable(len(integers))
        for number, tensor in enumerate(integers):
            table.put(number, tensor)
        tokens = matrices[0].shape[0] if matrices else rows
        requests = integers[1].shape[0] if self.on_cache is not None else 0
        step = Step(tokens=tokens, requests=requests, sampled=rows, integers=table.addresses, strides=table.distances)
        self.library.run_plan(program, step, 0, len(instructions))
        return results[0] if len(results) == 1 else results


class IntegerTable:
    """The integer arrays of a step as the native library sees them.

    Attributes:
        addresses: of the table of their addresses.
        distances: of the table of elements between their rows.
    """

    def __init__(self, count: int) -> None:
        self._addresses = (c_void_p * max(count, 1))()
        self._strides = (c_int64 * max(count, 1))()
        self.addresses, self.distances = addressof(self._addresses), addressof(self._strides)

    def put(self, number: int, tensor: torch.Tensor) -> None:
        """Take the address of an int32 tensor, which must outlive the step."""
        self._addresses[number] = tensor.data_ptr()
        self._strides[number] = tensor.stride(0)


def matrix_of(tensor: torch.Tensor) -> Matrix:
    """A tensor [rows, columns] whose rows are contiguous."""
    return Matrix(tensor.data_ptr(), tensor.stride(0))
