"""Packed weight formats and what their bytes mean.

Those of GGUF, defined here, cut a row into blocks; a block holds small integers
and the scales that turn them back into numbers. Those of ``array_formats`` are
arrays beside each other; unpacking and joining take both. This module knows
nothing of files, names or devices. Source of the blocks: the structures of ggml
(``ggml-common.h``) as the GGUF specification refers to them; all numbers are
little-endian.

Invariant: arithmetic is float32, in the order in which the formats define it
(scale times integer, then the offset), so results are the same bit for bit
wherever that order is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.interface.weights import DENSE, PackedTensor
from midspan.weights.array_formats import ARRAY_FORMATS, ArrayFormat, join_arrays
from midspan.weights.stored_tensor import DENSE_DTYPES

_CHUNK_VALUES = 1 << 17
"""Numbers unpacked at a time: few enough that temporaries stay in the processor's cache."""

Blocks = NDArray[np.void]
Float32Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockFormat:
    """One packed format.

    Attributes:
        name: as in ``PackedTensor.format``.
        values: numbers in a block.
        layout: the fields of a block.
        unpack: fills float32 ``[n, values]`` from n blocks.
    """

    name: str
    values: int
    layout: np.dtype[Any]
    unpack: Callable[[Blocks, Float32Array], None]


def dequantize(tensor: PackedTensor, dtype: str = "float32") -> NDArray[Any]:
    """Unpack a tensor into plain numbers.

    Args:
        tensor: dense or in one of ``KNOWN_FORMATS``.
        dtype: element type of the result, a key of ``DENSE_DTYPES``. Other types than float32 are
            rounded from float32 piece by piece, so that no float32 copy of the whole exists.

    Returns:
        An array of the tensor's shape. A dense tensor of that type is returned as it is, not copied.

    Raises:
        UnsupportedModel: nothing here unpacks the format.
        CheckpointError: the bytes or parts do not fit the shape.
    """
    wanted = DENSE_DTYPES[dtype]
    if tensor.format == DENSE:
        with np.errstate(over="ignore"):
            return tensor.parts["data"].astype(wanted, copy=False)
    if tensor.format in ARRAY_FORMATS:
        return _unpack_arrays(ARRAY_FORMATS[tensor.format], tensor, wanted)
    layout = FORMATS.get(tensor.format)
    if layout is None:
        raise UnsupportedModel(
            f"Tensor '{tensor.name}' is packed as {tensor.format}, which nothing here unpacks.",
            remedy=f"Take the model in one of: {', '.join(sorted(KNOWN_FORMATS))}.",
        )
    packed = np.ascontiguousarray(tensor.parts["blocks"])
    values = int(np.prod(tensor.shape, dtype=np.int64))
    if packed.nbytes * layout.values != values * layout.layout.itemsize:
        raise CheckpointError(
            f"Tensor '{tensor.name}' of shape {list(tensor.shape)} has {packed.nbytes:,} bytes, "
            f"which is not what {tensor.format} takes.",
            remedy="The file is damaged: download it again.",
        )
    blocks = packed.reshape(-1).view(layout.layout)
    out = np.empty((len(blocks), layout.values), dtype=wanted)
    _unpack_in_chunks(layout, blocks, out)
    return out.reshape(tensor.shape)


def join_packed(format_name: str, pieces: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]] | None:
    """The parts of packed matrices under each other.

    Args:
        format_name: of all pieces, one of ``KNOWN_FORMATS``.
        pieces: the parts of each matrix, from the top.

    Returns:
        The parts of the joined matrix; None where the format cannot hold it.
    """
    layout = ARRAY_FORMATS.get(format_name)
    if layout is not None:
        return join_arrays(layout, pieces)
    blocks = [piece["blocks"] for piece in pieces]
    return {"blocks": blocks[0] if len(blocks) == 1 else np.concatenate(blocks)}


