"""Quantized models as they are published: for each layout a ``quantization_config``, and a way to write a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from published_layouts import FP8, Layer, awq, float8, gptq, packed_integers, plain_int8
from safetensors.torch import save_file

Arrays = dict[str, NDArray[Any]]
Write = Callable[[NDArray[Any]], Layer]
BFLOAT16 = ml_dtypes.bfloat16


def compressed(kind: str, weights: Mapping[str, Any], inputs: Any = None, **more: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        **more,
    }


def integers(bits: int, strategy: str = "channel", *, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, "dynamic": False, **more}


BY_ROW = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
FLOAT_BY_ROW = {**BY_ROW, "type": "float"}


@dataclass(frozen=True)
class Case:
    """A published layout.

    Attributes:
        config: its quantization_config.
        write: a matrix -> a layer's tensors and meaning.
        format: in which the matrices are given to a device that takes all formats.
        unjoined: layers whose merged matrix is unpacked, since its parts cannot be joined.
        model: fields of the model's config.
    """

    config: dict[str, Any]
    write: Write
    format: str
    unjoined: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)


def gptq_config(bits: int, group: int, symmetric: bool, *, shuffled: bool = False, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": shuffled, **more}


E4M3 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
PACKED = "pack-quantized"

CASES: dict[str, Case] = {
    "gptq 4 bits": Case(gptq_config(4, 32, True), partial(gptq, bits=4, group=32, symmetric=True), "int4.group"),
    "gptq 4 bits asymmetric": Case(
        gptq_config(4, 16, False), partial(gptq, bits=4, group=16, symmetric=False), "int4.group"
    ),
    "gptq 4 bits groups of 128": Case(
        gptq_config(4, 128, True),
        partial(gptq, bits=4, group=128, symmetric=True),
        "int4.group",
        model={"hidden_size": 128, "intermediate_size": 256},
    ),
    "gptq 4 bits one group": Case(
        gptq_config(4, -1, False), partial(gptq, bits=4, group=-1, symmetric=False), "int4.group"
    ),
    "gptq 4 bits desc_act": Case(
        gptq_config(4, 32, False, shuffled=True),
        partial(gptq, bits=4, group=32, symmetric=False, shuffled=True),
        "int4.group",
    ),
    "gptq second version": Case(
        gptq_config(4, 32, False, checkpoint_format="gptq_v2"),
        partial(gptq, bits=4, group=32, symmetric=False, version=2),
        "int4.group",
    ),
    "gptq zeros that borrow": Case(
        gptq_config(4, 32, False, meta={"quantizer": ["gptqmodel:5.0.0"]}),
        partial(gptq, bits=4, group=32, symmetric=False, borrows=True),
        "int4.group",
    ),
    "gptq 8 bits zeros that borrow": Case(
        gptq_config(8, 32, False, meta={"quantizer": ["gptqmodel:5.0.0"]}),
        partial(gptq, bits=8, group=32, symmetric=False, borrows=True),
        "int8.group",
    ),
    "gptq 8 bits": Case(gptq_config(8, -1, True), partial(gptq, bits=8, group=-1, symmetric=True), "int8.channel"),
    "gptq 8 bits groups": Case(gptq_config(8, 32, True), partial(gptq, bits=8, group=32, symmetric=True), "int8.group"),
    "gptq 8 bits asymmetric": Case(
        gptq_config(8, -1, False), partial(gptq, bits=8, group=-1, symmetric=False), "int8.group"
    ),
    "gptq 8 bits desc_act": Case(
        gptq_config(8, 16, False, shuffled=True),
        partial(gptq, bits=8, group=16, symmetric=False, shuffled=True),
        "int8.group",
    ),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        partial(awq, group=32),
        "int4.group",
    ),
    "awq one group": Case(
        {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "version": "GEMM"}, partial(awq, group=-1), "int4.group"
    ),
    "compressed w8a8": Case(compressed("int-quantized", integers(8), BY_ROW), plain_int8, "int8.dynamic"),
    "compressed w8a8 one scale, bfloat16": Case(
        compressed("int-quantized", integers(8, "tensor"), BY_ROW),
        partial(plain_int8, scale_type=BFLOAT16, per_tensor=True),
        "int8.dynamic",
    ),
    "compressed w8a8 static inputs": Case(
        compressed("int-quantized", integers(8), {**BY_ROW, "dynamic": False, "strategy": "tensor"}),
        plain_int8,
        "int8.channel",
    ),
    "compressed w8a16 plain": Case(compressed("naive-quantized", integers(8)), plain_int8, "int8.channel"),
    "compressed w8a16 packed": Case(
        compressed(PACKED, integers(8)), partial(packed_integers, bits=8, group=-1, symmetric=True), "int8.channel"
    ),
    "compressed w8a16 packed groups": Case(
        compressed(PACKED, integers(8, "group", group_size=16, symmetric=False)),
        partial(packed_integers, bits=8, group=16, symmetric=False),
        "int8.group",
    ),
    "compressed w4a16": Case(
        compressed(PACKED, integers(4, "group", group_size=32)),
        partial(packed_integers, bits=4, group=32, symmetric=True),
        "int4.group",
    ),
    "compressed w4a16 asymmetric": Case(
        compressed(PACKED, integers(4, "group", group_size=16, symmetric=False)),
        partial(packed_integers, bits=4, group=16, symmetric=False),
        "int4.group",
    ),
    "compressed w4a16 by row": Case(
        compressed(PACKED, integers(4)), partial(packed_integers, bits=4, group=-1, symmetric=True), "int4.group"
    ),
    "compressed w4a16 actorder": Case(
        compressed(PACKED, integers(4, "group", group_size=32, actorder="group")),
        partial(packed_integers, bits=4, group=32, symmetric=True, shuffled=True),
        "int4.group",
    ),
    "compressed fp8": Case(
        compressed("float-quantized", {**integers(8), "type": "float"}, FLOAT_BY_ROW),
        partial(float8, strategy="channel", scale_type=BFLOAT16),
        "fp8.channel",
    ),
    "compressed fp8 one scale": Case(
        compressed("float-quantized", {**integers(8, "tensor"), "type": "float"}, FLOAT_BY_ROW),
        partial(float8, strategy="tensor"),
        "fp8.channel",
    ),
    "compressed fp8 blocks": Case(
        compressed(
            "float-quantized", {**integers(8, "block", block_structure=[128, 128]), "type": "float"}, FLOAT_BY_ROW
        ),
        partial(float8, strategy="block"),
        "fp8.block",
        unjoined=("self_attn", "gate_proj"),
    ),
    "compressed fp8 blocks, older": Case(
        compressed(
            "float-quantized", {**integers(8, "block", block_structure="128x128"), "type": "float"}, FLOAT_BY_ROW
        ),
        partial(float8, strategy="block"),
        "fp8.block",
        unjoined=("self_attn", "gate_proj"),
    ),
    "fp8 blocks": Case(
        {**E4M3, "weight_block_size": [128, 128], "fmt": "e4m3"},
        partial(float8, strategy="block", scale_name="weight_scale_inv"),
        "fp8.block",
        unjoined=("gate_proj",),
        model={"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    ),
    "fbgemm fp8": Case(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        partial(float8, strategy="channel"),
        "fp8.channel",
    ),
    "fp8 one scale": Case({**E4M3, "activation_scheme": "static"}, partial(float8, strategy="tensor"), "fp8.channel"),
}


def as_torch(array: NDArray[Any]) -> torch.Tensor:
    """The same bits as a torch tensor."""
    for kind, bits, name in ((FP8, np.uint8, torch.float8_e4m3fn), (BFLOAT16, np.int16, torch.bfloat16)):
        if array.dtype == kind:
            return torch.from_numpy(np.ascontiguousarray(array).view(bits)).view(name)
    return torch.from_numpy(np.ascontiguousarray(array))


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, NDArray[Any]],
    quantization: Any,
    write: Write,
    *,
    dense: tuple[str, ...] = (),
) -> Arrays:
    """Write ``config.json`` and ``model.safetensors`` of a quantized model.

    Args:
        folder: where.
        config: of the model.
        weights: what is quantized: the matrices of its linear layers, but for the output layer.
        quantization: its ``quantization_config``.
        write: a matrix -> a layer.
        dense: parts of the names of layers that stay as they are.

    Returns:
        The numbers that the files stand for, by the names of the weights.
    """
    plain, stored = dict(weights), {}
    for name, array in weights.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or any(word in name for word in dense):
            stored[name] = array
            continue
        layer = write(array)
        plain[name] = layer.means
        stored |= {f"{module}.{suffix}": tensor for suffix, tensor in layer.tensors.items()}
    save_file({name: as_torch(array) for name, array in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return plain
