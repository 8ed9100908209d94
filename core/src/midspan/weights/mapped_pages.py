"""Pages of mapped files that were read and are not needed any more.

For: keeping a process small while a checkpoint of its own size goes through it. A released page stays in the
system's cache of the file, and whoever reads it after all gets the same bytes again.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

_RELEASE = getattr(mmap, "MADV_DONTNEED", None)  # absent where the system has no such call


@dataclass(frozen=True, kw_only=True, eq=False)
class MappedRange:
    """Bytes ``begin`` to ``end`` of a mapped file."""

    buffer: mmap.mmap
    begin: int
    end: int

    def release(self) -> None:
        """Let the system take back the pages that lie wholly inside."""
        page = mmap.PAGESIZE
        first = -(-self.begin // page) * page
        length = self.end // page * page - first
        if _RELEASE is not None and length > 0:
            self.buffer.madvise(_RELEASE, first, length)


def mapped_range(array: NDArray[Any]) -> MappedRange | None:
    """Where an array lies in a mapped file; None when it is not a contiguous view of one that is read only."""
    whole: Any = array
    while isinstance(getattr(whole, "base", None), type(array)):
        whole = whole.base
    base = whole.base
    buffer = base.obj if isinstance(base, memoryview) else base
    if not isinstance(buffer, mmap.mmap) or array.flags.writeable or not array.flags.c_contiguous:
        return None
    if whole.nbytes != len(buffer):
        return None
    address, start = (one.__array_interface__["data"][0] for one in (array, whole))
    return MappedRange(buffer=buffer, begin=address - start, end=address - start + array.nbytes)
