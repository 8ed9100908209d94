"""The core asks devices, programs, caches and collectives what the interface has, and never who they are."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

KNOWN = {
    ("midspan.conformance.operation_case", "cache is passed on as Any in inputs.append(cache)"): (
        "the definition of attention is called with the reference's own cache"
    ),
    ("midspan.runtimes.reference.program", "cache is passed on as Any in arguments.append(cache)"): (
        "an attention kernel gets the cache as its own device made it"
    ),
    ("midspan.conformance.reference_judge", "ReferenceProgram.values"): (
        "the judge is the reference, and looks at the logits of the reference"
    ),
}
"""What is found and is right, and why."""

MAY_LOOK_UP = ("midspan.devices.", "midspan.conformance.", "midspan_cli.commands.devices", "midspan_cli.device_listing")
"""Who a device is matters where one is looked up by what a person asked for, where devices are listed with their
plugins, and to the suite, which holds names against the contract. None may compare one with a name in the code."""

STRANGER = """
from typing import Any, cast
import re
from midspan.interface.cache import Cache
from midspan.interface.collectives import Collectives
from midspan.interface.device import Device, DeviceInfo, GroupDevice
from midspan.interface.plugin import DevicePlugin
from midspan.interface.program import Program, StepOutput
from midspan.runtimes.reference.device import ReferenceDevice

TABLE = {"chip": 1}

def fine(device: Device, program: Program, cache: Cache | None, output: StepOutput, info: DeviceInfo) -> str:
    if cache is not None and device.capabilities.deterministic:
        cache.copy("full", [(1, 2)])
    output.result()
    return f"{info.id} has {device.memory().free_bytes} bytes and {len(program.placement.nodes)} nodes"

def beyond(device: Device, program: Program, cache: Cache | None, output: StepOutput, group: Collectives) -> None:
    device.turbo()  # beyond
    program.source  # beyond
    if cache is not None:
        cache.arrays = 1  # beyond
    output.later  # beyond
    group.barrier()  # beyond
    [d.stream for d in [device]]  # beyond
    (lambda d: d.stream)(device)  # beyond
    opened: Device = device
    opened._programs  # beyond

def concrete(device: ReferenceDevice) -> None:
    device.memory()
    device._kernels  # beyond

def probes(device: Device, program: Program, cache: Cache | None, anything: object) -> None:
    hasattr(device, "fast")  # probe
    getattr(program, "source", None)  # probe
    isinstance(device, ReferenceDevice)  # probe
    isinstance(device, GroupDevice)  # probe
    vars(cache)  # probe
    setattr(device.compile, "x", 1)
    isinstance(anything, str)

def unknown(device: object, cache: Any) -> None:
    hasattr(device, "fast")  # probe
    cache.arrays  # escape
    cache.read  # escape

def escapes(device: Device, program: Program, takes_all: Any) -> None:
    loose: Any = device  # escape
    cast(Any, program).source  # escape
    cast("Any", device)  # escape
    swallow(program)  # escape
    swallow(thing=device)  # escape
    cast(GroupDevice, device).join
    print(device)

def swallow(thing: Any) -> None:
    thing.turbo

class Owner:
    def __init__(self, device: Device, program: Any) -> None:
        self._device = device
        self._program: Any = program

    def use(self) -> None:
        self._device.turbo  # beyond
        self._program.run  # escape

def identity(device: Device, info: DeviceInfo, plugin: DevicePlugin, program: Program) -> None:
    info.id == "chip"  # name
    "chip" in device.info.id  # name
    device.info.description.lower() != "chip"  # name
    device.info.id.startswith("chip")  # name
    re.match("chip", plugin.name)  # name
    TABLE[plugin.name]  # identity
    TABLE.get(info.id)  # identity
    type(device) is ReferenceDevice  # identity probe
    device.__class__ == ReferenceDevice  # identity beyond
    program.placement.device == "chip"  # name
    name = device.info.id
    name == "chip"  # name
    name.partition(":")[0] == "chip"  # name identity
    info.id in ("chip", "box")  # name
    info.id == plugin.name  # identity
    info.memory_bytes == 1
