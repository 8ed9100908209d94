"""Where the values of a step lie: fixed places in one piece of memory.

Each value of the plan has room for its rows in the largest step; a place is
given again when the last reader of its value has run. Columns of a wider value
lie inside of it. Knows no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from midspan.interface import Bounds, Graph, Node, Value
from midspan.interface.graph import ACTIVATION
from midspan.runtimes.torch.element_types import torch_type

ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one value lies.

    Attributes:
        offset: bytes from the begin of the memory.
        stride: elements from row to row.
        columns: elements of a row.
        rows: the symbol that counts its rows, ``"T"`` or ``"S"``.
        dtype: element type.
    """

    offset: int
    stride: int
    columns: int
    rows: str
    dtype: torch.dtype


class Arena:
    """The memory, and the places in it.

    Attributes:
        places: value -> place; values that live elsewhere have none.
        nbytes: size of the memory.
        address: of its first byte.
    """

    def __init__(self, places: Mapping[str, Place], nbytes: int) -> None:
        self.places = places
        self.nbytes = nbytes
        self._memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
        self._start = -self._memory.data_ptr() % ALIGNMENT
        self.address = self._memory.data_ptr() + self._start
        kinds = {place.dtype for place in places.values()}
        whole = self._memory[self._start : self._start + nbytes // ALIGNMENT * ALIGNMENT]
        self._typed = {dtype: whole.view(dtype) for dtype in kinds}

    def view(self, place: Place, rows: int) -> torch.Tensor:
        """The value as a tensor [rows, columns] over this memory."""
        first = place.offset // place.dtype.itemsize
        # as_strided counts from the storage's begin.
        first += self._start // place.dtype.itemsize
        return self._typed[place.dtype].as_strided((rows, place.columns), (place.stride, 1), first)


@dataclass
class _FreeList:
    """Free ranges below ``end``, and what lies beyond is free too."""

    end: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def take(self, size: int) -> int:
        """The smallest free range that is large enough, or new memory at the end."""
        fitting = [(length, start) for start, length in self.ranges if length >= size]
        if not fitting:
            start, self.end = self.end, self.end + size
            return start
        length, start = min(fitting)
        self.ranges.remove((start, length))
        if length > size:
            self.ranges.append((start + size, length - size))
        return start

    def give(self, start: int, size: int) -> None:
        """Return a range, joined with its neighbours."""
        self.ranges = sorted([*self.ranges, (start, size)])
        joined: list[tuple[int, int]] = []
        for begin, length in self.ranges:
            if joined and joined[-1][0] + joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((begin, length))
        self.ranges = joined


def place_values(graph: Graph, native: set[str], bounds: Bounds) -> Arena:
    """Give a place to each value that a native node reads or makes.

    Args:
        graph: nodes in execution order.
        native: names of the nodes that run in plans.
        bounds: the largest step.
    """
    wanted = _wanted(graph, native)
    owner = _owners(graph, wanted)
    last_use = _last_uses(graph, owner)
    room = _FreeList()
    places: dict[str, Place] = {}
    taken: dict[str, tuple[int, int]] = {}
    for index, node in enumerate(graph.nodes):
        for name in (*graph.inputs, *node.outputs) if index == 0 else node.outputs:
            if name not in wanted:
                continue
            if owner[name] != name:
                places[name] = _part(graph, node, name, places[node.inputs[0]])
                continue
            size = _bytes(graph, name, bounds)
            taken[name] = (room.take(size), size)
            places[name] = _place(graph, name, taken[name][0], bounds)
        for name in [name for name in taken if last_use[name] <= index]:
            room.give(*taken.pop(name))
    return Arena(places, room.end)


def _wanted(graph: Graph, native: set[str]) -> set[str]:
    """Values of two sizes that native nodes touch, and what is cut from them."""
    touched: set[str] = set()
    for node in graph.nodes:
        if node.name in native:
            touched.update(node.inputs, node.outputs)
    for node in reversed(graph.nodes):
        if node.op == "split" and any(name in touched for name in (*node.inputs, *node.outputs)):
            touched.update(node.inputs, node.outputs)
    return {name for name in touched if _is_matrix(graph.values[name])}


def _is_matrix(value: Value) -> bool:
    """Of two sizes, the second one known; block tables and the likes are not."""
    known = len(value.shape) == 2 and isinstance(value.shape[1], int)
    return known and value.dtype in (ACTIVATION, "float32", "int32")


def _type(value: Value, bounds: Bounds) -> torch.dtype:
    if value.dtype == "int32":
        return torch.int32
    return torch_type(bounds.dtype if value.dtype == ACTIVATION else value.dtype)


def _owners(graph: Graph, wanted: set[str]) -> dict[str, str]:
    """The value whose place a value lies in: its own, or what it was cut from."""
    owner = {name: name for name in wanted}
    for node in graph.nodes:
        if node.op == "split" and node.inputs[0] in wanted:
            owner.update({name: owner[node.inputs[0]] for name in node.outputs if name in wanted})
    return owner


def _last_uses(graph: Graph, owner: Mapping[str, str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for name in (*node.inputs, *node.outputs):
            if name in owner:
                last[owner[name]] = index
    for name in graph.outputs:
        if name in owner:
            last[owner[name]] = len(graph.nodes)
    return last


def _part(graph: Graph, node: Node, name: str, whole: Place) -> Place:
    before = node.outputs[: node.outputs.index(name)]
    first = sum(int(graph.values[earlier].shape[1]) for earlier in before)
    columns = int(graph.values[name].shape[1])
    return Place(
        offset=whole.offset + first * whole.dtype.itemsize,
        stride=whole.stride,
        columns=columns,
        rows=whole.rows,
        dtype=whole.dtype,
    )


def _place(graph: Graph, name: str, offset: int, bounds: Bounds) -> Place:
    value = graph.values[name]
    columns = int(value.shape[1])
    dtype = _type(value, bounds)
    return Place(offset=offset, stride=columns, columns=columns, rows=str(value.shape[0]), dtype=dtype)


def _bytes(graph: Graph, name: str, bounds: Bounds) -> int:
    value = graph.values[name]
    rows = {"T": bounds.max_tokens, "S": bounds.max_sampled_rows}[str(value.shape[0])]
    dtype = _type(value, bounds)
    size = rows * int(value.shape[1]) * dtype.itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT
