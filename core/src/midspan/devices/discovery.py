"""Finds installed plugins and the devices that they bring.

Knows no hardware: it reads entry points, loads each on its own, asks each device
plugin's probe once and keeps what came of it. A plugin that fails to load, breaks
the contract or speaks another interface version is recorded with its traceback
and is fatal only where someone asks for it by name (``devices.selection``).

Invariants: device plugins have unique names; the built-in portable device is
always listed; nothing here raises because of somebody else's package.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Union, cast

import pluggy

from midspan import __version__
from midspan.devices.interface_version import check_interface
from midspan.errors import PluginError
from midspan.interface import hooks
from midspan.interface.device import DeviceInfo
from midspan.interface.plugin import DevicePlugin, Found, Unavailable
from midspan.runtimes.reference.device import PLUGIN as REFERENCE

BUILT_IN = "midspan"
"""The distribution of what ships with the core."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PluginFailure:
    """A plugin that cannot be used, and why.

    Attributes:
        name: the entry point's name, or the device plugin's where that is known.
        entry_point: the entry point's name.
        distribution: the installed package, as pip names it.
        version: that package's version.
        error: what went wrong.
        trace: the traceback as text.
    """

    name: str
    entry_point: str
    distribution: str
    version: str
    error: Exception
    trace: str

    def summary(self) -> str:
        """One line for people."""
        return f"{self.name} ({self.distribution} {self.version}): {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeFailed:
    """A probe that raised or returned what is no probe result.

    Attributes:
        error: what it raised.
        trace: the traceback as text.
    """

    error: Exception
    trace: str


ProbeResult = Union[Found, Unavailable, ProbeFailed]


@dataclass(frozen=True, kw_only=True, eq=False)
class DiscoveredDevice:
    """A device plugin that speaks our interface, and what its probe said.

    Attributes:
        plugin: the plugin.
        distribution: the installed package that brings it.
        version: that package's version.
        probe: the probe's answer, asked once.
    """

    plugin: DevicePlugin
    distribution: str
    version: str
    probe: ProbeResult

    def devices(self) -> tuple[DeviceInfo, ...]:
        """What the probe found; empty when it found nothing."""
        return self.probe.devices if isinstance(self.probe, Found) else ()


@dataclass(frozen=True, kw_only=True, eq=False)
class InstalledPlugin:
    """A package whose hooks are registered.

    Attributes:
        name: the entry point's name.
        distribution: the package, as pip names it.
        version: that package's version.
    """

    name: str
    distribution: str
    version: str


@dataclass(frozen=True, kw_only=True, eq=False)
class PluginRegistry:
    """Loaded packages, before any of their hooks was called.

    Attributes:
        manager: for calling hooks.
        installed: packages that loaded.
        failures: those that did not.
    """

    manager: pluggy.PluginManager
    installed: tuple[InstalledPlugin, ...]
    failures: tuple[PluginFailure, ...]


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


def load_plugins(entries: Iterable[EntryPoint] | None = None) -> PluginRegistry:
    """Load every entry point of the group ``midspan.plugins`` and register its hooks.

    Args:
        entries: entry points; None: those of the installed distributions.
    """
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    found = entry_points(group=hooks.ENTRY_POINT_GROUP) if entries is None else entries
    installed: list[InstalledPlugin] = []
    failures: list[PluginFailure] = []
    for entry in sorted(found, key=lambda entry: (_distribution(entry), entry.name)):
        owner = InstalledPlugin(name=entry.name, distribution=_distribution(entry)[0], version=_distribution(entry)[1])
        try:
            _register(manager, entry)
        except Exception as error:
            failures.append(_failure(owner, owner.name, error))
        else:
            installed.append(owner)
    return PluginRegistry(manager=manager, installed=tuple(installed), failures=tuple(failures))


def discover(entries: Iterable[EntryPoint] | None = None) -> DeviceCatalogue:
    """Load all plugins and ask each device plugin's probe once.

    Args:
        entries: entry points; None: those of the installed distributions.
    """
    registry = load_plugins(entries)
    owners = {owner.name: owner for owner in registry.installed}
    core = InstalledPlugin(name="reference", distribution=BUILT_IN, version=__version__)
    failures = list(registry.failures)
    plugins: dict[str, DiscoveredDevice] = {}
    _admit(REFERENCE, core, plugins, failures)
    for implementation in registry.manager.hook.midspan_devices.get_hookimpls():
        owner = owners[implementation.plugin_name]
        try:
            offered = _offered(implementation.function, owner)
        except Exception as error:
            failures.append(_failure(owner, owner.name, error))
            continue
        for plugin in offered:
            _admit(plugin, owner, plugins, failures)
    return DeviceCatalogue(plugins=plugins, failures=tuple(failures), registry=registry)


