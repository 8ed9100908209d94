"""The entry point of the package: what it brings to Midspan.

Imported at every start, so it loads nothing but names and figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from midspan.interface import Device, DeviceInfo, DevicePlugin, hookimpl
from midspan_simulated.probe import NAME, probe

INTERFACE = (0, 9)
"""The version of the device interface that this package was written against."""


def open_device(info: DeviceInfo, options: Mapping[str, str]) -> Device:
    """Open a simulated device.

    Raises:
        SettingsError: an option is unknown, wrong, or does not go with another.
    """
    from midspan_simulated.device import SimulatedDevice
    from midspan_simulated.options import read_options

    return SimulatedDevice(info, read_options(options))


PLUGIN = DevicePlugin(
    name=NAME,
    interface=INTERFACE,
    probe=probe,
    open=open_device,
    description="devices that are not here: exact numerics, modelled time, faults on demand",
)


@hookimpl
def midspan_devices() -> Sequence[DevicePlugin]:
    """The one device plugin of this package."""
    return (PLUGIN,)
