"""Philox against its published vectors, and what the sampler builds on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from midspan.runtimes.reference.random_numbers import derive_seed, philox4x32, uniform

# Known answers of the Random123 distribution, file kat_vectors, rows "philox4x32 10".
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

uint64s = st.integers(0, 2**64 - 1)


def _columns(words: tuple[int, ...]) -> list[NDArray[np.uint32]]:
    return [np.array([word], np.uint32) for word in words]


def _numbers(seeds: list[int], positions: list[int]) -> NDArray[np.float32]:
    return uniform(np.array(seeds, np.uint64), np.array(positions, np.int64))


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox4x32(_columns(counter), _columns(key))
    assert tuple(int(word[0]) for word in words) == expected


def test_a_uniform_number_is_the_top_24_bits_of_the_first_word() -> None:
    assert _numbers([0], [0])[0] == (0x6627E8D5 >> 8) / 2**24


@given(seed=uint64s, position=st.integers(0, 2**63 - 1))
def test_seed_and_position_enter_as_key_and_counter_low_word_first(seed: int, position: int) -> None:
    words = philox4x32(
        _columns((position & 0xFFFFFFFF, position >> 32, 0, 0)), _columns((seed & 0xFFFFFFFF, seed >> 32))
    )
    assert _numbers([seed], [position])[0] == (int(words[0][0]) >> 8) / 2**24


@given(rows=st.lists(st.tuples(uint64s, st.integers(0, 2**63 - 1)), min_size=1, max_size=20))
def test_a_number_does_not_depend_on_its_neighbours(rows: list[tuple[int, int]]) -> None:
    together = _numbers([seed for seed, _ in rows], [position for _, position in rows])
    alone = [_numbers([seed], [position])[0] for seed, position in rows]
    assert together.dtype == np.float32
    assert together.tolist() == [float(number) for number in alone]
    assert all(0.0 <= number < 1.0 for number in together)


def test_numbers_are_spread_evenly_over_positions_and_over_seeds() -> None:
    count = 1 << 16
    line = np.arange(count)
    for numbers in (_numbers([7] * count, line.tolist()), _numbers(line.tolist(), [7] * count)):
        histogram = np.bincount((numbers * 64).astype(int), minlength=64)
        # Each cell is binomial with mean 1024 and deviation below 32; six deviations on 64 cells
        # fail by chance about once in ten million draws, and these draws are fixed.
        assert np.abs(histogram - count / 64).max() < 6 * 32


def test_the_first_sample_keeps_the_seed_of_its_request() -> None:
    assert derive_seed(1234, 0) == 1234
    assert derive_seed(-1, 0) == 2**64 - 1


@given(seed=st.integers(-(2**63), 2**64 - 1))
def test_samples_of_one_request_have_different_seeds(seed: int) -> None:
    seeds = [derive_seed(seed, index) for index in range(16)]
    assert len(set(seeds)) == 16
    assert all(0 <= derived < 2**64 for derived in seeds)


def test_a_derived_seed_is_no_number_that_a_position_gives() -> None:
    assert derive_seed(5, 1) & 0xFFFFFFFF != int(philox4x32(_columns((1, 0, 0, 0)), _columns((5, 0)))[0][0])
