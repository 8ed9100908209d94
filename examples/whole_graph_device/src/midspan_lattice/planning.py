"""From expressions to a flat list of instructions over planned buffers.

Chains of pointwise expressions that nobody else reads become one instruction, which
goes over its rows in pieces small enough to stay near the processor. A buffer's place
is used again once its last reader has run. Knows no graph and no memory: places are offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan_lattice.expression import Expression

PIECE_ELEMENTS = 1 << 14
"""Elements of one piece of a fused chain."""

ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Instruction:
    """One step of the program.

    Attributes:
        run: writes the target register's buffer, or returns what the register holds from now on.
        target: register.
        operands: registers.
        returns: which of the two.
    """

    run: Callable[..., Any]
    target: int
    operands: tuple[int, ...]
    returns: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A program for one set of shapes.

    Attributes:
        instructions: in order.
        leaves: register -> expression, to be bound before it runs.
        buffers: register -> (offset, expression).
        outputs: registers.
        registers: how many.
        nbytes: of the buffers together; they overlap where their lives do not.
    """

    instructions: tuple[Instruction, ...]
    leaves: dict[int, Expression]
    buffers: dict[int, tuple[int, Expression]]
    outputs: tuple[int, ...]
    registers: int
    nbytes: int


def plan(outputs: Sequence[Expression]) -> Plan:
    """Order, fuse and place everything that the outputs need."""
    order = _in_order(outputs)
    fused = _fused(order, outputs)
    kept = [item for item in order if item not in fused]
    register = {item: place for place, item in enumerate(kept)}
    instructions = []
    for item in kept:
        if item.kind in ("leaf", "input"):
            continue
        operands: Sequence[Expression] = item.operands
        run = item.run
        if item.kind == "pointwise":
            run, operands = _chain(item, fused)
        places = tuple(register[operand] for operand in operands)
        instructions.append(Instruction(run=run, target=register[item], operands=places, returns=item.kind == "alias"))
    buffers, nbytes = _place(kept, instructions, [register[item] for item in outputs])
    return Plan(
        instructions=tuple(instructions),
        leaves={register[item]: item for item in kept if item.kind == "leaf"},
        buffers=buffers,
        outputs=tuple(register[item] for item in outputs),
        registers=len(kept),
        nbytes=nbytes,
    )


def _in_order(outputs: Sequence[Expression], inside: Container[Expression] | None = None) -> list[Expression]:
    """Every expression once, operands first; ``inside`` says which operands to go into, None: all."""
    done: dict[Expression, None] = {}
    waiting = [(item, False) for item in reversed(outputs)]
    while waiting:
        item, ready = waiting.pop()
        if ready:
            done.setdefault(item)
        elif item not in done:
            waiting.append((item, True))
            operands = reversed(item.operands)
            waiting += [(operand, False) for operand in operands if inside is None or operand in inside]
    return list(done)


def _fused(order: Sequence[Expression], outputs: Sequence[Expression]) -> set[Expression]:
    """Pointwise expressions that are worked out inside their only reader."""
    readers: dict[Expression, list[Expression]] = {}
    for item in order:
        for operand in item.operands:
            readers.setdefault(operand, []).append(item)
    return {
        item
        for item in order
        if item.kind == "pointwise"
        and item not in outputs
        and len(readers[item]) == 1
        and readers[item][0].kind == "pointwise"
        and readers[item][0].shape == item.shape
    }


def _chain(root: Expression, fused: set[Expression]) -> tuple[Callable[..., None], list[Expression]]:
    """One function for a pointwise expression and all that is fused into it, and what it reads."""
    chain = _in_order([root], fused)
    read = list(dict.fromkeys(operand for item in chain for operand in item.operands if operand not in fused))
    place = {item: index for index, item in enumerate([*read, *chain])}
    calls = [(item.run, [place[operand] for operand in item.operands]) for item in chain]

    def run(out: NDArray[Any], *operands: NDArray[Any]) -> None:
        rows = out.shape[0] if out.ndim else 1
        step = max(1, PIECE_ELEMENTS // max(1, out.size // rows))
        for start in range(0, rows, step):
            piece = slice(start, start + step) if out.ndim else ()
            values = [
                array[piece] if array.ndim == out.ndim and array.ndim and len(array) == rows else array
                for array in operands
            ]
            for function, places in calls:
                values.append(function(*[values[index] for index in places]))
            out[piece] = values[-1]

    return run, read


def _place(
    kept: Sequence[Expression], instructions: Sequence[Instruction], outputs: Sequence[int]
) -> tuple[dict[int, tuple[int, Expression]], int]:
    """An offset for each buffer such that buffers in use at the same time do not overlap."""
    owner: dict[int, int] = {}
    last: dict[int, int] = {}
    for time, instruction in enumerate(instructions):
        if instruction.returns:
            owner[instruction.target] = owner.get(instruction.operands[0], instruction.operands[0])
        for place in instruction.operands:
            last[owner.get(place, place)] = time
    last.update({owner.get(place, place): len(instructions) for place in outputs})
    live: dict[int, tuple[int, int]] = {}
    placed: dict[int, tuple[int, Expression]] = {}

    def put(place: int) -> None:
        size = -(-math.prod(kept[place].shape) * kept[place].dtype.itemsize // ALIGNMENT) * ALIGNMENT
        live[place] = (_first_gap(live.values(), size), size)
        placed[place] = (live[place][0], kept[place])

    for place in [place for place, item in enumerate(kept) if item.kind == "input"]:
        put(place)
    peak = sum(size for _, size in live.values())
    for time, instruction in enumerate(instructions):
        if not instruction.returns:
            put(instruction.target)
            peak = max(peak, sum(live[instruction.target]))
        for place in [place for place in live if last.get(place, time) <= time]:
            del live[place]
    return placed, peak


def _first_gap(taken: Iterable[tuple[int, int]], size: int) -> int:
    end = 0
    for offset, length in sorted(taken):
        if offset - end >= size:
            break
        end = max(end, offset + length)
    return end


def execute(program: Plan, registers: list[NDArray[Any] | None]) -> None:
    """Run the instructions.

    Args:
        program: the plan.
        registers: leaves and buffers are bound; aliases are filled in.
    """
    with np.errstate(all="ignore"):  # padding rows may divide by zero; nobody reads them
        for instruction in program.instructions:
            operands = [registers[place] for place in instruction.operands]
            if instruction.returns:
                registers[instruction.target] = instruction.run(*operands)
            else:
                instruction.run(registers[instruction.target], *operands)
