"""A line on the terminal that says how far a long call is. Nothing where nobody looks."""

from __future__ import annotations

import sys
import time
from typing import TextIO

SECONDS_BETWEEN_LINES = 0.2


class ProgressLine:
    """Rewrites one line of a terminal."""

    def __init__(self, total: int, *, enabled: bool, stream: TextIO | None = None) -> None:
        """Begin.

        Args:
            total: requests in all.
            enabled: False shows nothing.
            stream: where to write; None: standard error. Nothing is written where it is no terminal.
        """
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled and total > 0 and self._stream.isatty()
        self._total = total
        self._began = self._shown = time.monotonic()

    def show(self, done: int, tokens: int) -> None:
        """Say how far it is; seldom enough not to slow the work.

        Args:
            done: finished requests.
            tokens: generated so far.
        """
        now = time.monotonic()
        if self._enabled and now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            rate = tokens / max(now - self._began, 1e-9)
            self._stream.write(f"\rPrompts: {done}/{self._total}, {rate:.0f} tokens/s\x1b[K")
            self._stream.flush()

    def close(self) -> None:
        """Clear the line."""
        if self._enabled:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
