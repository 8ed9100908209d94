"""Finds stop strings in a text that arrives in pieces, and holds back what might become one.

Knows characters only, no tokens. Invariant: where a stop string is found, and
which, does not depend on how the text was cut into pieces: it is the one that is
complete first; of several that end at the same character, the longest.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Follows one text.

    Args:
        stop: the stop strings, none of them empty.
        include_stop: a stop string belongs to the text that it ends.
    """

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        self._stop = tuple(sorted(set(stop), key=lambda text: -len(text)))
        self._include = include_stop
        self._beginnings = frozenset(text[:end] for text in self._stop for end in range(1, len(text)))
        self._reach = max((len(text) for text in self._stop), default=1) - 1
        self._held = ""

    def push(self, text: str, *, counts: bool = True) -> tuple[str, str | None]:
        """Take the next piece.

        Args:
            text: the piece, possibly empty.
            counts: a stop string that becomes complete in this piece is one.

        Returns:
            The text that became certain, and the stop string that ended it, or None.
        """
        if not self._stop:
            return text, None
        known = len(self._held)
        text = self._held + text
        found = self._first(text, known) if counts else None
        if found is not None:
            end, stop = found
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        held = self._possible_beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def finish(self) -> str:
        """What was held back; nothing more will come."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str, known: int) -> tuple[int, str] | None:
        """End and string of the first one that ends after the known characters."""
        best: tuple[int, str] | None = None
        for stop in self._stop:
            place = text.find(stop, max(0, known + 1 - len(stop)))
            if place >= 0 and (best is None or place + len(stop) < best[0]):
                best = (place + len(stop), stop)
        return best

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        for length in range(min(self._reach, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0
