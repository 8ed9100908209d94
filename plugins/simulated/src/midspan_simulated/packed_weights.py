"""The packed weights that the device reads as they are: GGUF's q8_0.

A block of 34 bytes is a float16 scale and 32 signed bytes; number = scale * byte, in float32.
Source: the block structures of ggml (``ggml-common.h``), as the GGUF specification refers to them.
"""

from __future__ import annotations

import numpy as np

from midspan.interface.weights import DENSE, PackedTensor

_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", 32)])


def unpacked(tensor: PackedTensor) -> PackedTensor:
    """A q8_0 tensor as plain float32.

    Args:
        tensor: of the format ``gguf.q8_0``, ``blocks`` uint8 ``[out, bytes per row]``.
    """
    blocks = np.ascontiguousarray(tensor.parts["blocks"]).view(_BLOCK)
    data = blocks["values"].astype(np.float32) * blocks["scale"].astype(np.float32)[..., None]
    return PackedTensor(name=tensor.name, shape=tensor.shape, format=DENSE, parts={"data": data.reshape(tensor.shape)})
