"""Lets live requests into a fresh engine process one after the other.

The process before it died, perhaps of one of them. Each is on trial until all its
sequences have generated; when the process dies meanwhile, and nothing else was in it, that request
is the culprit. When others were in it already, it is the first one to be tried
next, and so alone. Knows no process: messages go through the function that it is given.

Invariants: one request is on trial at a time; nobody is found guilty who was not
alone; a request is sent once to each process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from midspan.engine.messages import AddRequest


class Resumption:
    """Which requests are in the engine process, and which still wait to be let in."""

    def __init__(self, send: Callable[[AddRequest], None]) -> None:
        """Begin with an empty process.

        Args:
            send: gives a request to the process of this moment.
        """
        self._send = send
        self._waiting: OrderedDict[str, AddRequest] = OrderedDict()
        self._on_trial: str | None = None
        self._silent: set[int] = set()
        self._inside: set[str] = set()
        self._suspect: str | None = None

    def let_in(self, request: AddRequest, send: Callable[[AddRequest], None] | None = None) -> None:
        """Send a new request, at once where nobody is on trial and otherwise behind those who wait.

        Args:
            request: the request.
            send: how it is sent when that is at once; None: as all are.
        """
        if self._on_trial is None:
            self._inside.add(request.request_id)
            (send or self._send)(request)
        else:
            self._waiting[request.request_id] = request

    def lost(self) -> str | None:
        """The process died; nobody is in it now.

        Returns:
            The request that it died of, where that is certain.
        """
        died_of = self._on_trial if not self._inside else None
        self._suspect = self._on_trial
        self._on_trial = None
        self._inside.clear()
        self._waiting.clear()
        return died_of

    def begin(self, requests: Iterable[AddRequest]) -> None:
        """Let requests into a fresh process.

        Args:
            requests: in the order in which they are tried, but for the suspect, who is the first.
        """
        self._waiting = OrderedDict((request.request_id, request) for request in requests)
        if self._suspect is not None and self._suspect in self._waiting:
            self._waiting.move_to_end(self._suspect, last=False)
        self._try_next()

    def generated(self, request_id: str, index: int) -> None:
        """A sequence has generated, or ended; when all of a request's have, the process did not die of it."""
        if request_id == self._on_trial:
            self._silent.discard(index)
            if not self._silent:
                self._inside.add(request_id)
                self._try_next()

    def ended(self, request_id: str) -> bool:
        """A request ended in whatever way.

        Returns:
            Whether it was never sent.
        """
        self._inside.discard(request_id)
        if request_id == self._on_trial:
            self._try_next()
        return self._waiting.pop(request_id, None) is not None

    def _try_next(self) -> None:
        self._on_trial = None
        if self._waiting:
            self._on_trial, request = self._waiting.popitem(last=False)
            self._silent = {start.index for start in request.sequences}
            self._send(request)
