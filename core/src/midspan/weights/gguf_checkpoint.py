"""A GGUF file as a checkpoint: published names, the row order of the original, a config.

It knows how the published converters rename, reorder and describe models of the
Llama family, and nothing of tokenizers (``midspan.text`` reads those keys) or of
what a tensor does in a model. Sources: the GGUF specification's standardized
keys and tensor names; the rope convention of the ``llama`` architecture, whose
query and key rows are stored with each head's two halves interleaved.

Invariant: a file with a tensor or a setting that would change the model and is
not understood here is refused, never read in part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.gguf_file import GgufTensor, read_gguf
from midspan.interface.weights import DENSE
from midspan.weights.gguf_config import ARCHITECTURES, config_from_metadata, generation_config_from_metadata
from midspan.weights.quantization import FORMATS
from midspan.weights.stored_tensor import Checkpoint, StoredTensor

_DENSE: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_OUTSIDE_LAYERS: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

_IN_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTER_NAME = re.compile(r"(\w+)\.(weight|bias)")
_READ_BY_CONFIG = frozenset({"rope_freqs.weight"})


def open_gguf_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file.

    Args:
        path: the file.

    Returns:
        The checkpoint; tensors stay mapped.

    Raises:
        CheckpointError: the file is damaged or lacks what it must say.
        UnsupportedModel: its architecture, a tensor or a quantization is not known here.
    """
    file = read_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{path} has the architecture {architecture!r}, which cannot be read from GGUF.",
            remedy=f"GGUF files can be read of: {', '.join(sorted(ARCHITECTURES))}.",
        )
    parts = file.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModel(
            f"{path} is one of {parts} parts of a split model.",
            remedy="Merge the parts into one file (llama-gguf-split --merge), or take another download of the model.",
        )
    config = config_from_metadata(file)
    heads = _interleaved_heads(config) if architecture == "llama" else {}
    stored = [_stored(path, tensor, heads) for tensor in file.tensors.values() if tensor.name not in _READ_BY_CONFIG]
    return Checkpoint(
        path=path,
        config=config,
        generation_config=generation_config_from_metadata(file),
        tensors={tensor.name: tensor for tensor in stored},
    )


def _interleaved_heads(config: Mapping[str, Any]) -> Mapping[str, int]:
    """Projections whose rows the conversion interleaves -> their number of heads."""
    return {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}


def _stored(path: Path, tensor: GgufTensor, heads: Mapping[str, int]) -> StoredTensor:
    name, role = _published_name(path, tensor.name)
    kind = tensor.type.name
    dense = _DENSE.get(kind)
    packed_format = f"gguf.{kind.lower()}"
    if dense is None and packed_format not in FORMATS:
        known = [*_DENSE, *(entry.removeprefix("gguf.").upper() for entry in FORMATS)]
        raise UnsupportedModel(
            f"{path}: tensor '{tensor.name}' is quantized as {kind}, which cannot be unpacked here.",
            remedy=f"Take the model in one of: {', '.join(known)}.",
        )
    head_count = heads.get(role)
    if head_count is not None and tensor.shape[0] % (2 * head_count):
        raise CheckpointError(
            f"{path}: tensor '{tensor.name}' has {tensor.shape[0]} rows, which {head_count} heads cannot share.",
            remedy="The file is damaged or was written by a broken converter: download another version of it.",
        )
    return StoredTensor(
        name=name,
        shape=tensor.shape,
        format=DENSE if dense is not None else packed_format,
        dtype=None if dense is None else str(dense.name),
        nbytes=tensor.data.nbytes,
        read=_Reader(tensor=tensor, dtype=dense, heads=head_count),
    )


def _published_name(path: Path, name: str) -> tuple[str, str]:
    """The Hugging Face name of a tensor, and the role in its layer ("" outside of layers)."""
    inside = _LAYER_NAME.fullmatch(name)
    if inside and inside[2] in _IN_LAYER:
        return f"model.layers.{int(inside[1])}.{_IN_LAYER[inside[2]]}.{inside[3]}", inside[2]
    outside = _OUTER_NAME.fullmatch(name)
    if outside and outside[1] in _OUTSIDE_LAYERS:
        return f"{_OUTSIDE_LAYERS[outside[1]]}.{outside[2]}", ""
    raise UnsupportedModel(
        f"{path} holds the tensor '{name}', which is no part of the models that can be read from GGUF.",
        remedy="Take the model as safetensors: more kinds of models can be read from these.",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reader:
    """Gives a tensor's parts, rows in the order of the original model.

    The conversion puts row i of a head's first half before row i of its second half; rows are
    whole, packed or not, so putting them back moves bytes and unpacks nothing.
    """

    tensor: GgufTensor
    dtype: np.dtype[Any] | None
    heads: int | None

    def __call__(self) -> Mapping[str, NDArray[Any]]:
        data: NDArray[Any] = self.tensor.data
        if self.heads is not None:
            rows = data.reshape(self.heads, self.tensor.shape[0] // self.heads // 2, 2, -1)
            data = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(data.shape)
            data.flags.writeable = False
        if self.dtype is None:
            return {"blocks": data}
        return {"data": data.view(self.dtype).reshape(self.tensor.shape)}
