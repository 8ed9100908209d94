"""Devices and plugins as plain data, for people and for programs.

Nothing is opened for a listing: it shows what entry points and probes said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from midspan.settings import SKIP_PLUGINS

if TYPE_CHECKING:
    from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice, InstalledPlugin, PluginFailure

OK = "ok"
UNAVAILABLE = "unavailable"
FAILED = "failed"
SKIPPED = "skipped"


def look_around() -> DeviceCatalogue:
    """All that is installed."""
    from midspan.devices.discovery import discover

    return discover()


def devices(catalogue: DeviceCatalogue) -> list[dict[str, Any]]:
    """Every device that is here, the preferred one first."""
    owners = {info.id: found for found in catalogue.plugins.values() for info in found.devices()}
    return [
        {
            "id": info.id,
            "description": info.description,
            "memory_bytes": info.memory_bytes,
            "preference": info.preference,
            "plugin": owners[info.id].distribution,
        }
        for info in catalogue.devices()
    ]


def absent(catalogue: DeviceCatalogue) -> list[dict[str, Any]]:
    """Every kind of device that is not here, with the reason and the remedy."""
    from midspan.devices.discovery import ProbeFailed
    from midspan.interface.plugin import Unavailable

    result = []
    for name, found in catalogue.plugins.items():
        if isinstance(found.probe, Unavailable):
            result.append(_reason(name, found, found.probe.reason, found.probe.remedy))
        elif isinstance(found.probe, ProbeFailed):
            result.append(_reason(name, found, f"its probe failed: {_text(found.probe.error)}", _remedy(found)))
    for failure in catalogue.failures:
        result.append(
            _reason(failure.name, failure, f"its plugin cannot be used: {_text(failure.error)}", failure.remedy())
        )
    return result


def plugins(catalogue: DeviceCatalogue) -> list[dict[str, Any]]:
    """Every installed plugin: device kinds, further packages, and those that failed."""
    result = [_device_plugin(found) for found in catalogue.plugins.values()]
    shown = {found.entry_point for found in catalogue.plugins.values()}
    shown |= {failure.entry_point for failure in catalogue.failures}
    result += [_package(owner) for owner in catalogue.registry.installed if owner.name not in shown]
    result += [_skipped_plugin(owner) for owner in catalogue.registry.skipped]
    return result + [_failed_plugin(failure) for failure in catalogue.failures]


def warnings(catalogue: DeviceCatalogue) -> list[str]:
    """What works and should be better, for people."""
    return [text for found in catalogue.plugins.values() for text in found.warnings()]


def _reason(name: str, owner: DiscoveredDevice | PluginFailure, reason: str, remedy: str) -> dict[str, Any]:
    return {"name": name, "plugin": owner.distribution, "reason": reason, "remedy": remedy}


def _device_plugin(found: DiscoveredDevice) -> dict[str, Any]:
    from midspan.devices.discovery import ProbeFailed
    from midspan.devices.interface_version import version_text
    from midspan.interface.plugin import Unavailable

    result = {
        "name": found.plugin.name,
        "entry_point": found.entry_point or None,
        "distribution": found.distribution,
        "version": found.version,
        "interface": version_text(found.plugin.interface),
        "description": found.plugin.description,
        "import_seconds": round(found.import_seconds, 4),
        "probe_seconds": round(found.probe_seconds, 4),
        "devices": [info.id for info in found.devices()],
        "warnings": list(found.warnings()),
        "status": OK,
    }
    if isinstance(found.probe, Unavailable):
        result |= {"status": UNAVAILABLE, "reason": found.probe.reason, "remedy": found.probe.remedy}
    elif isinstance(found.probe, ProbeFailed):
        error = f"its probe failed: {_text(found.probe.error)}"
        result |= {"status": FAILED, "error": error, "remedy": _remedy(found), "traceback": found.probe.trace}
    return result


def _package(owner: InstalledPlugin) -> dict[str, Any]:
    return {
        "name": owner.name,
        "entry_point": owner.name,
        "distribution": owner.distribution,
        "version": owner.version,
        "interface": None,
        "description": f"implements {', '.join(owner.hooks)}",
        "import_seconds": round(owner.import_seconds, 4),
        "probe_seconds": None,
        "devices": [],
        "warnings": [],
        "status": OK,
    }


def _skipped_plugin(owner: InstalledPlugin) -> dict[str, Any]:
    return _package(owner) | {"description": f"left out by {SKIP_PLUGINS}", "import_seconds": None, "status": SKIPPED}


def _failed_plugin(failure: PluginFailure) -> dict[str, Any]:
    return {
        "name": failure.name,
        "entry_point": failure.entry_point,
        "distribution": failure.distribution,
        "version": failure.version,
        "interface": failure.interface,
        "description": "",
        "import_seconds": round(failure.import_seconds, 4),
        "probe_seconds": None,
        "devices": [],
        "warnings": [],
        "status": FAILED,
        "error": _text(failure.error),
        "remedy": failure.remedy(),
        "traceback": failure.trace,
    }


def _text(error: BaseException) -> str:
    """What happened, without what to do about it."""
    from midspan.devices.contract import error_text
    from midspan.errors import MidspanError

    return error.message if isinstance(error, MidspanError) else error_text(error)


def _remedy(found: DiscoveredDevice) -> str:
    from midspan.devices.contract import own_error_remedy
    from midspan.devices.discovery import ProbeFailed
    from midspan.errors import MidspanError

    if (
        isinstance(found.probe, ProbeFailed)
        and isinstance(found.probe.error, MidspanError)
        and found.probe.error.remedy
    ):
        return found.probe.error.remedy
    return own_error_remedy(found.distribution)
