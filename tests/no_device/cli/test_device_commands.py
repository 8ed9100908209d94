"""``midspan devices`` and ``midspan plugins``: what is here, what is not, why, and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PLUGIN = """
from midspan.interface import DeviceInfo, DevicePlugin, Found, Unavailable, hookimpl

def found():
    return Found(tuple(
        DeviceInfo(id=f"box:{number}", description="a box of 3 GiB", memory_bytes=3 * 2**30, preference=50)
        for number in range(3)
    ))

def slow():
    import time
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.11:
        pass
    return Found((DeviceInfo(id="slow", description="slow", memory_bytes=1, preference=-1),))

def absent():
    return Unavailable("no such card is in this machine", "Plug one in.")

def broken():
    raise OSError("the driver is upset")

def open_box(info, options):
    raise AssertionError("a listing opens nothing")

def plugin(name, probe, version=(0, 9)):
    return DevicePlugin(name=name, interface=version, probe=probe, open=open_box, description=f"the {name}")

@hookimpl
def midspan_devices():
    return [
        plugin("box", found), plugin("slow", slow), plugin("absent", absent), plugin("broken", broken),
        plugin("newer", found, (99, 1)),
    ]
"""

COMMANDS = """
from midspan.interface import hookimpl

@hookimpl
def midspan_commands(app):
    pass
"""


@pytest.fixture
def boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages with devices that are here, absent and broken, one with a command, one that fails to load."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, source in (("box", PLUGIN), ("words", COMMANDS), ("wreck", "import nothing_that_exists")):
        (tmp_path / f"{name}_of_a_stranger.py").write_text(source)
        facts = tmp_path / f"{name}-2.5.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n")
        (facts / "entry_points.txt").write_text(f"[midspan.plugins]\n{name} = {name}_of_a_stranger\n")
        monkeypatch.delitem(sys.modules, f"{name}_of_a_stranger", raising=False)


Midspan = Callable[..., Any]


@pytest.mark.usefixtures("boxes")
def test_devices_says_what_is_here_what_auto_takes_and_why_the_rest_is_not_here(midspan: Midspan) -> None:
    done = midspan("devices")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("box:0")]
    assert "<- auto" in line
    for text in ("3.0 GiB", "50", "a box of 3 GiB"):
        assert text in line
    for text in (
        "absent (box) is not available: no such card is in this machine\n  Plug one in.",
        "broken (box) is not available: its probe failed: OSError: the driver is upset\n  Its own message is above",
        "newer (box) is not available: its plugin cannot be used: The plugin 'newer' of box was built for interface 99",
        "The core is too old; upgrade it: pip install --upgrade midspan",
        "wreck (wreck) is not available: its plugin cannot be used: ModuleNotFoundError",
        "Warning: The probe of 'slow' took",
    ):
        assert text in done.stdout


@pytest.mark.usefixtures("boxes")
def test_devices_as_json(midspan: Midspan) -> None:
    listed = json.loads(midspan("devices", "--json").stdout)
    assert [device["id"] for device in listed["devices"]][:3] == ["box:0", "box:1", "box:2"]
    assert listed["auto"]["id"] == "box:0"
    assert "preference of 50" in listed["auto"]["explanation"]
    assert {item["name"] for item in listed["unavailable"]} == {"absent", "broken", "newer", "wreck"}
    assert all(item["reason"] and item["remedy"] and item["plugin"] for item in listed["unavailable"])
    assert any("'slow'" in text for text in listed["warnings"])


@pytest.mark.usefixtures("boxes")
def test_plugins_as_json_holds_every_fact(midspan: Midspan) -> None:
    listed = json.loads(midspan("plugins", "--json").stdout)
    plugins = {plugin["name"]: plugin for plugin in listed["plugins"]}
    box = plugins["box"]
    assert (box["distribution"], box["version"], box["interface"], box["status"]) == ("box", "2.5", "0.9", "ok")
    assert box["devices"] == ["box:0", "box:1", "box:2"]
    assert box["import_seconds"] > 0
    assert box["probe_seconds"] >= 0
    assert plugins["slow"]["warnings"]
    assert plugins["slow"]["probe_seconds"] > 0.1
    assert plugins["absent"]["status"] == "unavailable"
    assert (plugins["absent"]["reason"], plugins["absent"]["remedy"]) == (
        "no such card is in this machine",
        "Plug one in.",
    )
    for name, trace in (("broken", "the driver is upset"), ("newer", "99.1"), ("wreck", "nothing_that_exists")):
        assert plugins[name]["status"] == "failed"
        assert "Traceback" in plugins[name]["traceback"]
        assert trace in plugins[name]["traceback"]
        assert plugins[name]["remedy"]
    assert plugins["newer"]["interface"] == "99.1"
    assert plugins["words"]["description"] == "implements midspan_commands"
    assert len({frozenset(plugin) - {"reason", "remedy", "error", "traceback"} for plugin in listed["plugins"]}) == 1


@pytest.mark.usefixtures("boxes")
def test_plugins_as_text_shows_versions_times_and_tracebacks(midspan: Midspan) -> None:
    done = midspan("plugins")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.split()[:4] == ["box", "box", "2.5", "0.9"] and "box:0 and 2 more" in line for line in lines)
    assert any(line.split()[:3] == ["newer", "box", "2.5"] and "99.1" in line and "failed" in line for line in lines)
    assert "ModuleNotFoundError: No module named 'nothing_that_exists'" in done.stdout
    assert "Warning: The probe of 'slow'" in done.stdout


@pytest.mark.usefixtures("boxes")
@pytest.mark.parametrize("command", ["run", "bench", "doctor"])
def test_auto_says_what_it_took_and_never_takes_another_when_that_fails(
    midspan: Midspan, tiny_model: Path, command: str
) -> None:
    arguments = {
        "run": ("run", str(tiny_model), "a"),
        "bench": ("bench", str(tiny_model), "--num-prompts", "1"),
        "doctor": ("doctor", "--model", str(tiny_model)),
    }[command]
    done = midspan(*arguments)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "a listing opens nothing" in said
    assert "taken by 'auto' for its preference of 50" in said


@pytest.mark.parametrize("command", ["run", "bench", "doctor"])
def test_the_device_is_named_with_the_reason(midspan: Midspan, tiny_model: Path, command: str) -> None:
    small = ("--device", "reference", "--kv-cache-memory-bytes", "4M")
    arguments = {
        "run": ("run", str(tiny_model), "a", "--max-tokens", "2"),
        "bench": ("bench", str(tiny_model), "--num-prompts", "1", "--input-len", "4", "--output-len", "2"),
        "doctor": ("doctor", "--model", str(tiny_model)),
    }[command]
    done = midspan(*arguments, *small)
    assert done.returncode == 0, done.stderr
    assert "Device reference (" in done.stdout + done.stderr
    assert "as asked." in done.stdout + done.stderr


@pytest.mark.usefixtures("boxes")
def test_a_plugin_that_is_left_out_is_listed_as_skipped(midspan: Midspan) -> None:
    without = {"MIDSPAN_SKIP_PLUGINS": "wreck"}
    plugins = {
        item["name"]: item for item in json.loads(midspan("plugins", "--json", environment=without).stdout)["plugins"]
    }
    assert (plugins["wreck"]["status"], plugins["wreck"]["distribution"]) == ("skipped", "wreck")
    lines = midspan("plugins", environment=without).stdout.splitlines()
    assert any(line.split()[:3] == ["wreck", "wreck", "2.5"] and "skipped" in line for line in lines)
    assert any("wreck" in item["name"] for item in json.loads(midspan("devices", "--json").stdout)["unavailable"])


WRAPPED = """
print("from the import")
from midspan.interface import DeviceInfo, DevicePlugin, Found, Kernel, hookimpl
from midspan.runtimes.reference import ReferenceDevice

