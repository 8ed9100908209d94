"""Finds installed plugins and the devices that they bring.

Knows no hardware: it asks each loaded package for its device plugins, holds them
against the interface, asks each one's probe once and keeps what came of it. A plugin
that fails to load, breaks the contract or speaks another interface version is recorded
with its traceback and is fatal only where someone asks for it by name (``devices.selection``).

Invariants: device plugins have unique names: of two with one name one whose probe failed
gives way, and otherwise the package that comes first in the alphabet is taken; nobody takes
the built-in portable device's name; nothing here raises because of somebody else's package,
and what that prints goes to standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from midspan import __version__
from midspan.devices.contract import check_plugin, error_text
from midspan.devices.hook_tables import architectures, asking, implementations, quantizations, table_failures
from midspan.devices.interface_version import check_interface, version_text
from midspan.devices.plugin_calls import PATIENCE_SECONDS, prints_as_errors
from midspan.devices.plugin_loading import (
    InstalledPlugin,
    PluginFailure,
    PluginRegistry,
    load_plugins,
    plugin_failure,
    uninstall_remedy,
)
from midspan.devices.probing import (
    PROBE_DEADLINE_SECONDS,
    SLOW_PROBE_SECONDS,
    ProbeFailed,
    ProbeResult,
    ask_probes,
)
from midspan.errors import PluginError
from midspan.interface.device import DeviceInfo
from midspan.interface.plugin import DevicePlugin, Found
from midspan.runtimes.reference.device import PLUGIN as REFERENCE

__all__ = [
    "BUILT_IN",
    "DeviceCatalogue",
    "DiscoveredDevice",
    "InstalledPlugin",
    "PluginFailure",
    "PluginRegistry",
    "ProbeFailed",
    "ProbeResult",
    "architectures",
    "discover",
    "load_plugins",
    "quantizations",
]

BUILT_IN = "midspan"
"""The distribution of what ships with the core."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DiscoveredDevice:
    """A device plugin that speaks our interface, and what its probe said.

    Attributes:
        plugin: the plugin.
        distribution: the installed package that brings it.
        version: that package's version.
        probe: the probe's answer, asked once.
        entry_point: name of the package's entry point; empty for what is built in.
        import_seconds: how long the entry point took to import.
        probe_seconds: how long the probe took.
    """

    plugin: DevicePlugin
    distribution: str
    version: str
    probe: ProbeResult
    entry_point: str = ""
    import_seconds: float = 0.0
    probe_seconds: float = 0.0

    def devices(self) -> tuple[DeviceInfo, ...]:
        """What the probe found; empty when it found nothing."""
        return self.probe.devices if isinstance(self.probe, Found) else ()

    def warnings(self) -> tuple[str, ...]:
        """What works here and should be better, for people."""
        if self.probe_seconds <= SLOW_PROBE_SECONDS or isinstance(self.probe, ProbeFailed):
            return ()
        return (
            f"The probe of '{self.plugin.name}' took {self.probe_seconds:.2f} s; "
            f"every start waits for it, and the interface allows {SLOW_PROBE_SECONDS:g} s.",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceCatalogue:
    """All that is installed.

    Attributes:
        plugins: device plugins by name, the built-in one included.
        failures: packages and device plugins that cannot be used.
        registry: the loaded packages, for other hooks.
    """

    plugins: Mapping[str, DiscoveredDevice]
    failures: tuple[PluginFailure, ...]
    registry: PluginRegistry

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Every device found, the highest preference first."""
        found = [info for plugin in self.plugins.values() for info in plugin.devices()]
        return tuple(sorted(found, key=lambda info: -info.preference))


def discover(
    entries: Iterable[EntryPoint] | None = None,
    *,
    probe_deadline: float = PROBE_DEADLINE_SECONDS,
    patience: float = PATIENCE_SECONDS,
) -> DeviceCatalogue:
    """Load all plugins and ask each device plugin's probe once.

    Args:
        entries: entry points; None: those of the installed distributions.
        probe_deadline: seconds after which a probe that has not answered has failed.
        patience: seconds of an import or a hook after which a person is told for whom they wait.
    """
    registry = load_plugins(entries, patience=patience)
    failures = [*registry.failures, *table_failures(registry)]
    core = InstalledPlugin(name="", distribution=BUILT_IN, version=__version__)
    admitted = [(REFERENCE, core)]
    for owner, hook in implementations(registry, "midspan_devices"):
        try:
            offered = _offered(hook, owner, patience)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failures.append(plugin_failure(owner, owner.name, error))
            continue
        for item in offered:
            _admit(item, owner, admitted, failures)
    with prints_as_errors():
        outcomes = ask_probes([plugin for plugin, _ in admitted], deadline_seconds=probe_deadline)
    asked = [
        DiscoveredDevice(
            plugin=plugin,
            distribution=owner.distribution,
            version=owner.version,
            probe=outcome.result,
            entry_point=owner.name,
            import_seconds=owner.import_seconds,
            probe_seconds=outcome.seconds,
        )
        for (plugin, owner), outcome in zip(admitted, outcomes, strict=True)
    ]
    plugins, others = _one_for_each_name(asked)
    return DeviceCatalogue(plugins=plugins, failures=(*failures, *others), registry=registry)


def _one_for_each_name(
    asked: Sequence[DiscoveredDevice],
) -> tuple[dict[str, DiscoveredDevice], list[PluginFailure]]:
    """Of those with one name the first whose probe did not fail, or else the first; and why not the others."""
    rivals: dict[str, list[DiscoveredDevice]] = {}
    for device in asked:
        rivals.setdefault(device.plugin.name, []).append(device)
    chosen = {}
    for name, group in rivals.items():
        sound = [device for device in group if not isinstance(device.probe, ProbeFailed)]
        chosen[name] = group[0] if name == REFERENCE.name or not sound else sound[0]
    failures = [
        _beaten(device, chosen[device.plugin.name]) for device in asked if device is not chosen[device.plugin.name]
    ]
    return {device.plugin.name: device for device in asked if device is chosen[device.plugin.name]}, failures


def _beaten(device: DiscoveredDevice, taken: DiscoveredDevice) -> PluginFailure:
    name, distribution = device.plugin.name, device.distribution
    if distribution == taken.distribution:
        message = f"The package {distribution} lists the device name '{name}' more than once; one of them is taken."
        remedy = f"Correct the package, or report it to its makers: each plugin of {distribution} needs its own name."
    else:
        message = f"The device name '{name}' of {distribution} is already taken by {taken.distribution}"
        broken = device.probe.error if isinstance(device.probe, ProbeFailed) else None
        built_in = taken.distribution == BUILT_IN
        message += f"; its own probe failed: {error_text(broken)}." if broken and not built_in else "."
        remedy = uninstall_remedy(distribution, *([] if built_in else [taken.distribution]))
    owner = InstalledPlugin(
        name=device.entry_point,
        distribution=distribution,
        version=device.version,
        import_seconds=device.import_seconds,
    )
    error = PluginError(message, plugin=name, remedy=remedy)
    return plugin_failure(owner, name, error, interface=version_text(device.plugin.interface))


def _offered(hook: Callable[[], object], owner: InstalledPlugin, patience: float) -> Sequence[object]:
    with asking(owner, "devices", patience):
        offered = hook()
    if not isinstance(offered, (list, tuple)):
        raise _no_devices(owner, offered)
    return offered


def _no_devices(owner: InstalledPlugin, offered: object) -> PluginError:
    return PluginError(
        f"The hook midspan_devices of '{owner.name}' must return a list of DevicePlugin, not {offered!r}.",
        plugin=owner.name,
        remedy=f"Report it to the makers of {owner.distribution}.",
    )


def _admit(
    offered: object,
    owner: InstalledPlugin,
    admitted: list[tuple[DevicePlugin, InstalledPlugin]],
    failures: list[PluginFailure],
) -> None:
    """Take a device plugin in, or record why not."""
    name, interface = owner.name, None
    try:
        if not isinstance(offered, DevicePlugin):
            raise _no_devices(owner, offered)
        interface = version_text(offered.interface)
        check_plugin(offered)
        name = offered.name
        check_interface(offered, owner.distribution)
    except Exception as error:
        failures.append(plugin_failure(owner, name, error, interface=interface))
        return
    admitted.append((offered, owner))
