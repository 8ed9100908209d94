"""Checkpoints of the compressed-tensors library, as llm-compressor writes them: integers and e4m3.

The config groups layers by name or class and states for each group how weights and inputs are rounded. In the
files a layer has ``weight`` (int8 or float8 ``[out, in]``) or ``weight_packed`` (int32 ``[out, words]``, unsigned
integers from the lowest bits, with ``weight_shape``), its ``weight_scale``, and where weights are not symmetric
``weight_zero_point`` (with packed weights packed along the outputs). w = (q - zero) * scale with signed q and zero.
Source: the library's ``compressors`` and ``QuantizationArgs``.

8-bit weights with inputs rounded by row become ``int8.dynamic``. Inputs that are rounded in other ways, by scales
of the file or to float8, keep 16 or 32 bits here, which is closer to the model than what it was published with. Not
read: 2:4 sparsity, other numbers of bits, fp4 and microscaled formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.weights.published.float8 import channel_scale, float8_tensor
from midspan.weights.published.module_tensors import (
    DAMAGED,
    Parts,
    Tensors,
    check_groups,
    column_order,
    group_scale,
    is_named,
    modules_with,
    nibbles,
    numbers,
    packed_tensor,
    paired,
    row_bytes,
    tensor_of,
    with_packed,
)
from midspan.weights.stored_tensor import StoredTensor

FORMATS = ("int-quantized", "naive-quantized", "float-quantized", "pack-quantized", "mixed-precision", "dense")
"""Of the ``format`` field; which one a layer has is seen from its tensors."""

_CLASS = "Linear"
_CONSUMED = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def read_compressed_tensors(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors of such a checkpoint as a graph asks for them.

    Args:
        config: ``quantization_config``.
        tensors: as the files hold them.

    Raises:
        UnsupportedModel: a format, a number of bits or a sparsity that cannot be read here.
        CheckpointError: tensors are missing or contradict the config.
    """
    _check_config(config)
    groups = _groups(config)
    ignored = config.get("ignore") or ()
    made: list[StoredTensor] = []
    consumed: list[StoredTensor] = []
    packed = modules_with(tensors, "weight_packed")
    for module in dict.fromkeys((*modules_with(tensors, "weight_scale"), *packed)):
        if is_named(module, ignored):
            continue
        layer = _Layer(module=module, tensors=tensors, group=_group_of(module, groups))
        made.append(layer.weight())
        consumed += [tensors[f"{module}.{name}"] for name in _CONSUMED if f"{module}.{name}" in tensors]
    return with_packed(tensors, made, consumed)


def _check_config(config: Mapping[str, Any]) -> None:
    sparsity = config.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) and sparsity else "dense"
    stored = config.get("format") or "dense"
    if stored not in FORMATS or sparse != "dense":
        raise UnsupportedModel(
            f"The model is stored in the compressed-tensors format '{stored if sparse == 'dense' else sparse}'.",
            remedy=f"Read are {', '.join(FORMATS)}, without sparsity.",
        )
    transforms = config.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise UnsupportedModel(
            "The model's activations are rotated while it runs ('transform_config'), which is not done here.",
            remedy="Take it quantized without rotations, or in 16 bits.",
        )


@dataclass(frozen=True, kw_only=True)
class _Group:
    """How the layers of a group are rounded."""

    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any]


