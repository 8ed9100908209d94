"""The device that is being held against the contract.

Knows how a device is found by name and opened, and nothing about what is checked.

Invariants: it is the device that was asked for or an error, never another one; the
shared device is opened once and closed with the subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice, discover
from midspan.devices.selection import AUTO, select_device
from midspan.errors import DeviceNotFound
from midspan.interface import Capabilities, Device, DeviceInfo, DevicePlugin


@dataclass(kw_only=True, eq=False)
class Subject:
    """A device under examination.

    Attributes:
        name: as people write it after ``--device``.
        options: of ``--device-option``.
        discovered: the plugin, the package that brings it, and what its probe said.
        info: the device.
        facts: what a check found out beside whether it holds, for the report: whatever JSON
            can hold. What one check writes here is reported with that check and is gone
            before the next one; lists under the same key are joined in the report.
    """

    name: str
    options: Mapping[str, str]
    discovered: DiscoveredDevice
    info: DeviceInfo
    facts: dict[str, Any] = field(default_factory=dict)
    _shared: Device | None = None

    @property
    def plugin(self) -> DevicePlugin:
        """The plugin that brings the device."""
        return self.discovered.plugin

    @property
    def capabilities(self) -> Capabilities:
        """What the device claims, once it is open.

        Raises:
            Exception: whatever opening raises.
        """
        return self.device().capabilities

    def device(self) -> Device:
        """The device that checks share: opened once, with the options."""
        if self._shared is None:
            self._shared = self.plugin.open(self.info, self.options)
        return self._shared

    @property
    def is_open(self) -> bool:
        """Whether the shared device is open."""
        return self._shared is not None

    @contextmanager
    def open(self) -> Iterator[Device]:
        """A device of the check's own, closed at the end."""
        device = self.plugin.open(self.info, self.options)
        try:
            yield device
        finally:
            device.close()

    def dtypes(self) -> tuple[str, ...]:
        """Activation types that the device claims, the preferred one first."""
        return self.capabilities.dtypes

    def opening_error(self) -> Exception | None:
        """What opening the shared device raises, or None."""
        try:
            self.device()
        except Exception as error:
            return error
        return None

    def close(self) -> None:
        """Close the shared device."""
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.close()


def open_subject(
    name: str, options: Mapping[str, str] | None = None, catalogue: DeviceCatalogue | None = None
) -> Subject:
    """Find a device by name; it is opened when a check first needs it.

    Args:
        name: a plugin's name (its first device) or ``name:index``.
        options: the plugin's own.
        catalogue: what is installed; None: look now.

    Raises:
        DeviceNotFound: there is no such device here, or the name is ``auto``.
        PluginError: its plugin failed to load, or its probe failed.
    """
    found = discover() if catalogue is None else catalogue
    if name == AUTO:
        listed = ", ".join(info.id for info in found.devices())
        raise DeviceNotFound(
            f"The suite examines one device by name, and '{AUTO}' is none.", remedy=f"Take one of: {listed}."
        )
    selected = select_device(found, name)
    return Subject(
        name=name, options=dict(options or {}), discovered=found.plugins[selected.plugin.name], info=selected.info
    )
