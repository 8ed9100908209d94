"""The device's memory: one piece, taken when the device is opened, given out in whole tiles.

Knows no graph and no array's meaning. First fit; neighbours that are free are one gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import MidspanError, OutOfDeviceMemory

TILE_BYTES = 512
"""Nothing that the device gives out is smaller, and every piece starts at a multiple of it."""


@dataclass(frozen=True, eq=False)
class Region:
    """A piece of the arena.

    Attributes:
        start: first byte.
        nbytes: a multiple of the tile.
    """

    start: int
    nbytes: int


def whole_tiles(nbytes: int) -> int:
    """Bytes of as many tiles as it takes."""
    return -(-nbytes // TILE_BYTES) * TILE_BYTES


class Arena:
    """All memory of an opened device.

    Args:
        nbytes: how much; pages of the host stand behind it only once they are written.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes // TILE_BYTES * TILE_BYTES
        self._bytes = np.zeros(self.nbytes, np.uint8)
        self._taken: list[Region] = []

    def used_bytes(self) -> int:
        """Bytes given out."""
        return sum(region.nbytes for region in self._taken)

    def take(self, nbytes: int, what: str) -> Region:
        """The first gap that is large enough.

        Raises:
            OutOfDeviceMemory: there is none.
        """
        wanted, start = whole_tiles(nbytes), 0
        for place, region in enumerate([*self._taken, Region(self.nbytes, 0)]):
            if region.start - start >= wanted:
                found = Region(start, wanted)
                self._taken.insert(place, found)
                return found
            start = region.start + region.nbytes
        free = self.nbytes - self.used_bytes()
        raise OutOfDeviceMemory(
            f"{what} of {wanted} bytes does not fit: {free} of {self.nbytes} bytes are free.",
            remedy="Take a smaller model, fewer tokens per step or fewer cache blocks, or give memory_bytes.",
        )

    def give_back(self, region: Region) -> None:
        """Make a region's bytes free again; a region that was given back already is left alone."""
        self._taken = [taken for taken in self._taken if taken is not region]

    def array(self, region: Region, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A view of a region's bytes as an array."""
        nbytes = math.prod(shape) * dtype.itemsize
        if offset + nbytes > region.nbytes:
            raise MidspanError(f"An array of {nbytes} bytes reaches beyond its region of {region.nbytes} bytes.")
        start = region.start + offset
        return self._bytes[start : start + nbytes].view(dtype).reshape(shape)
