"""Whether a plugin and this core speak the same device interface.

Knows no plugin by name. The rule: equal majors, and a plugin minor that is not
newer than the core's; minors only add optional fields with a default.
"""

from __future__ import annotations

from typing import TypeGuard

from midspan.errors import InterfaceMismatch
from midspan.interface.plugin import DevicePlugin
from midspan.interface.version import INTERFACE_VERSION


def check_interface(plugin: DevicePlugin, distribution: str, *, core: tuple[int, int] = INTERFACE_VERSION) -> None:
    """Accept the plugin's interface version, or say which side to upgrade.

    Args:
        plugin: the plugin.
        distribution: its package, as pip names it.
        core: (major, minor) that this core speaks.

    Raises:
        InterfaceMismatch: the versions do not go together.
    """
    version = plugin.interface
    if not _is_version(version):
        raise InterfaceMismatch(
            f"The plugin '{plugin.name}' of {distribution} states the interface version {version!r}; "
            "it must be a tuple of two integers.",
            plugin=plugin.name,
            remedy=f"Upgrade the plugin: pip install --upgrade {distribution}",
        )
    if version[0] == core[0] and version[1] <= core[1]:
        return
    spoken = (
        f"The plugin '{plugin.name}' of {distribution} was built for interface {version_text(version)}, "
        f"this core speaks {version_text(core)}."
    )
    if version < core:
        remedy = f"The plugin is too old; upgrade it: pip install --upgrade {distribution}"
    else:
        remedy = "The core is too old; upgrade it: pip install --upgrade midspan"
    raise InterfaceMismatch(spoken, plugin=plugin.name, remedy=remedy)


def version_text(version: object) -> str:
    """An interface version as people write it; what is none is shown as it is."""
    return ".".join(str(part) for part in version) if _is_version(version) else repr(version)


def _is_version(version: object) -> TypeGuard[tuple[int, int]]:
    return isinstance(version, tuple) and len(version) == 2 and all(type(part) is int and part >= 0 for part in version)
