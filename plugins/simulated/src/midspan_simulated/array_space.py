"""Arrays that live on one simulated device.

Numpy can neither read them nor compute with them: what wants their numbers has to fetch them
from their device. Knows no operation. Invariant: an array never works on another device than
the one that made it, even one of the same name.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from midspan.errors import MidspanError
from midspan.runtimes.reference import ArrayLibrary


class SimulatedArray:
    """Numbers on a device. Made by ``ArraySpace.put``.

    Attributes:
        shape: sizes.
        dtype: the numpy name of the element type.
    """

    __slots__ = ("_content", "_space", "dtype", "shape")
    __array_ufunc__ = None

    def __init__(self, content: NDArray[Any], space: ArraySpace) -> None:
        self._content = content
        self._space = space
        self.shape: tuple[int, ...] = content.shape
        self.dtype: str = content.dtype.name

    def __array__(self, *_: object) -> NoReturn:
        raise TypeError(
            f"An array of device '{self._space.device_id}' was handed to numpy; fetch it with the device's to_host."
        )

    def content_in(self, space: ArraySpace) -> NDArray[Any]:
        """The numbers, for the device that made it.

        Raises:
            MidspanError: another device asks.
        """
        if space is not self._space:
            raise MidspanError(
                f"An array of device '{self._space.device_id}' was used on another device, '{space.device_id}'.",
                remedy="Bring it to the host and from there to the other device.",
            )
        return self._content


class ArraySpace:
    """The memory of one opened device, as far as arrays go.

    Args:
        device_id: for messages.
    """

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id

    def put(self, array: NDArray[Any]) -> SimulatedArray:
        """Copy an array to the device."""
        return SimulatedArray(array.copy(), self)

    def get(self, array: SimulatedArray) -> NDArray[Any]:
        """Copy an array of this device to the host.

        Raises:
            MidspanError: it is no array of this device.
        """
        if not isinstance(array, SimulatedArray):
            raise MidspanError(
                f"Device '{self.device_id}' was given a {type(array).__name__} instead of its own array."
            )
        return np.array(array.content_in(self))

    def library(self) -> ArrayLibrary:
        """The two crossings, for the runtime."""
        return ArrayLibrary(to_device=self.put, to_host=self.get)
