"""Weights as they travel from a checkpoint to a device.

A weight is dense, or packed in a published format that the device claimed in
``Capabilities.quantizations``; the loader unpacks every other format. This
module knows formats by name and parts only.

With the matrix w ``[out, in]``, the formats and their parts are:

* ``dense``: ``data`` in the logical shape, dtype float32, float16 or bfloat16 (``ml_dtypes.bfloat16``).
* ``gguf.*``: ``blocks``, uint8 ``[out, bytes per row]``, the file's own bytes, rows in logical order; those of
  experts one behind the other, ``[experts * out, bytes per row]``.
* ``int8.channel``: ``data`` int8 ``[out, in]``, ``scale`` float32 ``[out]``; w = data * scale. Activations
  are not rounded (W8A16).
* ``int8.dynamic``: the same parts. The device also rounds each input row x to int8: s = max|x| / 127,
  q = x / s rounded half to even, a row of zeros stays zeros; y = (q . data) * s * scale, where the sum of
  products is an exact integer (W8A8). Where rows are picked and not multiplied it is ``int8.channel``.
* ``int8.group``: ``data`` uint8 ``[out, in]``, ``scale`` float32 or float16 ``[out, groups]``, ``zero`` int16
  ``[out, groups]``; column i is in group i // (in / groups); w = (data - zero) * scale.
* ``int4.group``: ``data`` uint8 ``[out, in / 2]``, column 2 i in the low half of byte i and 2 i + 1 in its high
  half; ``scale`` float32 or float16 ``[out, groups]``, ``zero`` uint8 ``[out, groups]``, which may be 16;
  w = (integer - zero) * scale. Groups divide the columns evenly, and have an even number of them.
* ``fp8.channel``: ``data`` ``ml_dtypes.float8_e4m3fn`` ``[out, in]``, ``scale`` float32 ``[out]``; w = data * scale.
* ``fp8.block``: ``data`` as before, ``scale`` float32 ``[ceil(out / 128), ceil(in / 128)]``, one for each block.

The group formats may have ``order``, int32 ``[in]``: their column j is column ``order[j]`` of w, each named
once. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        parts: arrays by role, see below; they may be read-only views of a mapped file.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    parts: Mapping[str, NDArray[Any]]

    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor:
    """One tensor of a checkpoint, not yet read.

    Attributes:
        name: its published Hugging Face name, ``model.layers.0.self_attn.q_proj.weight``.
        shape: logical shape, ``[out, in]`` for linear weights.
        format: ``"dense"``, or a packed format's name, ``"gguf.q4_1"``.
        dtype: element type of a dense tensor, as in config.json; None for a packed one.
        nbytes: bytes that it takes in the file.
        read: gives its parts, see ``PackedTensor``; views of the file where nothing must be rearranged.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    dtype: str | None
    nbytes: int
    read: Callable[[], Mapping[str, NDArray[Any]]] = field(repr=False)

    def packed(self) -> PackedTensor:
        """The content as it is stored; dense tensors keep their element type."""
        return PackedTensor(name=self.name, shape=self.shape, format=self.format, parts=self.read())


QuantizationReader = Callable[[Mapping[str, Any], Mapping[str, StoredTensor]], Mapping[str, StoredTensor]]
"""Makes weights of a published quantization: (``quantization_config`` of config.json, tensors as the files hold
them, by name) -> tensors as a graph asks for them, dense or in one of the formats above. What it does not know it
hands on as it is. It reads nothing big itself: ``StoredTensor.read`` of what it makes does, once a weight is loaded."""


class WeightSource(Protocol):
    """Where a device gets the content of a graph's weights."""

    def load(self, weight: Weight) -> PackedTensor:
        """Content of a graph weight, its ``sources`` joined, shape checked.

        Raises:
            CheckpointError: a source is missing or has another shape.
        """
        ...
