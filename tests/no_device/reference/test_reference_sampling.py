"""The sampler against a slow, plain float64 version of its own definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from midspan.interface import Adjustments, SamplingBatch, StepResult
from midspan.runtimes.reference.random_numbers import uniform
from midspan.runtimes.reference.sampling import largest_ids, sample

Logits = NDArray[np.float32]

# exp in float32 is good to a few units of 2**-24, and (l - max) / T loses one rounding of 2**-24 relative to an
# exponent below 104 in size (beyond it the weight is 0): together a relative error below 110 * 2**-24 < 1e-5 of
# each weight, hence of any cumulated share. Draws nearer than that to a border may fall on either side.
BORDER = 1e-5


def batch(rows: int, vocab: int, **changes: Any) -> SamplingBatch:
    """Plain sampling for all rows; a scalar change holds for every row."""
    fields: dict[str, tuple[Any, Any]] = {
        "temperature": (1.0, np.float32),
        "top_k": (vocab, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "seeds": (0, np.uint64),
        "positions": (np.arange(rows), np.int64),
    }
    built = {
        name: np.broadcast_to(np.asarray(changes.pop(name, value)), (rows,)).astype(dtype)
        for name, (value, dtype) in fields.items()
    }
    return SamplingBatch(**built, **changes)


def single(sampling: SamplingBatch, row: int) -> SamplingBatch:
    """The part of a batch that belongs to one row."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        if isinstance(value, np.ndarray):
            changes[field.name] = value[row : row + 1].copy()
    if sampling.adjustments is not None:
        mine = sampling.adjustments.rows == row
        changes["adjustments"] = Adjustments(
            rows=np.zeros(int(mine.sum()), np.int32),
            token_ids=sampling.adjustments.token_ids[mine],
            repetition=sampling.adjustments.repetition[mine],
            bias=sampling.adjustments.bias[mine],
        )
    return dataclasses.replace(sampling, **changes)


