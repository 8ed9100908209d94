"""Cuts a byte stream into messages: four bytes of length, then so many bytes.

Knows no message's content. Invariant: a frame is delivered whole or not at all;
a length above the limit is an error, for nothing behind it can be trusted.

The length is unsigned, big-endian.
"""

from __future__ import annotations

import asyncio
import socket
import struct

from midspan.engine.messages import ProtocolError


class BrokenStream(ProtocolError):
    """The bytes are no frames any more; nothing after them can be trusted."""


LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 1 << 28
"""256 MiB: far above the largest prompt with logprobs, far below a length made of rubbish."""


def frame(payload: bytes) -> bytes:
    """The payload with its length before it.

    Raises:
        BrokenStream: it is longer than a frame may be.
    """
    _check(len(payload))
    return LENGTH.pack(len(payload)) + payload


def receive_frame(connection: socket.socket) -> bytes | None:
    """Block until a whole frame is there.

    Returns:
        Its payload, or None at the end of the stream (also in the midst of a frame).

    Raises:
        BrokenStream: the length is above the limit.
    """
    header = _receive(connection, LENGTH.size)
    if header is None:
        return None
    (size,) = LENGTH.unpack(header)
    _check(size)
    return _receive(connection, size)


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """As ``receive_frame``, for asyncio."""
    try:
        (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        _check(size)
        return await reader.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _receive(connection: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        try:
            part = connection.recv(min(size, 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _check(size: int) -> None:
    if size > MAX_FRAME_BYTES:
        raise BrokenStream(f"A frame of {size} bytes is above the limit of {MAX_FRAME_BYTES}.")
