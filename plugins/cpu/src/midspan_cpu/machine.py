"""What the host has: processor cores, instruction sets, memory.

Reads the operating system's own tables and nothing else, so that a probe can
ask before any large library is loaded. Every answer respects what this process
is allowed (affinity, control group), and has a portable fallback.

Formats: proc(5) for ``/proc/cpuinfo`` and ``/proc/meminfo``, the kernel's
documents on control groups (versions 1 and 2) and on the CPU topology in sysfs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

INSTRUCTION_SETS = ("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd")
"""Feature flags that decide which kernels are fast, in the names of /proc/cpuinfo."""

_UNLIMITED = 1 << 60
"""Control groups of version 1 write a huge number for "no limit"."""


@dataclass(frozen=True, kw_only=True)
class MemoryState:
    """Memory of the host as this process may use it, in bytes.

    Attributes:
        total: all of it, or the control group's limit.
        available: what can be taken without swapping or exceeding the limit.
    """

    total: int
    available: int


def processor_name(root: Path = ROOT) -> str:
    """The processor's product name, or "processor" where the system does not say."""
    for key in ("model name", "Hardware", "cpu model"):
        for value in _cpu_fields(key, root):
            return value
    return "processor"


def instruction_sets(root: Path = ROOT) -> tuple[str, ...]:
    """Those of ``INSTRUCTION_SETS`` that every core has."""
    for key in ("flags", "Features"):
        for value in _cpu_fields(key, root):
            flags = set(value.split())
            return tuple(name for name in INSTRUCTION_SETS if name in flags)
    return ()


def usable_cores(root: Path = ROOT) -> int:
    """Physical cores that this process may keep busy, at least 1.

    Two hardware threads of one core count once; a control group's quota of
    processor time, rounded up, is a limit.
    """
    processors = allowed_processors()
    cores = {_core_of(processor, root) for processor in processors}
    quota = _quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), quota))


def allowed_processors() -> frozenset[int]:
    """Numbers of the logical processors on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def memory_state(root: Path = ROOT) -> MemoryState:
    """Memory now: the host's, cut to the control group's limits where it has any."""
    total, available = _host_memory(root)
    for limit, used in _group_memory(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return MemoryState(total=total, available=available)


def _cpu_fields(key: str, root: Path) -> Iterator[str]:
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            yield value.strip()


def _core_of(processor: int, root: Path) -> str:
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    return _text(topology / "thread_siblings_list").strip() or f"alone {processor}"


def _quota(root: Path) -> int | None:
    """Processors' worth of time that the control groups grant, rounded up; None: no limit."""
    found = []
    for folder in _group_folders("cpu", root):
        allowed, _, period = _text(folder / "cpu.max").partition(" ")
        if not allowed:
            allowed, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        share, length = _integer(allowed), _integer(period)
        if share is not None and length and share > 0:
            found.append(max(1, -(-share // length)))
    return min(found, default=None)


def _host_memory(root: Path) -> tuple[int, int]:
    fields = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number = _integer(value.replace("kB", ""))
        if number is not None:
            fields[name] = number * 1024
    if "MemTotal" in fields:
        return fields["MemTotal"], fields.get("MemAvailable", fields.get("MemFree", 0))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total // 2  # a system that tells no free memory: half is a cautious guess


def _group_memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of each control group above this process."""
    for folder in _group_folders("memory", root):
        limit = _integer(_text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes"))
        used = _integer(_text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes"))
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        yield limit, max(0, used - _droppable(folder))


def _droppable(folder: Path) -> int:
    """Bytes of a group's page cache that the system takes back at need."""
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return _integer(value) or 0
    return 0


def _group_folders(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups that hold this process, innermost first, both versions."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = top / path.lstrip("/")
        yield from (parent for parent in (folder, *folder.parents) if parent == top or top in parent.parents)


def _integer(text: str) -> int | None:
    try:
        return int(text.strip())
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
