"""The array library: expressions of known shape that say what to compute and compute nothing.

``plan`` turns expressions into instructions. Knows no graph, no memory and no cache. Elements are
float32 or int32; a comparison gives int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Expression:
    """An array that does not exist yet.

    Attributes:
        kind: ``leaf`` (bound by name before it runs, or constant), ``input`` (copied in by name
            before it runs), ``pointwise`` (element by element, fused with its neighbours),
            ``whole`` (``run(out, *operands)``), or ``alias`` (``run(*operands)`` returns memory
            that exists: a view, or an array that was stored into).
        shape: sizes, all known.
        dtype: element type.
        operands: what it is computed from.
        run: how, by numpy.
        leaf: a leaf's or an input's name, or the constant.
        contiguous: False for a view with gaps, which cannot be reshaped in place.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] = FLOAT
    operands: tuple[Expression, ...] = ()
    run: Callable[..., Any] = np.positive
    leaf: Union[str, NDArray[Any], None] = None
    contiguous: bool = True

    def __add__(self, other: Operand) -> Expression:
        return pointwise(np.add, self, other)

    def __sub__(self, other: Operand) -> Expression:
        return pointwise(np.subtract, self, other)

    def __mul__(self, other: Operand) -> Expression:
        return pointwise(np.multiply, self, other)

    def __truediv__(self, other: Operand) -> Expression:
        return pointwise(np.divide, self, other)

    def reshape(self, *shape: int) -> Expression:
        """The same elements under other sizes."""
        source = self if self.contiguous else pointwise(np.positive, self)
        return Expression(
            kind="alias", shape=shape, dtype=self.dtype, operands=(source,), run=lambda array: array.reshape(shape)
        )

    def part(self, axis: int, start: int, stop: int, step: int = 1) -> Expression:
        """A slice along an axis."""
        axis %= len(self.shape)
        index = (slice(None),) * axis + (slice(start, stop, step),)
        shape = (*self.shape[:axis], len(range(start, stop, step)), *self.shape[axis + 1 :])
        whole = self.contiguous and axis == 0 and step == 1
        return Expression(
            kind="alias",
            shape=shape,
            dtype=self.dtype,
            operands=(self,),
            run=lambda array: array[index],
            contiguous=whole,
        )

    def transposed(self) -> Expression:
        """Rows and columns of a matrix exchanged."""
        return Expression(
            kind="alias",
            shape=self.shape[::-1],
            dtype=self.dtype,
            operands=(self,),
            run=lambda array: array.T,
            contiguous=False,
        )


Operand = Union[Expression, float]


def leaf(name: str, shape: tuple[int, ...], dtype: np.dtype[Any] = FLOAT) -> Expression:
    """An array of the device that is bound before the program runs."""
    return Expression(kind="leaf", shape=shape, dtype=dtype, leaf=name)


def from_host(name: str, shape: tuple[int, ...], dtype: np.dtype[Any] = FLOAT) -> Expression:
    """An array of the host that is copied in before the program runs."""
    return Expression(kind="input", shape=shape, dtype=dtype, leaf=name)


def constant(array: Any, dtype: np.dtype[Any] = FLOAT) -> Expression:
    """An array that is known."""
    content = np.asarray(array, dtype)
    return Expression(kind="leaf", shape=content.shape, dtype=dtype, leaf=content)


def pointwise(function: Callable[..., Any], *operands: Operand, dtype: np.dtype[Any] | None = None) -> Expression:
    """A numpy function of elements, with numpy's broadcasting."""
    whole_numbers = all(
        isinstance(item, int) or (isinstance(item, Expression) and item.dtype == INT) for item in operands
    )
    kind = dtype or (INT if whole_numbers else FLOAT)
    own = tuple(item if isinstance(item, Expression) else constant(item, kind) for item in operands)
    shape = np.broadcast_shapes(*(item.shape for item in own))
    return Expression(kind="pointwise", shape=shape, dtype=kind, operands=own, run=function)


def as_float(x: Expression) -> Expression:
    """int32 as float32."""
    return pointwise(np.float32, x, dtype=FLOAT)


def at_most(a: Expression, b: Operand) -> Expression:
    """Where ``a <= b``."""
    return pointwise(np.less_equal, a, b, dtype=INT)


def choose(condition: Expression, a: Operand, b: Operand) -> Expression:
    """``a`` where the condition holds, and ``b`` elsewhere."""
    return pointwise(np.where, condition, a, b, dtype=FLOAT)


def matmul(a: Expression, b: Expression) -> Expression:
    """Matrix products over the last two axes, the others broadcast."""
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    return Expression(kind="whole", shape=shape, operands=(a, b), run=lambda out, x, y: np.matmul(x, y, out=out))


def reduce(function: np.ufunc, x: Expression, *axes: int) -> Expression:
    """A ufunc over some axes, which stay with size 1."""
    places = tuple(axis % len(x.shape) for axis in axes)
    shape = tuple(1 if axis in places else size for axis, size in enumerate(x.shape))
    return Expression(
        kind="whole",
        shape=shape,
        dtype=x.dtype,
        operands=(x,),
        run=lambda out, array: function.reduce(array, axis=places, keepdims=True, out=out),
    )


def mean(x: Expression) -> Expression:
    """The mean over the last axis, which stays with size 1."""
    return reduce(np.add, x, -1) / float(x.shape[-1])


def gather(table: Expression, indexes: Expression) -> Expression:
    """Rows of a table by index."""

    def run(out: NDArray[Any], rows: NDArray[Any], index: NDArray[Any]) -> None:
        out[...] = rows[index]

    shape = (*indexes.shape, *table.shape[1:])
    return Expression(kind="whole", shape=shape, dtype=table.dtype, operands=(table, indexes), run=run)


def join(parts: Sequence[Expression], axis: int) -> Expression:
    """Arrays one behind the other along an axis."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return Expression(
        kind="whole",
        shape=tuple(shape),
        dtype=parts[0].dtype,
        operands=tuple(parts),
        run=lambda out, *arrays: np.concatenate(arrays, axis=axis, out=out),
    )


def store(write: Callable[..., Any], target: Expression, *operands: Expression) -> Expression:
    """The target after ``write(target, *operands)`` changed it in place; who reads the result reads it later."""
    return Expression(kind="alias", shape=target.shape, dtype=target.dtype, operands=(target, *operands), run=write)


def _erf(x: NDArray[Any]) -> NDArray[Any]:
    result: NDArray[Any] = np.frompyfunc(math.erf, 1, 1)(x).astype(np.float32)
    return result


def erf(x: Expression) -> Expression:
    """The error function."""
    return pointwise(_erf, x)
