"""The most memory that a process and its children ever took together, by sampling.

Reads proc(5): the proportional share (PSS), which counts a page that several of them map once.
"""

from __future__ import annotations

import threading
from pathlib import Path

INTERVAL_SECONDS = 0.25


class PeakMemory:
    """Samples a process tree in a thread of its own until it is stopped."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The peak in bytes."""
        self._stop.set()
        self._thread.join()
        return self._peak

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self._peak = max(self._peak, tree_bytes(self._process))


def tree_bytes(process: int) -> int:
    """Bytes that a process and all below it hold now; 0 for one that is gone."""
    folder = Path("/proc") / str(process)
    try:
        lines = (folder / "smaps_rollup").read_text().splitlines()
        children = [
            int(name) for task in (folder / "task").iterdir() for name in (task / "children").read_text().split()
        ]
    except OSError:
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return own + sum(map(tree_bytes, children))
