"""Devices and plugins as plain data, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice

GIBIBYTE = 2**30


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
    from midspan.interface.plugin import Unavailable

    result = []
    for name, found in catalogue.plugins.items():
        if isinstance(found.probe, Unavailable):
            result.append({"name": name, "reason": found.probe.reason, "remedy": found.probe.remedy})
        elif not found.devices():
            result.append(
                {
                    "name": name,
                    "reason": f"its probe failed: {_probe_error(found)}",
                    "remedy": f"Reinstall it: pip install --force-reinstall {found.distribution}",
                }
            )
    for failure in catalogue.failures:
        result.append(
            {
                "name": failure.name,
                "reason": f"its plugin failed to load: {failure.error}",
                "remedy": "'midspan plugins' shows the traceback.",
            }
        )
    return result


def plugins(catalogue: DeviceCatalogue) -> list[dict[str, Any]]:
    """Every installed plugin: device kinds, further packages, and those that failed."""
    result = [_device_plugin(found) for found in catalogue.plugins.values()]
    known = {found.distribution for found in catalogue.plugins.values()}
    for package in catalogue.registry.installed:
        if package.distribution not in known:
            result.append(
                {"name": package.name, "distribution": package.distribution, "version": package.version, "status": "ok"}
            )
    for failure in catalogue.failures:
        result.append(
            {
                "name": failure.name,
                "distribution": failure.distribution,
                "version": failure.version,
                "status": "failed",
                "error": f"{type(failure.error).__name__}: {failure.error}",
                "traceback": failure.trace,
            }
        )
    return result


def _device_plugin(found: DiscoveredDevice) -> dict[str, Any]:
    trace = getattr(found.probe, "trace", None)
    result = {
        "name": found.plugin.name,
        "distribution": found.distribution,
        "version": found.version,
        "interface": ".".join(str(part) for part in found.plugin.interface),
        "description": found.plugin.description,
        "status": "ok" if trace is None else "failed",
    }
    if trace is not None:
        result |= {"error": _probe_error(found), "traceback": trace}
    return result


def _probe_error(found: DiscoveredDevice) -> str:
    from midspan.devices.discovery import ProbeFailed

    return repr(found.probe.error) if isinstance(found.probe, ProbeFailed) else "it found nothing"


def readable(count: int) -> str:
    """A size for people, in the largest unit that leaves a whole part."""
    for unit, size in (("GiB", GIBIBYTE), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
