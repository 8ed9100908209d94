"""A checkpoint's tensors in the shape that a graph asks for.

It joins rows, unpacks what the device did not claim, checks shapes and counts
what was read. It knows no device and no operation: what a device takes packed is
given to it as names of formats.

Invariants: a weight stays packed only as matrices whose sources all have the same claimed
format and can be joined in it; vectors are always dense; a dense weight that is one stored tensor of a
travelling type is a view of the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.interface.graph import Weight
from midspan.interface.weights import DENSE, PackedTensor
from midspan.weights.array_formats import DYNAMIC
from midspan.weights.quantization import FORMATS, check_parts, dequantize, join_packed
from midspan.weights.stored_tensor import DENSE_DTYPES, Checkpoint, StoredTensor

SAME_PARTS: Mapping[str, str] = {DYNAMIC: "int8.channel"}
"""A format -> another with the same parts that rounds less, for devices that take that one alone."""


@dataclass(frozen=True, kw_only=True)
class LoadProgress:
    """How far the loading of weights is.

    Attributes:
        tensor: the weight that was loaded last.
        bytes_done: bytes of the checkpoint's tensors that were read.
        bytes_total: bytes of all its tensors; what a graph does not use is never read.
    """

    tensor: str
    bytes_done: int
    bytes_total: int


class CheckpointWeights:
    """A ``WeightSource`` over a checkpoint.

    Args:
        checkpoint: an opened model.
        quantizations: packed formats that the device takes, ``Capabilities.quantizations``.
        dtype: element type of weights that must be unpacked, a key of ``DENSE_DTYPES``; a device
            that computes in bfloat16 saves half of the memory by asking for it. Weights that
            are stored dense keep their type.
        report: called after each load.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        quantizations: tuple[str, ...],
        dtype: str = "float32",
        report: Callable[[LoadProgress], None] | None = None,
    ) -> None:
        if dtype not in DENSE_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DENSE_DTYPES)}, not {dtype!r}")
        self._checkpoint = checkpoint
        self._quantizations = frozenset(quantizations)
        self._dtype = dtype
        self._report = report
        self._read: set[str] = set()
        self._bytes_done = 0
        self._bytes_total = checkpoint.nbytes
        self._given: dict[tuple[str, str], int] = {}

    def packed_as(self) -> Mapping[tuple[str, str], int]:
        """(stored format, format given to the device) -> matrices loaded so; stored dense ones are not in it."""
        return self._given

    def load(self, weight: Weight) -> PackedTensor:
        """Content of a graph weight, its sources joined along the rows.

        Args:
            weight: name, shape and sources.

        Returns:
            Packed in a claimed format, or dense.

        Raises:
            CheckpointError: a source is missing, or the joined shape is another than the weight's.
            UnsupportedModel: a source has an element type that no weight can have.
        """
        sources = [self._find(name, weight) for name in weight.sources or (weight.name,)]
        self._check_shape(weight, sources)
        loaded = self._join(weight, sources)
        self._count(weight, sources)
        return loaded

    def _find(self, name: str, weight: Weight) -> StoredTensor:
        tensor = self._checkpoint.tensors.get(name)
        if tensor is not None:
            return tensor
        near = difflib.get_close_matches(name, list(self._checkpoint.tensors), n=3)
        wanted = "" if name == weight.name else f", a part of '{weight.name}'"
        raise CheckpointError(
            f"{self._checkpoint.path} has no tensor '{name}'{wanted}."
            + (f" Near names: {', '.join(near)}." if near else ""),
            remedy="The model is incomplete, or its config is of another architecture: download it again.",
        )

    def _check_shape(self, weight: Weight, sources: list[StoredTensor]) -> None:
        tails = {source.shape[1:] for source in sources}
        scalar = any(not source.shape for source in sources)
        joined = None if len(tails) > 1 or scalar else (sum(source.shape[0] for source in sources), *tails.pop())
        if joined == weight.shape or (len(sources) == 1 and sources[0].shape == weight.shape):
            return
        if joined is not None and joined == _as_rows(weight.shape, len(joined)):
            return
        found = " + ".join(f"'{source.name}' {list(source.shape)}" for source in sources)
        raise CheckpointError(
            f"{self._checkpoint.path}: weight '{weight.name}' must have the shape {list(weight.shape)} "
            f"and the file holds {found}.",
            remedy="config.json and weights belong to different models or versions: download both again.",
        )

    def _join(self, weight: Weight, sources: list[StoredTensor]) -> PackedTensor:
        packed = self._packed(weight, sources)
        for source in sources:
            if source.format != DENSE:
                way = (source.format, DENSE if packed is None else packed.format)
                self._given[way] = self._given.get(way, 0) + 1
        if packed is not None:
            return packed
        arrays = [self._dense(source) for source in sources]
        if len(arrays) > 1:
            types = {array.dtype for array in arrays}
            common = types.pop() if len(types) == 1 else DENSE_DTYPES["float32"]
            data = np.concatenate([array.astype(common, copy=False) for array in arrays])
        else:
            data = arrays[0]
        return PackedTensor(
            name=weight.name, shape=weight.shape, format=DENSE, parts={"data": data.reshape(weight.shape)}
        )

    def _packed(self, weight: Weight, sources: list[StoredTensor]) -> PackedTensor | None:
        """The weight in a format that the device takes, or None."""
        formats = {source.format for source in sources}
        stored = formats.pop() if len(formats) == 1 else DENSE
        kind = stored if stored in self._quantizations else SAME_PARTS.get(stored)
        if kind not in self._quantizations or any(len(source.shape) != 2 for source in sources):
            return None
        if len(weight.shape) != 2 and stored not in FORMATS:  # only the rows of blocks know nothing of their number
            return None
        pieces = [source.packed() for source in sources]
        for piece in pieces:
            check_parts(piece)
        parts = join_packed(stored, [piece.parts for piece in pieces])
        return None if parts is None else PackedTensor(name=weight.name, shape=weight.shape, format=kind, parts=parts)

    def _dense(self, source: StoredTensor) -> NDArray[Any]:
        content = source.packed()
        if source.format != DENSE:
            return dequantize(content, self._dtype)
        data = content.parts["data"]
        if data.dtype in DENSE_DTYPES.values():
            return data
        if data.dtype == np.float64:
            return data.astype(np.float32)
        raise UnsupportedModel(
            f"{self._checkpoint.path}: tensor '{source.name}' holds {data.dtype.name}, and a weight must be "
            f"{', '.join(DENSE_DTYPES)} or float64.",
            remedy="Its quantization cannot be read here: take the unquantized model, or a GGUF file.",
        )

    def _count(self, weight: Weight, sources: list[StoredTensor]) -> None:
        for source in sources:
            if source.name not in self._read:
                self._read.add(source.name)
                self._bytes_done += source.nbytes
        if self._report is not None:
            self._report(LoadProgress(tensor=weight.name, bytes_done=self._bytes_done, bytes_total=self._bytes_total))


def _as_rows(shape: tuple[int, ...], sizes: int) -> tuple[int, ...]:
    """A shape with its leading sizes put together, so that so many are left."""
    leading = len(shape) - sizes + 1
    return shape if leading < 1 else (prod(shape[:leading]), *shape[leading:])
