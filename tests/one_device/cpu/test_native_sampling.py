"""The native sampler chooses what the definition chooses, row by row, whatever is asked of the neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from midspan.interface import Adjustments, SamplingBatch
from midspan.runtimes.reference.sampling import sample
from midspan_cpu.kernels.native_sampling import _Sampler
from midspan_cpu.native_library import NativeLibrary, load_native_library

ROWS = 24


@pytest.fixture(scope="module", params=["best", "portable"])
def sampler(request: pytest.FixtureRequest) -> Iterator[_Sampler]:
    library = load_native_library(instruction_set=None if request.param == "best" else "portable", threads=2)
    assert isinstance(library, NativeLibrary)
    yield _Sampler(library)
    library.close()


def random_case(seed: int) -> tuple[NDArray[np.float32], SamplingBatch]:
    """Logits with ties and forbidden tokens, and everything that can be asked, mixed over the rows.

    Numbers and borders are random, so that none falls within rounding of another: the two
    samplers add in other orders and must still agree.
    """
    random = np.random.default_rng(seed)
    columns = int(random.choice([1, 2, 7, 33, 64, 129, 1000, 5003]))
    logits = (random.standard_normal((ROWS, columns)) * random.choice([0.3, 3.0, 30.0])).astype(np.float32)
    logits[random.random(logits.shape) < 0.1] = -np.inf
    ties = random.random(ROWS) < 0.3
    logits[ties] = np.round(logits[ties])
    logits[0] = np.nan
    logits[1, -1] = np.inf
    logits[2] = -np.inf
    edits = int(random.integers(0, 3 * ROWS))
    pairs = np.unique(np.stack([random.integers(0, ROWS, edits), random.integers(0, columns, edits)], axis=1), axis=0)
    random.shuffle(pairs)
    bias = random.standard_normal(len(pairs)).astype(np.float32)
    bias[random.random(len(pairs)) < 0.2] = -np.inf
    allowed = random.integers(0, 2**32, (ROWS, -(-columns // 32)), dtype=np.uint32)
    allowed[random.random(ROWS) < 0.5] = 0xFFFFFFFF
    has_target = random.random(ROWS) < 0.1
    batch = SamplingBatch(
        temperature=random.choice([0.0, 0.37, 1.0, 1.7], ROWS).astype(np.float32),
        top_k=random.choice([1, 2, 5, 50, columns], ROWS).clip(1, columns).astype(np.int32),
        top_p=random.choice([1.0, 0.913, 0.317, 0.0001], ROWS).astype(np.float32),
        min_p=random.choice([0.0, 0.0, 0.0513], ROWS).astype(np.float32),
        seeds=random.integers(0, 2**63, ROWS).astype(np.uint64),
        positions=random.integers(0, 10**6, ROWS),
        adjustments=Adjustments(
            rows=pairs[:, 0].astype(np.int32),
            token_ids=pairs[:, 1].astype(np.int32),
            repetition=random.choice([1.0, 1.3, 0.7], len(pairs)).astype(np.float32),
            bias=bias,
        ),
        allowed=allowed,
        targets=random.integers(0, columns, ROWS).astype(np.int32),
        has_target=has_target,
    )
    return logits, batch


def run(sampler: _Sampler, logits: NDArray[np.float32], batch: SamplingBatch) -> list[NDArray[Any]]:
    return [tensor.numpy() for tensor in sampler(torch.from_numpy(logits), batch)]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("asked", ["everything", "no edits", "no mask", "no targets", "nothing but draws"])
def test_tokens_are_those_of_the_definition(sampler: _Sampler, seed: int, asked: str) -> None:
    logits, batch = random_case(seed)
    if asked in ("no edits", "nothing but draws"):
        batch = replace(batch, adjustments=None)
    if asked in ("no mask", "nothing but draws"):
        batch = replace(batch, allowed=None)
    if asked in ("no targets", "nothing but draws"):
        batch = replace(batch, targets=None, has_target=None)
    expected = sample(logits, batch)
    tokens, *_, failed = run(sampler, logits, batch)
    assert expected.invalid is not None
    np.testing.assert_array_equal(failed, expected.invalid)
    np.testing.assert_array_equal(tokens[~failed], expected.token_ids[~failed])


@pytest.mark.parametrize("seed", range(10))
def test_logprobs_are_those_of_the_definition_and_change_no_token(sampler: _Sampler, seed: int) -> None:
    logits, batch = random_case(seed)
    plain, *_ = run(sampler, logits, batch)
    asked = replace(batch, num_logprobs=3)
    tokens, chosen, ranks, top_ids, top, failed = run(sampler, logits, asked)
    np.testing.assert_array_equal(tokens, plain)
    expected = sample(logits, asked)
    assert expected.logprobs is not None
    np.testing.assert_array_equal(chosen, expected.logprobs.chosen)
    np.testing.assert_array_equal(ranks, expected.logprobs.ranks)
    np.testing.assert_array_equal(top_ids, expected.logprobs.top_token_ids)
    np.testing.assert_array_equal(top, expected.logprobs.top)
    assert failed[0]


def test_a_row_is_drawn_alike_alone_and_among_others(sampler: _Sampler) -> None:
    logits, batch = random_case(3)
    batch = replace(batch, adjustments=None, allowed=None, targets=None, has_target=None)
    together, *_ = run(sampler, logits, batch)
    for row in range(ROWS):
        one = slice(row, row + 1)
        names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
        alone, *_ = run(sampler, logits[one], replace(batch, **{name: getattr(batch, name)[one] for name in names}))
        assert alone[0] == together[row]


def test_draws_follow_the_distribution(sampler: _Sampler) -> None:
    # 20,000 draws of three tokens: each count lies within five standard deviations of its expectation.
    draws, weights = 20_000, np.array([0.5, 0.3, 0.2])
    logits = np.tile(np.log(weights).astype(np.float32), (draws, 1))
    batch = SamplingBatch(
        temperature=np.ones(draws, np.float32),
        top_k=np.full(draws, 3, np.int32),
        top_p=np.ones(draws, np.float32),
        min_p=np.zeros(draws, np.float32),
        seeds=np.full(draws, 7, np.uint64),
        positions=np.arange(draws),
    )
    tokens, *_ = run(sampler, logits, batch)
    deviation = np.sqrt(draws * weights * (1 - weights))
    assert (np.abs(np.bincount(tokens, minlength=3) - draws * weights) < 5 * deviation).all()
