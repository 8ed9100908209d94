"""Arrays as bytes on a connection, and their transfer between several peers at once.

A frame is a header of fixed size, the shape, and the elements in C order.
Knows no group, no operation's meaning and no device; nothing is executed by being read.

Invariants: a frame's length follows from its header, which is checked before anything is
allocated; sending to and receiving from all peers go on at the same time, so that two
ranks that send to each other never wait for each other; no transfer lasts longer than its
patience without a byte coming or going.
"""

from __future__ import annotations

import math
import selectors
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import DeviceLost, MidspanError
from midspan.runtimes.reference.element_types import ELEMENT_TYPES

FRAME_TYPES: Mapping[str, np.dtype[Any]] = {**ELEMENT_TYPES, "int32": np.dtype(np.int32)}
"""Element types that travel; their order is their number in a header."""

LARGEST_FRAME = 2**38
"""Bytes of one array at most; a header that says more is rubbish."""
LARGEST_RANK = 32
"""Axes of one array at most; numpy's own limit was this for long."""

_HEADER = struct.Struct("<BBBxIQ")
"""Operation, element type, axes, how many frames went before, bytes of elements."""
_PIECE = 1 << 18
"""Bytes that are handed to a socket at a time."""


@dataclass(kw_only=True, eq=False)
class Peer:
    """The connection to one other rank.

    Attributes:
        rank: which.
        connection: non-blocking.
        sent: frames that were sent to it.
        received: frames that came from it.
    """

    rank: int
    connection: socket.socket
    sent: int = 0
    received: int = 0


def _frame(array: NDArray[Any], operation: int, sequence: int) -> list[memoryview]:
    """A frame as parts to be sent one after the other; the elements are not copied where they lie in order."""
    names = list(FRAME_TYPES)
    number = next((place for place, name in enumerate(names) if FRAME_TYPES[name] == array.dtype), None)
    if number is None:
        raise MidspanError(
            f"An array of {array.dtype} cannot travel between devices.", remedy=f"Take one of {', '.join(names)}."
        )
    if array.ndim > LARGEST_RANK or array.nbytes > LARGEST_FRAME:
        raise MidspanError(
            f"An array of shape {array.shape} and {array.nbytes} bytes is too large to travel at once.",
            remedy="Send it in parts.",
        )
    header = _HEADER.pack(operation, number, array.ndim, sequence % 2**32, array.nbytes)
    parts = [memoryview(header + struct.pack(f"<{array.ndim}Q", *array.shape))]
    if array.nbytes:
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return parts


@dataclass(kw_only=True, eq=False)
class _Incoming:
    """One frame in the making: header, then shape, then elements."""

    peer: Peer
    operation: int
    buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(_HEADER.size)))
    filled: int = 0
    dtype: np.dtype[Any] | None = None
    axes: int = 0
    nbytes: int = 0
    shape: tuple[int, ...] | None = None

    def take(self) -> bool:
        """Read what is there; True once the frame is whole."""
        while True:
            while self.filled < len(self.buffer):
                count = self.peer.connection.recv_into(self.buffer[self.filled :])
                if count == 0:
                    raise ConnectionResetError("it left the group")
                self.filled += count
            if not self._next_part():
                return True

    def array(self) -> NDArray[Any]:
        """The whole frame's array."""
        return np.frombuffer(self.buffer, self.dtype or np.dtype(np.uint8)).reshape(self.shape or ())

    def _next_part(self) -> bool:
        if self.dtype is None:
            self._read_header()
        elif self.shape is None:
            self._read_shape()
        else:
            return False
        return True

    def _read_header(self) -> None:
        operation, number, axes, sequence, self.nbytes = _HEADER.unpack(self.buffer)
        types = list(FRAME_TYPES.values())
        if number >= len(types) or axes > LARGEST_RANK or self.nbytes > LARGEST_FRAME:
            raise DeviceLost(f"Rank {self.peer.rank} sent something that is no array.", remedy=_RESTART)
        if (operation, sequence) != (self.operation, self.peer.received % 2**32):
            raise MidspanError(
                f"Rank {self.peer.rank} is in another operation of the group than this rank (operation {operation}, "
                f"message {sequence}; here it is {self.operation}, {self.peer.received}).",
                remedy="Every rank must call the same operations in the same order.",
            )
        self.dtype, self.axes = types[number], axes
        self._expect(8 * axes)

    def _read_shape(self) -> None:
        self.shape = struct.unpack(f"<{self.axes}Q", self.buffer)
        if self.dtype is None or math.prod(self.shape) * self.dtype.itemsize != self.nbytes:
            raise DeviceLost(
                f"Rank {self.peer.rank} sent an array whose length is not that of its shape.", remedy=_RESTART
            )
        self._expect(self.nbytes)

    def _expect(self, count: int) -> None:
        self.buffer, self.filled = memoryview(bytearray(count)), 0


