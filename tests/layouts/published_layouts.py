"""Writers of published quantized layouts, from their definitions; each returns what the numbers are meant to be.

Every writer takes a matrix and gives the tensors of one layer by suffix, and the matrix that they stand for in
float32. Integers are put into words one by one, so that nothing here is a reader's inverse by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FP8 = ml_dtypes.float8_e4m3fn
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs lies in each half-byte of a word, from the lowest."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """One layer as it is published.

    Attributes:
        tensors: suffix -> array.
        means: the matrix that they stand for, float32.
    """

    tensors: dict[str, Array]
    means: Array


@dataclass(frozen=True)
class Rounded:
    """A matrix in unsigned integers, by groups of columns: w = (q - zero) * scale."""

    q: Array
    zero: Array
    scale: Array
    group_of: Array

    def means(self) -> Array:
        difference = self.q.astype(np.float32) - self.zero.astype(np.float32)[:, self.group_of]
        return difference * self.scale.astype(np.float32)[:, self.group_of]


def rounded(w: Array, bits: int, group: int, *, symmetric: bool, group_of: Array | None = None) -> Rounded:
    """Round a matrix by groups of columns; scales are float16 numbers."""
    rows, columns = w.shape
    group = columns if group == -1 else group
    owner = np.arange(columns) // group if group_of is None else group_of
    zero, scale = np.empty((rows, columns // group), int), np.empty((rows, columns // group), np.float16)
    largest = 2**bits - 1
    for number in range(columns // group):
        part = w[:, owner == number]
        if symmetric:
            scale[:, number] = np.abs(part).max(axis=1) * 2 / largest
            zero[:, number] = 2 ** (bits - 1)
        else:
            low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
            scale[:, number] = (high - low) / largest
            # A zero point of 0 has no place in the first GPTQ layout, which stores it less 1.
            zero[:, number] = np.clip(np.rint(-low / scale[:, number]), 1, largest)
    q = np.clip(np.rint(w / scale.astype(np.float32)[:, owner]) + zero[:, owner], 0, largest).astype(int)
    return Rounded(q, zero, scale, owner)


def words(integers: Array, bits: int, *, places: tuple[int, ...] | None = None) -> Array:
    """``[n, k]`` integers -> int32 ``[n, ceil(k * bits / 32)]``; ``places``: which integer a part of a word holds."""
    each = 32 // bits
    order = tuple(range(each)) if places is None else places
    result = np.zeros((integers.shape[0], -(-integers.shape[1] // each)), np.uint32)
    for word in range(result.shape[1]):
        for part, offset in enumerate(order):
            column = word * each + offset
            if column < integers.shape[1]:
                result[:, word] |= (integers[:, column].astype(np.uint32) & (2**bits - 1)) << np.uint32(bits * part)
    return result.view(np.int32)


def gptq(
    w: Array,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    shuffled: bool = False,
    version: int = 1,
    borrows: bool = False,
) -> Layer:
    """AutoGPTQ's layout.

    Args:
        w: the matrix.
        bits: of a number.
        group: columns of a group; -1: all.
        symmetric: whether zero points lie in the middle.
        shuffled: neighbouring columns are of different groups, as desc_act makes them.
        version: of the layout; the first stores zero points less 1.
        borrows: the 1 is taken from each number of the packed word at once, as GPTQModel does; some are 0 then.
    """
    size = w.shape[1] if group == -1 else group
    owner = np.random.default_rng(size).permutation(np.arange(w.shape[1]) // size) if shuffled else None
    r = rounded(w, bits, group, symmetric=symmetric, group_of=owner)
    if borrows:
        r.zero[::3] = 0
    qzeros = words((r.zero - (1 if version == 1 and not borrows else 0)).T, bits)
    if borrows:
        ones = sum(1 << place for place in range(0, 32, bits))
        qzeros = ((qzeros.view(np.uint32).astype(np.int64) - ones) % 2**32).astype(np.uint32).view(np.int32)
    tensors = {
        "qweight": np.ascontiguousarray(words(r.q, bits).T),
        "qzeros": qzeros,
        "scales": np.ascontiguousarray(r.scale.T),
        "g_idx": r.group_of.astype(np.int32),
    }
    return Layer(tensors, r.means())


def awq(w: Array, *, group: int) -> Layer:
    """AutoAWQ's layout gemm."""
    r = rounded(w, 4, group, symmetric=False)
    tensors = {
        "qweight": words(r.q.T, 4, places=AWQ_ORDER),
        "qzeros": words(r.zero.T, 4, places=AWQ_ORDER),
        "scales": np.ascontiguousarray(r.scale.T),
    }
    return Layer(tensors, r.means())


def packed_integers(w: Array, *, bits: int, group: int, symmetric: bool, shuffled: bool = False) -> Layer:
    """compressed-tensors' pack-quantized; signed integers with an offset, zero points packed along the outputs."""
    size = w.shape[1] if group == -1 else group
    owner = np.random.default_rng(size).permutation(np.arange(w.shape[1]) // size) if shuffled else None
    r = rounded(w, bits, group, symmetric=symmetric, group_of=owner)
    tensors = {
        "weight_packed": words(r.q, bits),
        "weight_scale": r.scale,
        "weight_shape": np.array(w.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(words(r.zero.T, bits).T)
    if shuffled:
        tensors["weight_g_idx"] = r.group_of.astype(np.int32)
    return Layer(tensors, r.means())


def plain_int8(w: Array, *, scale_type: Any = np.float32, per_tensor: bool = False) -> Layer:
    """compressed-tensors' int-quantized and naive-quantized: signed bytes and a scale for each row."""
    largest = np.abs(w).max() if per_tensor else np.abs(w).max(axis=1, keepdims=True)
    scale = np.asarray(largest / 127, scale_type)
    q = np.clip(np.rint(w / scale.astype(np.float32)), -128, 127).astype(np.int8)
    return Layer(
        {"weight": q, "weight_scale": scale.reshape(-1, 1) if not per_tensor else scale.reshape(1)},
        q * scale.astype(np.float32),
    )


def float8(w: Array, *, strategy: str, scale_name: str = "weight_scale", scale_type: Any = np.float32) -> Layer:
    """e4m3 with a scale for the tensor (``tensor``, shape []), for each row (``channel``) or block (``block``)."""
    rows, columns = w.shape
    if strategy == "block":
        scale = np.empty((-(-rows // 128), -(-columns // 128)), np.float32)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                scale[i, j] = np.abs(w[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]).max() / 448
        wide = np.array([[scale[i // 128, j // 128] for j in range(columns)] for i in range(rows)], np.float32)
    else:
        largest = np.abs(w).max() if strategy == "tensor" else np.abs(w).max(axis=1, keepdims=True)
        scale = np.asarray(largest / 448, scale_type)
        wide = scale.astype(np.float32)
    data = np.clip(w / wide, -448, 448).astype(FP8)
    return Layer({"weight": data, scale_name: scale}, data.astype(np.float32) * wide)
