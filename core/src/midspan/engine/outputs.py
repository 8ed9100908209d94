"""What callers get back: records in vLLM's shape and names.

Used by the offline ``LLM`` (whole results) and by the server (increments).
Knows no device and no transport.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """One candidate token.

    Attributes:
        logprob: natural logarithm of its probability before any edit of the logits.
        rank: 1 for the most probable token; None when it was not computed.
        decoded_token: its text alone.
    """

    logprob: float
    rank: int | None
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""Candidates at one place by token id: the token that stands there first, then the top ones."""


@dataclass(kw_only=True)
class CompletionOutput:
    """One completion of a prompt, whole (``LLM``) or the newest piece (a stream).

    Attributes:
        index: 0 to n - 1.
        text: its text; in a stream the characters that became certain since the last piece.
        token_ids: its tokens; in a stream the new ones. The token that ended it is included.
        cumulative_logprob: sum over all its tokens so far, or None.
        logprobs: one entry for each of ``token_ids``, or None when not asked for.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"``, ``"error"``; None while it runs.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
        error: the message of a completion that finished with ``"error"``.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def finished(self) -> bool:
        """Whether no more will come."""
        return self.finish_reason is not None


@dataclass(kw_only=True)
class RequestMetrics:
    """Moments of a request, seconds of the monotonic clock; None while it has not come to pass."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """State of a request (``LLM``), or an increment of it (a stream).

    Attributes:
        request_id: as given.
        prompt: the prompt's text, or None when it came as token ids.
        prompt_token_ids: what was run.
        prompt_logprobs: one entry for each prompt token, None for the first; None when not asked for.
        outputs: completions; in a stream only those with news.
        finished: whether all n completions are.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        metrics: moments.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
