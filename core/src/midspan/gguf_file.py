"""The GGUF container: typed metadata and named tensors in one mapped file.

It knows the container and nothing of what is inside: no architecture, no
tokenizer, no weight's meaning. Source: the GGUF specification,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3,
little-endian.

Invariants: nothing is read outside the file, whatever the bytes say; every
tensor lies inside the file, on its alignment, and overlaps no other; a file
that breaks a rule gives ``CheckpointError``. Arrays of the metadata are walked
when the file is opened and decoded when they are asked for, so that opening
stays cheap with any vocabulary.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError

_DOWNLOAD_AGAIN = "The file is damaged or was not downloaded completely: delete it and download it again."
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 4
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Mapping[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<B"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
"""Metadata value types of fixed size. 8 is a string, 9 an array."""


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """How numbers of a tensor are stored.

    Attributes:
        name: the format's name in upper case, ``Q4_1``.
        values: numbers in one block; a row holds whole blocks.
        size: bytes of one block.
    """

    name: str
    values: int
    size: int


_TYPE_TABLE = """
    0:F32:1:4 1:F16:1:2 2:Q4_0:32:18 3:Q4_1:32:20 6:Q5_0:32:22 7:Q5_1:32:24 8:Q8_0:32:34
    10:Q2_K:256:84 11:Q3_K:256:110 12:Q4_K:256:144 13:Q5_K:256:176 14:Q6_K:256:210
    16:IQ2_XXS:256:66 17:IQ2_XS:256:74 18:IQ3_XXS:256:98 19:IQ1_S:256:50 20:IQ4_NL:32:18
    21:IQ3_S:256:110 22:IQ2_S:256:82 23:IQ4_XS:256:136 24:I8:1:1 25:I16:1:2 26:I32:1:4
    27:I64:1:8 28:F64:1:8 29:IQ1_M:256:56 30:BF16:1:2 34:TQ1_0:256:54 35:TQ2_0:256:66
    39:MXFP4:32:17 40:NVFP4:64:36 41:Q1_0:128:18
