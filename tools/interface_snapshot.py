"""The device interface as data, and which changes of it break the plugins that exist.

A snapshot of each minor stands in ``tests/architecture/interface_MAJOR_MINOR.json``.
``--write`` writes the one of the present version, and refuses where plugins built against
a snapshot of this major would break.

A record (dataclass) may gain fields with a default, a function or a class that the core provides
may gain arguments with a default, and new names, operations, hooks and errors may come. What plugins
implement (every protocol but those in ``GIVEN_BY_CORE``) never changes: a method that is added
there is one that no existing plugin has.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from interface_reading import ERRORS, INTERFACE, ROOT, RUNTIMES, Entry, entries, entry

from midspan.interface.hooks import ENTRY_POINT_GROUP
from midspan.interface.operations import OPERATIONS
from midspan.interface.version import INTERFACE_VERSION

FOLDER = ROOT / "tests/architecture"
GIVEN_BY_CORE = ("WeightSource",)
"""Protocols that the core implements and plugins call."""

Snapshot = Mapping[str, Any]


def snapshot() -> dict[str, Any]:
    """The present interface."""
    found = [item for module in INTERFACE for item in entries(module)]
    errors = {item.name: item for item in entries("midspan.errors")}
    return {
        "version": ".".join(map(str, INTERFACE_VERSION)),
        "entry_point_group": ENTRY_POINT_GROUP,
        "hooks": {item.name: item.signature for item in found if "hookspec" in item.flags},
        "names": {item.name: _described(item) for item in found if "hookspec" not in item.flags},
        "operations": {name: _operation(name) for name in OPERATIONS},
        "runtimes": {f"{module}.{name}": _described(entry(module, name)) for module, name in RUNTIMES},
        "errors": {name: _described(errors[name]) for name in ERRORS},
    }


def _described(item: Entry) -> dict[str, Any]:
    described: dict[str, Any] = {"kind": item.kind, "module": item.module}
    if item.kind == "function":
        return {**described, "signature": item.signature}
    if item.kind == "value":
        return {**described, "value": item.signature} if _is_plain(item.signature) else described
    if item.signature:
        described["bases"] = item.signature
    if item.flags:
        described["declared"] = " ".join(item.flags)
    if item.fields:
        described["fields"] = {
            field.name: field.type if field.default is None else f"{field.type} = {field.default}"
            for field in item.fields
        }
    if item.methods:
        described["methods"] = {method.name: method.signature for method in item.methods}
    return described


def _is_plain(source: str) -> bool:
    """A literal or a type, and nothing that is worked out."""
    return not any(isinstance(node, (ast.Call, ast.GeneratorExp, ast.Dict)) for node in ast.walk(ast.parse(source)))


def _operation(name: str) -> dict[str, Any]:
    operation = OPERATIONS[name]
    return {
        "inputs": " ".join(operation.inputs),
        "weights": " ".join(operation.weights),
        "optional_weights": " ".join(operation.optional_weights),
        "attributes": {key: repr(default) for key, default in operation.attributes.items()},
        "row_wise": operation.row_wise,
    }


def differences(old: Snapshot, new: Snapshot) -> list[str]:
    """Every difference of two snapshots, a line each."""
    before, after = dict(_leaves(old, "")), dict(_leaves(new, ""))
    lines = [f"removed: {path} = {value}" for path, value in before.items() if path not in after]
    lines += [f"added: {path} = {value}" for path, value in after.items() if path not in before]
    lines += [
        f"changed: {path}: {value} -> {after[path]}"
        for path, value in before.items()
        if path in after and after[path] != value
    ]
    return lines


def _leaves(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path} {key}".strip())
    else:
        yield path, json.dumps(node)


def breaks(old: Snapshot, new: Snapshot) -> list[str]:
    """What a plugin that was built against ``old`` would find broken in ``new``, a line each."""
    lines = list(_changed("entry_point_group", old["entry_point_group"], new["entry_point_group"]))
    for part in ("names", "runtimes", "errors"):
        for name, before in old[part].items():
            after = new[part].get(name)
            lines += [f"{name} was removed"] if after is None else _entry_breaks(name, before, after)
    for name, before in old["operations"].items():
        after = new["operations"].get(name)
        lines += [f"operation {name} was removed"] if after is None else _operation_breaks(name, before, after)
    for name, before in old["hooks"].items():
        after = new["hooks"].get(name)
        lines += [f"hook {name} was removed"] if after is None else _call_breaks(name, before, after, returns=True)
    return lines


def _changed(what: str, before: object, after: object) -> Iterator[str]:
    if before != after:
        yield f"{what} changed from {before} to {after}"


def _entry_breaks(name: str, old: Snapshot, new: Snapshot) -> Iterator[str]:
    if old["kind"] != new["kind"]:
        yield f"{name} was a {old['kind']} and is a {new['kind']}"
        return
    for key in ("bases", "declared"):
        yield from _changed(f"{name}: {key}", old.get(key), new.get(key))
    if old["module"] != new["module"]:
        yield f"{name} moved from {old['module']} to {new['module']}"
    if name != "INTERFACE_VERSION":
        yield from _changed(name, old.get("value"), new.get("value"))
    if old["kind"] == "function":
        yield from _call_breaks(name, old["signature"], new["signature"], returns=True)
    implemented = old["kind"] == "protocol" and name not in GIVEN_BY_CORE
    yield from _field_breaks(name, old, new, implemented)
    methods, present = old.get("methods", {}), new.get("methods", {})
    for method in [method for method in present if method not in methods and implemented]:
        yield f"{name}.{method} was added, and no existing plugin has it"
    for method, before in methods.items():
        where = f"{name}.{method}"
        if method not in present:
            yield f"{where} was removed"
        elif implemented:
            yield from _changed(where, before, present[method])
        else:
            yield from _call_breaks(where, before, present[method], returns="runtimes" not in old["module"])


def _field_breaks(name: str, old: Snapshot, new: Snapshot, implemented: bool) -> Iterator[str]:
    before, after = old.get("fields", {}), new.get("fields", {})
    for field, described in before.items():
        if field not in after:
            yield f"{name}.{field} was removed"
            continue
        yield from _changed(f"{name}.{field}", described, after[field])
    for field in [field for field in after if field not in before]:
        if implemented:
            yield f"{name}.{field} was added, and no existing plugin has it"
        elif " = " not in after[field]:
            yield f"{name}.{field} was added and must be given"
    positional = "kw_only" not in old.get("declared", "") and old["kind"] == "record"
    if positional and list(after)[: len(before)] != list(before):
        yield f"{name}: its fields stand in another order, {', '.join(after)}"


def _operation_breaks(name: str, old: Snapshot, new: Snapshot) -> Iterator[str]:
    for key in ("inputs", "weights", "row_wise"):
        yield from _changed(f"operation {name}: {key}", old[key], new[key])
    for role in old["optional_weights"].split():
        if role not in new["optional_weights"].split():
            yield f"operation {name}: optional weight {role} was removed"
    for attribute, default in old["attributes"].items():
        if attribute not in new["attributes"]:
            yield f"operation {name}: attribute {attribute} was removed"
        else:
            yield from _changed(f"operation {name}: default of {attribute}", default, new["attributes"][attribute])
    for attribute, default in new["attributes"].items():
        if attribute not in old["attributes"] and "required" in default:
            yield f"operation {name}: attribute {attribute} was added and must be given"


Argument = tuple[str, str, str, str]
"""Kind, name, type and default."""


def _call_breaks(where: str, old: str, new: str, *, returns: bool) -> Iterator[str]:
    """What breaks for who calls a function that had a signature."""
    if old == new:
        return
    before, after = _arguments(old), _arguments(new)
    for place, argument in enumerate(before):
        kind, name = argument[:2]
        if kind == "positional" and (place >= len(after) or after[place] != argument):
            yield f"{where}: argument {name} changed or moved"
        elif kind == "keyword" and argument not in after:
            yield f"{where}: argument {name} changed or was removed"
    known = {name for _, name, _, _ in before}
    for _, name, _, default in after:
        if name not in known and not default:
            yield f"{where}: argument {name} was added and must be given"
    if returns:
        yield from _changed(f"{where}: result", old.rpartition("->")[2].strip(), new.rpartition("->")[2].strip())


def _arguments(signature: str) -> list[Argument]:
    function = ast.parse(f"def f{signature}: ...").body[0]
    if not isinstance(function, ast.FunctionDef):
        raise ValueError(f"not a signature: {signature}")
    given = function.args
    missing: list[ast.expr | None] = [None] * (len(given.args) - len(given.defaults))
    defaults: Iterable[ast.expr | None] = [*missing, *given.defaults, *given.kw_defaults]
    kinds = ["positional"] * len(given.args) + ["keyword"] * len(given.kwonlyargs)
    return [
        (
            kind,
            argument.arg,
            ast.unparse(argument.annotation) if argument.annotation else "",
            ast.unparse(default) if default else "",
        )
        for kind, argument, default in zip(kinds, [*given.args, *given.kwonlyargs], defaults, strict=True)
    ]


def path_of(version: Iterable[int]) -> Path:
    """Where the snapshot of a version stands."""
    return FOLDER / f"interface_{'_'.join(map(str, version))}.json"


def kept() -> dict[Path, dict[str, Any]]:
    """Every snapshot of the present major."""
    paths = sorted(FOLDER.glob(f"interface_{INTERFACE_VERSION[0]}_*.json"))
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def main() -> int:
    """Write the snapshot of the present version, or show how the interface differs from it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the snapshot of the present version")
    arguments = parser.parse_args()
    present, path = snapshot(), path_of(INTERFACE_VERSION)
    if not arguments.write:
        old = kept().get(path, {})
        sys.stdout.write("\n".join([*differences(old, present), ""]))
        return 0
    broken = [f"{old.name}: {line}" for old, content in kept().items() for line in breaks(content, present)]
    if broken:
        sys.stderr.write("\n".join([*broken, "This breaks plugins: take it back, or raise the major version.", ""]))
        return 1
    path.write_text(json.dumps(present, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
