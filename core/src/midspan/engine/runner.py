"""Runs the steps of any device's program.

The one model runner: it builds batches, calls the program and gathers results.
It asks the device nothing and knows neither clients nor stop rules.

Invariant: an error of one request does not reach its neighbours. When a run fails,
its requests run again in halves until the guilty one stands alone; a step may be
repeated, because the same batch writes the same data to the same slots.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from midspan.devices.step_contract import fetch_result
from midspan.engine.batch_building import StepSlice, build_batch, limit_rows
from midspan.engine.messages import TokenScores
from midspan.errors import DeviceLost, OutOfDeviceMemory
from midspan.interface.cache import Cache, CacheGroup
from midspan.interface.program import Logprobs, Program, StepResult

logger = logging.getLogger("midspan.engine")


@dataclass(kw_only=True, eq=False)
class StepOutcome:
    """What a step came to.

    Attributes:
        token_ids: one for each sampled row of the step, 0 where the request failed.
        scores: logprobs by row, for rows that want them.
        failures: place in the step -> why that request failed.
        device_seconds: the device's own time of the runs that succeeded, together; None where it does not tell.
    """

    token_ids: list[int]
    scores: dict[int, TokenScores] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    device_seconds: float | None = None


class Runner:
    """Runs steps on one program and cache."""

    def __init__(
        self,
        program: Program,
        cache: Cache,
        *,
        groups: tuple[CacheGroup, ...],
        block_size: int,
        vocab_size: int,
        max_sampled_rows: int,
    ) -> None:
        self._program = program
        self._cache = cache
        self._groups = groups
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._max_sampled_rows = max_sampled_rows

    def run(self, step: StepSlice) -> StepOutcome:
        """Run a step.

        Args:
            step: the whole step.

        Raises:
            DeviceLost: nothing on the device can be used any more.
        """
        outcome = StepOutcome(token_ids=[0] * sum(step.sampled))
        for part in limit_rows(step, self._max_sampled_rows):
            self._attempt(part, outcome)
        return outcome

    def _attempt(self, part: StepSlice, outcome: StepOutcome) -> None:
        if outcome.failures:
            part = part.choose([index for index, place in enumerate(part.places) if place not in outcome.failures])
        if not len(part):
            return
        try:
            batch = build_batch(part, self._groups, self._block_size, self._vocab_size)
            result = fetch_result(
                self._program.run(batch, self._cache),
                rows=len(batch.rows_to_sample),
                vocab_size=self._vocab_size,
                num_logprobs=batch.sampling.num_logprobs,
                device=self._program.placement.device,
            )
            self._gather(part, result, outcome)
        except DeviceLost:
            raise
        except Exception as error:
            self._isolate(part, error, outcome)

    def _isolate(self, part: StepSlice, error: Exception, outcome: StepOutcome) -> None:
        if len(part) > 1:
            middle = len(part) // 2
            pieces = (part.part(0, middle), part.part(middle, len(part)))
        elif isinstance(error, OutOfDeviceMemory) and part.counts[0] > 1:
            pieces = part.cut_tokens(0, part.counts[0] // 2)
        else:
            logger.error("request %s failed", part.requests[0].request_id, exc_info=error)
            outcome.failures[part.places[0]] = f"{type(error).__name__}: {error}"
            return
        for piece in pieces:
            self._attempt(piece, outcome)

    def _gather(self, part: StepSlice, result: StepResult, outcome: StepOutcome) -> None:
        tokens = result.token_ids.tolist()
        if result.device_seconds is not None:
            outcome.device_seconds = (outcome.device_seconds or 0.0) + result.device_seconds
        invalid = None if result.invalid is None or not result.invalid.any() else result.invalid.tolist()
        begin = 0
        for place, row, sampled in zip(part.places, part.rows, part.sampled, strict=True):
            end = begin + sampled
            outcome.token_ids[row : row + sampled] = tokens[begin:end]
            if invalid is not None and any(invalid[begin:end]):
                outcome.failures[place] = "the model's logits were not numbers, or no token was left to choose"
            begin = end
        if result.logprobs is not None:
            self._gather_scores(part, tokens, result.logprobs, outcome)

    def _gather_scores(self, part: StepSlice, tokens: list[int], logprobs: Logprobs, outcome: StepOutcome) -> None:
        begin = 0
        for request, state, start, count, row, sampled in zip(
            part.requests, part.states, part.starts, part.counts, part.rows, part.sampled, strict=True
        ):
            first = start + count - sampled + 1
            for offset in range(sampled):
                chosen = first + offset >= len(request.token_ids)
                wanted = state.params.logprobs if chosen else state.params.prompt_logprobs
                if wanted is not None:
                    outcome.scores[row + offset] = _scores(tokens[begin + offset], logprobs, begin + offset, wanted)
            begin += sampled


def _scores(token: int, logprobs: Logprobs, row: int, wanted: int) -> TokenScores:
    return TokenScores(
        token_id=token,
        logprob=float(logprobs.chosen[row]),
        rank=int(logprobs.ranks[row]),
        top_ids=logprobs.top_token_ids[row, :wanted].tolist(),
        top=logprobs.top[row, :wanted].tolist(),
    )
