"""What the machine can do at best, measured: how fast it reads memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from midspan_cpu.native_library import NativeLibrary, load_native_library

READ_BYTES = 1 << 30
"""Far more than a processor caches."""

REPETITIONS = 7


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds a step.

    Attributes:
        read_bytes_per_second: reading memory in huge pages with all threads, the best of some turns.
    """

    read_bytes_per_second: float


def measure_limits(threads: int) -> Limits:
    """Measure now, with so many threads.

    Raises:
        RuntimeError: the native kernels cannot be used here.
    """
    library = load_native_library(instruction_set=None, threads=threads)
    if not isinstance(library, NativeLibrary):
        raise RuntimeError(library.reason)
    memory = torch.empty(READ_BYTES, dtype=torch.uint8)
    library.advise_huge_pages(memory.data_ptr(), READ_BYTES)
    memory.fill_(1)
    times = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        library.read(memory.data_ptr(), READ_BYTES)
        times.append(time.perf_counter() - began)
    library.close()
    return Limits(read_bytes_per_second=READ_BYTES / min(times))
