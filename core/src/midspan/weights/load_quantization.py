"""Quantizes a 16- or 32-bit checkpoint's linear weights while they are loaded.

Knows how numbers are rounded and which weights of a graph are meant; which formats a device takes is given
to it. Not covered: calibration. Each weight is rounded to the nearest by itself, so int4 costs more accuracy
here than in a checkpoint whose maker looked at activations (GPTQ, AWQ).

Invariants: every weight is quantized after its sources were joined, each row or group for itself, so merging
projections changes no number; embeddings, output layers and weights that they share stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError
from midspan.interface.graph import Graph, Weight
from midspan.interface.weights import DENSE, PackedTensor, WeightSource
from midspan.weights.array_formats import FP8

GROUP_SIZES = (128, 32)
"""Columns that share an int4 scale; the first that divides a weight's columns is taken."""

_LARGEST_INT8, _LARGEST_INT4, _LARGEST_FP8 = 127.0, 15.0, 448.0
_CHUNK_VALUES = 1 << 20

Parts = dict[str, NDArray[Any]]
Float32Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way to quantize while loading.

    Attributes:
        name: what a person asks for.
        format: the packed format that it makes.
        quantize: parts of float32 rows; None where the matrix cannot have that format.
    """

    name: str
    format: str
    quantize: Callable[[Float32Array], Parts | None]


def _scaled(rows: Float32Array, largest: float) -> tuple[Float32Array, Float32Array]:
    """Rows divided by their scales, and the scales: the largest magnitude of a row becomes ``largest``."""
    scale = (np.abs(rows).max(axis=1, initial=0.0) / np.float32(largest)).astype(np.float32)
    scale[scale == 0.0] = 1.0
    return rows / scale[:, None], scale


def _int8(rows: Float32Array) -> Parts:
    scaled, scale = _scaled(rows, _LARGEST_INT8)
    return {"data": np.clip(np.rint(scaled), -_LARGEST_INT8, _LARGEST_INT8).astype(np.int8), "scale": scale}


def _fp8(rows: Float32Array) -> Parts:
    scaled, scale = _scaled(rows, _LARGEST_FP8)
    return {"data": np.clip(scaled, -_LARGEST_FP8, _LARGEST_FP8).astype(FP8), "scale": scale}


def _int4(rows: Float32Array) -> Parts | None:
    size = next((size for size in GROUP_SIZES if rows.shape[1] % size == 0), None)
    if size is None:
        return None
    groups = rows.reshape(rows.shape[0], -1, size)
    low = np.minimum(groups.min(axis=-1), 0.0)
    scale = ((np.maximum(groups.max(axis=-1), 0.0) - low) / np.float32(_LARGEST_INT4)).astype(np.float32)
    scale[scale == 0.0] = 1.0
    zero = np.clip(np.rint(-low / scale), 0.0, _LARGEST_INT4)
    integers = np.clip(np.rint(groups / scale[:, :, None]) + zero[:, :, None], 0.0, _LARGEST_INT4)
    flat = integers.astype(np.uint8).reshape(rows.shape)
    return {"data": flat[:, ::2] | (flat[:, 1::2] << 4), "scale": scale, "zero": zero.astype(np.uint8)}


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="int8", format="int8.dynamic", quantize=_int8),
        Scheme(name="w8a16", format="int8.channel", quantize=_int8),
        Scheme(name="int4", format="int4.group", quantize=_int4),
        Scheme(name="fp8", format="fp8.channel", quantize=_fp8),
    )
}
"""What ``--quantization`` can ask for, for weights that are not quantized yet."""


def quantized(tensor: PackedTensor, scheme: Scheme) -> PackedTensor:
    """A dense matrix in a scheme's format.

    Args:
        tensor: dense, ``[out, in]``.
        scheme: how.

    Returns:
        The quantized tensor; the tensor itself where its columns cannot be cut into groups.

    Raises:
        CheckpointError: a number is infinite or none.
    """
    data: NDArray[Any] = tensor.parts["data"].reshape(tensor.shape)
    step = max(1, _CHUNK_VALUES // max(1, data.shape[1]))
    pieces: list[Parts] = []
    for start in range(0, data.shape[0], step):
        rows = data[start : start + step].astype(np.float32)
        if not np.isfinite(rows).all():
            raise CheckpointError(
                f"The weight '{tensor.name}' holds numbers that are infinite or none, which no integer can stand for.",
                remedy="The model is damaged, or overflowed where it was converted: download another version of it.",
            )
        piece = scheme.quantize(rows)
        if piece is None:
            return tensor
        pieces.append(piece)
    parts = {role: np.concatenate([piece[role] for piece in pieces]) for role in pieces[0]}
    return PackedTensor(name=tensor.name, shape=tensor.shape, format=scheme.format, parts=parts)


class QuantizingWeights:
    """A ``WeightSource`` that quantizes what another one gives.

    Args:
        source: of dense weights.
        graph: whose linear weights are meant.
        scheme: how.
    """

    def __init__(self, source: WeightSource, graph: Graph, scheme: Scheme) -> None:
        self._source = source
        self._scheme = scheme
        self._meant = linear_weights(graph)
        self._left: list[str] = []
        self._done = 0

    def load(self, weight: Weight) -> PackedTensor:
        """The weight, quantized if it is meant and dense.

        Raises:
            CheckpointError: as the source, and where a weight's numbers cannot be quantized.
        """
        tensor = self._source.load(weight)
        if weight.name not in self._meant or tensor.format != DENSE:
            return tensor
        result = quantized(tensor, self._scheme)
        if result.format == DENSE:
            self._left.append(weight.name)
        else:
            self._done += 1
        return result

    def summary(self) -> str:
        """What was done, for people."""
        text = f"{self._done} linear weights became {self._scheme.format} ({self._scheme.name})"
        if not self._left:
            return text
        sizes = " or ".join(str(size) for size in GROUP_SIZES)
        return f"{text}; {len(self._left)} have no groups of {sizes} columns and stay as they are: {self._left[0]}" + (
            ", ..." if len(self._left) > 1 else ""
        )


def linear_weights(graph: Graph) -> frozenset[str]:
    """Names of the matrices that linear nodes multiply with and no other operation reads."""
    meant = {node.weights["weight"] for node in graph.nodes if node.op == "linear"}
    others = {name for node in graph.nodes if node.op != "linear" for name in node.weights.values()}
    return frozenset(meant - others)
