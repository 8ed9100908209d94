"""Pages of a mapped file leave the process, and what is read afterwards is the same."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from midspan.weights.mapped_pages import mapped_range


def _mapped(path: Path, content: bytes) -> np.ndarray:
    path.write_bytes(content)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def _resident_bytes(address: int) -> int:
    """What the process holds of the mapping that an address lies in, from proc(5)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads proc(5)")
def test_released_pages_leave_the_process_and_read_the_same_again(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096 * 4
    whole = _mapped(tmp_path / "file", content)
    part = whole[100 : len(content) - 100].view(np.uint8)
    assert part.tobytes() == content[100:-100]
    before = _resident_bytes(whole.ctypes.data)
    pages = mapped_range(part)
    assert pages is not None
    assert (pages.begin, pages.end) == (100, len(content) - 100)
    pages.release()
    assert _resident_bytes(whole.ctypes.data) <= before - len(content) + 4 * mmap.PAGESIZE
    assert part.tobytes() == content[100:-100]


def test_arrays_that_are_no_view_of_a_whole_mapped_file_have_no_range(tmp_path: Path) -> None:
    whole = _mapped(tmp_path / "file", bytes(64))
    assert mapped_range(np.zeros(8)) is None
    assert mapped_range(whole.copy()) is None
    assert mapped_range(whole.reshape(8, 8)[:, 1]) is None
    assert mapped_range(whole[8:24].view(np.float32).reshape(2, 2)) is not None
