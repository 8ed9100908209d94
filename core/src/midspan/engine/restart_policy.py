"""How often a process that dies is replaced.

Knows no process and reads no clock: times are given to it.
"""

from __future__ import annotations

from collections import deque


class RestartPolicy:
    """Allows a number of restarts within a span of time."""

    def __init__(self, *, restarts: int = 3, seconds: float = 600.0) -> None:
        """Set the limit.

        Args:
            restarts: that many at most;
            seconds: within any such span.
        """
        self.restarts = restarts
        self.seconds = seconds
        self._times: deque[float] = deque()

    def allows(self, now: float) -> bool:
        """Whether one more may happen; it is counted if so.

        Args:
            now: seconds of a monotonic clock.
        """
        while self._times and now - self._times[0] > self.seconds:
            self._times.popleft()
        if len(self._times) >= self.restarts:
            return False
        self._times.append(now)
        return True

    def forgive(self) -> None:
        """Forget what was counted: the cause is known and gone."""
        self._times.clear()
