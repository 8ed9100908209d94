"""The sampling numbers of a step, against a plain recount of each sequence's history."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midspan.decoding.sampling_params import SamplingParams
from midspan.decoding.sampling_state import SamplingRow, SamplingState, build_sampling_batch
from midspan.interface import SamplingBatch

VOCAB = 50


def state(params: SamplingParams, prompt: tuple[int, ...] = (), **changes: Any) -> SamplingState:
    return SamplingState(params, prompt, **{"seed": 0, "vocab_size": VOCAB, **changes})


def batch_of(*states: SamplingState) -> SamplingBatch:
    return build_sampling_batch([SamplingRow(state=each, position=9) for each in states], VOCAB)


def edits_of(sampling: SamplingBatch, row: int) -> dict[int, tuple[float, float]]:
    """Token -> (repetition, bias) for a row, without edits that change nothing."""
    if sampling.adjustments is None:
        return {}
    adjustments = sampling.adjustments
    mine = adjustments.rows == row
    tokens = adjustments.token_ids[mine].tolist()
    assert len(tokens) == len(set(tokens))
    pairs = zip(adjustments.repetition[mine].tolist(), adjustments.bias[mine].tolist(), strict=True)
    return {token: pair for token, pair in zip(tokens, pairs, strict=True) if pair != (1.0, 0.0)}


def test_plain_rows_make_a_batch_of_constants() -> None:
    greedy = state(SamplingParams(temperature=0.0), seed=5)
    warm = state(SamplingParams(temperature=0.7, top_k=7, top_p=0.9, min_p=0.1), seed=-1)
    sampling = build_sampling_batch(
        [SamplingRow(state=greedy, position=3), SamplingRow(state=warm, position=2**40)], VOCAB
    )
    assert sampling.temperature.tolist() == [0.0, np.float32(0.7)]
    assert sampling.top_k.tolist() == [VOCAB, 7]
    assert sampling.top_p.tolist() == [1.0, np.float32(0.9)]
    assert sampling.min_p.tolist() == [0.0, np.float32(0.1)]
    assert sampling.seeds.tolist() == [5, 2**64 - 1]
    assert sampling.positions.tolist() == [3, 2**40]
    for array in (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seeds):
        assert array.flags.c_contiguous
    optional = [sampling.adjustments, sampling.allowed, sampling.num_logprobs, sampling.targets, sampling.has_target]
    assert optional == [None] * 5


@pytest.mark.parametrize("top_k", [-1, 0, VOCAB, VOCAB + 1, 2**31 - 1])
def test_no_limit_and_a_limit_beyond_the_vocabulary_are_the_vocabulary(top_k: int) -> None:
    assert batch_of(state(SamplingParams(top_k=top_k))).top_k.tolist() == [VOCAB]


tokens = st.integers(0, VOCAB - 1)


@settings(deadline=None)
@given(
    prompt=st.lists(tokens, max_size=30),
    output=st.lists(tokens, max_size=100),
    presence=st.sampled_from([0.0, 0.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.25, -0.5]),
    repetition=st.sampled_from([1.0, 1.25, 0.5]),
    bias=st.dictionaries(tokens, st.sampled_from([-100.0, 0.5, 3.0]), max_size=4),
    min_tokens=st.integers(0, 120),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=3),
)
def test_edits_are_those_of_a_recount_of_the_whole_history(
    prompt: list[int],
    output: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
    min_tokens: int,
    bad_words: list[tuple[int, ...]],
) -> None:
    params = SamplingParams(
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
        min_tokens=min_tokens,
        max_tokens=None,
        stop_token_ids=[7],
    )
    followed = state(params, tuple(prompt), eos_token_ids=(2,), bad_word_ids=tuple(bad_words))
    for token in output:
        followed.append(token)
    counts = Counter(output)
    history = prompt + output
    expected: dict[int, tuple[float, float]] = {}
    for token in range(VOCAB):
        factor = repetition if token in history else 1.0
        added = bias.get(token, 0.0) - (presence * (counts[token] > 0) + frequency * counts[token])
        if len(output) < min_tokens and token in (2, 7):
            added = -math.inf
        if any(word[-1] == token and history[len(history) - len(word) + 1 :] == list(word[:-1]) for word in bad_words):
            added = -math.inf
        if (factor, added) != (1.0, 0.0):
            expected[token] = (factor, added)
    assert edits_of(batch_of(state(SamplingParams()), followed), 1) == expected
    resumed = state(params, tuple(prompt), eos_token_ids=(2,), bad_word_ids=tuple(bad_words), output_ids=output)
    assert edits_of(batch_of(resumed), 0) == expected


def test_ends_are_forbidden_until_min_tokens_and_free_afterwards() -> None:
    followed = state(SamplingParams(min_tokens=2, stop_token_ids=[7]), eos_token_ids=(2, 3))
    for _ in range(2):
        assert edits_of(batch_of(followed), 0) == dict.fromkeys((2, 3, 7), (1.0, -math.inf))
        followed.append(1)
    assert edits_of(batch_of(followed), 0) == {}


def test_an_ignored_end_of_sequence_is_not_forbidden() -> None:
    followed = state(SamplingParams(min_tokens=2, ignore_eos=True, stop_token_ids=[7]), eos_token_ids=(2,))
    assert edits_of(batch_of(followed), 0) == {7: (1.0, -math.inf)}


def test_tokens_without_a_logit_are_left_out_of_the_edits() -> None:
    followed = state(SamplingParams(repetition_penalty=2.0, presence_penalty=1.0), (VOCAB, 3))
    followed.append(VOCAB + 5)
    assert edits_of(batch_of(followed), 0) == {3: (2.0, 0.0)}


def test_the_history_of_one_row_does_not_touch_another() -> None:
    first, second = (state(SamplingParams(presence_penalty=1.0)) for _ in range(2))
    first.append(4)
    second.append(5)
    sampling = batch_of(first, second)
    assert edits_of(sampling, 0) == {4: (1.0, -1.0)}
    assert edits_of(sampling, 1) == {5: (1.0, -1.0)}


def test_a_batch_keeps_its_numbers_when_its_sequences_go_on() -> None:
    followed = state(SamplingParams(presence_penalty=1.0))
    followed.append(4)
    sampling = batch_of(followed)
    for token in (4, 5, 6):
        followed.append(token)
    assert edits_of(sampling, 0) == {4: (1.0, -1.0)}


@pytest.mark.parametrize("vocab", [31, 32, 33, 64, 100])
def test_allowed_tokens_become_bits_and_other_rows_allow_all(vocab: int) -> None:
    listed = [0, 5, 30, vocab - 1]
    some = state(SamplingParams(allowed_token_ids=[*listed, vocab + 3]), vocab_size=vocab)
    every = state(SamplingParams(), vocab_size=vocab)
    rows = [SamplingRow(state=each, position=0) for each in (every, some)]
    allowed = build_sampling_batch(rows, vocab).allowed
    assert allowed is not None
    assert allowed.shape == (2, -(-vocab // 32))
    bits = [[bool(allowed[row, token // 32] >> (token % 32) & 1) for token in range(vocab)] for row in (0, 1)]
    assert all(bits[0])
    assert [token for token, bit in enumerate(bits[1]) if bit] == sorted(set(listed))


def test_the_most_demanding_row_sets_the_number_of_logprobs() -> None:
    plain, two, five = (state(SamplingParams(logprobs=count)) for count in (None, 2, 5))
    assert batch_of(plain).num_logprobs is None
    assert batch_of(plain, two, five).num_logprobs == 5
    assert batch_of(state(SamplingParams(logprobs=0))).num_logprobs == 0


def test_a_scored_prompt_row_has_a_target_and_no_edits() -> None:
    scored = state(SamplingParams(prompt_logprobs=3, logprobs=9, repetition_penalty=2.0, allowed_token_ids=[1]), (4, 5))
    rows = [
        SamplingRow(state=scored, position=1, target=5),
        SamplingRow(state=state(SamplingParams()), position=2),
    ]
    sampling = build_sampling_batch(rows, VOCAB)
    assert sampling.targets is not None
    assert sampling.has_target is not None
    assert sampling.has_target.tolist() == [True, False]
    assert sampling.targets[0] == 5
    assert sampling.num_logprobs == 3
    assert sampling.adjustments is None
    assert sampling.allowed is None