_RESTART = "Start the group again; if it happens again, look at what else uses its port."


class Transfer:
    """Frames to some peers and from some peers, all at once.

    Args:
        peers: by rank.
        outgoing: rank -> array to send.
        senders: ranks that send one frame each.
        operation: the number that all these frames bear.
        patience: seconds without any progress after which those that are missing count as lost.
    """

    def __init__(
        self,
        peers: Mapping[int, Peer],
        outgoing: Mapping[int, NDArray[Any]],
        senders: frozenset[int],
        *,
        operation: int,
        patience: float,
    ) -> None:
        self._peers = peers
        self._outgoing = {rank: _frame(array, operation, peers[rank].sent) for rank, array in outgoing.items()}
        self._incoming = {rank: _Incoming(peer=peers[rank], operation=operation) for rank in senders}
        self._patience = patience

    def run(self) -> dict[int, NDArray[Any]]:
        """Do it.

        Returns:
            What each sender sent.

        Raises:
            DeviceLost: a peer is gone, or did nothing for too long; the message names the ranks.
            MidspanError: a peer is in another operation.
        """
        received: dict[int, NDArray[Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank in {*self._outgoing, *self._incoming}:
                selector.register(self._peers[rank].connection, self._events(rank), rank)
            last = time.monotonic()
            while selector.get_map():
                ready = selector.select(max(0.0, last + self._patience - time.monotonic()))
                if not ready:
                    self._give_up()
                last = time.monotonic()
                for key, events in ready:
                    self._serve(key.data, events, received)
                    self._watch(selector, key.data)
        return received

    def _serve(self, rank: int, events: int, received: dict[int, NDArray[Any]]) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._write(self._peers[rank])
            if events & selectors.EVENT_READ and self._incoming[rank].take():
                received[rank] = self._incoming.pop(rank).array()
                self._peers[rank].received += 1
        except BlockingIOError:
            return
        except OSError as error:
            raise DeviceLost(f"Rank {rank} is lost: {error}.", remedy="Start the whole group again.") from error

    def _write(self, peer: Peer) -> None:
        parts = self._outgoing[peer.rank]
        sent = peer.connection.send(parts[0][:_PIECE])
        parts[0] = parts[0][sent:]
        if not len(parts[0]):
            parts.pop(0)
        if not parts:
            del self._outgoing[peer.rank]
            peer.sent += 1

    def _watch(self, selector: selectors.BaseSelector, rank: int) -> None:
        events = self._events(rank)
        if events:
            selector.modify(self._peers[rank].connection, events, rank)
        else:
            selector.unregister(self._peers[rank].connection)

    def _events(self, rank: int) -> int:
        writes = selectors.EVENT_WRITE if rank in self._outgoing else 0
        return writes | (selectors.EVENT_READ if rank in self._incoming else 0)

    def _give_up(self) -> None:
        missing = sorted({*self._outgoing, *self._incoming})
        names = ", ".join(str(rank) for rank in missing)
        raise DeviceLost(
            f"{'Rank' if len(missing) == 1 else 'Ranks'} {names} did not come to an operation of the group within "
            f"{self._patience:g} seconds.",
            remedy="Look at why they are slow or gone, and start the whole group again.",
        )
