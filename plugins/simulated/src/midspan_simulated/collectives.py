"""Collectives whose numbers cross the host's sockets and whose time is the ring's.

Knows no graph. Numbers and errors are the reference's; what is added is the time that the
exchange would take over the accelerator's own links.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from midspan.interface.collectives import Collectives
from midspan_simulated.ring import Ring


class TimedCollectives:
    """Implements ``interface.collectives.Collectives``.

    Args:
        inner: exchanges the numbers.
        ring: says how long it takes; None: no time is counted.
    """

    def __init__(self, inner: Collectives, ring: Ring | None) -> None:
        self.rank = inner.rank
        self.world_size = inner.world_size
        self._inner = inner
        self._ring = ring
        self._seconds = 0.0

    def take_seconds(self) -> float:
        """Modelled seconds of what was exchanged since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def to_device(self, array: NDArray[Any]) -> Any:
        """A host array as the device's own."""
        return self._inner.to_device(array)

    def to_host(self, array: Any) -> NDArray[Any]:
        """One of the device's arrays as numpy sees it."""
        return self._inner.to_host(array)

    def all_reduce(self, array: Any) -> Any:
        """Sum over all ranks."""
        if self._ring is not None:
            self._seconds += self._ring.all_reduce(self._bytes(array))
        return self._inner.all_reduce(array)

    def all_gather(self, array: Any, axis: int) -> Any:
        """Every rank's array, joined along an axis by rank."""
        result = self._inner.all_gather(array, axis)
        if self._ring is not None:
            self._seconds += self._ring.all_gather(self._bytes(result))
        return result

    def reduce_scatter(self, array: Any, axis: int) -> Any:
        """Sum over all ranks, of which each keeps its share."""
        if self._ring is not None:
            self._seconds += self._ring.all_gather(self._bytes(array))
        return self._inner.reduce_scatter(array, axis)

    def all_to_all(self, array: Any, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Any:
        """Exchange rows by rank."""
        if self._ring is not None:
            self._seconds += self._ring.all_gather(self._bytes(array))
        return self._inner.all_to_all(array, send_counts, receive_counts)

    def send(self, array: Any, rank: int) -> None:
        """Send to one rank."""
        if self._ring is not None:
            self._seconds += self._ring.point_to_point(self._bytes(array))
        self._inner.send(array, rank)

    def receive(self, shape: tuple[int, ...], dtype: str, rank: int) -> Any:
        """Receive what one rank sends; its sender counts the time."""
        return self._inner.receive(shape, dtype, rank)

    def broadcast(self, array: Any, rank: int) -> Any:
        """One rank's array, on every rank."""
        if self._ring is not None:
            self._seconds += self._ring.all_gather(self._bytes(array))
        return self._inner.broadcast(array, rank)

    def close(self) -> None:
        """Leave the group."""
        self._inner.close()

    def _bytes(self, array: Any) -> int:
        return self._inner.to_host(array).nbytes
