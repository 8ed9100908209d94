"""What packages bring by name: model architectures, and readers of published quantizations.

Asks the hooks that return a mapping, and joins the answers. Knows neither what an architecture is nor what a
quantization is.

Invariants: of two packages that bring one name the first in the alphabet is taken; a package whose hook raises or
returns something else brings nothing, and why is kept; nothing here raises because of somebody else's package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from midspan.devices.plugin_calls import PATIENCE_SECONDS, plugin_code
from midspan.devices.plugin_loading import (
    InstalledPlugin,
    PluginFailure,
    PluginRegistry,
    plugin_failure,
    uninstall_remedy,
)
from midspan.errors import PluginError
from midspan.interface.weights import QuantizationReader


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A hook that returns a mapping, and the words for it.

    Attributes:
        hook: its name.
        entry: what one name of the mapping is.
        contents: what the mapping leads from and to.
    """

    hook: str
    entry: str
    contents: str


_ARCHITECTURES = _Table(hook="midspan_architectures", entry="architecture", contents="class names to builders")
_QUANTIZATIONS = _Table(
    hook="midspan_quantizations", entry="quantization", contents="names of quantization methods to readers"
)


def architectures(registry: PluginRegistry) -> dict[str, Callable[..., Any]]:
    """Model builders that packages bring: published class name -> builder.

    What a broken package would have brought is left out; ``discover`` records why.
    """
    return _joined(registry, _ARCHITECTURES)[0]


def quantizations(registry: PluginRegistry) -> dict[str, QuantizationReader]:
    """Readers of published quantizations that packages bring: ``quant_method`` -> reader.

    What a broken package would have brought is left out; ``discover`` records why.
    """
    return _joined(registry, _QUANTIZATIONS)[0]


def table_failures(registry: PluginRegistry) -> list[PluginFailure]:
    """The packages whose hooks of this kind bring nothing, and why."""
    return [failure for table in (_ARCHITECTURES, _QUANTIZATIONS) for failure in _joined(registry, table)[1]]


def implementations(registry: PluginRegistry, name: str) -> list[tuple[InstalledPlugin, Callable[[], object]]]:
    """The packages that implement a hook, in the order of their names, each with its function."""
    found = getattr(registry.manager.hook, name).get_hookimpls()
    functions = {implementation.plugin_name: implementation.function for implementation in found}
    return [(owner, functions[owner.name]) for owner in registry.installed if owner.name in functions]


def asking(owner: InstalledPlugin, what: str, patience: float) -> AbstractContextManager[None]:
    """Around the call of a hook: a person who waits is told for whom; what it prints goes to standard error."""
    doing = f"asking the plugin '{owner.name}' of {owner.distribution} for its {what}"
    return plugin_code(doing, owner.distribution, owner.name, patience=patience)


def _joined(registry: PluginRegistry, table: _Table) -> tuple[dict[str, Callable[..., Any]], list[PluginFailure]]:
    entries: dict[str, Callable[..., Any]] = {}
    homes: dict[str, InstalledPlugin] = {}
    failures = []
    for owner, hook in implementations(registry, table.hook):
        try:
            offered = _offered(hook, owner, table)
            for name in offered:
                if name in homes:
                    raise PluginError(
                        f"The {table.entry} '{name}' of {owner.distribution} is already brought by "
                        f"{homes[name].distribution}.",
                        plugin=owner.name,
                        remedy=uninstall_remedy(owner.distribution, homes[name].distribution),
                    )
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failures.append(plugin_failure(owner, owner.name, error))
        else:
            entries.update(offered)
            homes.update(dict.fromkeys(offered, owner))
    return entries, failures


def _offered(hook: Callable[[], object], owner: InstalledPlugin, table: _Table) -> dict[str, Callable[..., Any]]:
    with asking(owner, f"{table.entry}s", PATIENCE_SECONDS):
        offered = hook()
    if not isinstance(offered, Mapping) or not all(
        isinstance(name, str) and callable(entry) for name, entry in offered.items()
    ):
        raise PluginError(
            f"The hook {table.hook} of '{owner.name}' must map {table.contents}, not be {offered!r}.",
            plugin=owner.name,
            remedy=f"Report it to the makers of {owner.distribution}.",
        )
    return dict(offered)