"""
"""What must be found, line by line, and what must not."""


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, list[Any]]]:
    """Uses by module: of the core as it is, and of ``STRANGER`` as if it were a module of the engine."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        tool = importlib.import_module("interface_uses")
        stranger = importlib.import_module("mypy.modulefinder").BuildSource(
            "stranger.py", "midspan.engine.stranger", STRANGER
        )
        uses: dict[str, list[Any]] = {"midspan.engine.stranger": []}
        for use in tool.uses([*tool.core_sources(), stranger]):
            uses.setdefault(use.module, []).append(use)
        yield uses
    finally:
        sys.path.remove(str(ROOT / "tools"))


def of_the_core(found: dict[str, list[Any]]) -> Iterator[Any]:
    for module, uses in found.items():
        if module != "midspan.engine.stranger":
            yield from uses


def test_the_core_uses_what_the_interface_has_and_nothing_else(found: dict[str, list[Any]]) -> None:
    wrong = [
        str(use)
        for use in of_the_core(found)
        if use.kind in ("beyond", "probe", "escape") and (use.module, use.what) not in KNOWN
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_excused_is_still_there(found: dict[str, list[Any]]) -> None:
    there = {(use.module, use.what) for use in of_the_core(found)}
    assert set(KNOWN) <= there


def test_the_core_was_read(found: dict[str, list[Any]]) -> None:
    """Each part that knows devices is seen to use them; a walk that sees nothing would prove nothing."""
    used = {use.what for use in of_the_core(found) if use.kind == "attribute"}
    for what in (
        "Device.compile",
        "Device.allocate_cache",
        "Device.memory",
        "Device.capabilities",
        "Device.close",
        "Program.run",
        "Program.placement",
        "StepOutput.result",
        "Cache.read",
        "Cache.write",
        "Cache.layout",
    ):
        assert what in used
    modules = {module for module in found if module.startswith("midspan.")}
    assert {"midspan.engine.runner", "midspan.engine.loading", "midspan.runtimes.reference.foreign_cache"} <= modules
    assert any(module.startswith("midspan.conformance.") for module in modules)
    assert any(module.startswith("midspan_cli.") for module in found)


def test_no_part_of_the_core_decides_by_who_a_device_is(found: dict[str, list[Any]]) -> None:
    wrong = []
    for use in of_the_core(found):
        if use.kind == "name" or (use.kind == "identity" and not use.module.startswith(MAY_LOOK_UP)):
            wrong.append(str(use))
    assert not wrong, "\n".join(wrong)


def test_every_departure_in_a_text_made_for_it_is_found_and_nothing_else(found: dict[str, list[Any]]) -> None:
    wanted = []
    for number, line in enumerate(STRANGER.splitlines(), 1):
        _, mark, kinds = line.partition("  # ")
        wanted += [(number, kind) for kind in kinds.split()] if mark else []
    seen = [(use.line, use.kind) for use in found["midspan.engine.stranger"] if use.kind != "attribute"]
    assert sorted(seen) == sorted(wanted)


def test_the_parts_below_know_no_device() -> None:
    """Modules that the walk leaves out cannot hold a device: they do not import what one is."""
    concepts = {"Device", "GroupDevice", "Program", "Cache", "StepOutput", "Collectives", "DevicePlugin", "DeviceInfo"}
    below = ("models", "scheduling", "text", "weights", "decoding", "observation", "graph")
    wrong, count = [], 0
    for folder in below:
        for path in sorted((ROOT / "core/src/midspan" / folder).rglob("*.py")):
            count += 1
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("midspan.interface"):
                    names = {alias.name for alias in node.names} & concepts
                    wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in sorted(names)]
    assert count > 30
    assert not wrong, "\n".join(wrong)
