"""How long a group of devices in a ring takes to exchange numbers.

Knows sizes and links, and no graph. The ring algorithm moves the least possible bytes over each
link (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
Journal of Parallel and Distributed Computing 69, 2009): a sum of S bytes over N devices takes
2 (N - 1) turns of S / N bytes, a gathering of S bytes in all N - 1 turns of S / N bytes. A turn costs
its bytes over the link's bandwidth in one direction, and a latency.
"""

from __future__ import annotations

from dataclasses import dataclass

TURN_LATENCY = 3e-6
"""Seconds. No vendor publishes it. Sums of a few bytes over two GPUs, two turns, take about 6 microseconds in
the tables that people publish from nccl-tests, so this is the order of magnitude, the same for all sheets."""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Devices in a ring.

    Attributes:
        devices: how many.
        bandwidth: bytes per second from each to the next.
        latency: of a turn, seconds.
    """

    devices: int
    bandwidth: float
    latency: float = TURN_LATENCY

    def all_reduce(self, size: float) -> float:
        """Seconds for a sum of ``size`` bytes that all get: shares are summed, and then gathered."""
        return 2 * self.all_gather(size)

    def all_gather(self, size: float) -> float:
        """Seconds until everybody has all ``size`` bytes; summing them so that each keeps its share takes as long."""
        if self.devices == 1:
            return 0.0
        return (self.devices - 1) * (size / self.devices / self.bandwidth + self.latency)

    def point_to_point(self, size: float) -> float:
        """Seconds for ``size`` bytes from one device to the next."""
        return size / self.bandwidth + self.latency
