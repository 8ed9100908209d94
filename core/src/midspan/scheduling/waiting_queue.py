"""Requests that wait to be admitted, in the order of their rank.

Those that were ended stay until they come to its top or are too many, so
ending one costs nothing in a queue of thousands. Forks stand aside, by the id of the
leader whose prompt they wait for. Knows nothing of blocks or budgets.

Invariant: ``first`` is a request that waits or was preempted.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from midspan.scheduling.request import Request


class WaitingQueue:
    """A heap by rank, and forks that are not ready to be in it."""

    __slots__ = ("_ended", "_heap", "_held")

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Request]] = []
        self._held: dict[str, list[Request]] = {}
        self._ended = 0

    def push(self, request: Request) -> None:
        """Put a ranked request in its place."""
        heapq.heappush(self._heap, (request.rank, request))

    def first(self) -> Request | None:
        """The one to be admitted next; it stays in the queue."""
        while self._heap:
            request = self._heap[0][1]
            if not request.is_finished():
                return request
            heapq.heappop(self._heap)
            self._ended = max(0, self._ended - 1)
        return None

    def pop(self) -> Request:
        """Take out what ``first`` returned."""
        return heapq.heappop(self._heap)[1]

    def hold(self, request: Request, leader_id: str) -> None:
        """Let a fork stand aside."""
        self._held.setdefault(leader_id, []).append(request)

    def has_held(self, leader_id: str) -> bool:
        """Whether forks wait for that leader."""
        return leader_id in self._held

    def release_held(self, leader_id: str) -> None:
        """Put the forks of a leader into the queue."""
        for request in self._held.pop(leader_id, ()):
            self.push(request)

    def note_ended(self) -> None:
        """One of the requests here was finished."""
        self._ended += 1
        if self._ended * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[1].is_finished()]
            heapq.heapify(self._heap)
            self._ended = 0

    def __iter__(self) -> Iterator[Request]:
        """All live requests here, in no order."""
        held = (request for requests in self._held.values() for request in requests)
        in_heap = (request for _rank, request in self._heap)
        return (request for part in (in_heap, held) for request in part if not request.is_finished())
