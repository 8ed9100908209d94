"""Names of element types, as the interface writes them, and their numpy types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from midspan.errors import SettingsError

ELEMENT_TYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def element_type(name: str) -> np.dtype[Any]:
    """The numpy type of a name.

    Raises:
        SettingsError: there is none; the message lists those that exist.
    """
    if name not in ELEMENT_TYPES:
        raise SettingsError(
            f"The reference has no element type '{name}'.", remedy=f"Known types: {', '.join(ELEMENT_TYPES)}."
        )
    return ELEMENT_TYPES[name]
