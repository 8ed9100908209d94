"""The values of one step, each on the host, on the device, or on both.

A value crosses when somebody on the other side first asks for it, and once at
most. Knows no graph and no operation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from midspan.runtimes.reference.array_library import ArrayLibrary


class StepValues:
    """Arrays by name.

    Args:
        arrays: how they cross.
    """

    def __init__(self, arrays: ArrayLibrary) -> None:
        self._arrays = arrays
        self._host: dict[str, Any] = {}
        self._device: dict[str, Any] = {}

    def put_on_host(self, name: str, value: Any) -> None:
        """Add what the host computed, or a record that is no array."""
        self._host[name] = value

    def put_on_device(self, name: str, value: Any) -> None:
        """Add what the device computed."""
        self._device[name] = value

    def on_host(self, name: str) -> Any:
        """A value as numpy sees it."""
        if name not in self._host:
            self._host[name] = self._arrays.to_host(self._device[name])
        return self._host[name]

    def on_device(self, name: str) -> Any:
        """A value as the device sees it; records are handed on as they are."""
        if name not in self._device:
            value = self._host[name]
            self._device[name] = self._arrays.to_device(value) if isinstance(value, np.ndarray) else value
        return self._device[name]

    def drop(self, name: str) -> None:
        """Forget a value."""
        self._host.pop(name, None)
        self._device.pop(name, None)
