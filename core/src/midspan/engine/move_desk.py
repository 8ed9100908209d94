"""The engine process's part in moving requests: takes pieces in, gives pieces out.

Knows messages and the engine, no socket.

Invariant: every ``Detach`` is answered by one ``Detached``, every ``Attach`` by one
``Attached``; pieces of a request that never came are forgotten with the next answer about it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from midspan.engine.messages import Attach, Attached, CachePiece, Detach, Detached, Piece
from midspan.engine.step_loop import EngineCore
from midspan.errors import DeviceLost, InvalidRequest, MidspanError

logger = logging.getLogger("midspan.engine")


class MoveDesk:
    """Requests that come to an engine, and that leave it."""

    def __init__(self, send: Callable[[Piece | Detached | Attached], None]) -> None:
        self._send = send
        self._pieces: dict[str, list[CachePiece]] = {}

    def take(self, piece: CachePiece) -> None:
        """Keep a part of the cache of a request that is to come."""
        self._pieces.setdefault(piece.request_id, []).append(piece)

    def detach(self, core: EngineCore, message: Detach) -> None:
        """Let a request go. DeviceLost: its cache cannot be read, nor anything else."""
        try:
            moved = core.detach(message.request_id)
        except InvalidRequest:
            self._send(Detached(request_id=message.request_id))
            return
        for piece in moved.pieces:
            self._send(Piece(piece=piece))
        self._send(Detached(request_id=message.request_id, moved=msgspec.structs.replace(moved, pieces=[])))

    def attach(self, core: EngineCore, message: Attach) -> None:
        """Let a request in. DeviceLost: its cache cannot be written, nor anything else."""
        request_id = message.moved.request.request_id
        moved = msgspec.structs.replace(message.moved, pieces=self._pieces.pop(request_id, []))
        try:
            tokens = core.attach(moved)
        except DeviceLost:
            raise
        except Exception as error:
            if not isinstance(error, MidspanError):
                logger.exception("request %s could not be taken over", request_id)
            self._send(Attached(request_id=request_id, problem=str(error) or type(error).__name__))
            return
        self._send(Attached(request_id=request_id, tokens=tokens))
