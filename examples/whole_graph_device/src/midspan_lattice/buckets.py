"""Static shapes: each step is padded to the next of a few sizes, and compiled once for each.

A size is a power of two up to the bound that the program was compiled for. Padding rows
write into the padding block and belong to nobody; what they compute is cut off again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from midspan.errors import GraphError
from midspan.interface import PADDING_BLOCK, Bounds, Dim, Graph, Value
from midspan_lattice.expression import FLOAT, INT

Sizes = dict[str, int]


def largest(graph: Graph, bounds: Bounds) -> Sizes:
    """The sizes of the largest step."""
    blocks = -(-bounds.max_context // bounds.block_size)
    tables = {f"M.{group.name}": blocks for group in graph.cache}
    return {"T": bounds.max_tokens, "B": bounds.max_requests, "S": bounds.max_sampled_rows, **tables}


def measure(graph: Graph, inputs: Mapping[str, Any]) -> Sizes:
    """What each symbol stands for in these inputs."""
    sizes: Sizes = {}
    for name in graph.inputs:
        array = inputs[name]
        if not isinstance(array, np.ndarray):
            continue
        for symbol, size in zip(graph.values[name].shape, array.shape, strict=True):
            key, actual = ("B", size - 1) if symbol == "B+1" else (symbol, size)
            if isinstance(key, str) and sizes.setdefault(key, actual) != actual:
                raise GraphError(f"the input '{name}' has {actual} of {key}, another has {sizes[key]}")
    return sizes


def padded(sizes: Sizes, most: Sizes) -> Sizes:
    """The bucket: each size as the next power of two, but no more than the bound."""
    rounded = {symbol: 1 << max(size - 1, 0).bit_length() for symbol, size in sizes.items()}
    return {symbol: max(sizes[symbol], min(size, most.get(symbol, size))) for symbol, size in rounded.items()}


def shape(dims: tuple[Dim, ...], sizes: Sizes) -> tuple[int, ...]:
    """Sizes of a value; ``B+1`` follows from ``B``."""
    known = {**sizes, "B+1": sizes.get("B", 0) + 1}
    return tuple(dim if isinstance(dim, int) else known[dim] for dim in dims)


def fill(target: NDArray[Any], value: Value, array: NDArray[Any], dtype: str) -> None:
    """Copy a host array into a padded one.

    Args:
        target: as large as the bucket.
        value: the graph input; activations are rounded to ``dtype``.
        array: as large as the step.
        dtype: the program's activation type.
    """
    target[...] = PADDING_BLOCK  # also slot 0, which lies in it, token 0 and row 0
    content = rounded(array, dtype) if value.dtype == "activation" else array
    target[tuple(slice(0, size) for size in array.shape)] = content
    if value.shape[-1:] == ("B+1",):
        target[len(array) :] = array[-1]  # requests that pad begin and end where the last one ends


def rounded(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float32 numbers that the type can hold."""
    return array if dtype == "float32" else array.astype(ml_dtypes.bfloat16).astype(np.float32)


def element(value: Value) -> np.dtype[Any]:
    """What the device keeps a value in."""
    return INT if value.dtype == "int32" else FLOAT
