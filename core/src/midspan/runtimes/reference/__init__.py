"""The numpy runtime: the definition of every operation, and a device.

What a device of somebody else's stands on: ``ReferenceDevice`` with kernels and
an ``ArrayLibrary`` of its own.
"""

from __future__ import annotations

from midspan.runtimes.reference.array_library import HOST_ARRAYS, ArrayLibrary
from midspan.runtimes.reference.cache import ReferenceCache
from midspan.runtimes.reference.device import ReferenceDevice
from midspan.runtimes.reference.kernels import KERNELS

__all__ = ["HOST_ARRAYS", "KERNELS", "ArrayLibrary", "ReferenceCache", "ReferenceDevice"]
