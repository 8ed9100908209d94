"""Weights as they travel from a checkpoint to a device.

A weight is dense, or packed in a published format that the device claimed in
``Capabilities.quantizations``; the loader unpacks every other format. This
module knows formats by name only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from midspan.interface.graph import Weight

DENSE = "dense"
"""The format of a plain array, in ``parts["data"]``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTensor:
    """A weight's content on the host.

    Attributes:
        name: the graph weight's name.
        shape: logical shape, ``[out, in]`` for linear weights, ``[experts, out, in]`` for those of experts.
        format: ``"dense"`` or a packed format's name, for example ``"gguf.q4_1"``.
        parts: arrays by role. Dense: ``data`` in the logical shape, dtype float32, float16
            or bfloat16 (``ml_dtypes.bfloat16``). GGUF formats: ``blocks``, uint8
            ``[out, bytes per row]``, the file's own bytes, rows in logical order (all experts' one
            behind the other: ``[experts * out, bytes per row]``).
            Arrays may be read-only views of a mapped file.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    parts: Mapping[str, NDArray[Any]]

    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


class WeightSource(Protocol):
    """Where a device gets the content of a graph's weights."""

    def load(self, weight: Weight) -> PackedTensor:
        """Content of a graph weight, its ``sources`` joined, shape checked.

        Raises:
            CheckpointError: a source is missing or has another shape.
        """
        ...
