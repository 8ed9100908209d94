"""Looks for the device: the host's processor, which is always there.

Imports no numerical library.
"""

from __future__ import annotations

from midspan.interface.device import DeviceInfo
from midspan.interface.plugin import Found
from midspan_cpu.machine import instruction_sets, memory_state, processor_name, usable_cores

NAME = "cpu"

PREFERENCE = 10
"""Above the portable reference, below whatever was bought to compute."""


def probe() -> Found:
    """One device, described by its processor, cores, memory and instruction sets."""
    memory = memory_state()
    cores = usable_cores()
    parts = [
        processor_name(),
        f"{cores} core{'s' if cores > 1 else ''}",
        f"{memory.total / 2**30:.0f} GiB",
        " ".join(instruction_sets()) or "no vector instructions known",
    ]
    info = DeviceInfo(id=NAME, description=", ".join(parts), memory_bytes=memory.total, preference=PREFERENCE)
    return Found(devices=(info,))
