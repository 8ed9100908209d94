"""When a sequence ends, as far as token ids tell.

Ints only: knows no text (stop strings are found by
``midspan.text.incremental_detokenizer``) and no logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from midspan.decoding.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why a sequence ended.

    Attributes:
        finish_reason: ``"stop"`` or ``"length"``.
        stop_reason: the stop token id; None for end-of-sequence and for length.
    """

    finish_reason: str
    stop_reason: int | None = None


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """The token ids and lengths at which one sequence ends.

    Attributes:
        eos_token_ids: the model's end-of-sequence tokens.
        stop_token_ids: those of the request.
        min_tokens: the first so many output tokens never end it (but ``max_tokens`` does).
        max_tokens: output tokens at most.
        ignore_eos: end-of-sequence tokens do not end it, unless they are in ``stop_token_ids``.
    """

    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False

    def check(self, output_len: int, token_id: int) -> Stop | None:
        """Whether the newest token ends the sequence.

        Args:
            output_len: output tokens so far, the newest included.
            token_id: the newest.
        """
        if output_len > self.min_tokens:
            if token_id in self.eos_token_ids and not self.ignore_eos:
                return Stop(finish_reason="stop")
            if token_id in self.stop_token_ids:
                return Stop(finish_reason="stop", stop_reason=token_id)
        if output_len >= self.max_tokens:
            return Stop(finish_reason="length")
        return None


def ending_token_ids(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> frozenset[int]:
    """Every token that would end a sequence with these parameters."""
    eos = () if params.ignore_eos else eos_token_ids
    return frozenset(params.stop_token_ids) | frozenset(eos)


def stop_rule(params: SamplingParams, *, eos_token_ids: tuple[int, ...], max_tokens: int) -> StopRule:
    """The rule for one sequence.

    Args:
        params: the request's.
        eos_token_ids: the model's.
        max_tokens: what the context leaves room for; the request's own limit applies below it.
    """
    limit = max_tokens if params.max_tokens is None else min(params.max_tokens, max_tokens)
    return StopRule(
        max_tokens=limit,
        eos_token_ids=frozenset(eos_token_ids),
        stop_token_ids=frozenset(params.stop_token_ids),
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
    )
