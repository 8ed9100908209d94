"""Whether a plugin and this core speak the same device interface.

Knows no plugin by name. The rule: equal majors, and a plugin minor that is not
newer than the core's; minors only add optional fields with a default.
"""

from __future__ import annotations

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
    if not (isinstance(version, tuple) and len(version) == 2 and all(isinstance(part, int) for part in version)):
        raise InterfaceMismatch(
            f"The plugin '{plugin.name}' states the interface version {version!r}; it must be two integers.",
            plugin=plugin.name,
            remedy=f"Upgrade the plugin: pip install --upgrade {distribution}",
        )
    if version[0] == core[0] and version[1] <= core[1]:
        return
    spoken = (
        f"The plugin '{plugin.name}' of {distribution} was built for interface {version[0]}.{version[1]}, "
        f"this core speaks {core[0]}.{core[1]}."
    )
    if version < core:
        remedy = f"The plugin is too old; upgrade it: pip install --upgrade {distribution}"
    else:
        remedy = "The core is too old; upgrade it: pip install --upgrade midspan"
    raise InterfaceMismatch(spoken, plugin=plugin.name, remedy=remedy)
