"""The sample operation's outputs as arrays, and the step's result made of them.

The operation has six outputs whatever was asked for; a ``StepResult`` leaves
out what was not. Knows nothing about how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.interface.batch import SamplingBatch
from midspan.interface.program import Logprobs, StepResult


def outputs_of(result: StepResult) -> tuple[NDArray[Any], ...]:
    """The operation's six outputs, in its order; logprob outputs are empty when none were asked for."""
    rows = result.token_ids.shape[0]
    invalid = np.zeros(rows, np.bool_) if result.invalid is None else result.invalid
    found = result.logprobs
    if found is None:
        found = Logprobs(
            chosen=np.zeros(0, np.float32),
            ranks=np.zeros(0, np.int32),
            top_token_ids=np.zeros((0, 0), np.int32),
            top=np.zeros((0, 0), np.float32),
        )
    return (result.token_ids, found.chosen, found.ranks, found.top_token_ids, found.top, invalid)


def result_of(outputs: Sequence[NDArray[Any]], sampling: SamplingBatch) -> StepResult:
    """The step's result, from the operation's six outputs."""
    token_ids, chosen, ranks, top_token_ids, top, invalid = outputs
    logprobs = None
    if sampling.num_logprobs is not None:
        logprobs = Logprobs(chosen=chosen, ranks=ranks, top_token_ids=top_token_ids, top=top)
    return StepResult(token_ids=token_ids, logprobs=logprobs, invalid=invalid if bool(invalid.any()) else None)