def _groups(config: Mapping[str, Any]) -> list[_Group]:
    named = config.get("config_groups")
    groups = named.values() if isinstance(named, dict) else ()
    found = [
        _Group(
            targets=tuple(str(target) for target in group.get("targets") or ()),
            weights=group["weights"],
            inputs=group.get("input_activations") or {},
        )
        for group in groups
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    if not found:
        raise CheckpointError("The model's quantization_config names no 'config_groups' with weights.", remedy=DAMAGED)
    return found


def _group_of(module: str, groups: Sequence[_Group]) -> _Group:
    """The group that names the module; else the one that is for all linear layers."""
    for group in groups:
        if is_named(module, (target for target in group.targets if target != _CLASS)):
            return group
    for group in groups:
        if _CLASS in group.targets:
            return group
    raise CheckpointError(
        f"The layer '{module}' is quantized, and no group of quantization_config is for it.", remedy=DAMAGED
    )


def _block(stated: object) -> object:
    """Rows and columns of a block; older files have them as ``"128x128"``."""
    return [int(size) for size in stated.split("x") if size.isdecimal()] if isinstance(stated, str) else stated


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """One quantized layer."""

    module: str
    tensors: Tensors
    group: _Group

    def weight(self) -> StoredTensor:
        """The packed weight."""
        args = self.group.weights
        bits, kind = args.get("num_bits"), args.get("type", "int")
        if kind == "float" and bits == 8:
            block = _block(args.get("block_structure")) if args.get("strategy") == "block" else None
            return float8_tensor(self.module, self.tensors, self._scale(), block)
        if kind != "int" or bits not in (4, 8):
            raise UnsupportedModel(
                f"The layer '{self.module}' has weights of the type {kind} with {bits} bits.",
                remedy="Read are integers of 4 and 8 bits, and floating numbers of 8.",
            )
        return self._integers(int(bits))

    def _integers(self, bits: int) -> StoredTensor:
        packed = f"{self.module}.weight_packed" in self.tensors
        stored = tensor_of(
            self.tensors, self.module, "weight_packed" if packed else "weight", "int32" if packed else "int8"
        )
        shape = self._packed_shape(stored, bits) if packed else (stored.shape[0], stored.shape[1])
        scale, optional = self._scale(), self._optional()
        rows, columns = shape
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        if scale.shape not in ((), (1,), (rows,), (1, 1), (rows, groups)):
            raise CheckpointError(
                f"'{scale.name}' has the shape {list(scale.shape)}, which does not fit a weight of {rows} x {columns}.",
                remedy=DAMAGED,
            )
        size = self.group.weights.get("group_size") if self.group.weights.get("strategy") == "group" else None
        check_groups(self.module, columns, groups, size)
        data = _Integers(stored=stored, bits=bits, packed=packed, shape=shape)
        of = [self.tensors[f"{self.module}.{name}"] for name in _CONSUMED if f"{self.module}.{name}" in self.tensors]
        if bits == 8 and groups == 1 and "weight_zero_point" not in optional:
            kind = "int8.dynamic" if self._rounds_rows() else "int8.channel"
            return packed_tensor(self.module, shape, kind, partial(_channel_parts, data, scale), of)
        kind = "int4.group" if bits == 4 else "int8.group"
        read = partial(
            _group_parts,
            self.module,
            data,
            scale,
            optional.get("weight_zero_point"),
            optional.get("weight_g_idx"),
        )
        return packed_tensor(self.module, shape, kind, read, of)

    def _scale(self) -> StoredTensor:
        scale = self.tensors.get(f"{self.module}.weight_scale")
        if scale is None:
            raise CheckpointError(f"The quantized layer '{self.module}' has no 'weight_scale'.", remedy=DAMAGED)
        return scale

    def _optional(self) -> dict[str, StoredTensor]:
        wanted = (
            ["weight_g_idx"] if self.group.weights.get("symmetric", True) else ["weight_zero_point", "weight_g_idx"]
        )
        names = {name: f"{self.module}.{name}" for name in wanted}
        return {name: self.tensors[full] for name, full in names.items() if full in self.tensors}

    def _packed_shape(self, stored: StoredTensor, bits: int) -> tuple[int, int]:
        stated = numbers(tensor_of(self.tensors, self.module, "weight_shape", dimensions=1)).tolist()
        if len(stated) != 2 or stated[0] != stored.shape[0] or -(-stated[1] * bits // 32) != stored.shape[1]:
            raise CheckpointError(
                f"'{stored.name}' of {list(stored.shape)} words cannot hold a weight of the shape {stated}.",
                remedy=DAMAGED,
            )
        return int(stated[0]), int(stated[1])

    def _rounds_rows(self) -> bool:
        """Whether inputs are rounded to 8 bits by row, as they come and symmetrically."""
        inputs = self.group.inputs
        by_row = inputs.get("dynamic") is True and inputs.get("strategy", "token") == "token"
        wanted = inputs.get("num_bits") == 8 and inputs.get("type", "int") == "int"
        return by_row and wanted and inputs.get("symmetric", True) is True


@dataclass(frozen=True, kw_only=True, eq=False)
class _Integers:
    """The integers of a layer, packed into words or a byte each."""

    stored: StoredTensor
    bits: int
    packed: bool
    shape: tuple[int, int]

    def unsigned(self) -> NDArray[np.uint8]:
        """``[out, in]``, the smallest signed integer as 0."""
        data, columns = numbers(self.stored), self.shape[1]
        if self.packed:
            wide = row_bytes(data)
            return np.ascontiguousarray((nibbles(wide) if self.bits == 4 else wide)[:, :columns])
        shifted: NDArray[np.uint8] = data.view(np.uint8) + np.uint8(1 << (self.bits - 1))
        return shifted


def _channel_parts(data: _Integers, scale: StoredTensor) -> Parts:
    signed = (data.unsigned() ^ np.uint8(128)).view(np.int8)
    return {"data": signed, "scale": channel_scale(scale, data.shape[0])}


def _group_parts(
    module: str, data: _Integers, scale: StoredTensor, zero_point: StoredTensor | None, group_of: StoredTensor | None
) -> Parts:
    rows = data.shape[0]
    scales = numbers(scale)
    scales = (
        scales
        if scales.shape[:1] == (rows,) and scales.ndim == 2
        else np.broadcast_to(scales.reshape(-1, 1), (rows, 1))
    )
    groups, integers = scales.shape[1], data.unsigned()
    order = None if group_of is None else column_order(module, numbers(group_of), groups)
    if order is not None:
        integers = integers[:, order]
    zero = _zeros(zero_point, data.bits, (rows, groups))
    parts = {
        "data": paired(integers) if data.bits == 4 else integers,
        "scale": np.ascontiguousarray(group_scale(scales)),
        "zero": zero.astype(np.uint8) if data.bits == 4 else zero,
    }
    return parts if order is None else {**parts, "order": order}


def _zeros(zero_point: StoredTensor | None, bits: int, shape: tuple[int, int]) -> NDArray[np.int16]:
    """Zero points of unsigned integers ``[out, groups]``."""
    middle = 1 << (bits - 1)
    if zero_point is None:
        return np.full(shape, middle, np.int16)
    stored = numbers(zero_point)
    if stored.dtype != np.int32:
        signed: NDArray[np.int16] = stored.reshape(-1, shape[1]).astype(np.int16) + np.int16(middle)
        return np.ascontiguousarray(np.broadcast_to(signed, shape))
    wide = row_bytes(stored.T)  # packed along the outputs
    outputs = (nibbles(wide) if bits == 4 else wide)[:, : shape[0]]
    if outputs.shape != shape[::-1]:
        raise CheckpointError(
            f"'{zero_point.name}' of the shape {list(zero_point.shape)} has no zero points for {shape[0]} outputs.",
            remedy=DAMAGED,
        )
    return np.ascontiguousarray(outputs.T).astype(np.int16)