INFO = DeviceInfo(id="wrapped", description="a wrapped one", memory_bytes=2**30, preference=-1)

def prepare(site):
    print("from the kernel")
    weight = site.weights["weight"].parts["data"].astype("float32") * FACTOR
    return lambda x: x @ weight.T

def open_device(info, options):
    print("from open")
    return ReferenceDevice(info, kernels=[Kernel(name="own", op="linear", prepare=prepare, priority=1)])

@hookimpl
def midspan_devices():
    return [DevicePlugin(name="wrapped", interface=(0, 9), probe=lambda: Found((INFO,)), open=open_device)]
"""


@pytest.fixture
def wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a device that prints wherever it can and multiplies its weights by a factor: ``wrapped("1.0")``."""

    def install(factor: str) -> None:
        folder = tmp_path / "wrapped"
        facts = folder / "wrapped-1.0.dist-info"
        facts.mkdir(parents=True)
        (folder / "wrapped_of_a_stranger.py").write_text(WRAPPED.replace("FACTOR", factor))
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: wrapped\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text("[midspan.plugins]\nwrapped = wrapped_of_a_stranger\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.delitem(sys.modules, "wrapped_of_a_stranger", raising=False)

    return install


SMALL = ("--device", "wrapped", "--kv-cache-memory-bytes", "4M")


def test_only_the_text_goes_to_standard_output(wrapped: Callable[[str], None], tiny_model: Path) -> None:
    wrapped("1.0")
    done = subprocess.run(
        [sys.executable, "-m", "midspan_cli", "run", str(tiny_model), "a", "--max-tokens", "2", *SMALL],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
    assert "from the" not in done.stdout
    for where in ("from the import", "from open", "from the kernel"):
        assert where in done.stderr


def test_doctor_holds_a_models_tokens_against_the_reference(
    midspan: Midspan, wrapped: Callable[[str], None], tiny_model: Path
) -> None:
    wrapped("1.0")
    done = midspan("doctor", "--model", str(tiny_model), *SMALL)
    assert done.returncode == 0, done.stdout
    assert "Self-test passed, token by token as the reference" in done.stdout


def test_doctor_finds_wrong_arithmetic(midspan: Midspan, wrapped: Callable[[str], None], tiny_model: Path) -> None:
    wrapped("-0.5")
    done = midspan("doctor", "--model", str(tiny_model), *SMALL)
    assert done.returncode == 1
    assert "Self-test FAILED" in done.stdout
    assert "the reference's choice after the same tokens is" in done.stdout


def test_doctor_does_not_say_passed_where_nothing_was_compared(midspan: Midspan, tiny_model: Path) -> None:
    small = ("--device", "reference", "--kv-cache-memory-bytes", "4M")
    done = midspan("doctor", "--model", str(tiny_model), "--load-format", "dummy", *small)
    assert done.returncode == 0, done.stdout
    assert "Generated (not held against the reference: its weights are random)" in done.stdout
    assert "passed" not in done.stdout
