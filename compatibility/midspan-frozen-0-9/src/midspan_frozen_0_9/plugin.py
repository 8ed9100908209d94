"""The entry point: two kinds of hardware that exist in this process only."""

from __future__ import annotations

from collections.abc import Mapping

from midspan.errors import SettingsError
from midspan.interface import Device, DeviceInfo, DevicePlugin, Found, hookimpl

MEMORY_BYTES = 1 << 30
WHOLE, KERNELS = "frozen-whole", "frozen-kernels"


def _probe_whole() -> Found:
    return Found((DeviceInfo(id=WHOLE, description="device of its own, interface 0.9", memory_bytes=MEMORY_BYTES),))


def _probe_kernels() -> Found:
    return Found((DeviceInfo(id=KERNELS, description="kernels of its own, interface 0.9", memory_bytes=MEMORY_BYTES),))


def _refuse(options: Mapping[str, str]) -> None:
    if options:
        raise SettingsError(f"This device has no option '{next(iter(options))}'.", remedy="It takes no options.")


def _open_whole(info: DeviceInfo, options: Mapping[str, str]) -> Device:
    from midspan_frozen_0_9.whole_device import WholeDevice

    _refuse(options)
    return WholeDevice(info)


def _open_kernels(info: DeviceInfo, options: Mapping[str, str]) -> Device:
    from midspan_frozen_0_9.kernel_device import open_kernel_device

    _refuse(options)
    return open_kernel_device(info)


@hookimpl
def midspan_devices() -> list[DevicePlugin]:
    """Both devices."""
    return [
        DevicePlugin(name=WHOLE, interface=(0, 9), probe=_probe_whole, open=_open_whole, description="kept from 0.9"),
        DevicePlugin(
            name=KERNELS, interface=(0, 9), probe=_probe_kernels, open=_open_kernels, description="kept from 0.9"
        ),
    ]