def mask_words(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    rows, vocab = allowed.shape
    words = np.zeros((rows, -(-vocab // 32)), np.uint32)
    for row, token in zip(*np.nonzero(allowed), strict=True):
        words[row, token // 32] |= np.uint32(1 << (token % 32))
    return words


def plain_choice(
    logits: Logits, *, temperature: float, top_k: int, top_p: float, min_p: float, number: float
) -> set[int]:
    """Every token that the definition may give within BORDER, worked out by sorting everything in float64."""
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    if temperature == 0.0:
        return {order[0]}
    order = order[:top_k]
    top = float(logits[order[0]])
    weights = {token: float(np.exp((float(logits[token]) - top) / temperature)) for token in order}
    answers: set[int] = set()
    for slack in (-BORDER, 0.0, BORDER):
        kept = [token for token in order if weights[token] >= min_p * (1.0 + slack)] or order[:1]
        total = sum(weights[token] for token in kept)
        nucleus, reached = [], 0.0
        for token in kept:
            nucleus.append(token)
            reached += weights[token]
            if top_p < 1.0 and reached >= top_p * total * (1.0 + slack):
                break
        share = sum(weights[token] for token in nucleus)
        for shift in (-BORDER, 0.0, BORDER):
            cumulated, wanted = 0.0, min(max(number + shift, 0.0), 1.0 - BORDER) * share
            for token in sorted(nucleus):
                cumulated += weights[token]
                if cumulated > wanted:
                    answers.add(token)
                    break
    return answers


def random_logits(rows: int, vocab: int, seed: int, spread: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * spread).astype(np.float32)


@settings(deadline=None, max_examples=150)
@given(
    vocab=st.sampled_from([1, 2, 31, 128, 129, 700]),
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    steps=st.sampled_from([None, 1.0]),
    temperature=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 2.0, 100.0]),
    top_k=st.sampled_from([1, 2, 5, 40, 10_000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)
def test_tokens_are_those_of_a_plain_float64_sampler(
    vocab: int,
    seed: int,
    spread: float,
    steps: float | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    logits = random_logits(4, vocab, seed, spread)
    if steps is not None:
        logits = np.round(logits / steps) * np.float32(steps)  # many ties
    sampling = batch(4, vocab, temperature=temperature, top_k=min(top_k, vocab), top_p=top_p, min_p=min_p, seeds=seed)
    numbers = uniform(sampling.seeds, sampling.positions)
    result = sample(logits, sampling)
    assert result.invalid is None
    for row in range(4):
        assert int(result.token_ids[row]) in plain_choice(
            logits[row],
            temperature=float(sampling.temperature[row]),
            top_k=min(top_k, vocab),
            top_p=float(sampling.top_p[row]),
            min_p=float(sampling.min_p[row]),
            number=float(numbers[row]),
        )


def mixed_batch(rows: int, vocab: int, seed: int) -> tuple[Logits, SamplingBatch]:
    """Rows of every kind side by side: greedy, filtered, edited, masked, scored."""
    rng = np.random.default_rng(seed)
    logits = random_logits(rows, vocab, seed)
    edited = rng.choice(rows * vocab, rows * 5, replace=False)
    allowed = rng.random((rows, vocab)) < 0.7
    allowed[:, 0] = True
    return logits, batch(
        rows,
        vocab,
        temperature=rng.choice([0.0, 0.6, 1.0], rows),
        top_k=rng.choice([3, 50, vocab], rows),
        top_p=rng.choice([0.5, 0.95, 1.0], rows),
        min_p=rng.choice([0.0, 0.1], rows),
        seeds=rng.integers(0, 2**63, rows),
        positions=rng.integers(0, 5000, rows),
        num_logprobs=4,
        adjustments=Adjustments(
            rows=(edited // vocab).astype(np.int32),
            token_ids=(edited % vocab).astype(np.int32),
            repetition=rng.choice([0.8, 1.0, 1.3], len(edited)).astype(np.float32),
            bias=rng.choice([-np.inf, -1.5, 0.0, 4.0], len(edited)).astype(np.float32),
        ),
        allowed=mask_words(allowed),
        targets=rng.integers(0, vocab, rows).astype(np.int32),
        has_target=rng.random(rows) < 0.2,
    )


def rows_of(result: StepResult, row: int) -> list[Any]:
    assert result.logprobs is not None
    bad = False if result.invalid is None else bool(result.invalid[row])
    parts = [result.logprobs.chosen, result.logprobs.ranks, result.logprobs.top_token_ids, result.logprobs.top]
    return [int(result.token_ids[row]), bad, *(part[row].tobytes() for part in parts)]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(seed: int) -> None:
    logits, sampling = mixed_batch(16, 517, seed)
    logits[3, 100] = np.nan
    together = sample(logits, sampling)
    for row in range(16):
        alone = sample(logits[row : row + 1], single(sampling, row))
        assert rows_of(alone, 0) == rows_of(together, row)


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits, sampling = mixed_batch(16, 300, 1)
    before = logits.copy()
    sample(logits, sampling)
    assert np.array_equal(before, logits)


def test_frequencies_follow_the_softmax() -> None:
    draws = 20_000
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    result = sample(np.tile(logits, (draws, 1)), batch(draws, 4, seeds=3))
    shares = np.bincount(result.token_ids, minlength=4) / draws
    # Deviation of a share is at most sqrt(0.25 / 20000) = 0.0036; five of them.
    assert np.abs(shares - [0.5, 0.25, 0.125, 0.125]).max() < 0.018


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([[1, 5, 5, 2], [7, 7, 7, 7]], np.float32)
    assert sample(logits, batch(2, 4, temperature=0.0)).token_ids.tolist() == [1, 0]


def test_top_k_keeps_the_lower_ids_among_equals() -> None:
    logits = np.zeros((500, 6), np.float32)
    result = sample(logits, batch(500, 6, top_k=2))
    assert set(result.token_ids.tolist()) == {0, 1}


def test_top_p_keeps_the_lower_ids_among_equals_and_at_least_one() -> None:
    logits = np.zeros((500, 8), np.float32)
    assert set(sample(logits, batch(500, 8, top_p=0.5)).token_ids.tolist()) == {0, 1, 2, 3}
    assert set(sample(logits, batch(500, 8, top_p=1e-9)).token_ids.tolist()) == {0}


def test_top_p_counts_from_what_top_k_and_min_p_left() -> None:
    # Shares 0.5, 0.25, 0.125, ...: of the first two, 0.5 is two thirds, which reaches 0.6 alone.
    logits = np.tile(-np.arange(8, dtype=np.float32) * np.float32(np.log(2)), (300, 1))
    assert set(sample(logits, batch(300, 8, top_k=2, top_p=0.6)).token_ids.tolist()) == {0}
    assert set(sample(logits, batch(300, 8, min_p=0.4, top_p=0.6)).token_ids.tolist()) == {0}
    assert set(sample(logits, batch(300, 8, top_p=0.6)).token_ids.tolist()) == {0, 1}


def test_min_p_keeps_what_has_that_share_of_the_largest() -> None:
    logits = np.tile(np.log(np.array([1.0, 0.5, 0.2, 0.19], np.float32)), (400, 1))
    assert set(sample(logits, batch(400, 4, min_p=0.4)).token_ids.tolist()) == {0, 1}


def test_repetition_divides_positive_and_multiplies_other_logits_and_bias_comes_after() -> None:
    logits = np.array([[4.0, 3.0, -9.0], [-1.0, -1.5, -9.0], [4.0, 3.0, -9.0]], np.float32)
    edits = Adjustments(
        rows=np.array([2, 0, 1, 2], np.int32),
        token_ids=np.array([0, 0, 0, 1], np.int32),
        repetition=np.array([2.0, 2.0, 2.0, 1.0], np.float32),
        bias=np.array([1.5, 0.0, 0.0, 0.0], np.float32),
    )
    assert sample(logits, batch(3, 3, temperature=0.0, adjustments=edits)).token_ids.tolist() == [1, 1, 0]


def test_logprobs_come_from_the_logits_before_any_edit() -> None:
    logits = np.array([[3.0, 2.0, 2.0, -np.inf]], np.float32)
    edits = Adjustments(
        rows=np.array([0], np.int32),
        token_ids=np.array([0], np.int32),
        repetition=np.ones(1, np.float32),
        bias=np.array([-np.inf], np.float32),
    )
    result = sample(logits, batch(1, 4, temperature=0.0, adjustments=edits, num_logprobs=4))
    assert result.token_ids.tolist() == [1]
    assert result.logprobs is not None
    exact = np.array([3.0, 2.0, 2.0, -np.inf]) - np.log(np.exp(3.0) + 2 * np.exp(2.0))
    # The sum of float32 exponentials is good to a few 2**-24 relative; its logarithm to as much absolutely,
    # and the result, below 4 in size, is rounded to 2**-23.
    assert np.allclose(result.logprobs.top[0], exact, rtol=0.0, atol=4 * 2.0**-23)
    assert result.logprobs.top_token_ids.tolist() == [[0, 1, 2, 3]]
    assert result.logprobs.ranks.tolist() == [2]
    assert result.logprobs.chosen[0] == result.logprobs.top[0, 1]


def test_a_row_with_a_target_returns_it_with_its_logprob() -> None:
    logits = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], np.float32)
    result = sample(
        logits,
        batch(
            2,
            3,
            temperature=0.0,
            num_logprobs=0,
            targets=np.array([0, 0], np.int32),
            has_target=np.array([True, False]),
        ),
    )
    assert result.token_ids.tolist() == [0, 2]
    assert result.logprobs is not None
    assert result.logprobs.ranks.tolist() == [3, 1]
    assert result.logprobs.top.shape == (2, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "row", [[0.0, np.nan, 1.0], [0.0, np.inf, 1.0], [-np.inf, -np.inf, -np.inf]], ids=["nan", "infinity", "nothing"]
)
def test_a_row_without_usable_logits_is_invalid_alone(row: list[float], temperature: float) -> None:
    logits = np.array([[0.0, 5.0, 1.0], row, [9.0, 5.0, 1.0]], np.float32)
    for count in (None, 2):
        result = sample(logits, batch(3, 3, temperature=temperature, top_k=1, num_logprobs=count))
        assert result.invalid is not None
        assert result.invalid.tolist() == [False, True, False]
        assert result.token_ids[[0, 2]].tolist() == [1, 0]


def test_a_row_whose_every_token_is_forbidden_is_invalid() -> None:
    logits = np.ones((2, 3), np.float32)
    edits = Adjustments(
        rows=np.zeros(3, np.int32),
        token_ids=np.arange(3, dtype=np.int32),
        repetition=np.ones(3, np.float32),
        bias=np.full(3, -np.inf, np.float32),
    )
    masked = mask_words(np.array([[False, False, False], [True, True, True]]))
    for sampling in (batch(2, 3, adjustments=edits), batch(2, 3, temperature=0.0, allowed=masked)):
        result = sample(logits, sampling)
        assert result.invalid is not None
        assert result.invalid.tolist() == [True, False]


def test_a_nan_under_the_mask_still_makes_the_row_invalid() -> None:
    logits = np.array([[1.0, np.nan]], np.float32)
    result = sample(logits, batch(1, 2, allowed=mask_words(np.array([[True, False]]))))
    assert result.invalid is not None


def test_only_allowed_tokens_are_chosen_at_any_vocabulary_size() -> None:
    vocab = 77
    allowed = np.zeros((200, vocab), np.bool_)
    allowed[:, [0, 31, 32, 76]] = True
    result = sample(np.zeros((200, vocab), np.float32), batch(200, vocab, allowed=mask_words(allowed)))
    assert set(result.token_ids.tolist()) == {0, 31, 32, 76}


def test_extreme_logits_and_temperatures_give_tokens_and_no_warnings() -> None:
    logits = np.array([[3e38, -3e38, 0.0]], np.float32)
    for temperature in (1e-30, 1.0, 100.0):
        result = sample(logits, batch(1, 3, temperature=temperature, num_logprobs=1))
        assert result.invalid is None
        assert result.token_ids.tolist() == [0]


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=400),
    repeat=st.integers(1, 5),
    count=st.integers(1, 400),
)
def test_the_largest_are_found_with_ties_to_the_lower_place(values: list[int], repeat: int, count: int) -> None:
    row = np.array(values * repeat, np.float32)
    count = min(count, len(row))
    expected = sorted(sorted(range(len(row)), key=lambda place: (-row[place], place))[:count])
    assert largest_ids(row, count).tolist() == expected
