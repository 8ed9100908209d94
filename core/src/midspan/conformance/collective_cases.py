"""What the ranks of a group do together, and what must come of it: one list for all ranks.

Each rank makes everybody's arrays from the same seeds, so that it knows what it must get; numpy
only, knows no device and no process.

Invariants: the cases and their numbers are a function of the world's size and the element types;
what only travels arrives with the same bits. A sum over n ranks may be rounded to its type at each of
its n - 1 additions and once more, in any order, so it lies within n v (|x_0| + ... + |x_n-1|) of the
exact one (Higham, "Accuracy and Stability of Numerical Algorithms", chapter 4; v as in
``operation_margins``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.operation_margins import STEPS, UNITS
from midspan.interface import Collectives
from midspan.runtimes.reference.element_types import ELEMENT_TYPES

Array = NDArray[Any]

INTEGER = "int32"
OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send-and-receive", "broadcast", "in-turn")
"""Parts of the list, in the order in which the ranks go through it; the last mixes all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CollectiveCase:
    """One operation of the whole group.

    Attributes:
        operation: of ``OPERATIONS``.
        name: what is special.
        run: does this rank's part; host array, or None where this rank gets nothing.
        expected: this rank's result, exact in float64 or in its own type; None as above.
        margin: how far off it may be, None: not at all.
        dtype: element type of the result.
        same_everywhere: every rank gets the same array.
    """

    operation: str
    name: str
    run: Callable[[Collectives], Array | None]
    expected: Array | None
    margin: Array | None
    dtype: str
    same_everywhere: bool = False

    def problem(self, found: Array | None) -> str | None:
        """What is wrong with a result, or None."""
        if found is None or self.expected is None:
            return None if found is self.expected else "a result where none, or none where one is due"
        if found.shape != self.expected.shape:
            return f"shape {found.shape} instead of {self.expected.shape}"
        if found.dtype != _numpy_type(self.dtype):
            return f"elements of {found.dtype} instead of {self.dtype}"
        wide, wanted = found.astype(np.float64), self.expected.astype(np.float64)
        off = ~(np.abs(wide - wanted) <= (0.0 if self.margin is None else self.margin))
        if not off.any():
            return None
        place = tuple(int(index) for index in np.argwhere(off)[0])
        return (
            f"{int(off.sum())} of {off.size} elements are off; at {place} it is {wide[place]:.9g} and not "
            f"{wanted[place]:.9g}"
        )


def collective_cases(rank: int, world_size: int, dtypes: Sequence[str]) -> list[CollectiveCase]:
    """All cases for one rank.

    Args:
        rank: which.
        world_size: ranks in the group.
        dtypes: activation types that the device claims.
    """
    world = _World(rank, world_size)
    cases = list(_each(world, dtypes))
    order = np.random.default_rng(world_size).permutation(len(cases))
    return [*cases, *(_in_turn(cases[place]) for place in order[:40])]


def _each(world: _World, dtypes: Sequence[str]) -> Iterator[CollectiveCase]:
    travelling = (*dtypes, INTEGER)
    for dtype, shape in product(dtypes, [(5, 7), (1,), (0, 3), (33, 31), (2, 3, 4)]):
        yield world.all_reduce(dtype, shape)
    for dtype, (shape, axis) in product(travelling, [((3, 4), 0), ((3, 4), 1), ((2, 1, 5), -1), ((0, 2), 0)]):
        yield world.all_gather(dtype, shape, axis, uneven=False)
    for dtype, axis in product(travelling, [0, 1]):
        yield world.all_gather(dtype, (3, 3), axis, uneven=True)
    even = [((6 * world.size, 5), 0), ((3, 4 * world.size), 1), ((2, world.size, 3), -2)]
    odd = [((2 * world.size + 1, 5), 0), ((3, world.size - 1), 1), ((0, 4), 0)]
    for dtype, (shape, axis) in product(dtypes, [*even, *odd]):
        yield world.reduce_scatter(dtype, shape, axis)
    for dtype, (width, spread) in product(travelling, [((4,), 1), ((4,), 3), ((), 3), ((2, 3), 2)]):
        yield world.all_to_all(dtype, width, spread)
    for dtype, shape in product(travelling, [(6, 5), (1,), (0, 4)]):
        for source, target in product(range(world.size), repeat=2):
            if source != target:
                yield world.send(dtype, shape, source, target)
    for dtype, shape in product(travelling, [(6, 5), (0, 4)]):
        for source in range(world.size):
            yield world.broadcast(dtype, shape, source)


def _in_turn(case: CollectiveCase) -> CollectiveCase:
    return CollectiveCase(
        operation="in-turn",
        name=f"{case.operation}, {case.name}",
        run=case.run,
        expected=case.expected,
        margin=case.margin,
        dtype=case.dtype,
        same_everywhere=case.same_everywhere,
    )


