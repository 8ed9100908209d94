"""Lets live requests leave one engine process for another, while their streams go on.

The engines' processes never meet: what leaves one comes here as messages and goes on as
messages. Knows no output's content and no process's life.

Invariants: in every moment a request is in one engine's lists; a move ends once, with an
answer or with the process; what the client was given decides where a request goes on,
so cache content that does not fit to it is left behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import msgspec

from midspan.engine.live_requests import LiveRequests, LiveStream
from midspan.engine.messages import (
    AddRequest,
    Attach,
    Attached,
    CachePiece,
    Detach,
    Detached,
    MovedRequest,
    Piece,
)
from midspan.engine.supervisor import EngineSupervisor

logger = logging.getLogger("midspan.engine")


@dataclass(kw_only=True, eq=False)
class _Move:
    """One request on its way out; its pieces as far as they came."""

    target: RequestMoves
    done: asyncio.Future[bool]
    pieces: list[CachePiece] = field(default_factory=list)


class RequestMoves:
    """Moves out of one engine, and into it."""

    def __init__(self, live: LiveRequests, supervisor: EngineSupervisor) -> None:
        self._live = live
        self._supervisor = supervisor
        self._moves: dict[str, _Move] = {}

    def is_leaving(self, live: LiveStream) -> bool:
        """Whether a request is on its way out."""
        return live.wire_id in self._moves

    async def leave(self, live: LiveStream, target: RequestMoves) -> bool:
        """Have a request go on in another engine, where it is not leaving yet; False: it ended, or goes on here."""
        wire_id = live.wire_id
        move = self._moves[wire_id] = _Move(target=target, done=asyncio.get_running_loop().create_future())
        if self._supervisor.is_ready():
            self._supervisor.send(Detach(request_id=wire_id))
        else:
            self.hear(Detached(request_id=wire_id))
        return await move.done

    def hear(self, message: Piece | Detached | Attached) -> None:
        """Take in what this engine's process says of moves."""
        if isinstance(message, Piece):
            move = self._moves.get(message.piece.request_id)
            if move is not None:
                move.pieces.append(message.piece)
        elif isinstance(message, Detached):
            self._let_go(message)
        elif message.problem is not None:
            live = self._live.find_sent(message.request_id)
            if live is not None:
                logger.warning("a request is computed again, its cache was refused: %s", message.problem)
                self._live.send(live.entry.resumption())

    def lost(self) -> None:
        """The process died: nothing leaves it any more."""
        for move in self._moves.values():
            if not move.done.done():
                move.done.set_result(False)
        self._moves.clear()

    def take_over(self, live: LiveStream, moved: MovedRequest | None) -> None:
        """Go on with another engine's request; from its tokens where there is no cache to take over."""
        wire_id = f"{self._live.next_number()}:{live.request_id}"
        live.stream.follow(partial(self._live.give_up, wire_id))
        request = msgspec.structs.replace(live.entry.resumption(), request_id=wire_id)
        self._live.open(request, live.request_id, live.processor, live.stream, self._sender(moved, request))

    def _let_go(self, answer: Detached) -> None:
        """A request has left the process; in the same breath the other engine has it."""
        move = self._moves.pop(answer.request_id, None)
        live = self._live.find_sent(answer.request_id)
        if move is None:
            return
        moved = None if answer.moved is None else msgspec.structs.replace(answer.moved, pieces=move.pieces)
        gone = live is not None and move.target._is_open()
        if live is not None and gone:
            # Not only struck off: where the process knew it not, it may be on its way there since.
            self._live.abort(live)
            move.target.take_over(live, moved)
        elif live is not None and moved is not None:
            request = live.entry.resumption()
            self._live.send(request, self._sender(moved, request))
        if not move.done.done():
            move.done.set_result(gone)

    def _is_open(self) -> bool:
        return self._supervisor.death is None and not self._supervisor.closing

    def _sender(self, moved: MovedRequest | None, request: AddRequest) -> Callable[[AddRequest], None] | None:
        """How to send a request with its cache; None: without.

        A stop string may have ended a sequence that had gone on meanwhile; then they do not fit.
        """
        if moved is None or moved.request.sequences != request.sequences:
            return None
        return partial(self._send_moved, moved)

    def _send_moved(self, moved: MovedRequest, request: AddRequest) -> None:
        for piece in moved.pieces:
            self._supervisor.send(Piece(piece=msgspec.structs.replace(piece, request_id=request.request_id)))
        arriving = msgspec.structs.replace(moved.request, request_id=request.request_id)
        self._supervisor.send(Attach(moved=msgspec.structs.replace(moved, request=arriving, pieces=[])))
