"""Finds out whether a plugin patches the core.

A snapshot remembers which object stands behind every name of the core: attributes of
its modules, of the classes that they define, items of their tables, fields of their
records and the code of their functions. Two snapshots tell what somebody replaced,
added or removed in between. Knows no plugin by name.

Not covered: what lies outside the core (builtins, the standard library, other
packages), the core's modules that are imported only after the first snapshot, cells of
closures, and patches that are made when a model is compiled or run.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import FunctionType, MappingProxyType, ModuleType
from typing import cast

import midspan
from midspan.devices.discovery import DeviceCatalogue, discover
from midspan.devices.selection import open_selected, select_device
from midspan.errors import PluginError
from midspan.interface.hooks import ENTRY_POINT_GROUP

CORE = "midspan"
Snapshot = Mapping[str, object]
"""Dotted path -> the object there. It holds the objects, so none of them can be replaced by one at the same address."""

NOT_IMPORTED = ("midspan.runtimes.torch",)
"""Parts of the core that need a package which the core does not require."""
NO_LIBRARY = ("__main__", "conftest")
TEST_PREFIXES = ("test_", "pytest_")
"""Modules that are there to be run by something, and are imported by nobody."""
BOOKKEEPING = frozenset(
    (
        "__abstractmethods__",
        "__annotate_func__",
        "__annotations__",
        "__annotations_cache__",
        "__builtins__",
        "__callable_proto_members_only__",
        "__dict__",
        "__non_callable_proto_members__",
        "__protocol_attrs__",
        "__slotnames__",
        "__warningregistry__",
        "__weakref__",
        "_abc_impl",
    )
)
"""Names that Python itself sets on modules and classes, some of them when they are first used."""
FIRST_NAME = re.compile(r"\w+")
DEPTH = 4
"""How far tables in tables and records in records are followed."""


def core_bindings() -> Snapshot:
    """What stands behind every name of the core's loaded modules now."""
    bindings: dict[str, object] = {}
    for name, module in sorted(sys.modules.items()):
        if isinstance(module, ModuleType) and (name == CORE or name.startswith(f"{CORE}.")):
            bindings[name] = module
            bindings[f"{name}.__class__"] = type(module)
            for attribute, value in vars(module).items():
                if attribute not in BOOKKEEPING:
                    _follow(f"{name}.{attribute}", value, name, bindings, DEPTH)
    return bindings


def rebound(before: Snapshot, after: Snapshot) -> tuple[str, ...]:
    """Names of the core that somebody else replaced, added or removed.

    Args:
        before: a snapshot.
        after: a later one. Modules that were imported in between, and their names in their
            packages, are no rebinding.

    Returns:
        Dotted names, sorted; of what was replaced as a whole, the whole alone, and a part of
        a value under the name where the value was defined, not where it is only imported.
    """
    changed = [name for name, value in before.items() if name not in after or after[name] is not value]
    new = after.keys() - before.keys()
    new_modules = [name for name in new if isinstance(module := after[name], ModuleType) and module.__name__ == name]
    for name in new:
        if not any(name == module or name.startswith(f"{module}.") for module in new_modules):
            changed.append(name)
    names = list(_outermost(sorted(changed)))
    return tuple(name for name in names if _is_at_home(name, before)) or tuple(names)


