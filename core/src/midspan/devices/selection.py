"""Chooses one of the found devices by what was asked, and opens it.

Knows no hardware: it compares names and preferences. The choice is never silent;
it comes with a sentence that says what was taken and why. Nothing else is ever taken
in place of a device that was asked for by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches

from midspan.devices.contract import AUTO, check_device, error_text, own_error_remedy, plugin_at_fault
from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice, ProbeFailed
from midspan.devices.plugin_calls import told_when_long
from midspan.errors import DeviceNotFound, MidspanError, PluginError
from midspan.interface.device import Device, DeviceInfo
from midspan.interface.plugin import DevicePlugin, Unavailable
from midspan.settings import SKIP_PLUGINS

TIES = "Of equal preference what ships with Midspan comes first, then packages by name, then a package's own order."

__all__ = ["AUTO", "SelectedDevice", "describe", "open_selected", "select_device"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectedDevice:
    """The choice.

    Attributes:
        plugin: whose ``open`` opens it.
        distribution: the installed package that brings the plugin.
        info: the device.
        explanation: what was taken and why, for people.
        entry_point: name of the package's entry point; empty for what is built in.
    """

    plugin: DevicePlugin
    distribution: str
    info: DeviceInfo
    explanation: str
    entry_point: str = ""


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
    name = asked.partition(":")[0]
    discovered = catalogue.plugins.get(name)
    if discovered is None:
        _raise_failure(catalogue, name)
        raise _not_here(catalogue, asked)
    if isinstance(discovered.probe, ProbeFailed):
        raise _probe_error(discovered, discovered.probe)
    if isinstance(discovered.probe, Unavailable):
        reason = discovered.probe.reason.rstrip(".")
        raise DeviceNotFound(
            f"The device '{name}' is not available: {reason}. {describe(catalogue)}", remedy=discovered.probe.remedy
        )
    info = _of_name(discovered, asked)
    if info is None:
        raise _not_here(catalogue, asked)
    first = f", the first of {len(discovered.devices())}" if info.id != asked and len(discovered.devices()) > 1 else ""
    parts = [f"Device {info.id} ({info.description}){first}, as asked."]
    parts += [f" Not taken: {line}." for line in _namesakes(catalogue, name)]
    return _selected(discovered, info, "".join(parts))


def open_selected(selected: SelectedDevice, options: Mapping[str, str]) -> Device:
    """Open the device that was chosen.

    Args:
        selected: the choice.
        options: of the plugin's own.

    Raises:
        SettingsError: an option that it does not take.
        PluginError: opening failed, or what was opened breaks the interface.
        DeviceLost, OutOfDeviceMemory: as the plugin says.
    """
    plugin, distribution = selected.plugin, selected.distribution
    doing = f"opening the device '{selected.info.id}' of {distribution}"
    with (
        plugin_at_fault(plugin, distribution, f"the device '{selected.info.id}' was opened"),
        told_when_long(doing, distribution, selected.entry_point),
    ):
        device = plugin.open(selected.info, options)
        try:
            check_device(device, plugin, found=selected.info)
        except BaseException:
            with suppress(Exception):
                device.close()
            raise
    return device


def describe(catalogue: DeviceCatalogue) -> str:
    """What exists here, and why the rest is not available, in sentences."""
    available = ", ".join(f"{info.id} ({info.description})" for info in catalogue.devices())
    lines = [f"Available: {available or 'nothing'}."]
    lines += [f"Not available: {line}." for line in _absent(catalogue)]
    return " ".join(lines)


def _select_best(catalogue: DeviceCatalogue) -> SelectedDevice:
    found = [(discovered, info) for discovered in catalogue.plugins.values() for info in discovered.devices()]
    if not found:
        raise DeviceNotFound(f"No device was found. {describe(catalogue)}", remedy="Install a device plugin.")
    best, info = max(found, key=lambda pair: pair[1].preference)
    others = [other for _, other in found if other is not info]
    beaten = ", ".join(f"{other.id} ({other.preference})" for other in others if other.preference >= 0)
    by_name = ", ".join(dict.fromkeys(other.id.partition(":")[0] for other in others if other.preference < 0))
    parts = [f"Device {info.id} ({info.description}), taken by 'auto' for its preference of {info.preference}"]
    parts.append(f" over {beaten}." if beaten else ", the only one." if not others else ".")
    parts += [f" {TIES}"] if any(other.preference == info.preference for other in others) else []
    parts += [f" Of negative preference, taken only when asked for by name: {by_name}."] if by_name else []
    parts += [f" Not available: {line}." for line in _absent(catalogue)]
    return _selected(best, info, "".join(parts))


def _selected(discovered: DiscoveredDevice, info: DeviceInfo, explanation: str) -> SelectedDevice:
    return SelectedDevice(
        plugin=discovered.plugin,
        distribution=discovered.distribution,
        info=info,
        explanation=explanation,
        entry_point=discovered.entry_point,
    )


def _absent(catalogue: DeviceCatalogue) -> list[str]:
    lines = []
    for name, discovered in catalogue.plugins.items():
        if isinstance(discovered.probe, Unavailable):
            lines.append(f"{name}: {discovered.probe.reason.rstrip('.')}")
        elif isinstance(discovered.probe, ProbeFailed):
            lines.append(f"{name}: its probe failed with {error_text(discovered.probe.error).rstrip('.')}")
    lines += [failure.summary().rstrip(".") for failure in catalogue.failures]
    lines += [
        f"{owner.name} ({owner.distribution}): left out by {SKIP_PLUGINS}" for owner in catalogue.registry.skipped
    ]
    return lines


def _namesakes(catalogue: DeviceCatalogue, name: str) -> list[str]:
    """Plugins of a name that another has taken."""
    return [failure.summary().rstrip(".") for failure in catalogue.failures if failure.name == name]


def _of_name(discovered: DiscoveredDevice, asked: str) -> DeviceInfo | None:
    """The device of an id, a plugin's first one for its name, or at 0 the one that has no number of its own."""
    devices = discovered.devices()
    for info in devices:
        if info.id == asked:
            return info
    name = discovered.plugin.name
    if asked == name or (asked == f"{name}:0" and devices[0].id == name):
        return devices[0]
    return None