def _numpy_type(dtype: str) -> np.dtype[Any]:
    return np.dtype(np.int32) if dtype == INTEGER else ELEMENT_TYPES[dtype]


class _World:
    """Makes cases for one rank."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._seed = 0

    def all_reduce(self, dtype: str, shape: tuple[int, ...]) -> CollectiveCase:
        arrays = self._arrays(dtype, [shape] * self.size)
        total, margin = _sum(arrays, dtype)
        return CollectiveCase(
            operation="all-reduce",
            name=f"{dtype} {shape}",
            run=lambda group: group.to_host(group.all_reduce(group.to_device(arrays[self.rank]))),
            expected=total,
            margin=margin,
            dtype=dtype,
            same_everywhere=True,
        )

    def all_gather(self, dtype: str, shape: tuple[int, ...], axis: int, *, uneven: bool) -> CollectiveCase:
        shapes = [list(shape) for _ in range(self.size)]
        if uneven:
            for rank, own in enumerate(shapes):
                own[axis] = 2 * rank
        arrays = self._arrays(dtype, [tuple(own) for own in shapes])
        return CollectiveCase(
            operation="all-gather",
            name=f"{dtype} {shape} along {axis}{', of different sizes' if uneven else ''}",
            run=lambda group: group.to_host(group.all_gather(group.to_device(arrays[self.rank]), axis)),
            expected=np.concatenate(arrays, axis=axis),
            margin=None,
            dtype=dtype,
            same_everywhere=True,
        )

    def reduce_scatter(self, dtype: str, shape: tuple[int, ...], axis: int) -> CollectiveCase:
        arrays = self._arrays(dtype, [shape] * self.size)
        total, margin = _sum(arrays, dtype)
        return CollectiveCase(
            operation="reduce-scatter",
            name=f"{dtype} {shape} along {axis}",
            run=lambda group: group.to_host(group.reduce_scatter(group.to_device(arrays[self.rank]), axis)),
            expected=np.array_split(total, self.size, axis=axis)[self.rank],
            margin=np.array_split(margin, self.size, axis=axis)[self.rank],
            dtype=dtype,
        )

    def all_to_all(self, dtype: str, width: tuple[int, ...], spread: int) -> CollectiveCase:
        counts = [
            [(source + 2 * target + 1) % spread + (spread == 1) for target in range(self.size)]
            for source in range(self.size)
        ]
        arrays = self._arrays(dtype, [(sum(row), *width) for row in counts])
        pieces = [np.split(array, np.cumsum(row)[:-1]) for array, row in zip(arrays, counts, strict=True)]
        receive = [row[self.rank] for row in counts]
        return CollectiveCase(
            operation="all-to-all",
            name=f"{dtype} rows {counts[self.rank]} of {width or 'one number'}",
            run=lambda group: group.to_host(
                group.all_to_all(group.to_device(arrays[self.rank]), counts[self.rank], receive)
            ),
            expected=np.concatenate([pieces[source][self.rank] for source in range(self.size)]),
            margin=None,
            dtype=dtype,
        )

    def send(self, dtype: str, shape: tuple[int, ...], source: int, target: int) -> CollectiveCase:
        (array,) = self._arrays(dtype, [shape])

        def run(group: Collectives) -> Array | None:
            if self.rank == source:
                group.send(group.to_device(array), target)
            if self.rank == target:
                return group.to_host(group.receive(shape, dtype, source))
            return None

        return CollectiveCase(
            operation="send-and-receive",
            name=f"{dtype} {shape} from {source} to {target}",
            run=run,
            expected=array if self.rank == target else None,
            margin=None,
            dtype=dtype,
        )

    def broadcast(self, dtype: str, shape: tuple[int, ...], source: int) -> CollectiveCase:
        arrays = self._arrays(dtype, [shape] * self.size)
        return CollectiveCase(
            operation="broadcast",
            name=f"{dtype} {shape} from {source}",
            run=lambda group: group.to_host(group.broadcast(group.to_device(arrays[self.rank]), source)),
            expected=arrays[source],
            margin=None,
            dtype=dtype,
            same_everywhere=True,
        )

    def _arrays(self, dtype: str, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
        self._seed += 1
        random = np.random.default_rng(self._seed)
        if dtype == INTEGER:
            return [random.integers(-(2**31), 2**31, shape).astype(np.int32) for shape in shapes]
        return [random.standard_normal(shape).astype(_numpy_type(dtype)) for shape in shapes]


def _sum(arrays: Sequence[Array], dtype: str) -> tuple[Array, Array]:
    """The exact sum, and how far off it a device's may be."""
    wide = [array.astype(np.float64) for array in arrays]
    magnitudes = np.sum([np.abs(array) for array in wide], axis=0)
    return np.sum(wide, axis=0), len(arrays) * UNITS[dtype] * magnitudes + STEPS[dtype]
