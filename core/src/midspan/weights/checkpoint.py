"""Opening a model that lies on this machine, whichever way it is stored.

It chooses between a folder in the published layout (``config.json`` and
safetensors) and a GGUF file, and knows no container itself. It finds nothing and
downloads nothing: ``resolve`` does. What a model was quantized with when it was
published is not looked at: ``published`` makes weights of such tensors.

Invariant: nothing is ever unpickled; a folder of pickled weights is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from midspan.errors import CheckpointError, ModelNotFound, UnsupportedModel
from midspan.weights.expert_tensors import with_expert_names
from midspan.weights.gguf_checkpoint import open_gguf_checkpoint
from midspan.weights.safetensors_checkpoint import find_safetensors
from midspan.weights.stored_tensor import Checkpoint, StoredTensor

__all__ = ["Checkpoint", "StoredTensor", "only_gguf_file", "open_checkpoint"]


def open_checkpoint(path: Path, *, weights: bool = True) -> Checkpoint:
    """Open a model for reading.

    Args:
        path: a folder with ``config.json`` and safetensors, a folder whose only model is one
            ``.gguf`` file, or a ``.gguf`` file.
        weights: False: nothing but ``config.json`` is needed, and weights that lie beside it are not looked at.

    Returns:
        The checkpoint. Only headers were read; tensors stay mapped.

    Raises:
        ModelNotFound: there is nothing at the path.
        CheckpointError: files are missing, damaged or contradict each other.
        UnsupportedModel: the files are in a format, or of a model, that cannot be read here.
    """
    if not path.exists():
        raise ModelNotFound(f"There is no file or folder {path}.", remedy="Check the path.")
    if not weights:
        return _open_config(path)
    if path.is_file():
        return open_gguf_checkpoint(path)
    alone = only_gguf_file(path)
    return open_gguf_checkpoint(alone) if alone is not None else _open_folder(path)


def only_gguf_file(folder: Path) -> Path | None:
    """The one ``.gguf`` file of a folder that has no safetensors; None otherwise."""
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return None
    files = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    return files[0] if len(files) == 1 else None


def _open_folder(folder: Path) -> Checkpoint:
    tensors = find_safetensors(folder)
    if not tensors:
        raise _without_safetensors(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has weights and no config.json, which says what model they are.",
            remedy="Download the folder again; it must hold config.json, the safetensors and the tokenizer's files.",
        )
    return _read_folder(folder, tensors)


def _open_config(path: Path) -> Checkpoint:
    if path.is_dir() and (path / "config.json").is_file():
        return _read_folder(path, {})
    found = "a GGUF file" if path.suffix == ".gguf" else "no folder" if path.is_file() else "a folder without it"
    raise CheckpointError(
        f"Weights can be made up for a model's config.json, and {path} is {found}.",
        remedy="Name a folder with the model's config.json; nothing else needs to be in it.",
    )


def _read_folder(folder: Path, tensors: Mapping[str, StoredTensor]) -> Checkpoint:
    config = _read_object(folder / "config.json")
    generation = folder / "generation_config.json"
    return Checkpoint(
        path=folder,
        config=config,
        generation_config=_read_object(generation) if generation.is_file() else {},
        tensors=with_expert_names(tensors, stacked=_stacked_experts(config)),
    )


def _stacked_experts(config: Mapping[str, Any]) -> int:
    """How many experts a tensor holds below each other, as DBRX's config says; 1 elsewhere."""
    inner = config.get("ffn_config")
    count = inner.get("moe_num_experts", 1) if isinstance(inner, Mapping) else 1
    return count if isinstance(count, int) and count > 0 else 1


def _without_safetensors(folder: Path) -> UnsupportedModel | CheckpointError:
    gguf_files = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf_files:
        return CheckpointError(
            f"{folder} has {len(gguf_files)} GGUF files: {', '.join(gguf_files[:8])}.",
            remedy="Name one of the files instead of the folder.",
        )
    pickled = sorted({path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)})
    if pickled:
        return UnsupportedModel(
            f"{folder} has its weights in {pickled[0]} only, a pickle: that can run any code and is never opened.",
            remedy="Convert the model to safetensors (transformers' save_pretrained does), or download it as such.",
        )
    return CheckpointError(
        f"{folder} holds no model: neither safetensors nor a GGUF file.",
        remedy="Check the path, or download the model again.",
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no valid JSON: {error}.", remedy="It is damaged or half downloaded: download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object.", remedy="Download it again.")
    return content
