"""One line of a terminal that says how far long work is. Nothing where nobody looks."""

from __future__ import annotations

import sys
import time
from typing import TextIO

SECONDS_BETWEEN = 0.2


class LiveLine:
    """Rewrites a line of standard error.

    Args:
        quiet: show nothing.
        stream: where to; None: standard error. Nothing is written where it is no terminal.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._enabled = not quiet and self._stream.isatty()
        self._shown = 0.0
        self.heading = ""

    def is_due(self) -> bool:
        """Whether anybody would see another text now; asked before it is made, so that it costs nothing."""
        return self._enabled and time.monotonic() - self._shown >= SECONDS_BETWEEN

    def show(self, text: str) -> None:
        """Show a text after the heading."""
        if self._enabled:
            self._shown = time.monotonic()
            self._stream.write(f"\r{self.heading}{text}\x1b[K")
            self._stream.flush()

    def close(self) -> None:
        """Clear the line."""
        if self._enabled:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
