"""What the entry point leads to: the kind of hardware, its probe, and how it is opened."""

from __future__ import annotations

from collections.abc import Mapping

from midspan.errors import SettingsError
from midspan.interface import Device, DeviceInfo, DevicePlugin, Found, hookimpl

MEMORY_BYTES = 512 * 2**20


def _probe() -> Found:
    info = DeviceInfo(id="lattice", description="whole graphs, static shapes, 512 MiB", memory_bytes=MEMORY_BYTES)
    return Found((info,))


def _open(info: DeviceInfo, options: Mapping[str, str]) -> Device:
    from midspan_lattice.device import LatticeDevice

    unknown = [name for name in options if name != "memory_bytes"]
    asked = options.get("memory_bytes", str(info.memory_bytes))
    if unknown or not asked.isdecimal():
        raise SettingsError(
            f"The device 'lattice' has no option '{unknown[0]}'." if unknown else f"memory_bytes={asked} is no number.",
            remedy="Its only option is memory_bytes, a number of bytes.",
        )
    return LatticeDevice(info, int(asked))


@hookimpl
def midspan_devices() -> list[DevicePlugin]:
    """The one kind of hardware of this package."""
    return [
        DevicePlugin(
            # A literal: it says what this package was written against, not what is installed.
            name="lattice",
            interface=(0, 9),
            probe=_probe,
            open=_open,
            description="an example that compiles whole graphs for static shapes",
        )
    ]
