"""What a checkpoint holds: named tensors that stay mapped until they are read, ``StoredTensor`` of the interface.

It knows no file format; the modules that do (``gguf_checkpoint``,
``safetensors_checkpoint``) fill these records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from midspan.interface.weights import DENSE, StoredTensor

__all__ = ["DENSE_DTYPES", "Checkpoint", "StoredTensor"]

DENSE_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Element types in which a dense weight travels to a device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """An opened model.

    Attributes:
        path: the folder or the file.
        config: the content of ``config.json``, or the same made from a file's own metadata.
        generation_config: the content of ``generation_config.json``; {} when there is none.
        tensors: published name -> tensor.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str | None:
        """The element type that the model was published in, or None if nothing says so.

        The config's ``torch_dtype`` (``dtype`` in newer files), otherwise what most of the dense
        matrices are stored as.
        """
        for key in ("torch_dtype", "dtype"):
            named = self.config.get(key)
            if isinstance(named, str) and named.removeprefix("torch.") in DENSE_DTYPES:
                return named.removeprefix("torch.")
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            kind = tensor.dtype if tensor.format == DENSE else tensor.format
            if len(tensor.shape) > 1 and kind is not None:
                sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
        largest = max(sizes, key=lambda name: sizes[name], default=None)
        return largest if largest in DENSE_DTYPES else None
