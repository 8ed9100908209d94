"""A compiled graph, and what a step returns.

A program knows its graph, its weights and its device; it knows nothing about
requests, blocks' owners or text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from midspan.interface.batch import Batch, SamplingBatch
from midspan.interface.cache import Cache
from midspan.interface.kernel import Placement


@dataclass(frozen=True, kw_only=True, eq=False)
class Logprobs:
    """Natural logarithms of probabilities, from the raw logits (before any edit).

    Attributes:
        chosen: float32 [S], of the token that the row returned.
        ranks: int32 [S], 1 for the most probable token.
        top_token_ids: int32 [S, L], by falling probability, lower ids first among equals.
        top: float32 [S, L].
    """

    chosen: NDArray[np.float32]
    ranks: NDArray[np.int32]
    top_token_ids: NDArray[np.int32]
    top: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepResult:
    """What a step produced, on the host.

    Attributes:
        token_ids: int32 [S], one for each row to sample, in that order.
        logprobs: None unless ``SamplingBatch.num_logprobs`` asked for them.
        invalid: bool [S], rows whose logits were not numbers or that had no token left to
            choose; their token id means nothing and only their request fails. None
            means that all rows are good.
        device_seconds: how long the step took on the device, where the device knows it.
    """

    token_ids: NDArray[np.int32]
    logprobs: Logprobs | None = None
    invalid: NDArray[np.bool_] | None = None
    device_seconds: float | None = None


class StepOutput(Protocol):
    """A step that may still be running on the device."""

    def result(self) -> StepResult:
        """Wait for the step and fetch its result; may be called again."""
        ...


class Program(Protocol):
    """What ``Device.compile`` returns."""

    placement: Placement
    """Which kernel serves each node, and why the others were refused."""

    def run(self, batch: Batch, cache: Cache) -> StepOutput:
        """Execute one step: write the tokens' keys and values, return sampled tokens.

        May return before the device has finished. Running the same batch again writes
        the same data to the same slots, so a step may be repeated, whole or in part.

        Raises:
            DeviceLost: the device is gone; nothing on it can be used any more. The engine ends
                with it; a server starts another one and resumes the requests.
            OutOfDeviceMemory: this step did not fit; a smaller one may, and the core tries that.
            Exception: anything else is taken for the fault of one request: the core runs the
                step again in halves until that one stands alone, and fails it.
        """
        ...

    def evaluate(
        self, inputs: Mapping[str, NDArray[Any] | SamplingBatch], cache: Cache | None = None
    ) -> tuple[NDArray[Any], ...]:
        """Run the graph once on any values, and bring its outputs to the host.

        For graphs of any kind, one node among them, which is how the conformance suite holds a
        device's operations against their definitions. T, B and S stay within ``Bounds``.
        Where ``sampling.num_logprobs`` is None, a ``sample`` node's logprob, rank, top token ids
        and top logprobs come with the shapes [0], [0], [0, 0] and [0, 0].

        Args:
            inputs: graph input -> host array, or the sampling record. An ``"activation"``
                comes as float32 and is rounded to the program's type.
            cache: of the same device; needed when the graph has attention.

        Returns:
            The graph's outputs in order; activations widened to float32.
        """
        ...

    def memory_bytes(self) -> int:
        """Bytes that weights and working memory occupy on the device at most."""
        ...

    def close(self) -> None:
        """Release weights and working memory."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedStep:
    """A ``StepOutput`` for devices that finish before they return.

    Attributes:
        step_result: what ``result`` returns.
    """

    step_result: StepResult

    def result(self) -> StepResult:
        """The result, at once."""
        return self.step_result
