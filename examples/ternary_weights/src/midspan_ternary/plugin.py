"""What the entry point leads to: the quantization method that this package reads."""

from __future__ import annotations

from collections.abc import Mapping

from midspan.interface import QuantizationReader, hookimpl
from midspan_ternary.reader import read_ternary


@hookimpl
def midspan_quantizations() -> Mapping[str, QuantizationReader]:
    """The one method of this package, by its name in config.json."""
    return {"bitnet": read_ternary}
