"""What readers of quantized checkpoints share: the tensors of one module, and packed tensors made of them.

A published layout keeps several tensors for each linear layer (``q_proj.qweight``, ``q_proj.scales``); a graph
asks for one (``q_proj.weight``). This module knows the way from those to that, and no layout.

Invariant: tensors are read when a weight is loaded and not before, but for those of a few bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.weights.stored_tensor import StoredTensor

Tensors = Mapping[str, StoredTensor]
Parts = Mapping[str, NDArray[Any]]

DAMAGED = "The files are damaged, or config.json belongs to another version of them: download the model again."


def modules_with(tensors: Tensors, suffix: str) -> tuple[str, ...]:
    """Names of the modules that have a tensor of this name: ``qweight`` -> ``model.layers.0.mlp.up_proj``."""
    ending = f".{suffix}"
    return tuple(name.removesuffix(ending) for name in tensors if name.endswith(ending))


def is_named(module: str, entries: Iterable[object]) -> bool:
    """Whether a list names a module: by its name, by a part of it between dots, or by a pattern after ``re:``."""
    for entry in entries:
        text = str(entry)
        if text.startswith("re:"):
            if _pattern(text.removeprefix("re:")).match(module):
                return True
        elif f".{text}." in f".{module}.":
            return True
    return False


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise CheckpointError(
            f"quantization_config has the invalid pattern 're:{text}': {error}.", remedy=DAMAGED
        ) from error


def tensor_of(
    tensors: Tensors, module: str, suffix: str, dtype: str | None = None, dimensions: int = 2
) -> StoredTensor:
    """A tensor of a module.

    Args:
        tensors: of the checkpoint.
        module: whose.
        suffix: the tensor's own name.
        dtype: its element type; None: any.
        dimensions: how many it has.

    Raises:
        CheckpointError: it is missing, or of another type or number of dimensions.
    """
    found = tensors.get(f"{module}.{suffix}")
    if found is None:
        raise CheckpointError(f"The quantized layer '{module}' has no tensor '{suffix}'.", remedy=DAMAGED)
    if (dtype is not None and found.dtype != dtype) or len(found.shape) != dimensions:
        wanted = f"{dtype or 'numbers'} in {dimensions} dimensions"
        raise CheckpointError(
            f"The tensor '{found.name}' holds {found.dtype} {list(found.shape)} instead of {wanted}.", remedy=DAMAGED
        )
    return found


def numbers(tensor: StoredTensor) -> NDArray[Any]:
    """The content of a stored dense tensor."""
    return tensor.read()["data"]


def packed_tensor(
    module: str, shape: tuple[int, int], kind: str, read: Callable[[], Parts], of: Sequence[StoredTensor]
) -> StoredTensor:
    """The weight of a module in a packed format.

    Args:
        module: whose.
        shape: ``[out, in]``.
        kind: the format.
        read: gives its parts.
        of: the tensors that it is made of.
    """
    size = sum(tensor.nbytes for tensor in of)
    return StoredTensor(name=f"{module}.weight", shape=shape, format=kind, dtype=None, nbytes=size, read=read)


def with_packed(
    tensors: Tensors, made: Iterable[StoredTensor], consumed: Iterable[StoredTensor]
) -> dict[str, StoredTensor]:
    """The checkpoint's tensors with the packed ones in the place of those that they were made of."""
    gone = {tensor.name for tensor in consumed}
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    return {**kept, **{tensor.name: tensor for tensor in made}}


def nibbles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[..., n]`` bytes -> ``[..., 2 n]``: of each byte the low half, then the high one."""
    halves: NDArray[np.uint8] = np.stack((data & 15, data >> 4), axis=-1)
    return halves.reshape(*data.shape[:-1], -1)


def paired(integers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of ``nibbles``."""
    result: NDArray[np.uint8] = np.bitwise_or(integers[..., ::2], integers[..., 1::2] << 4, dtype=np.uint8)
    return result


def row_bytes(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """``[rows, n]`` 32-bit words -> uint8 ``[rows, 4 n]``, the lowest byte of each word first."""
    contiguous: NDArray[Any] = np.ascontiguousarray(words.astype("<i4", copy=False))
    return contiguous.view(np.uint8)


def group_scale(scale: NDArray[Any]) -> NDArray[Any]:
    """Scales in a type that the group formats have: float16 as it is, all others as float32."""
    return scale if scale.dtype == np.float16 else scale.astype(np.float32)


def column_order(module: str, group_of: NDArray[Any], groups: int) -> NDArray[np.int32] | None:
    """The columns sorted by their groups; None where they lie so already.

    Args:
        module: for messages.
        group_of: ``[in]``, the group of each column; -1 throughout where nobody set it.
        groups: how many there are.

    Raises:
        UnsupportedModel: groups have different numbers of columns.
    """
    columns = len(group_of)
    if (group_of == -1).all():
        return None
    sizes = np.bincount(np.where((group_of < 0) | (group_of > groups), groups, group_of), minlength=groups + 1)
    if columns % groups or sizes[groups] or (sizes[:groups] != columns // groups).any():
        raise uneven(module, columns, groups)
    order: NDArray[np.int32] = np.argsort(group_of, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(columns)) else order


def check_groups(module: str, columns: int, groups: int, size: object) -> None:
    """Hold a number of groups against the size that the config states.

    Raises:
        UnsupportedModel: the last group would be a shorter one.
        CheckpointError: they contradict each other.
    """
    if groups < 1 or columns % groups:
        raise uneven(module, columns, groups)
    if isinstance(size, int) and size > 0 and size < columns and columns // groups != size:
        if -(-columns // size) == groups:
            raise uneven(module, columns, groups)
        raise CheckpointError(
            f"The layer '{module}' has {groups} groups in {columns} columns, and config.json says {size} columns each.",
            remedy=DAMAGED,
        )


def uneven(module: str, columns: int, groups: int) -> UnsupportedModel:
    """The error for groups of different sizes."""
    return UnsupportedModel(
        f"The layer '{module}' has {columns} columns in {groups} groups of different sizes, which no format here has.",
        remedy="Take the model quantized with a group size that divides its layers, or in 16 bits.",
    )
