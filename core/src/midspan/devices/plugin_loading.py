"""Loads the installed packages that extend Midspan, each on its own.

Reads entry points and registers hooks; calls none. Knows no hardware and no package
by name. A package that cannot be used is recorded with its traceback; nothing here
raises because of somebody else's package, except that a person may interrupt.

Not covered: code that ends the process while it is imported, and code that never returns;
there, a person is told for whom they wait and how to leave it out.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import pluggy

from midspan.devices.contract import error_text, own_error_remedy
from midspan.devices.plugin_calls import PATIENCE_SECONDS, plugin_code
from midspan.errors import MidspanError, PluginError
from midspan.interface import hooks
from midspan.settings import skipped_plugins


@dataclass(frozen=True, kw_only=True, eq=False)
class InstalledPlugin:
    """A package whose hooks are registered.

    Attributes:
        name: the entry point's name.
        distribution: the package, as pip names it.
        version: that package's version.
        import_seconds: how long its module took to import; what it shares with others is counted once.
        hooks: names of the hooks that it implements.
    """

    name: str
    distribution: str
    version: str
    import_seconds: float = 0.0
    hooks: tuple[str, ...] = ()


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
        interface: the interface version that the device plugin states, where it got so far.
        import_seconds: how long its module took to import, or to fail.
    """

    name: str
    entry_point: str
    distribution: str
    version: str
    error: BaseException
    trace: str
    interface: str | None = None
    import_seconds: float = 0.0

    def summary(self) -> str:
        """One line for people."""
        return f"{self.name} ({self.distribution} {self.version}): {error_text(self.error)}"

    def remedy(self) -> str:
        """What to do about it."""
        if isinstance(self.error, MidspanError) and self.error.remedy:
            return self.error.remedy
        if isinstance(self.error, ImportError) and (self.error.name or "").partition(".")[0] == "midspan":
            return f"Upgrade it, and the core it was written for: pip install --upgrade midspan {self.distribution}"
        return own_error_remedy(self.distribution)


@dataclass(frozen=True, kw_only=True, eq=False)
class PluginRegistry:
    """Loaded packages, before any of their hooks was called.

    Attributes:
        manager: for calling hooks.
        installed: packages that loaded.
        failures: those that did not.
        skipped: those that a person left out; they were not imported.
    """

    manager: pluggy.PluginManager
    installed: tuple[InstalledPlugin, ...]
    failures: tuple[PluginFailure, ...]
    skipped: tuple[InstalledPlugin, ...] = ()


def load_plugins(entries: Iterable[EntryPoint] | None = None, *, patience: float = PATIENCE_SECONDS) -> PluginRegistry:
    """Load every entry point of the group ``midspan.plugins`` and register its hooks.

    Args:
        entries: entry points; None: those of the installed distributions.
        patience: seconds of one import after which a person is told for whom they wait.
    """
    left_out = skipped_plugins()
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    found = entry_points(group=hooks.ENTRY_POINT_GROUP) if entries is None else entries
    installed: dict[str, InstalledPlugin] = {}
    failures: list[PluginFailure] = []
    skipped: list[InstalledPlugin] = []
    for entry in sorted(found, key=lambda entry: (_distribution(entry), entry.name)):
        if entry.name in left_out:
            skipped.append(_owner(entry, 0.0, ()))
            continue
        distribution, begun = _distribution(entry)[0], time.perf_counter()
        doing = f"importing the plugin '{entry.name}' of {distribution}"
        try:
            with plugin_code(doing, distribution, entry.name, patience=patience):
                module = entry.load()
            seconds = time.perf_counter() - begun
            names = _register(manager, module, entry, installed)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            owner = _owner(entry, time.perf_counter() - begun, ())
            failures.append(plugin_failure(owner, owner.name, error))
        else:
            installed[entry.name] = _owner(entry, seconds, names)
    return PluginRegistry(
        manager=manager, installed=tuple(installed.values()), failures=tuple(failures), skipped=tuple(skipped)
    )


def plugin_failure(
    owner: InstalledPlugin, name: str, error: BaseException, *, interface: str | None = None
) -> PluginFailure:
    """The record of a plugin that cannot be used.

    Args:
        owner: the package that brings it.
        name: the plugin's.
        error: what went wrong.
        interface: the version that it states, where it got so far.
    """
    return PluginFailure(
        name=name,
        entry_point=owner.name,
        distribution=owner.distribution,
        version=owner.version,
        error=error,
        trace="".join(traceback.format_exception(type(error), error, error.__traceback__)),
        interface=interface,
        import_seconds=owner.import_seconds,
    )


def uninstall_remedy(*distributions: str) -> str:
    """What to do where packages claim one name."""
    return f"Uninstall one of them: {', or '.join(f'pip uninstall {name}' for name in distributions)}"


def _owner(entry: EntryPoint, seconds: float, names: tuple[str, ...]) -> InstalledPlugin:
    distribution, version = _distribution(entry)
    return InstalledPlugin(
        name=entry.name, distribution=distribution, version=version, import_seconds=seconds, hooks=names
    )


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist is not None else ("unknown package", "?")


def _register(
    manager: pluggy.PluginManager, module: object, entry: EntryPoint, installed: dict[str, InstalledPlugin]
) -> tuple[str, ...]:
    if entry.name in installed:
        raise PluginError(
            f"The plugin name '{entry.name}' of {_distribution(entry)[0]} is already taken by "
            f"{installed[entry.name].distribution}.",
            plugin=entry.name,
            remedy=uninstall_remedy(_distribution(entry)[0], installed[entry.name].distribution),
        )
    try:
        manager.register(module, name=entry.name)
        names, unknown = _implemented(manager, module)
        if unknown:
            raise PluginError(
                f"The plugin '{entry.name}' implements hooks that this core does not know: {', '.join(unknown)}.",
                plugin=entry.name,
                remedy="Upgrade the core: pip install --upgrade midspan",
            )
        if not names:
            raise PluginError(
                f"The entry point '{entry.name}' leads to {entry.value}, which implements no hook of Midspan.",
                plugin=entry.name,
                remedy="Mark its functions with @hookimpl from midspan.interface, or correct the entry point.",
            )
    except BaseException:
        if manager.get_plugin(entry.name) is module:
            manager.unregister(module)
        raise
    return names


def _implemented(manager: pluggy.PluginManager, module: object) -> tuple[tuple[str, ...], list[str]]:
    """Names of the hooks that a module implements, and those of them that do not exist."""
    callers = manager.get_hookcallers(module) or ()
    unknown = [
        caller.name
        for caller in callers
        if not caller.has_spec()
        and any(hook.plugin is module and not hook.optionalhook for hook in caller.get_hookimpls())
    ]
    return tuple(sorted(caller.name for caller in callers)), sorted(unknown)
