"""How arrays travel between the host and a device that has an array type of its own.

Knows numpy, and the device's arrays only as what two functions take and return.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


def _as_it_is(array: Any) -> Any:
    return array


@dataclass(frozen=True, kw_only=True)
class ArrayLibrary:
    """The two crossings. Neither may change a number.

    Attributes:
        to_device: host array -> the device's. Gets float32, int32, float16 and
            ``ml_dtypes.bfloat16`` arrays, the last two only if the device claims them.
        to_host: the device's array -> numpy, of the same element type and shape.
    """

    to_device: Callable[[NDArray[Any]], Any] = _as_it_is
    to_host: Callable[[Any], NDArray[Any]] = _as_it_is


HOST_ARRAYS = ArrayLibrary()
"""The device's arrays are numpy's."""
