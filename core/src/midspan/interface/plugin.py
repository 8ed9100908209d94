"""What a device plugin's entry point leads to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Union

from midspan.interface.device import Device, DeviceInfo


@dataclass(frozen=True)
class Found:
    """The probe found hardware.

    Attributes:
        devices: at least one. Their texts hold no line breaks or other control characters.
    """

    devices: tuple[DeviceInfo, ...]


@dataclass(frozen=True)
class Unavailable:
    """The probe found none; said to people as it is.

    Attributes:
        reason: what is missing.
        remedy: what to do about it.
    """

    reason: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class DevicePlugin:
    """A kind of hardware.

    Attributes:
        name: what people write after ``--device``; lower case, unique.
        interface: (major, minor) of the interface that the plugin was built against, written out:
            ``INTERFACE_VERSION`` would claim whatever core happens to be installed.
        probe: looks for devices; cheap (below 0.1 s) and imports no vendor library. Called in a
            thread of its own, also in processes that open no device.
        open: opens one of the found devices, with options of the plugin's own from
            ``--device-option key=value``; an unknown key is a ``SettingsError`` that names it.
        description: one line for people.
    """

    name: str
    interface: tuple[int, int]
    probe: Callable[[], Union[Found, Unavailable]]
    open: Callable[[DeviceInfo, Mapping[str, str]], Device]
    description: str = ""
