"""Communication between the devices that share one model. Optional.

A device whose ``Capabilities.max_world_size`` is 1 has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class DeviceGroup:
    """A place in a group of devices that will share one model.

    Attributes:
        rank: this device's place, from 0.
        world_size: devices in the group.
        address: ``host:port`` on which rank 0 listens while the group forms; the port is free
            and is the group's alone.
        timeout_seconds: how long to wait for the others.
    """

    rank: int
    world_size: int
    address: str
    timeout_seconds: float = 60.0


class Collectives(Protocol):
    """Operations over one group of ranks, on the device's own arrays.

    Every rank calls the same operations in the same order; each returns a new array.
    """

    rank: int
    world_size: int

    def all_reduce(self, array: Any) -> Any:
        """Sum over all ranks, same shape."""
        ...

    def all_gather(self, array: Any, axis: int) -> Any:
        """Every rank's array, joined along an axis by rank."""
        ...

    def reduce_scatter(self, array: Any, axis: int) -> Any:
        """Sum over all ranks; each keeps its share along an axis."""
        ...

    def all_to_all(self, array: Any, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Any:
        """Exchange rows: the first ``send_counts[0]`` rows go to rank 0, and so on."""
        ...

    def send(self, array: Any, rank: int) -> None:
        """Send to one rank, which must receive."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: str, rank: int) -> Any:
        """Receive what one rank sends."""
        ...

    def broadcast(self, array: Any, rank: int) -> Any:
        """One rank's array, on every rank."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...
