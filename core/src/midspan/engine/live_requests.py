"""The live requests of one engine, by the caller's name and by the name that its process knows.

Keeps the journal and tells the process what comes and goes. Knows neither how outputs are made
nor how a process is kept alive.

Invariants: a request is in all lists or in none; its name in the process is never used again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from midspan.engine.journal import Journal, JournalEntry
from midspan.engine.messages import Abort, AddRequest
from midspan.engine.output_processing import OutputProcessor
from midspan.engine.request_stream import RequestStream
from midspan.engine.resumption import Resumption
from midspan.engine.supervisor import EngineSupervisor


@dataclass(frozen=True, kw_only=True, eq=False)
class LiveStream:
    """One request and who waits for it.

    Attributes:
        request_id: as the caller named it.
        entry: its record in the journal.
        processor: makes its outputs.
        stream: gets them.
    """

    request_id: str
    entry: JournalEntry
    processor: OutputProcessor
    stream: RequestStream

    @property
    def wire_id(self) -> str:
        """Its name in the process."""
        return self.entry.request.request_id


class LiveRequests:
    """All of them, in the order of their arrival.

    Attributes:
        idle: set while there is none.
    """

    def __init__(self, supervisor: EngineSupervisor) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self._supervisor = supervisor
        self._journal = Journal()
        self._resumption = Resumption(supervisor.send)
        self._by_id: dict[str, LiveStream] = {}
        self._by_wire_id: dict[str, LiveStream] = {}
        self._numbers = self._sent = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[LiveStream]:
        return iter(tuple(self._by_id.values()))

    def find(self, request_id: str) -> LiveStream | None:
        """By the caller's name."""
        return self._by_id.get(request_id)

    def find_sent(self, wire_id: str) -> LiveStream | None:
        """By the process's name."""
        return self._by_wire_id.get(wire_id)

    def next_number(self) -> int:
        """How many requests came before."""
        number, self._numbers = self._numbers, self._numbers + 1
        return number

    def open(
        self,
        request: AddRequest,
        request_id: str,
        processor: OutputProcessor,
        stream: RequestStream,
        send: Callable[[AddRequest], None] | None = None,
    ) -> None:
        """Add a request, and send it where there is a process.

        Args:
            request: with its name in the process.
            request_id: the caller's name.
            processor: makes its outputs.
            stream: gets them.
            send: how it is sent; None: as it is.
        """
        live = LiveStream(request_id=request_id, entry=self._journal.open(request), processor=processor, stream=stream)
        self._by_id[request_id] = self._by_wire_id[request.request_id] = live
        self.idle.clear()
        if self._supervisor.is_ready():
            self.send(request, send)

    def send(self, request: AddRequest, send: Callable[[AddRequest], None] | None = None) -> None:
        """Send a request to the process of this moment, when nobody is on trial there."""
        self._sent += 1
        self._resumption.let_in(request, send)

    def strike(self, live: LiveStream) -> None:
        """Forget a request that ended, or that is another engine's now."""
        del self._by_id[live.request_id]
        del self._by_wire_id[live.wire_id]
        self._journal.close(live.wire_id)
        self._sent -= self._resumption.ended(live.wire_id)
        if not self._by_id:
            self.idle.set()

    def abort(self, live: LiveStream) -> None:
        """Forget a request, and have the process forget it."""
        self.strike(live)
        self._supervisor.send(Abort(request_id=live.wire_id))

    def give_up(self, wire_id: str) -> None:
        """Abort a request whose stream was closed, if it is still here."""
        live = self._by_wire_id.get(wire_id)
        if live is not None:
            self.abort(live)

    def generated(self, wire_id: str, index: int) -> None:
        """A sequence has generated, or ended."""
        self._resumption.generated(wire_id, index)

    def unread(self, received: int) -> int:
        """Requests on their way to a process that has received so many."""
        return max(0, self._sent - received)

    def lost(self) -> LiveStream | None:
        """The process died; the request that it died of, where that is certain."""
        guilty = self._resumption.lost()
        return None if guilty is None else self._by_wire_id.get(guilty)

    def resume(self) -> int:
        """Have a fresh process go on with all of them; how many they are."""
        requests = self._journal.resumptions()
        self._sent = len(requests)
        self._resumption.begin(requests)
        return len(requests)