"""
"""Number in the file, name, values and bytes of a block."""

TENSOR_TYPES: Mapping[int, TensorType] = {
    int(number): TensorType(name=name, values=int(values), size=int(size))
    for number, name, values, size in (entry.split(":") for entry in _TYPE_TABLE.split())
}
"""Number in the file -> type. Known here means that its size is known, not that anybody can unpack it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufTensor:
    """One tensor of the file, still mapped.

    Attributes:
        name: its name in the file.
        shape: row-major, the last axis contiguous: the reverse of the order in the file.
        type: how it is stored.
        data: uint8 ``[*shape[:-1], bytes per row]``, a read-only view of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    data: NDArray[np.uint8]


class GgufMetadata(Mapping[str, Any]):
    """Key -> value, read-only.

    Integers, floats, booleans and strings come as Python's; an array of strings as a
    ``tuple[str, ...]``, an array of numbers or booleans as a read-only one-dimensional numpy
    array of its own type, an array of arrays as a tuple of these. Arrays are decoded once, when
    first asked for; text that is no UTF-8 gives ``CheckpointError`` then.
    """

    def __init__(self, cursor: _Cursor, entries: dict[str, Any]) -> None:
        self._cursor = cursor
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        value = self._entries[key]
        if isinstance(value, _ArrayPlace):
            value = self._cursor.decode_array(value)
            self._entries[key] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufFile:
    """An opened file.

    Attributes:
        path: where it lies.
        version: 2 or 3.
        metadata: key -> value.
        tensors: name -> tensor, in the file's order.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and read its header.

    Args:
        path: the file. It must not be cut while anything of the result is in use.

    Returns:
        The metadata and the tensors; nothing of the tensors' content has been read yet.

    Raises:
        CheckpointError: the file cannot be read, is truncated or breaks a rule of the format.
    """
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            reason, remedy = error.strerror, "Check the path and that you may read the file."
        else:  # mmap refuses an empty file so
            reason, remedy = "it is empty", _DOWNLOAD_AGAIN
        raise CheckpointError(f"Cannot read {path}: {reason}.", remedy=remedy) from error
    cursor = _Cursor(path, buffer)
    try:
        return _read_file(cursor)
    except (struct.error, OverflowError) as error:
        raise cursor.damaged("it ends in the middle of its header") from error


def _read_file(cursor: _Cursor) -> GgufFile:
    if bytes(cursor.buffer[:4]) != b"GGUF":
        raise CheckpointError(f"{cursor.path} is no GGUF file: it does not begin with 'GGUF'.", remedy=_DOWNLOAD_AGAIN)
    cursor.position = 4
    version = cursor.u32()
    if version not in (2, 3):
        order = " or big-endian" if version & 0xFFFF == 0 else ""
        raise CheckpointError(
            f"{cursor.path} has GGUF version {version}{order}; versions 2 and 3, little-endian, can be read.",
            remedy="Convert the model again with a current converter, or download a current file.",
        )
    tensor_count, entry_count = cursor.u64(), cursor.u64()
    cursor.demand(tensor_count, 24, "tensors")
    cursor.demand(entry_count, 13, "metadata entries")
    entries = _read_entries(cursor, entry_count)
    alignment = entries.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"its alignment is {alignment!r} and no power of two")
    places = [_read_place(cursor) for _ in range(tensor_count)]
    start = -(-cursor.position // alignment) * alignment
    tensors = _map_tensors(cursor, places, start, alignment)
    return GgufFile(path=cursor.path, version=version, metadata=GgufMetadata(cursor, entries), tensors=tensors)


def _read_entries(cursor: _Cursor, count: int) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in entries:
            raise cursor.damaged(f"the metadata key {key!r} appears twice")
        kind = cursor.u32()
        entries[key] = cursor.skip_array() if kind == _ARRAY else cursor.value(kind, key)
    return entries


@dataclass(frozen=True, kw_only=True)
class _TensorPlace:
    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


def _read_place(cursor: _Cursor) -> _TensorPlace:
    name = cursor.string()
    dimensions = cursor.u32()
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.damaged(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise cursor.damaged(f"tensor {name!r} of shape {list(shape)} is empty")
    number = cursor.u32()
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r} is stored as type {number}, which is not known here.",
            remedy="Take the model in another quantization (Q4_K_M, Q8_0), or download it again if it may be damaged.",
        )
    if shape[-1] % kind.values:
        raise cursor.damaged(f"rows of tensor {name!r} hold {shape[-1]} values, no multiple of {kind.values}")
    nbytes = shape[-1] // kind.values * kind.size
    for size in shape[:-1]:
        nbytes *= size
    return _TensorPlace(name=name, shape=shape, type=kind, offset=cursor.u64(), nbytes=nbytes)


def _map_tensors(cursor: _Cursor, places: list[_TensorPlace], start: int, alignment: int) -> dict[str, GgufTensor]:
    whole = np.frombuffer(cursor.buffer, dtype=np.uint8)
    end = 0
    for place in sorted(places, key=lambda place: place.offset):
        if place.offset % alignment:
            raise cursor.damaged(f"tensor {place.name!r} does not lie on the alignment of {alignment} bytes")
        if place.offset < end:
            raise cursor.damaged(f"tensor {place.name!r} overlaps another")
        end = place.offset + place.nbytes
    if places and start + end > cursor.size:
        raise cursor.damaged(f"it has {cursor.size:,} bytes and its header speaks of {start + end:,}")
    tensors: dict[str, GgufTensor] = {}
    for place in places:
        if place.name in tensors:
            raise cursor.damaged(f"tensor {place.name!r} appears twice")
        row = place.shape[-1] // place.type.values * place.type.size
        begin = start + place.offset
        data = whole[begin : begin + place.nbytes].reshape(*place.shape[:-1], row)
        tensors[place.name] = GgufTensor(name=place.name, shape=place.shape, type=place.type, data=data)
    return tensors


@dataclass(frozen=True, kw_only=True)
class _ArrayPlace:
    """Where an array's elements lie: bounds were checked when it was walked."""

    kind: int
    count: int
    start: int
    end: int


