"""Which published quantizations can be read, and the way from a checkpoint to packed weights.

Knows readers by the ``quant_method`` of config.json; packages add more by the hook ``midspan_quantizations``,
whose result is passed in. Knows no layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from midspan.errors import CheckpointError, PluginError, UnsupportedModel
from midspan.interface.weights import DENSE, QuantizationReader
from midspan.weights.published.awq import read_awq
from midspan.weights.published.compressed_tensors import read_compressed_tensors
from midspan.weights.published.float8 import read_float8
from midspan.weights.published.gptq import read_gptq
from midspan.weights.quantization import KNOWN_FORMATS
from midspan.weights.stored_tensor import Checkpoint, StoredTensor

BUILT_IN: Mapping[str, QuantizationReader] = {
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "fbgemm_fp8": read_float8,
    "fp8": read_float8,
    "gptq": read_gptq,
}
"""``quant_method`` -> reader."""

REFUSED: Mapping[str, str] = {
    "bitsandbytes": "its 4-bit codes stand for 16 fixed floating numbers in blocks that run across rows, and its 8-bit "
    "weights are meant to be multiplied with outliers taken apart; no format here means either",
}
"""``quant_method`` -> why it is not read."""

FIELDS = ("quantization_config", "compression_config")
"""Where config.json says how the model is quantized; the second is an older name."""


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a published config says of quantization; None where it says nothing.

    Raises:
        CheckpointError: it is no JSON object.
    """
    found = next((config[field] for field in FIELDS if config.get(field)), None)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(
            f"quantization_config is {found!r} in config.json, and must be an object.",
            remedy="Download the model again.",
        )
    return found


def method_of(quantization: Mapping[str, Any]) -> str:
    """The published name of a quantization method."""
    named = quantization.get("quant_method")
    if named is None and "config_groups" in quantization:
        return "compressed-tensors"
    return str(named or "an unnamed method")


def read_quantized(checkpoint: Checkpoint, *, readers: Mapping[str, QuantizationReader] | None = None) -> Checkpoint:
    """A checkpoint with the tensors that a graph asks for.

    Args:
        checkpoint: as it was opened.
        readers: of installed packages; they win over the core's own.

    Returns:
        The same checkpoint where config.json speaks of no quantization; else one with packed tensors.

    Raises:
        UnsupportedModel: nothing here reads the method, or what the files hold of it.
        CheckpointError: tensors are missing or contradict each other.
        PluginError: a package's reader did not return what a reader must.
    """
    quantization = quantization_of(checkpoint.config)
    if quantization is None:
        return checkpoint
    method, known = method_of(quantization), {**BUILT_IN, **(readers or {})}
    reader = known.get(method)
    if reader is None:
        because = f": {REFUSED[method]}" if method in REFUSED else ""
        raise UnsupportedModel(
            f"{checkpoint.path} is quantized with {method}, which cannot be read here{because}.",
            remedy="Take the model in 16 bits (--quantization makes it small), as GGUF, or in one of: "
            f"{', '.join(sorted(known))}. A plugin can add more.",
        )
    return dataclasses.replace(checkpoint, tensors=_checked(method, reader(quantization, checkpoint.tensors)))


def _checked(method: str, made: object) -> dict[str, StoredTensor]:
    """What a reader returned, if it is what one must return."""
    tensors = made if isinstance(made, Mapping) else {}
    wrong = [name for name, tensor in tensors.items() if not _is_stored(name, tensor)]
    if wrong or not isinstance(made, Mapping):
        found = f"'{wrong[0]}' is none" if wrong else f"it returned {made!r}"
        raise PluginError(
            f"The reader of models quantized with {method} must return stored tensors by their names, each dense or in "
            f"one of the formats {', '.join(KNOWN_FORMATS)}: {found}.",
            plugin=method,
            remedy="Report it to the makers of the package that brings the reader.",
        )
    return dict(tensors)


def _is_stored(name: object, tensor: object) -> bool:
    return isinstance(tensor, StoredTensor) and tensor.name == name and tensor.format in (DENSE, *KNOWN_FORMATS)