def count_rebindings(
    entry_name: str, device: str | None = None, options: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """What a plugin rebinds in the core while it is loaded, probed, opened and closed.

    To be called in a fresh process, where the plugin has not been loaded yet; imports the
    whole core first, so that everything has its name.

    Args:
        entry_name: the plugin's entry point; empty for the device that ships with the core.
        device: as after ``--device``; None: the first device that the plugin found, if any.
        options: for opening it.

    Returns:
        Dotted names, see ``rebound``; empty for a plugin that leaves the core alone.

    Raises:
        PluginError: there is no such entry point, or what it leads to cannot be used.
        DeviceNotFound: no such device of the plugin is here.
    """
    entries = _entries(entry_name)
    import_core()
    before = core_bindings()
    catalogue = discover(entries)
    asked = device if device is not None else _first_device(catalogue, entry_name)
    if asked is not None:
        open_selected(select_device(catalogue, asked), options or {}).close()
    return rebound(before, core_bindings())


def import_core() -> tuple[str, ...]:
    """Import every module of the core that its own dependencies suffice for.

    Returns:
        Their names.
    """
    return tuple(_import_below(midspan))


def _import_below(package: ModuleType) -> Iterator[str]:
    yield package.__name__
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        leaf = found.name.rpartition(".")[2]
        if found.name in NOT_IMPORTED or leaf in NO_LIBRARY or leaf.startswith(TEST_PREFIXES):
            continue
        module = import_module(found.name)
        if found.ispkg:
            yield from _import_below(module)
        else:
            yield found.name


def _entries(entry_name: str) -> list[EntryPoint]:
    found = [entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name == entry_name]
    if entry_name and not found:
        raise PluginError(
            f"No installed package has the entry point '{entry_name}' in the group '{ENTRY_POINT_GROUP}'.",
            plugin=entry_name,
            remedy="'midspan plugins' lists those that are installed.",
        )
    return found


def _first_device(catalogue: DeviceCatalogue, entry_name: str) -> str | None:
    for failure in catalogue.failures:
        if failure.entry_point == entry_name:
            return failure.name
    for discovered in catalogue.plugins.values():
        if discovered.entry_point == entry_name and discovered.devices():
            return discovered.devices()[0].id
    return None


def _follow(path: str, value: object, module: str, bindings: dict[str, object], depth: int) -> None:
    """Remember a value, and what it is made of if it is the core's."""
    bindings[path] = value
    if depth == 0:
        return
    for name, part in _parts(value, module):
        _follow(f"{path}{name}", part, module, bindings, depth - 1)


def _parts(value: object, module: str) -> Iterator[tuple[str, object]]:
    """What a value is made of: (how its name goes on, the part)."""
    if isinstance(value, type):
        if value.__module__ == module:
            yield from ((f".{name}", part) for name, part in vars(value).items() if name not in BOOKKEEPING)
    elif isinstance(value, (staticmethod, classmethod)):
        yield ".__func__", value.__func__
    elif isinstance(value, property):
        yield from ((f".{name}", getattr(value, name)) for name in ("fget", "fset", "fdel"))
    elif isinstance(value, FunctionType):
        if _is_of_core(value.__module__):
            yield from ((f".{name}", getattr(value, name)) for name in ("__code__", "__defaults__", "__kwdefaults__"))
    elif isinstance(value, (dict, MappingProxyType)):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((f"{{{part!r}}}", part) for part in value)
    elif is_dataclass(value) and _is_of_core(type(value).__module__):
        yield from ((f".{field.name}", getattr(value, field.name, None)) for field in fields(value))


def _is_at_home(name: str, before: Snapshot) -> bool:
    """False for a part of what the module only imports."""
    module = name
    while not isinstance(before.get(module), ModuleType):
        module = module[: max(module.rfind("."), 0)]
        if not module:
            return True
    rest = name[len(module) + 1 :]
    variable = FIRST_NAME.match(rest)
    if variable is None or variable[0] == rest:
        return True
    try:
        tree = ast.parse(inspect.getsource(cast("ModuleType", before[module])))
    except (OSError, TypeError):
        return True
    imported = (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
    return variable[0] not in {alias.asname or alias.name for node in imported for alias in node.names}


def _is_of_core(module: str | None) -> bool:
    return module is not None and (module == CORE or module.startswith(f"{CORE}."))


def _outermost(names: Iterable[str]) -> Iterator[str]:
    """Sorted names without those that only go on from one before them."""
    last: str | None = None
    for name in names:
        if last is None or not (name.startswith(last) and name[len(last) : len(last) + 1] in (".", "[", "{")):
            last = name
            yield name
