"""What the sampler must know of each sequence, and the batch made of it.

Turns parameters and token history into the numbers of a ``SamplingBatch``. Knows
no logits, no text and no device. All per-token bookkeeping happens in
``append``; making a batch of rows without penalties, masks or logprobs only
gathers constants.

Invariants: in the batch's adjustments each (row, token) pair appears once; rows
are numbered as given; a row with a target has no adjustments and no mask.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midspan.decoding.bad_words import BadWordMatcher
from midspan.decoding.sampling_params import SamplingParams
from midspan.decoding.stopping import ending_token_ids
from midspan.interface.batch import Adjustments, SamplingBatch

_CONSTANTS = struct.Struct("=fffiQ")
_CONSTANTS_DTYPE = np.dtype(
    [("temperature", "=f4"), ("top_p", "=f4"), ("min_p", "=f4"), ("top_k", "=i4"), ("seed", "=u8")]
)
_WORD_BITS = 32
_FIRST_LINES = 64


class SamplingState:
    """One sequence's parameters and what its tokens so far make of them.

    Args:
        params: the request's.
        prompt_ids: its prompt.
        seed: of this sequence (samples of one request each have their own); any integer,
            taken modulo 2**64.
        vocab_size: number of logits.
        eos_token_ids: the model's end-of-sequence tokens, forbidden up to ``min_tokens``.
        bad_word_ids: token sequences that must not appear, see ``bad_words.bad_word_ids``.
        output_ids: tokens that were generated before, for a sequence that is taken up again.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        seed: int,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        bad_word_ids: Sequence[Sequence[int]] = (),
        output_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.output_len = 0
        self.constants = _CONSTANTS.pack(
            params.temperature,
            params.top_p,
            params.min_p,
            params.top_k if 0 < params.top_k < vocab_size else vocab_size,
            seed % 2**64,
        )
        self.allowed = None if params.allowed_token_ids is None else _bits(params.allowed_token_ids, vocab_size)
        self._edits: _LogitEdits | None = None
        edits = _LogitEdits(params, prompt_ids, vocab_size, tuple(eos_token_ids), bad_word_ids)
        if edits.can_edit:
            self._edits = edits
        self.plain = self._edits is None and self.allowed is None and params.logprobs is None
        for token_id in output_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Note that a token was generated."""
        self.output_len += 1
        if self._edits is not None:
            self._edits.append(token_id)

    def edits(self) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]] | None:
        """Edits of the next token's logits: token ids, repetition factors, biases; None if there are none.

        The arrays are views: copy them before the next ``append``.
        """
        return None if self._edits is None else self._edits.current(self.output_len)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRow:
    """One row to sample.

    Attributes:
        state: of its sequence.
        position: in the sequence, of the token to be chosen.
        target: the token that already stands there, when a prompt is scored; None: choose one.
    """

    state: SamplingState
    position: int
    target: int | None = None


def build_sampling_batch(rows: Sequence[SamplingRow], vocab_size: int) -> SamplingBatch:
    """The sampling part of a step.

    Args:
        rows: in the order of the rows to sample.
        vocab_size: number of logits.

    Returns:
        A batch whose top logprobs are as many as the most demanding row wants.
    """
    constants = np.frombuffer(b"".join([row.state.constants for row in rows]), _CONSTANTS_DTYPE)
    positions = np.array([row.position for row in rows], np.int64)
    plain = all(row.state.plain and row.target is None for row in rows)
    targets, has_target = (None, None) if plain else _targets(rows)
    return SamplingBatch(
        temperature=np.ascontiguousarray(constants["temperature"]),
        top_k=np.ascontiguousarray(constants["top_k"]),
        top_p=np.ascontiguousarray(constants["top_p"]),
        min_p=np.ascontiguousarray(constants["min_p"]),
        seeds=np.ascontiguousarray(constants["seed"]),
        positions=positions,
        adjustments=None if plain else _adjustments(rows),
        allowed=None if plain else _allowed(rows, vocab_size),
        num_logprobs=None if plain else _num_logprobs(rows),
        targets=targets,
        has_target=has_target,
    )


def _targets(rows: Sequence[SamplingRow]) -> tuple[NDArray[np.int32] | None, NDArray[np.bool_] | None]:
    if all(row.target is None for row in rows):
        return None, None
    targets = np.array([row.target or 0 for row in rows], np.int32)
    return targets, np.array([row.target is not None for row in rows], np.bool_)


def _num_logprobs(rows: Sequence[SamplingRow]) -> int | None:
    wanted = [
        row.state.params.logprobs if row.target is None else (row.state.params.prompt_logprobs or 0) for row in rows
    ]
    return max((count for count in wanted if count is not None), default=None)


def _adjustments(rows: Sequence[SamplingRow]) -> Adjustments | None:
    edits = [(index, row.state.edits()) for index, row in enumerate(rows) if row.target is None]
    found = [(index, edit) for index, edit in edits if edit is not None]
    if not found:
        return None
    counts = [len(edit[0]) for _, edit in found]
    return Adjustments(
        rows=np.repeat(np.array([index for index, _ in found], np.int32), counts),
        token_ids=np.concatenate([edit[0] for _, edit in found]),
        repetition=np.concatenate([edit[1] for _, edit in found]),
        bias=np.concatenate([edit[2] for _, edit in found]),
    )


def _allowed(rows: Sequence[SamplingRow], vocab_size: int) -> NDArray[np.uint32] | None:
    masks = [(index, row.state.allowed) for index, row in enumerate(rows) if row.target is None]
    found = [(index, mask) for index, mask in masks if mask is not None]
    if not found:
        return None
    allowed = np.full((len(rows), -(-vocab_size // _WORD_BITS)), 0xFFFFFFFF, np.uint32)
    for index, mask in found:
        allowed[index] = mask
    return allowed


def _bits(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.uint32]:
    """uint32 [ceil(V / 32)] with a bit for each token of the vocabulary that is listed."""
    bits = np.zeros(-(-vocab_size // _WORD_BITS) * _WORD_BITS, np.bool_)
    listed = np.array(token_ids, np.int64)
    bits[listed[listed < vocab_size]] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


class _LogitEdits:
    """The sparse edits of one sequence: a growing table with one line for each token that has one.

    A line's bias is the request's logit bias less the presence and frequency
    penalties for the token's count so far; tokens that are forbidden only sometimes
    (ends before ``min_tokens``, ends of bad words) have a line from the beginning.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        bad_word_ids: Sequence[Sequence[int]],
    ) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._logit_bias = params.logit_bias or {}
        self._counts_tokens = bool(params.presence_penalty or params.frequency_penalty)
        self._repeats = params.repetition_penalty != 1.0
        self._endings = ending_token_ids(params, eos_token_ids) if params.min_tokens else frozenset()
        self._matcher = BadWordMatcher(bad_word_ids, prompt_ids) if bad_word_ids else None
        lines = set(self._logit_bias) | self._endings
        if self._matcher is not None:
            lines |= self._matcher.last_tokens()
        self._line_of: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._token_ids = np.zeros(_FIRST_LINES, np.int32)
        self._repetition = np.ones(_FIRST_LINES, np.float32)
        self._bias = np.zeros(_FIRST_LINES, np.float32)
        for token_id in sorted(lines):
            self._line(token_id)
        if self._repeats:
            for token_id in np.unique(np.array(prompt_ids, np.int64)).tolist():
                self._punish_repetition(token_id)
        self.can_edit = bool(lines) or self._repeats or self._counts_tokens

    def append(self, token_id: int) -> None:
        """Note a generated token."""
        if self._matcher is not None:
            self._matcher.append(token_id)
        if self._repeats:
            self._punish_repetition(token_id)
        if self._counts_tokens:
            count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
            line = self._line(token_id)
            if line is not None:
                penalty = self._params.presence_penalty + self._params.frequency_penalty * count
                self._bias[line] = self._logit_bias.get(token_id, 0.0) - penalty

    def current(self, output_len: int) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]] | None:
        """The edits for the token that comes after ``output_len`` output tokens."""
        forbidden: set[int] = set() if self._matcher is None else self._matcher.forbidden()
        if output_len < self._params.min_tokens:
            forbidden |= self._endings
        used = len(self._line_of)
        if not used:
            return None
        bias = self._bias[:used]
        places = [self._line_of[token_id] for token_id in forbidden if token_id in self._line_of]
        if places:
            bias = bias.copy()
            bias[places] = -np.inf
        return self._token_ids[:used], self._repetition[:used], bias

    def _punish_repetition(self, token_id: int) -> None:
        line = self._line(token_id)
        if line is not None:
            self._repetition[line] = self._params.repetition_penalty

    def _line(self, token_id: int) -> int | None:
        """The line of a token, made if it has none; None for a token without a logit."""
        if not 0 <= token_id < self._vocab_size:
            return None
        line = self._line_of.get(token_id)
        if line is None:
            line = self._line_of[token_id] = len(self._line_of)
            if line == len(self._token_ids):
                self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
                self._repetition = np.concatenate([self._repetition, np.ones_like(self._repetition)])
                self._bias = np.concatenate([self._bias, np.zeros_like(self._bias)])
            self._token_ids[line] = token_id
            self._bias[line] = self._logit_bias.get(token_id, 0.0)
        return line
