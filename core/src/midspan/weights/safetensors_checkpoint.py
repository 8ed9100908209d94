"""Tensors of safetensors files, mapped and not copied: one file, or shards with an index.

It knows this container and the index file beside it, and nothing of models.
Source: the safetensors format, https://github.com/huggingface/safetensors
(an 8-byte little-endian header length, a JSON header, then the tensors' bytes).

The header is read here and not by the safetensors library, because the library
gives numpy a copy of each tensor and has no bfloat16 there; here an array is a
view of the mapped file.

Invariants: the tensors cover the data area without holes or overlaps, as the
format demands; whatever breaks a rule gives ``CheckpointError``.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError
from midspan.interface.weights import DENSE
from midspan.weights.stored_tensor import StoredTensor

INDEX_NAME = "model.safetensors.index.json"
_DOWNLOAD_AGAIN = "It is damaged or was not downloaded completely: delete it and download it again."
_MAX_HEADER = 100_000_000

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(np.bool_),
}


def find_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder, whichever way it holds them.

    Args:
        folder: a folder with ``model.safetensors``, or an index and its shards, or one file of
            another name.

    Returns:
        Name -> tensor; {} when the folder has no safetensors file at all.

    Raises:
        CheckpointError: a file is damaged or missing, or the files contradict the index.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return read_safetensors(single)
    if (folder / INDEX_NAME).is_file():
        return _read_shards(folder)
    others = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not others:
        return {}
    if len(others) > 1:
        raise CheckpointError(
            f"{folder} has {len(others)} safetensors files and no {INDEX_NAME} that says what is in them.",
            remedy="Download the folder again with its index.",
        )
    return read_safetensors(others[0])


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Map one file.

    Args:
        path: the file. It must not be cut while anything of the result is in use.

    Returns:
        Name -> tensor, in the order of the data.

    Raises:
        CheckpointError: the file cannot be read or breaks a rule of the format.
    """
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror}.", remedy="Check that the file is there and that you may read it."
        ) from error
    except ValueError as error:  # mmap refuses an empty file so
        raise CheckpointError(f"{path} is empty.", remedy=_DOWNLOAD_AGAIN) from error
    start, header = _read_header(path, buffer)
    places = sorted((_place(path, name, entry) for name, entry in header.items()), key=lambda place: place.begin)
    _check_cover(path, places, len(buffer) - start)
    whole = np.frombuffer(buffer, dtype=np.uint8)
    return {place.name: _stored(place, whole[start + place.begin : start + place.end]) for place in places}


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: {reason}.", remedy=_DOWNLOAD_AGAIN)


def _read_header(path: Path, buffer: mmap.mmap) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the entry of each tensor."""
    size = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or size > min(_MAX_HEADER, len(buffer) - 8):
        raise _damaged(path, f"it has {len(buffer):,} bytes and no room for its header")
    try:
        header = json.loads(buffer[8 : 8 + size].decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is no valid JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    return 8 + size, header


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key appears twice")
    return entries


@dataclass(frozen=True, kw_only=True)
class _Place:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def _place(path: Path, name: str, entry: Any) -> _Place:
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or not isinstance(kind, str):
        raise _damaged(path, f"the header's entry of tensor '{name}' is invalid")
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor '{name}' has the element type {kind!r}, which is not known here.",
            remedy=f"Known are {', '.join(_DTYPES)}; if it is none of a newer format, download the file again.",
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(
            path, f"tensor '{name}' of shape {list(shape)} and type {kind} cannot take {end - begin:,} bytes"
        )
    return _Place(name=name, dtype=dtype, shape=shape, begin=begin, end=end)


def _sizes(value: Any) -> tuple[int, ...] | None:
    valid = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return tuple(value) if valid else None


def _check_cover(path: Path, places: list[_Place], available: int) -> None:
    expected = 0
    for place in places:
        if place.begin != expected:
            problem = "overlaps another" if place.begin < expected else "leaves a hole before it"
            raise _damaged(path, f"tensor '{place.name}' {problem}")
        expected = place.end
    if expected != available:
        problem = "the download stopped early" if available < expected else "it has bytes that belong to nothing"
        raise _damaged(path, f"its header speaks of {expected:,} bytes of data and {available:,} are there: {problem}")


def _stored(place: _Place, data: NDArray[np.uint8]) -> StoredTensor:
    return StoredTensor(
        name=place.name,
        shape=place.shape,
        format=DENSE,
        dtype=str(place.dtype.name),
        nbytes=data.nbytes,
        read=_Reader(data=data, dtype=place.dtype, shape=place.shape),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reader:
    """Gives the array: a view, or a copy where a writer left it off its natural alignment."""

    data: NDArray[np.uint8]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __call__(self) -> Mapping[str, NDArray[Any]]:
        array = self.data.view(self.dtype).reshape(self.shape)
        return {"data": array if array.flags.aligned else array.copy()}


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX_NAME
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(index, "it is no valid JSON") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise _damaged(index, "it has no valid 'weight_map'")
    shards = {shard: _read_shard(folder, index, shard) for shard in sorted(set(weight_map.values()))}
    tensors: dict[str, StoredTensor] = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index} says that '{name}' is in {shard}, and it is not there.",
                remedy="Index and shards belong to different models or versions: download the folder again.",
            )
        tensors[name] = shards[shard][name]
    return tensors


def _read_shard(folder: Path, index: Path, shard: str) -> dict[str, StoredTensor]:
    if Path(shard).name != shard or shard in (".", "..") or "\\" in shard or "\0" in shard:
        raise _damaged(index, f"it names the shard {shard!r}, which is no file name")
    if not (folder / shard).is_file():
        raise CheckpointError(
            f"{folder} lacks {shard}, which {INDEX_NAME} names.",
            remedy="The model was not downloaded completely: download the folder again.",
        )
    return read_safetensors(folder / shard)
