"""The entry point of the package: what it brings to Midspan.

Imported at every start, so it loads nothing heavy; torch comes with the device
when it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from midspan.interface import Device, DeviceInfo, DevicePlugin, hookimpl
from midspan_cpu.probe import NAME, probe

INTERFACE = (0, 9)
"""The version of the device interface that this package was written against."""


def open_device(info: DeviceInfo, options: Mapping[str, str]) -> Device:
    """Open the processor as a device.

    Raises:
        SettingsError: an option is unknown or wrong.
    """
    from midspan_cpu.device import CpuDevice
    from midspan_cpu.options import read_options

    return CpuDevice(info, read_options(options))


PLUGIN = DevicePlugin(
    name=NAME, interface=INTERFACE, probe=probe, open=open_device, description="The host's processor, through torch."
)


@hookimpl
def midspan_devices() -> Sequence[DevicePlugin]:
    """The one device plugin of this package."""
    return (PLUGIN,)
