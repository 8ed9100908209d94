"""The device interface changes on purpose only, and never under the plugins that exist."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from midspan.interface.version import INTERFACE_VERSION

ROOT = Path(__file__).resolve().parents[2]

Path_ = tuple[str, ...]


@pytest.fixture
def interface_snapshot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("interface_snapshot")


def leaves(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


def changed(snapshot: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    """A copy with another value at a path; None removes what is there."""
    mutated = copy.deepcopy(snapshot)
    node = mutated
    for key in path[:-1]:
        node = node[key]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return mutated


def test_the_interface_is_what_its_snapshot_says(interface_snapshot: ModuleType) -> None:
    path = interface_snapshot.path_of(INTERFACE_VERSION)
    assert path in interface_snapshot.kept(), f"{path.name} is missing. Run: make snapshot"
    lines = interface_snapshot.differences(interface_snapshot.kept()[path], interface_snapshot.snapshot())
    assert not lines, "\n".join(
        [
            "The device interface differs from its snapshot:",
            *lines,
            "If that is meant: raise the minor in midspan/interface/version.py once this version was released, "
            "then run: make snapshot",
        ]
    )


def test_plugins_of_every_minor_of_this_major_find_what_they_were_built_against(
    interface_snapshot: ModuleType,
) -> None:
    present, kept = interface_snapshot.snapshot(), interface_snapshot.kept()
    assert kept
    broken = [f"{path.name}: {line}" for path, old in kept.items() for line in interface_snapshot.breaks(old, present)]
    assert not broken, "\n".join(
        ["This breaks plugins that exist:", *broken, "Take it back, add it as something optional, or raise the major."]
    )


def test_every_single_change_is_seen_and_named(interface_snapshot: ModuleType) -> None:
    present = interface_snapshot.snapshot()
    paths = list(leaves(present))
    assert len(paths) > 300
    for path in paths:
        for value in (None, "something else"):
            lines = interface_snapshot.differences(present, changed(present, path, value))
            assert len(lines) == 1, path
            assert all(key in lines[0] for key in path), lines[0]


def test_whatever_is_removed_or_changed_breaks_plugins(interface_snapshot: ModuleType) -> None:
    present = interface_snapshot.snapshot()
    harmless = {("version",), ("entry_point_group",), ("names", "INTERFACE_VERSION", "value")}
    for path in set(leaves(present)) - harmless:
        if path[-1] == "optional_weights":
            continue  # may be added to; removing one has a case below
        if path[-2] in ("fields", "methods", "attributes", "hooks"):
            assert interface_snapshot.breaks(present, changed(present, path, None)), f"removing {' '.join(path)}"
        other = "(odd: int) -> Odd" if path[-2] in ("methods", "hooks") or path[-1] == "signature" else "odd"
        assert interface_snapshot.breaks(present, changed(present, path, other)), f"changing {' '.join(path)}"


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("names", "Batch"), "Batch was removed"),
        (("names", "Bounds", "fields", "strict"), "Bounds.strict was removed"),
        (("names", "Device", "methods", "compile"), "Device.compile was removed"),
        (("operations", "rotary"), "operation rotary was removed"),
        (("operations", "attention", "attributes", "window"), "operation attention: attribute window was removed"),
        (("hooks", "midspan_devices"), "hook midspan_devices was removed"),
        (("errors", "DeviceLost"), "DeviceLost was removed"),
        (("runtimes", "midspan.runtimes.reference.device.ReferenceDevice"), "ReferenceDevice was removed"),
    ],
)
def test_what_is_removed_is_named(interface_snapshot: ModuleType, path: Path_, named: str) -> None:
    present = interface_snapshot.snapshot()
    (line,) = interface_snapshot.breaks(present, changed(present, path, None))
    assert line.endswith(named)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("names", "Capabilities", "fields", "deterministic"), "bool = True", "Capabilities.deterministic changed"),
        (("names", "Bounds", "fields", "max_tokens"), "float", "Bounds.max_tokens changed from int to float"),
        (("names", "Bounds", "fields", "speed"), "int", "Bounds.speed was added and must be given"),
        (("names", "Cache", "methods", "move"), "() -> None", "Cache.move was added"),
        (("names", "Cache", "fields", "speed"), "int = 0", "Cache.speed was added"),
        (
            ("names", "Program", "methods", "run"),
            "(batch: Batch, cache: Cache, fast: bool = False) -> StepOutput",
            "Program.run changed",
        ),
        (("names", "always", "signature"), "(site: KernelSite, more: int) -> Support", "more was added and must"),
        (("names", "always", "signature"), "(site: KernelSite) -> bool", "result changed from Support to bool"),
        (("operations", "linear", "attributes", "split"), "'rows'", "operation linear: default of split changed"),
        (("operations", "add", "attributes", "factor"), "'<required>'", "attribute factor was added and must"),
        (("operations", "add", "inputs"), "a b c", "operation add: inputs changed"),
        (("operations", "linear", "optional_weights"), "scales", "optional weight bias was removed"),
    ],
)
def test_what_is_changed_so_that_plugins_break_is_named(
    interface_snapshot: ModuleType, path: Path_, value: str, named: str
) -> None:
    present = interface_snapshot.snapshot()
    (line,) = interface_snapshot.breaks(present, changed(present, path, value))
    assert named in line


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("names", "Capabilities", "fields", "sleeps"), "bool = False"),
        (("names", "StepResult", "fields", "joules"), "float | None = None"),
        (("names", "Found", "fields", "note"), "str = ''"),
        (("names", "WeightSource", "methods", "names"), "() -> tuple[str, ...]"),
        (("names", "Surprise"), {"kind": "record", "module": "midspan.interface.surprise"}),
        (("names", "always", "signature"), "(site: KernelSite, more: int = 0) -> Support"),
        (("operations", "add", "attributes", "factor"), "1.0"),
        (("operations", "add", "optional_weights"), "bias"),
        (("operations", "dream"), {"inputs": "x"}),
        (("hooks", "midspan_dreams"), "() -> None"),
    ],
)
def test_optional_additions_break_nobody(interface_snapshot: ModuleType, path: Path_, value: Any) -> None:
    present = interface_snapshot.snapshot()
    added = changed(present, path, value)
    assert interface_snapshot.breaks(present, added) == []
    assert interface_snapshot.differences(present, added)


def test_fields_that_are_given_by_place_keep_their_places(interface_snapshot: ModuleType) -> None:
    present = interface_snapshot.snapshot()
    turned = copy.deepcopy(present)
    fields = turned["names"]["Unavailable"]["fields"]
    turned["names"]["Unavailable"]["fields"] = {name: fields[name] for name in reversed(fields)}
    (line,) = interface_snapshot.breaks(present, turned)
    assert "another order" in line
    (line,) = interface_snapshot.breaks(present, {**present, "entry_point_group": "elsewhere"})
    assert "entry_point_group changed" in line