def check_parts(tensor: PackedTensor) -> None:
    """Hold the parts of a tensor in one of ``ARRAY_FORMATS`` against its shape.

    Raises:
        CheckpointError: they do not fit.
    """
    layout = ARRAY_FORMATS.get(tensor.format)
    if layout is None:
        return
    rows, columns = (*tensor.shape, 0, 0)[:2]
    problem = layout.problem(tensor.parts, (rows, columns)) if len(tensor.shape) == 2 else "it is no matrix"
    if problem is not None:
        raise CheckpointError(
            f"Tensor '{tensor.name}' of shape {list(tensor.shape)} is no {tensor.format}: {problem}.",
            remedy="The file is damaged, or was written by a tool that understands the format otherwise.",
        )


def _unpack_arrays(layout: ArrayFormat, tensor: PackedTensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    check_parts(tensor)
    rows, columns = tensor.shape
    out = np.empty((rows, columns), dtype)
    step = max(1, _CHUNK_VALUES // max(1, columns))
    with np.errstate(invalid="ignore", over="ignore"):  # damaged scales, as below
        for start in range(0, rows, step):
            out[start : start + step] = layout.unpack(tensor.parts, slice(start, start + step), (rows, columns))
    return out


def _unpack_in_chunks(layout: BlockFormat, blocks: Blocks, out: NDArray[Any]) -> None:
    step = max(1, _CHUNK_VALUES // layout.values)
    buffer = None if out.dtype == np.float32 else np.empty((step, layout.values), dtype=np.float32)
    # Damaged scales may be infinite or NaN; the numbers then say so, without a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            target = out[start : start + step]
            if buffer is None:
                layout.unpack(part, target)
            else:
                layout.unpack(part, buffer[: len(part)])
                target[...] = buffer[: len(part)]


def _column(blocks: Blocks, field: str) -> Float32Array:
    """A float16 field as float32 ``[n, 1]``."""
    column: Float32Array = blocks[field].astype(np.float32)[:, None]
    return column


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[n, groups, k]`` bytes -> ``[n, groups, 2, k]``: low halves, then high halves."""
    return np.stack((packed & 15, packed >> 4), axis=2)


def _five_bits(blocks: Blocks) -> NDArray[np.uint8]:
    """Integers 0..31 of a Q5_0 or Q5_1 block, ``[n, 32]``: nibbles, and bit i of ``qh`` above value i."""
    count = len(blocks)
    high = np.unpackbits(np.ascontiguousarray(blocks["qh"]), axis=1, bitorder="little")
    integers: NDArray[np.uint8] = np.bitwise_or(
        _nibbles(blocks["qs"][:, None, :]).reshape(count, 32), high << 4, dtype=np.uint8
    )
    return integers


def _unpack_q8_0(blocks: Blocks, out: Float32Array) -> None:
    np.multiply(blocks["qs"], _column(blocks, "d"), out=out)


def _unpack_q4_0(blocks: Blocks, out: Float32Array) -> None:
    integers = _nibbles(blocks["qs"][:, None, :]).reshape(-1, 32).view(np.int8) - np.int8(8)
    np.multiply(integers, _column(blocks, "d"), out=out)


def _unpack_q4_1(blocks: Blocks, out: Float32Array) -> None:
    np.multiply(_nibbles(blocks["qs"][:, None, :]).reshape(-1, 32), _column(blocks, "d"), out=out)
    out += _column(blocks, "m")


def _unpack_q5_0(blocks: Blocks, out: Float32Array) -> None:
    np.multiply(_five_bits(blocks).view(np.int8) - np.int8(16), _column(blocks, "d"), out=out)


def _unpack_q5_1(blocks: Blocks, out: Float32Array) -> None:
    np.multiply(_five_bits(blocks), _column(blocks, "d"), out=out)
    out += _column(blocks, "m")


def _scales_and_minimums(blocks: Blocks) -> tuple[Float32Array, Float32Array]:
    """The eight 6-bit scales and minimums of a K block, times the block's own, ``[n, 8, 1]`` each.

    Twelve bytes: 0-3 hold scales 0-3 and 4-7 minimums 0-3 in their low six bits; 8-11 hold the
    low four bits of scales 4-7 (low half) and minimums 4-7 (high half), whose upper two
    bits are the upper two of bytes 0-3 and 4-7.
    """
    first, second, third = blocks["scales"][:, 0:4], blocks["scales"][:, 4:8], blocks["scales"][:, 8:12]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6) << 4), axis=1)
    minimums = np.concatenate((second & 63, (third >> 4) | (second >> 6) << 4), axis=1)
    return (
        (_column(blocks, "d") * scales.astype(np.float32))[:, :, None],
        (_column(blocks, "dmin") * minimums.astype(np.float32))[:, :, None],
    )


def _unpack_q4_k(blocks: Blocks, out: Float32Array) -> None:
    scales, minimums = _scales_and_minimums(blocks)
    target = out.reshape(-1, 8, 32)
    np.multiply(_nibbles(blocks["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32), scales, out=target)
    target -= minimums


def _unpack_q5_k(blocks: Blocks, out: Float32Array) -> None:
    scales, minimums = _scales_and_minimums(blocks)
    high = (blocks["qh"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    integers = _nibbles(blocks["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32) | (high << 4)
    target = out.reshape(-1, 8, 32)
    np.multiply(integers, scales, out=target)
    target -= minimums


def _unpack_q6_k(blocks: Blocks, out: Float32Array) -> None:
    low = _nibbles(blocks["ql"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = (blocks["qh"].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    integers = (low | (high << 4)).view(np.int8) - np.int8(32)
    scales = _column(blocks, "d") * blocks["scales"].astype(np.float32)
    np.multiply(integers.reshape(-1, 16, 16), scales[:, :, None], out=out.reshape(-1, 16, 16))


def _format(name: str, values: int, unpack: Callable[[Blocks, Float32Array], None], fields: str) -> BlockFormat:
    """A format from its fields in words: ``"d:f2 qs:u1:16"`` is a float16 and 16 bytes."""
    layout: list[Any] = []
    for item in fields.split():
        field, kind, *count = item.split(":")
        layout.append((field, f"<{kind}", (int(count[0]),)) if count else (field, f"<{kind}"))
    return BlockFormat(name=name, values=values, layout=np.dtype(layout), unpack=unpack)


FORMATS: Mapping[str, BlockFormat] = {
    entry.name: entry
    for entry in (
        _format("gguf.q4_0", 32, _unpack_q4_0, "d:f2 qs:u1:16"),
        _format("gguf.q4_1", 32, _unpack_q4_1, "d:f2 m:f2 qs:u1:16"),
        _format("gguf.q5_0", 32, _unpack_q5_0, "d:f2 qh:u1:4 qs:u1:16"),
        _format("gguf.q5_1", 32, _unpack_q5_1, "d:f2 m:f2 qh:u1:4 qs:u1:16"),
        _format("gguf.q8_0", 32, _unpack_q8_0, "d:f2 qs:i1:32"),
        _format("gguf.q4_k", 256, _unpack_q4_k, "d:f2 dmin:f2 scales:u1:12 qs:u1:128"),
        _format("gguf.q5_k", 256, _unpack_q5_k, "d:f2 dmin:f2 scales:u1:12 qh:u1:32 qs:u1:128"),
        _format("gguf.q6_k", 256, _unpack_q6_k, "ql:u1:128 qh:u1:64 scales:i1:16 d:f2"),
    )
}
"""Every packed format of GGUF that can be unpacked here, by name."""

KNOWN_FORMATS: tuple[str, ...] = (*FORMATS, *ARRAY_FORMATS)
"""Names of all packed formats that can be unpacked here."""
