"""One of the n sequences of a request, as the step loop keeps it.

Joins what the scheduler knows of it (token ids, blocks) to what sampling and
stopping must know. Knows no text and no device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from midspan.decoding.sampling_state import SamplingState
from midspan.decoding.stopping import StopRule, stop_rule
from midspan.engine.messages import AddRequest, PromptReport, SequenceStart, TokenScores
from midspan.scheduling.request import Request


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A live sequence.

    Attributes:
        request: as it came, without its prompt and its sequences, which ``scheduled`` and ``state`` know.
        index: 0 to n - 1.
        seed: of its random numbers.
        scheduled: the scheduler's side of it.
        state: the sampler's side of it.
        rule: when it ends.
        scheduled_time: when it first entered a step, seconds of the monotonic clock.
        reported: whether its ``PromptReport`` was made.
        prompt_scores: by position, where the prompt is scored.
    """

    request: AddRequest
    index: int
    seed: int
    scheduled: Request
    state: SamplingState
    rule: StopRule
    scheduled_time: float | None = None
    reported: bool = False
    prompt_scores: dict[int, TokenScores] = field(default_factory=dict)

    @property
    def request_id(self) -> str:
        """Of the request as the client knows it."""
        return self.request.request_id

    def report_prompt(self) -> PromptReport | None:
        """What is known of the prompt; the first time only."""
        if self.reported:
            return None
        self.reported = True
        scores = None
        if self.scheduled.score_prompt:
            scores = [self.prompt_scores[position] for position in range(1, self.scheduled.prompt_length)]
            self.prompt_scores = {}
        return PromptReport(
            cached_tokens=min(self.scheduled.cached_tokens or 0, self.scheduled.prompt_length),
            scheduled_time=self.scheduled_time or 0.0,
            scores=scores,
        )


def sequence_id(request_id: str, index: int) -> str:
    """The scheduler's name of a sequence; different for different pairs, as an index holds no colon."""
    return f"{index}:{request_id}"


def make_sequence(
    request: AddRequest, start: SequenceStart, *, leader: SequenceStart, vocab_size: int, max_model_len: int
) -> Sequence:
    """Set up one sequence of a request.

    Args:
        request: checked by ``request_validation``.
        start: which sequence.
        leader: the first one of the request, whose prompt blocks the others share and which scores the prompt.
        vocab_size: number of logits.
        max_model_len: tokens of one request at most.

    Raises:
        InvalidRequest: the scheduler or the sampler refuses it.
    """
    params = request.params
    leads = start.index == leader.index
    rule = stop_rule(params, eos_token_ids=request.eos_token_ids, max_tokens=max_model_len - len(request.prompt_ids))
    scheduled = Request(
        sequence_id(request.request_id, start.index),
        request.prompt_ids,
        max_total_tokens=len(request.prompt_ids) + rule.max_tokens,
        output_ids=start.emitted_ids,
        priority=request.priority,
        arrival=request.arrival_time,
        salt=request.cache_salt,
        score_prompt=leads and params.prompt_logprobs is not None,
        fork_of=None if leads else sequence_id(request.request_id, leader.index),
    )
    state = SamplingState(
        params,
        request.prompt_ids,
        seed=start.seed,
        vocab_size=vocab_size,
        eos_token_ids=request.eos_token_ids,
        bad_word_ids=request.bad_word_ids,
        output_ids=start.emitted_ids,
    )
    origin = msgspec.structs.replace(request, prompt_ids=[], sequences=[])
    return Sequence(request=origin, index=start.index, seed=start.seed, scheduled=scheduled, state=state, rule=rule)
