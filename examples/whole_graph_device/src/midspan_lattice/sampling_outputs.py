"""The six outputs of the sample operation, from a step's result."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.interface import StepResult


def outputs_of(result: StepResult) -> tuple[NDArray[Any], ...]:
    """Token ids, their logprobs and ranks, the top ids and logprobs, and which rows are invalid."""
    rows = len(result.token_ids)
    invalid = np.zeros(rows, np.bool_) if result.invalid is None else result.invalid
    found = result.logprobs
    if found is None:
        numbers, ids = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int32)
        return result.token_ids, numbers.reshape(0), ids.reshape(0), ids, numbers, invalid
    return result.token_ids, found.chosen, found.ranks, found.top_token_ids, found.top, invalid