def _probe_error(discovered: DiscoveredDevice, probe: ProbeFailed) -> PluginError:
    name, cause = discovered.plugin.name, probe.error
    said, remedy = error_text(cause), own_error_remedy(discovered.distribution)
    if isinstance(cause, MidspanError):
        said, remedy = cause.message, cause.remedy or remedy
    error = PluginError(
        f"The probe of the device '{name}' ({discovered.distribution} {discovered.version}) failed: "
        f"{said.rstrip('.')}.",
        plugin=name,
        remedy=remedy,
    )
    error.__cause__ = cause
    return error


def _raise_failure(catalogue: DeviceCatalogue, name: str) -> None:
    """Raise what kept a plugin of that name from being used, if there is one."""
    for failure in catalogue.failures:
        names = (failure.name, failure.entry_point, failure.distribution, failure.distribution.removeprefix("midspan-"))
        if name in names:
            if isinstance(failure.error, PluginError):
                raise failure.error
            raise PluginError(
                f"The plugin '{failure.name}' of {failure.distribution} {failure.version} failed to load: "
                f"{error_text(failure.error)}.",
                plugin=failure.name,
                remedy=failure.remedy(),
            ) from failure.error
    for owner in catalogue.registry.skipped:
        if name in (owner.name, owner.distribution, owner.distribution.removeprefix("midspan-")):
            raise DeviceNotFound(
                f"The plugin '{owner.name}' of {owner.distribution} is left out by {SKIP_PLUGINS}.",
                remedy=f"Take '{owner.name}' out of {SKIP_PLUGINS}.",
            )


def _not_here(catalogue: DeviceCatalogue, asked: str) -> DeviceNotFound:
    """The error that lists what there is, and names what may have been meant."""
    ids = [info.id for info in catalogue.devices()]
    meant = [name for name in ids if name.partition(":")[2] == asked] or get_close_matches(asked, ids, n=3, cutoff=0.7)
    remedy = "Take one of those, or auto; or install the plugin that brings it."
    if meant:
        remedy = f"Did you mean {' or '.join(meant)}? 'midspan devices' lists all."
    return DeviceNotFound(f"There is no device '{asked}' here. {describe(catalogue)}", remedy=remedy)
