"""The two times in which a load test runs: the host's, and that of a device that models its own.

Knows no engine and no load.
"""

from __future__ import annotations

import time
from typing import Protocol

from midspan.errors import MidspanError


class LoadClock(Protocol):
    """Seconds since the clock was asked first."""

    def now(self) -> float:
        """This moment."""
        ...

    def pass_step(self, device_seconds: float | None) -> None:
        """A step has been run.

        Args:
            device_seconds: how long it took on the device, where the device knows it.
        """
        ...

    def wait_until(self, moment: float) -> None:
        """Let time pass up to a moment; at once when that is over."""
        ...


class HostClock:
    """The time that people see."""

    def __init__(self) -> None:
        self._start: float | None = None

    def now(self) -> float:
        """This moment; 0 the first time, so that nothing counts that was set up before."""
        now = time.monotonic()
        if self._start is None:
            self._start = now
        return now - self._start

    def pass_step(self, device_seconds: float | None) -> None:
        """The step took its time already."""

    def wait_until(self, moment: float) -> None:
        """Sleep."""
        left = moment - self.now()
        if left > 0:
            time.sleep(left)


class VirtualClock:
    """The time of a device with ``Capabilities.virtual_clock``: it moves by what is said of each step.

    Never reads the host's clock, so the same steps give the same moments.

    Args:
        host_seconds_per_step: what scheduling and the other work beside the device add to each step.
    """

    def __init__(self, *, host_seconds_per_step: float = 0.0) -> None:
        self._now = 0.0
        self._host_seconds = host_seconds_per_step

    def now(self) -> float:
        """This moment."""
        return self._now

    def pass_step(self, device_seconds: float | None) -> None:
        """Move on by the step's duration.

        Raises:
            MidspanError: the device did not tell it.
        """
        if device_seconds is None:
            raise MidspanError(
                "The device claims a clock of its own and did not say how long a step took.",
                remedy="Its plugin must fill StepResult.device_seconds, or not claim Capabilities.virtual_clock.",
            )
        self._now += device_seconds + self._host_seconds

    def wait_until(self, moment: float) -> None:
        """Be there."""
        self._now = max(self._now, moment)