def architectures(registry: PluginRegistry) -> dict[str, Callable[..., Any]]:
    """Model builders that packages bring: published class name -> builder.

    Raises:
        PluginError: a package's hook raised, or two packages bring the same name.
    """
    builders: dict[str, Callable[..., Any]] = {}
    for implementation in registry.manager.hook.midspan_architectures.get_hookimpls():
        try:
            offered: dict[str, Callable[..., Any]] = dict(cast("Mapping[str, Any]", implementation.function()))
        except Exception as error:
            raise PluginError(
                f"The plugin '{implementation.plugin_name}' failed to name its architectures: {error}",
                plugin=implementation.plugin_name,
                remedy="Upgrade or uninstall its package.",
            ) from error
        for name, builder in offered.items():
            if name in builders:
                raise PluginError(
                    f"Two plugins bring the architecture '{name}'; one is '{implementation.plugin_name}'.",
                    plugin=implementation.plugin_name,
                    remedy="Uninstall one of them.",
                )
            builders[name] = builder
    return builders


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist is not None else ("unknown package", "?")


def _register(manager: pluggy.PluginManager, entry: EntryPoint) -> None:
    module = entry.load()
    if manager.has_plugin(entry.name):
        raise PluginError(
            f"Another package already registers the plugin name '{entry.name}'.",
            plugin=entry.name,
            remedy="Uninstall one of the two packages.",
        )
    manager.register(module, name=entry.name)
    unknown = [
        caller.name
        for caller in manager.get_hookcallers(module) or ()
        if not caller.has_spec()
        and any(hook.plugin is module and not hook.optionalhook for hook in caller.get_hookimpls())
    ]
    if unknown:
        manager.unregister(module)
        raise PluginError(
            f"The plugin '{entry.name}' implements hooks that this core does not know: {', '.join(sorted(unknown))}.",
            plugin=entry.name,
            remedy="Upgrade the core: pip install --upgrade midspan",
        )


def _offered(hook: Callable[[], object], owner: InstalledPlugin) -> tuple[DevicePlugin, ...]:
    offered = hook()
    if not isinstance(offered, (list, tuple)) or not all(isinstance(item, DevicePlugin) for item in offered):
        raise PluginError(
            f"The hook midspan_devices of '{owner.name}' must return a list of DevicePlugin, not {offered!r}.",
            plugin=owner.name,
            remedy=f"Report it to the makers of {owner.distribution}.",
        )
    return tuple(offered)


def _admit(
    plugin: DevicePlugin,
    owner: InstalledPlugin,
    plugins: dict[str, DiscoveredDevice],
    failures: list[PluginFailure],
) -> None:
    try:
        check_interface(plugin, owner.distribution)
        if plugin.name in plugins:
            raise PluginError(
                f"The device name '{plugin.name}' of {owner.distribution} is already taken by "
                f"{plugins[plugin.name].distribution}.",
                plugin=plugin.name,
                remedy=f"Uninstall one of the two: pip uninstall {owner.distribution}",
            )
    except Exception as error:
        failures.append(_failure(owner, plugin.name, error))
        return
    plugins[plugin.name] = DiscoveredDevice(
        plugin=plugin, distribution=owner.distribution, version=owner.version, probe=_probe(plugin)
    )


def _probe(plugin: DevicePlugin) -> ProbeResult:
    try:
        answer = plugin.probe()
        if isinstance(answer, Unavailable) or (isinstance(answer, Found) and answer.devices):
            return answer
        raise PluginError(
            f"The probe of '{plugin.name}' must return Found with devices or Unavailable, not {answer!r}.",
            plugin=plugin.name,
            remedy="Report it to the makers of the plugin.",
        )
    except Exception as error:
        return ProbeFailed(error=error, trace=traceback.format_exc())


def _failure(owner: InstalledPlugin, name: str, error: Exception) -> PluginFailure:
    return PluginFailure(
        name=name,
        entry_point=owner.name,
        distribution=owner.distribution,
        version=owner.version,
        error=error,
        trace="".join(traceback.format_exception(type(error), error, error.__traceback__)),
    )
