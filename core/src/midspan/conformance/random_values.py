"""Random numbers that every activation type holds exactly.

Multiples of 1/32 up to 4 need eight significant bits at most, which bfloat16
has, and float16 and float32 have more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def grid(random: np.random.Generator, shape: tuple[int, ...], largest: float = 4.0) -> NDArray[np.float32]:
    """Normally distributed numbers, rounded to multiples of 1/32 and cut at ``largest``.

    Args:
        random: where they come from.
        shape: of the result.
        largest: at most 4.
    """
    values = np.round(random.standard_normal(shape) * 32.0) / 32.0
    return np.clip(values, -largest, largest).astype(np.float32)
