"""A program that computes nothing: for planning what is too large to compute here.

Its tokens are drawn from seeds and positions alone, so the same requests get the same tokens
again, and mean nothing. Knows no weight's content; its memory is counted from shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import MidspanError
from midspan.interface.batch import Batch, SamplingBatch
from midspan.interface.cache import Cache
from midspan.interface.graph import Graph
from midspan.interface.kernel import NodePlacement, Placement
from midspan.interface.program import FinishedStep, Logprobs, StepOutput, StepResult

KERNEL_NAME = "modelled"

_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""The constants of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""


class PlannedProgram:
    """Implements ``interface.program.Program`` without numbers.

    Args:
        graph: the model.
        device_id: for the placement.
        memory_bytes: what it occupies.
    """

    def __init__(self, graph: Graph, *, device_id: str, memory_bytes: int) -> None:
        self.placement = Placement(
            device=device_id,
            nodes=tuple(
                NodePlacement(node=node.name, op=node.op, kernel=KERNEL_NAME, fallback=False) for node in graph.nodes
            ),
        )
        self._vocab_size = graph.vocab_size
        self._memory_bytes = memory_bytes
        self._open = True

    def run(self, batch: Batch, cache: Cache) -> StepOutput:
        """Draw a token for each row."""
        if not self._open:
            raise MidspanError("The program was closed.")
        return FinishedStep(step_result=_drawn(batch.sampling, self._vocab_size))

    def evaluate(
        self, inputs: Mapping[str, NDArray[Any] | SamplingBatch], cache: Cache | None = None
    ) -> tuple[NDArray[Any], ...]:
        """Refused: there are no numbers.

        Raises:
            MidspanError: always.
        """
        raise MidspanError(
            "This device was opened with numerics=off and computes nothing.", remedy="Leave the option numerics out."
        )

    def memory_bytes(self) -> int:
        """Bytes that weights and values would occupy."""
        return self._memory_bytes

    def close(self) -> None:
        """Give the memory back."""
        self._open = False
        self._memory_bytes = 0


def _drawn(sampling: SamplingBatch, vocab_size: int) -> StepResult:
    with np.errstate(over="ignore"):
        mixed = sampling.seeds.astype(np.uint64) + _MIX[0] * sampling.positions.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[1]
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[2]
    tokens = ((mixed >> np.uint64(31)) % np.uint64(vocab_size)).astype(np.int32)
    if sampling.targets is not None and sampling.has_target is not None:
        tokens = np.where(sampling.has_target, sampling.targets, tokens).astype(np.int32)
    return StepResult(token_ids=tokens, logprobs=_uniform_logprobs(sampling, tokens, vocab_size))


def _uniform_logprobs(sampling: SamplingBatch, tokens: NDArray[np.int32], vocab_size: int) -> Logprobs | None:
    if sampling.num_logprobs is None:
        return None
    rows, top = len(tokens), min(sampling.num_logprobs, vocab_size)
    even = np.float32(-np.log(vocab_size))
    return Logprobs(
        chosen=np.full(rows, even, np.float32),
        ranks=np.ones(rows, np.int32),
        top_token_ids=np.tile(np.arange(top, dtype=np.int32), (rows, 1)),
        top=np.full((rows, top), even, np.float32),
    )
