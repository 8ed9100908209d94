"""Communication between the devices that share one model. Optional.

A device whose ``Capabilities.max_world_size`` is 1 has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class DeviceGroup:
    """A place in a group of devices that will share one model.

    Attributes:
        rank: this device's place, from 0.
        world_size: devices in the group.
        address: ``host:port`` on which rank 0 listens while the group forms; the port is free
            and is the group's alone.
        timeout_seconds: how long to wait for the others, while the group forms and in each operation.
        token: a secret of the group; who does not know it is turned away.
    """

    rank: int
    world_size: int
    address: str
    timeout_seconds: float = 60.0
    token: str = ""


class Collectives(Protocol):
    """Operations over one group of ranks, on the device's own arrays.

    Every rank calls the same operations in the same order; each returns a new array. All
    ranks get the same bits where they get the same numbers. Arrays may be empty. Integers only
    travel; sums are of the device's activation types.

    Each operation raises ``DeviceLost``, in bounded time, when another rank is gone or does not
    come within ``DeviceGroup.timeout_seconds``; nothing can be done in the group after that.
    """

    rank: int
    """This device's place in the group, from 0."""

    world_size: int
    """Devices in the group."""

    def to_device(self, array: NDArray[Any]) -> Any:
        """A host array (float32, int32, or a type that the device claims) as one of the device's own."""
        ...

    def to_host(self, array: Any) -> NDArray[Any]:
        """One of the device's arrays as numpy sees it, of the same shape and type."""
        ...

    def all_reduce(self, array: Any) -> Any:
        """Sum over all ranks, same shape."""
        ...

    def all_gather(self, array: Any, axis: int) -> Any:
        """Every rank's array, joined along an axis by rank; their sizes along it may differ."""
        ...

    def reduce_scatter(self, array: Any, axis: int) -> Any:
        """Sum over all ranks; each keeps its share along an axis, in the order of ranks.

        Where the axis does not divide evenly, the first ranks have one more (``numpy.array_split``).
        """
        ...

    def all_to_all(self, array: Any, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Any:
        """Exchange rows: the first ``send_counts[0]`` rows go to rank 0, and so on.

        Returns the rows of rank 0, then those of rank 1, and so on: ``receive_counts`` of them.
        """
        ...

    def send(self, array: Any, rank: int) -> None:
        """Send to one rank, which must receive."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: str, rank: int) -> Any:
        """Receive what one rank sends."""
        ...

    def broadcast(self, array: Any, rank: int) -> Any:
        """One rank's array, on every rank; the others give one of the same shape and type, whose content is unused."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...