class _Cursor:
    """Reads the header front to back. ``struct.error`` means that the file ended."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.position = 0

    def damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {reason}.", remedy=_DOWNLOAD_AGAIN)

    def demand(self, count: int, least: int, what: str) -> None:
        """Refuse a count that cannot fit in the rest of the file, before anything is built from it."""
        if count * least > self.size - self.position:
            raise self.damaged(f"it claims {count:,} {what}, more than fit in its {self.size:,} bytes")

    def u32(self) -> int:
        value: int = _U32.unpack_from(self.buffer, self.position)[0]
        self.position += 4
        return value

    def u64(self) -> int:
        value: int = _U64.unpack_from(self.buffer, self.position)[0]
        self.position += 8
        return value

    def string(self) -> str:
        length = self.u64()
        self.demand(length, 1, "characters in one string")
        start = self.position
        self.position += length
        return self._text(self.buffer[start : self.position])

    def _text(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text {data[:40]!r} is no UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        """One value that is no array."""
        if kind == _STRING:
            return self.string()
        layout = _SCALARS.get(kind)
        if layout is None:
            raise self.damaged(f"the metadata key {key!r} has type {kind}, which does not exist")
        value = layout.unpack_from(self.buffer, self.position)[0]
        self.position += layout.size
        return self._boolean(value) if kind == _BOOL else value

    def _boolean(self, value: int) -> bool:
        if value > 1:
            raise self.damaged(f"a boolean has the value {value}")
        return value == 1

    def skip_array(self, depth: int = 1) -> _ArrayPlace:
        """Walk over an array and remember where it is."""
        if depth > _MAX_ARRAY_DEPTH:
            raise self.damaged(f"arrays are nested deeper than {_MAX_ARRAY_DEPTH}")
        kind, count = self.u32(), self.u64()
        start = self.position
        if kind == _STRING:
            self.demand(count, 8, "strings in an array")
            self._skip_strings(count)
        elif kind == _ARRAY:
            self.demand(count, 12, "arrays in an array")
            for _ in range(count):
                self.skip_array(depth + 1)
        elif kind in _SCALARS:
            self.demand(count, _SCALARS[kind].size, "elements in an array")
            self.position += count * _SCALARS[kind].size
        else:
            raise self.damaged(f"an array has elements of type {kind}, which does not exist")
        return _ArrayPlace(kind=kind, count=count, start=start, end=self.position)

    def _skip_strings(self, count: int) -> None:
        # The one long loop of opening a file: 100,000 strings and more. Lengths are unsigned, so
        # the position only grows, and reading past the end stops it.
        read, buffer, position = _U64.unpack_from, self.buffer, self.position
        for _ in repeat(None, count):
            position += 8 + read(buffer, position)[0]
        if position > self.size:
            raise self.damaged("an array of strings reaches past its end")
        self.position = position

    def decode_array(self, place: _ArrayPlace) -> Any:
        """The elements of an array that was walked before."""
        if place.kind == _STRING:
            return self._decode_strings(place)
        if place.kind == _ARRAY:
            inner = _Cursor(self.path, self.buffer)
            inner.position = place.start
            return tuple(self.decode_array(inner.skip_array()) for _ in range(place.count))
        layout = "<u1" if place.kind == _BOOL else _SCALARS[place.kind].format
        array = np.frombuffer(self.buffer, dtype=layout, count=place.count, offset=place.start).copy()
        if place.kind == _BOOL:
            if array.size and array.max() > 1:
                raise self.damaged("an array of booleans holds something else")
            array = array.astype(np.bool_)
        array.flags.writeable = False
        return array

    def _decode_strings(self, place: _ArrayPlace) -> tuple[str, ...]:
        region = self.buffer[place.start : place.end]
        read, position, strings = _U64.unpack_from, 0, []
        for _ in repeat(None, place.count):
            start = position + 8
            position = start + read(region, position)[0]
            strings.append(region[start:position])
        try:
            return tuple([item.decode() for item in strings])
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text {error.object[:40]!r} is no UTF-8") from error
