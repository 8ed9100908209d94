"""One plugin's entry point and probe, in a process that has imported the core and nothing else.

Tells how long they took and what they imported. Knows no plugin by name.
"""

from __future__ import annotations

import sys
import time
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from midspan.conformance.child_process import answer
from midspan.devices.plugin_loading import load_plugins
from midspan.interface import DevicePlugin
from midspan.interface.hooks import ENTRY_POINT_GROUP
from midspan.runtimes.reference.device import PLUGIN as REFERENCE


def probe_once(arguments: dict[str, Any]) -> dict[str, Any]:
    """Load one plugin and ask its probe.

    Args:
        arguments: ``plugin``, its name; ``entry_point`` and ``distribution`` that bring it, the
            first empty for what is built in.

    Returns:
        ``import_seconds``, ``probe_seconds``, and ``packages``: top-level package that neither Python,
        the core nor the plugin brings -> whether compiled modules of it were loaded.
    """
    entry = _entry_point(arguments)
    before = set(sys.modules)
    begun = time.perf_counter()
    plugin = REFERENCE if entry is None else _load(entry, arguments["plugin"])
    loaded = time.perf_counter()
    plugin.probe()
    probed = time.perf_counter()
    own = set() if entry is None else {entry.module.split(".")[0]}
    return {
        "import_seconds": loaded - begun,
        "probe_seconds": probed - loaded,
        "packages": _foreign_packages(before, own),
    }


def _entry_point(arguments: dict[str, Any]) -> EntryPoint | None:
    if not arguments["entry_point"]:
        return None
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=arguments["entry_point"]):
        if entry.dist is not None and entry.dist.name == arguments["distribution"]:
            return entry
    raise LookupError(f"a new process finds no entry point '{arguments['entry_point']}' of {arguments['distribution']}")


def _load(entry: EntryPoint, name: str) -> DevicePlugin:
    registry = load_plugins([entry])
    for offered in registry.manager.hook.midspan_devices():
        for plugin in offered:
            if isinstance(plugin, DevicePlugin) and plugin.name == name:
                return plugin
    raise LookupError(f"in a new process, the entry point '{entry.name}' brings no device '{name}'")


def _foreign_packages(before: set[str], own: set[str]) -> dict[str, bool]:
    known = {name.split(".")[0] for name in before} | own | set(sys.stdlib_module_names)
    packages: dict[str, bool] = {}
    for name in sorted(set(sys.modules) - before):
        top = name.split(".")[0]
        if top not in known:
            packages[top] = packages.get(top, False) or _is_compiled(sys.modules[name])
    return packages


def _is_compiled(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and file.endswith(tuple(EXTENSION_SUFFIXES))


if __name__ == "__main__":
    answer(probe_once)
