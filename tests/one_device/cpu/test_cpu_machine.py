"""What the plugin reads off the operating system, from made-up systems and from this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from midspan.errors import SettingsError
from midspan_cpu import machine
from midspan_cpu.options import read_options
from midspan_cpu.probe import probe

MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:   12000 kB\nHugePages_Total:  0\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def processors(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    monkeypatch.setattr(machine, "allowed_processors", lambda: frozenset(numbers))


def siblings(*pairs: str) -> dict[str, str]:
    return {
        f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list": f"{pair}\n"
        for number, pair in enumerate(pairs)
    }


def test_hardware_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, siblings("0,2", "1,3", "0,2", "1,3"))
    processors(monkeypatch, 0, 1, 2, 3)
    assert machine.usable_cores(root) == 2
    processors(monkeypatch, 0, 2)
    assert machine.usable_cores(root) == 1


def test_without_a_known_topology_every_allowed_processor_is_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processors(monkeypatch, 3, 4, 5)
    assert machine.usable_cores(tmp_path) == 3


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/pod/box\n", "sys/fs/cgroup/pod/cpu.max": "150000 100000\n"},
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/pod\n1:name=systemd:/\n",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_a_quota_of_one_and_a_half_processors_allows_two_cores(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path, files)
    processors(monkeypatch, 0, 1, 2, 3)
    assert machine.usable_cores(root) == 2


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/pod\n", "sys/fs/cgroup/pod/cpu.max": "max 100000\n"},
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_no_quota_is_no_limit(files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, files)
    processors(monkeypatch, 0, 1, 2, 3)
    assert machine.usable_cores(root) == 4


def test_memory_is_the_hosts_where_no_group_limits_it(tmp_path: Path) -> None:
    state = machine.memory_state(write(tmp_path, {"proc/meminfo": MEMINFO}))
    assert (state.total, state.available) == (16000 * 1024, 12000 * 1024)


def test_a_groups_limit_counts_its_page_cache_as_available(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": "4000000\n",
            "sys/fs/cgroup/pod/memory.current": "3000000\n",
            "sys/fs/cgroup/pod/memory.stat": "anon 1\ninactive_file 500000\n",
        },
    )
    state = machine.memory_state(root)
    assert (state.total, state.available) == (4000000, 1500000)


def test_a_group_of_the_first_version_without_a_limit_is_none(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/pod\n",
            "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/pod/memory.usage_in_bytes": "3000000\n",
        },
    )
    assert machine.memory_state(root).total == 16000 * 1024


def test_the_processor_is_named_with_the_instruction_sets_that_matter(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma sse2\n"})
    assert machine.processor_name(root) == "Some CPU"
    assert machine.instruction_sets(root) == ("avx2", "fma")


def test_a_system_that_tells_nothing_still_has_a_core_and_a_name(tmp_path: Path) -> None:
    assert machine.usable_cores(tmp_path) >= 1
    assert machine.processor_name(tmp_path) == "processor"
    assert machine.instruction_sets(tmp_path) == ()


def test_this_machine_is_found_with_plausible_numbers() -> None:
    (info,) = probe().devices
    assert info.id == "cpu"
    assert info.memory_bytes > 2**28
    assert info.preference > 0


def test_probing_imports_no_numerical_library_beyond_numpy() -> None:
    program = (
        "import sys\n"
        "from midspan_cpu.plugin import PLUGIN\n"
        "PLUGIN.probe()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_options_are_read_from_text() -> None:
    assert read_options({}).threads is None
    assert read_options({"threads": "3"}).threads == 3


@pytest.mark.parametrize("options", [{"thread": "2"}, {"threads": "0"}, {"threads": "-1"}, {"threads": "two"}])
def test_wrong_options_are_refused_with_what_can_be_taken(options: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="threads"):
        read_options(options)
