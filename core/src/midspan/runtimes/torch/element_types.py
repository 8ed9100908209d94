"""Element types by name, and the way from numpy arrays to torch tensors.

Knows no graph and no operation. bfloat16 has no numpy type of its own: arrays
of ``ml_dtypes.bfloat16`` cross over as the 16-bit integers of the same bits.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from midspan.errors import SettingsError

TORCH_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Floating types that values, weights and caches may have."""

_STAGING_ELEMENTS = 1 << 20


def torch_type(name: str) -> torch.dtype:
    """The torch type of a name such as ``"bfloat16"``.

    Raises:
        SettingsError: the name stands for no type of ``TORCH_TYPES``.
    """
    try:
        return TORCH_TYPES[name]
    except KeyError:
        raise SettingsError(
            f"the torch runtime has no element type {name!r}.", remedy=f"Take one of {', '.join(TORCH_TYPES)}."
        ) from None


def type_name(dtype: torch.dtype) -> str:
    """The name of a torch type."""
    return str(dtype).removeprefix("torch.")


def borrow(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor of a batch's array, without a copy where the device reads host memory.

    Args:
        array: any shape, C-contiguous; a type that both numpy and torch have.
        device: where the tensor shall be.

    Returns:
        A tensor of the same type; on the host it shares the array's memory.
    """
    if not array.flags.writeable:
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


def copy_in(array: NDArray[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of its own with an array's content, rounded once to a type.

    Args:
        array: any shape; float32, float16, ``ml_dtypes.bfloat16`` or an integer type; may
            be a read-only view of a file.
        dtype: the tensor's type.
        device: where the tensor shall be.

    Returns:
        A contiguous tensor of the array's shape.
    """
    result = torch.empty(array.shape, dtype=dtype, device=device)
    flat, source = result.view(-1), _bits(np.ascontiguousarray(array)).reshape(-1)
    wanted = torch.bfloat16 if array.dtype == ml_dtypes.bfloat16 else None
    # Through a small buffer: torch takes no read-only memory, and a second whole copy is never made.
    staging = np.empty(min(_STAGING_ELEMENTS, source.size), source.dtype)
    for start in range(0, source.size, _STAGING_ELEMENTS):
        part = source[start : start + _STAGING_ELEMENTS]
        np.copyto(staging[: part.size], part)
        piece = torch.from_numpy(staging[: part.size])
        flat[start : start + part.size].copy_(piece if wanted is None else piece.view(wanted))
    return result


def copy_out(tensor: torch.Tensor) -> NDArray[np.float32]:
    """A float32 host array of a tensor's content, shape kept."""
    array: NDArray[np.float32] = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
    return array


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array
