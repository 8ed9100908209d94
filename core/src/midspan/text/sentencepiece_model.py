"""SentencePiece's ``tokenizer.model`` file, read without the library that wrote it.

Knows the file format and no tokenizer. Sources: ``sentencepiece_model.proto`` of
the SentencePiece project for the fields; the protocol buffers encoding guide
for the bytes. Fields that are not listed here are skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from midspan.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces, also in GGUF files."""

UNIGRAM, BPE = 1, 2
"""Kinds of models."""

Field = int | bytes | float


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """Content of a model file.

    Attributes:
        pieces: by id.
        scores: by id.
        types: by id, ``NORMAL`` and so on.
        kind: ``UNIGRAM``, ``BPE`` or another number.
        space_before_text: a space is put before every text.
        charsmap: compiled normalization, or nothing.
        unknown_id, bos_id, eos_id: -1 in the file, None here, where there is none.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    kind: int
    space_before_text: bool
    charsmap: bytes
    unknown_id: int | None
    bos_id: int | None
    eos_id: int | None


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a model file.

    Raises:
        CheckpointError: the file is no SentencePiece model or is cut off.
    """
    try:
        return _model(path.read_bytes())
    except (ValueError, TypeError, LookupError, struct.error, OSError) as error:
        raise CheckpointError(
            f"{path} is no readable SentencePiece model: {error}.", remedy="Download the file again."
        ) from error


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Field] = {}
    normalizer: dict[int, Field] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_message(value)))
            text, score, kind = _message(piece.get(1, b"")).decode(), piece.get(2, 0.0), piece.get(3, NORMAL)
            pieces.append((text, float(score), int(kind)))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    if not pieces:
        raise ValueError("it has no pieces")
    return SentencePieceModel(
        pieces=tuple(text for text, _, _ in pieces),
        scores=tuple(score for _, score, _ in pieces),
        types=tuple(kind for _, _, kind in pieces),
        kind=int(trainer.get(3, UNIGRAM)),
        space_before_text=bool(normalizer.get(3, 1)),
        charsmap=_message(normalizer.get(2, b"")),
        unknown_id=_id(trainer.get(40, 0)),
        bos_id=_id(trainer.get(41, 1)),
        eos_id=_id(trainer.get(42, 2)),
    )


def _id(value: Field) -> int | None:
    number = int(value)
    return number if number < 1 << 31 else None  # negative numbers are stored as huge ones


def _message(value: Field) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a field has another type than it should")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """Field numbers and values of one message: integers, floats and byte strings."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, place = _varint(data, place)
        if size is None or place + size > len(data):
            raise ValueError("a field is cut off or of an unknown type")
        content = data[place : place + size]
        place += size
        yield tag >> 3, struct.unpack("<f", content)[0] if wire == 5 else content


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number is longer than ten bytes")
