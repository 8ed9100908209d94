"""Random weights for a graph, where the published ones are not needed.

For sizing, timing and trying a device with a model that is not here. Knows no device and
no file. Numbers are made when a tensor is read, so a device that asks for none pays for none.

Invariants: a tensor's numbers are a function of its published name and shape alone, whatever
is merged, split or left out; matrices keep the size of what they multiply (a row's squares add
up to about 1) and norm weights lie around 1, so no model's logits overflow.

Source of the generator: Philox4x64-10 of Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011), in numpy's bit-exact implementation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import UnsupportedModel
from midspan.interface.graph import Graph, Weight
from midspan.interface.weights import DENSE
from midspan.weights.published.catalogue import method_of, quantization_of
from midspan.weights.stored_tensor import DENSE_DTYPES, Checkpoint, StoredTensor

_CHUNK = 1 << 20
"""Numbers made at a time: few enough that temporaries stay small beside the tensor."""

_VECTOR_SPREAD = 0.05
"""How far vectors lie around their middle, at most."""


def with_dummy_weights(checkpoint: Checkpoint, graph: Graph) -> Checkpoint:
    """A checkpoint with random tensors for all weights of a graph.

    Args:
        checkpoint: its config says the element type; float32 when it does not.
        graph: before any pass, so that every weight is one published tensor or equal parts of several.

    Returns:
        The same checkpoint with other tensors; none of their numbers is made yet.

    Raises:
        UnsupportedModel: the published model is quantized, so that random tensors would have other sizes.
    """
    quantization = quantization_of(checkpoint.config)
    if quantization is not None:
        raise UnsupportedModel(
            f"{checkpoint.path} is quantized with {method_of(quantization)}, and random weights are made in "
            "16 or 32 bits: sizes and times would be wrong.",
            remedy="Remove 'quantization_config' from a copy of config.json, and quantize the random weights: "
            "--quantization int8, w8a16, int4 or fp8.",
        )
    dtype = checkpoint.dtype or "float32"
    size = DENSE_DTYPES[dtype].itemsize
    tensors = {
        name: StoredTensor(
            name=name,
            shape=shape,
            format=DENSE,
            dtype=dtype,
            nbytes=math.prod(shape) * size,
            read=_Maker(name=name, shape=shape, dtype=dtype),
        )
        for weight in graph.weights.values()
        for name, shape in _published(weight)
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def _published(weight: Weight) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor that a weight is made of."""
    if not weight.sources:
        yield weight.name, weight.shape
        return
    tail = weight.shape[2:] if len(weight.shape) > 2 or weight.name.endswith("bias") else weight.shape[1:]
    rows = math.prod(weight.shape) // math.prod(tail) // len(weight.sources)
    for source in weight.sources:
        yield source, (rows, *tail)


def dummy_tensor(name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """The random numbers of one tensor.

    Args:
        name: published name.
        shape: of the result.
        dtype: a key of ``DENSE_DTYPES``.

    Returns:
        Uniform numbers: a matrix's lie around 0 with a variance of 1 / its last size, a bias's
        close to 0, another vector's close to 1.
    """
    random = np.random.Philox(key=int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little"))
    matrix = len(shape) > 1
    middle = 0.0 if matrix or name.endswith("bias") else 1.0
    spread = math.sqrt(3 / shape[-1]) if matrix else _VECTOR_SPREAD
    count = math.prod(shape)
    data = np.empty(count, DENSE_DTYPES[dtype])
    for first in range(0, count, _CHUNK):
        part = data[first : first + _CHUNK]
        integers = random.random_raw(-(-len(part) // 4)).astype("<u8", copy=False).view("<i2")[: len(part)]
        numbers = integers.astype(np.float32)
        numbers *= np.float32(spread / 2**15)
        if middle:
            numbers += np.float32(middle)
        part[:] = numbers
    return data.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class _Maker:
    name: str
    shape: tuple[int, ...]
    dtype: str

    def __call__(self) -> Mapping[str, NDArray[Any]]:
        return {"data": dummy_tensor(self.name, self.shape, self.dtype)}
