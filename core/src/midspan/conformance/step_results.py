"""Whether a step's result has the types and shapes that the interface declares.

Knows ``StepResult`` and what a batch asked for; whether the numbers are right is the judge's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from midspan.interface import Batch, Cache, Capabilities, FinishedStep, Program, StepOutput, StepResult


@dataclass(eq=False, kw_only=True)
class InspectedProgram:
    """Looks at the result of every step.

    Attributes:
        program: the device's.
        claims: the device's.
        problems: what is wrong, each kind once.
    """

    program: Program
    claims: Capabilities
    problems: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.placement = self.program.placement
        self.evaluate = self.program.evaluate
        self.memory_bytes = self.program.memory_bytes
        self.close = self.program.close

    def run(self, batch: Batch, cache: Cache) -> StepOutput:
        """Run the step to its end, and look at it."""
        result = self.program.run(batch, cache).result()
        self.problems.update(dict.fromkeys(result_problems(result, batch, self.claims)))
        return FinishedStep(step_result=result)


def result_problems(result: StepResult, batch: Batch, claims: Capabilities) -> Iterator[str]:
    """What in a result is not as declared.

    Args:
        result: of a step.
        batch: of the same step.
        claims: of the device.
    """
    rows, wanted = len(batch.rows_to_sample), batch.sampling.num_logprobs
    arrays: dict[str, tuple[Any, str, tuple[int, ...]]] = {"token_ids": (result.token_ids, "int32", (rows,))}
    if result.invalid is not None:
        arrays["invalid"] = (result.invalid, "bool", (rows,))
    if result.logprobs is None and wanted is not None:
        yield "StepResult.logprobs is None although the batch asked for logprobs"
    elif result.logprobs is not None and wanted is None:
        yield "StepResult.logprobs is there although the batch asked for none"
    elif result.logprobs is not None and wanted is not None:
        found = result.logprobs
        arrays["logprobs.chosen"] = (found.chosen, "float32", (rows,))
        arrays["logprobs.ranks"] = (found.ranks, "int32", (rows,))
        arrays["logprobs.top_token_ids"] = (found.top_token_ids, "int32", (rows, wanted))
        arrays["logprobs.top"] = (found.top, "float32", (rows, wanted))
    for name, (array, dtype, shape) in arrays.items():
        if not isinstance(array, np.ndarray):
            yield f"StepResult.{name} is {type(array).__name__}, not a numpy array"
        elif array.dtype != np.dtype(dtype):
            yield f"StepResult.{name} is of {array.dtype}, not of {dtype}"
        elif array.shape != shape:
            yield f"StepResult.{name} has the shape {array.shape} where the batch asks for {shape}"
    yield from _time_problems(result.device_seconds, claims.virtual_clock)


def _time_problems(seconds: Any, is_claimed: bool) -> Iterator[str]:
    if seconds is None:
        if is_claimed:
            yield "virtual_clock is claimed, and StepResult.device_seconds is None"
    elif isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        yield f"StepResult.device_seconds is {type(seconds).__name__}, not a number"
    elif not (math.isfinite(seconds) and seconds >= 0):
        yield f"StepResult.device_seconds is {float(seconds):g}, which no step takes"
