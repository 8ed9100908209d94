"""Chooses one of the found devices by what was asked.

Knows no hardware: it compares names and preferences. The choice is never silent;
it comes with a sentence that says what was taken and why.
"""

from __future__ import annotations

from dataclasses import dataclass

from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice, ProbeFailed
from midspan.errors import DeviceNotFound, PluginError
from midspan.interface.device import DeviceInfo
from midspan.interface.plugin import DevicePlugin, Unavailable

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectedDevice:
    """The choice.

    Attributes:
        plugin: whose ``open`` opens it.
        info: the device.
        explanation: what was taken and why, for people.
    """

    plugin: DevicePlugin
    info: DeviceInfo
    explanation: str


def select_device(catalogue: DeviceCatalogue, asked: str) -> SelectedDevice:
    """Choose a device.

    Args:
        catalogue: what is installed.
        asked: ``auto``, a plugin's name (its first device), or ``name:index``.

    Raises:
        DeviceNotFound: no such device here; the message lists what there is.
        PluginError: it was asked for by name and its plugin failed.
    """
    if asked == AUTO:
        return _select_best(catalogue)
    name, _, index = asked.partition(":")
    discovered = catalogue.plugins.get(name)
    if discovered is None or isinstance(discovered.probe, ProbeFailed):
        _raise_failure(catalogue, name)
    if discovered is None:
        raise DeviceNotFound(f"There is no device '{asked}' here. {describe(catalogue)}", remedy=_remedy(catalogue))
    if isinstance(discovered.probe, Unavailable):
        reason = discovered.probe.reason.rstrip(".")
        raise DeviceNotFound(
            f"The device '{name}' is not available: {reason}. {describe(catalogue)}", remedy=discovered.probe.remedy
        )
    info = _numbered(discovered, asked, index)
    if info is None:
        raise DeviceNotFound(f"There is no device '{asked}' here. {describe(catalogue)}", remedy=_remedy(catalogue))
    return SelectedDevice(
        plugin=discovered.plugin, info=info, explanation=f"Device {info.id} ({info.description}), as asked."
    )


def describe(catalogue: DeviceCatalogue) -> str:
    """What exists here, and why the rest is not available, in sentences."""
    available = ", ".join(f"{info.id} ({info.description})" for info in catalogue.devices())
    lines = [f"Available: {available or 'nothing'}."]
    lines += [f"Not available: {line}." for line in _absent(catalogue)]
    return " ".join(lines)


def _select_best(catalogue: DeviceCatalogue) -> SelectedDevice:
    candidates = [(discovered, info) for discovered in catalogue.plugins.values() for info in discovered.devices()]
    if not candidates:
        raise DeviceNotFound(f"No device was found. {describe(catalogue)}", remedy="Install a device plugin.")
    best, info = max(candidates, key=lambda pair: pair[1].preference)
    others = ", ".join(f"{other.id} ({other.preference})" for _, other in candidates if other is not info)
    parts = [f"Device {info.id} ({info.description}), taken by 'auto' for its preference of {info.preference}"]
    parts.append(f" over {others}." if others else ", the only one.")
    parts += [f" Not available: {line}." for line in _absent(catalogue)]
    return SelectedDevice(plugin=best.plugin, info=info, explanation="".join(parts))


def _absent(catalogue: DeviceCatalogue) -> list[str]:
    lines = []
    for name, discovered in catalogue.plugins.items():
        if isinstance(discovered.probe, Unavailable):
            lines.append(f"{name}: {discovered.probe.reason.rstrip('.')}")
        elif isinstance(discovered.probe, ProbeFailed):
            lines.append(f"{name}: its probe failed with {discovered.probe.error!r}")
    lines += [f"{failure.summary().rstrip('.')}" for failure in catalogue.failures]
    return lines


def _numbered(discovered: DiscoveredDevice, asked: str, index: str) -> DeviceInfo | None:
    devices = discovered.devices()
    for info in devices:
        if info.id == asked:
            return info
    if not index and ":" not in asked:
        return devices[0]
    if index.isdecimal() and int(index) < len(devices):
        return devices[int(index)]
    return None


def _raise_failure(catalogue: DeviceCatalogue, name: str) -> None:
    discovered = catalogue.plugins.get(name)
    if discovered is not None and isinstance(discovered.probe, ProbeFailed):
        raise PluginError(
            f"The probe of the device '{name}' ({discovered.distribution} {discovered.version}) failed: "
            f"{discovered.probe.error!r}.",
            plugin=name,
            remedy=f"Upgrade or reinstall it: pip install --upgrade {discovered.distribution}",
        ) from discovered.probe.error
    for failure in catalogue.failures:
        if name in (failure.name, failure.entry_point, failure.distribution.removeprefix("midspan-")):
            if isinstance(failure.error, PluginError):
                raise failure.error
            raise PluginError(
                f"The plugin '{failure.name}' of {failure.distribution} {failure.version} failed to load: "
                f"{failure.error!r}.",
                plugin=failure.name,
                remedy=f"Reinstall it: pip install --force-reinstall {failure.distribution}",
            ) from failure.error
    return


def _remedy(catalogue: DeviceCatalogue) -> str:
    names = ", ".join(info.id for info in catalogue.devices())
    return f"Take one of: auto, {names}; or install the plugin that brings it."
