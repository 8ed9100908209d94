"""Cuts a byte stream into messages: four bytes of length, then so many bytes.

Knows no message's content. Invariant: a frame is delivered whole or not at all;
a length above the limit is an error, for nothing behind it can be trusted.

The length is unsigned, big-endian.
"""

from __future__ import annotations

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
    check_length(len(payload))
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
    check_length(size)
    return _receive(connection, size)


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


def check_length(size: int) -> None:
    """Refuse a length that no frame has.

    Raises:
        BrokenStream: it is above the limit.
    """
    if size > MAX_FRAME_BYTES:
        raise BrokenStream(f"A frame of {size} bytes is above the limit of {MAX_FRAME_BYTES}.")
