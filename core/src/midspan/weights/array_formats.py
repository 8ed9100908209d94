"""Packed weight formats that are arrays beside each other: small numbers, and the scales that make them large again.

The parts of each format stand in ``midspan.interface.weights``; this module says what they mean, checks
them and joins them. It knows nothing of files, of published layouts or of devices.

Invariant: arithmetic is float32, integer less zero point first and then times scale, so that numbers are the
same bit for bit wherever that order is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = 128
"""Rows and columns that share a scale in ``fp8.block``."""

Parts = Mapping[str, NDArray[Any]]
Float32Array = NDArray[np.float32]

_SCALES = (np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayFormat:
    """One packed format.

    Attributes:
        name: as in ``PackedTensor.format``.
        problem: what is wrong with parts for a matrix of ``[out, in]``; None where they fit.
        unpack: float32 ``[n, in]`` of n rows from the first one on; arguments: parts, rows, shape.
        grid: rows that share a scale; matrices are joined at multiples of it only.
    """

    name: str
    problem: Callable[[Parts, tuple[int, int]], str | None]
    unpack: Callable[[Parts, slice, tuple[int, int]], Float32Array]
    grid: int = 1


def join_arrays(layout: ArrayFormat, pieces: Sequence[Parts]) -> dict[str, NDArray[Any]] | None:
    """The parts of matrices under each other.

    Args:
        layout: the format of all.
        pieces: the parts of each, from the top.

    Returns:
        The joined parts; None where the format has none for them: another size of groups, another order of
        the columns, or rows that would share a scale with those of a neighbour.
    """
    if len(pieces) == 1:
        return dict(pieces[0])
    first = pieces[0]
    if any(piece["data"].shape[0] % layout.grid for piece in pieces[:-1]):
        return None
    for piece in pieces[1:]:
        if piece.keys() != first.keys() or any(piece[role].shape[1:] != first[role].shape[1:] for role in first):
            return None
        if "order" in first and not np.array_equal(piece["order"], first["order"]):
            return None
    return {role: first[role] if role == "order" else _stacked([piece[role] for piece in pieces]) for role in first}


def _stacked(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    types = {array.dtype for array in arrays}
    common = types.pop() if len(types) == 1 else np.dtype(np.float32)
    return np.concatenate([array.astype(common, copy=False) for array in arrays])


def _wrong(parts: Parts, role: str, shape: tuple[int, ...], dtypes: Sequence[np.dtype[Any]]) -> str | None:
    part = parts.get(role)
    if part is None:
        return f"it has no part '{role}'"
    if part.shape != shape:
        return f"its part '{role}' has the shape {list(part.shape)} instead of {list(shape)}"
    if part.dtype not in dtypes:
        return f"its part '{role}' holds {part.dtype.name} instead of {' or '.join(kind.name for kind in dtypes)}"
    return None


def _channel_problem(data: np.dtype[Any]) -> Callable[[Parts, tuple[int, int]], str | None]:
    def problem(parts: Parts, shape: tuple[int, int]) -> str | None:
        return _wrong(parts, "data", shape, (data,)) or _wrong(parts, "scale", shape[:1], _SCALES[:1])

    return problem


def _channel_rows(parts: Parts, rows: slice, shape: tuple[int, int]) -> Float32Array:
    wide: Float32Array = parts["data"][rows].astype(np.float32)
    wide *= parts["scale"][rows, None]
    return wide


def _block_problem(parts: Parts, shape: tuple[int, int]) -> str | None:
    blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    return _wrong(parts, "data", shape, (FP8,)) or _wrong(parts, "scale", blocks, _SCALES[:1])


def _block_rows(parts: Parts, rows: slice, shape: tuple[int, int]) -> Float32Array:
    wide: Float32Array = parts["data"][rows].astype(np.float32)
    numbers = np.arange(rows.start, rows.start + len(wide)) // BLOCK
    wide *= np.repeat(parts["scale"][numbers], BLOCK, axis=1)[:, : shape[1]]
    return wide


def _group_problem(values: int, zeros: Sequence[np.dtype[Any]]) -> Callable[[Parts, tuple[int, int]], str | None]:
    """Of a format that holds so many integers in a byte."""

    def problem(parts: Parts, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        scale = parts.get("scale")
        groups = scale.shape[1] if scale is not None and scale.ndim == 2 else 0
        if columns % values or not groups or columns % groups or columns // groups % values:
            return f"{columns} columns cannot lie in {groups} groups"
        wrong = _wrong(parts, "data", (rows, columns // values), (np.dtype(np.uint8),))
        wrong = wrong or _wrong(parts, "scale", (rows, groups), _SCALES)
        wrong = wrong or _wrong(parts, "zero", (rows, groups), zeros)
        if wrong or "order" not in parts:
            return wrong
        wrong = _wrong(parts, "order", (columns,), (np.dtype(np.int32),))
        if wrong is None and not np.array_equal(np.sort(parts["order"]), np.arange(columns)):
            wrong = "its part 'order' does not name each column once"
        return wrong

    return problem


def _group_rows(integers: NDArray[np.uint8], parts: Parts, rows: slice, shape: tuple[int, int]) -> Float32Array:
    count, groups = len(integers), parts["scale"].shape[1]
    wide = integers.astype(np.float32).reshape(count, groups, -1)
    wide -= parts["zero"][rows].astype(np.float32)[:, :, None]
    wide *= parts["scale"][rows].astype(np.float32)[:, :, None]
    flat = wide.reshape(count, shape[1])
    if "order" not in parts:
        return flat
    ordered = np.empty_like(flat)
    ordered[:, parts["order"]] = flat
    return ordered


def _int4_rows(parts: Parts, rows: slice, shape: tuple[int, int]) -> Float32Array:
    packed = parts["data"][rows]
    return _group_rows(np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1), parts, rows, shape)


def _int8_group_rows(parts: Parts, rows: slice, shape: tuple[int, int]) -> Float32Array:
    return _group_rows(parts["data"][rows], parts, rows, shape)


_INT8, _UINT8, _INT16 = np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int16)

ARRAY_FORMATS: Mapping[str, ArrayFormat] = {
    entry.name: entry
    for entry in (
        ArrayFormat(name="int8.channel", problem=_channel_problem(_INT8), unpack=_channel_rows),
        ArrayFormat(name="int8.dynamic", problem=_channel_problem(_INT8), unpack=_channel_rows),
        ArrayFormat(name="int8.group", problem=_group_problem(1, (_INT16,)), unpack=_int8_group_rows),
        ArrayFormat(name="int4.group", problem=_group_problem(2, (_UINT8,)), unpack=_int4_rows),
        ArrayFormat(name="fp8.channel", problem=_channel_problem(FP8), unpack=_channel_rows),
        ArrayFormat(name="fp8.block", problem=_block_problem, unpack=_block_rows, grid=BLOCK),
    )
}
"""Every such format, by name."""

DYNAMIC = "int8.dynamic"
"""The format whose products round their inputs too."""
