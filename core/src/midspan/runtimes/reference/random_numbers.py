"""The random number of each token: a pure function of (seed, position).

Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw,
"Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Knows no logits and
keeps no state, so a token's number does not depend on what else is in the batch
or on how often a step was repeated.

Invariants: the key is the seed, low word first. Uniform numbers use the counters
``(position low, position high, 0, 0)``; derived seeds use ``(index low, index
high, 0, 1)``, so the two never share a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Uint32Array = NDArray[np.uint32]

_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64).reshape(-1, 1, 1)


def philox4x32(
    counter: Sequence[Uint32Array], key: Sequence[Uint32Array]
) -> tuple[Uint32Array, Uint32Array, Uint32Array, Uint32Array]:
    """Philox4x32-10, one block for each element.

    Args:
        counter: four uint32 arrays [N], word 0 first.
        key: two uint32 arrays [N], word 0 first.

    Returns:
        Four uint32 arrays [N] of random bits.
    """
    # Words live in uint64 so that a product keeps its high half; each stays below 2**32.
    even = np.array([counter[0], counter[2]], np.uint64)
    odd = np.array([counter[1], counter[3]], np.uint64)
    for round_key in (np.array(key, np.uint64) + _ROUNDS * _WEYL_STEPS) & _LOW_WORD:
        products = (even * _MULTIPLIERS)[::-1]
        even = (products >> _WORD_BITS) ^ odd ^ round_key
        odd = products & _LOW_WORD
    words = [word.astype(np.uint32) for word in (even[0], odd[0], even[1], odd[1])]
    return words[0], words[1], words[2], words[3]


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """A number in [0, 1) for each (seed, position), a multiple of 2**-24.

    Args:
        seeds: uint64 [S].
        positions: int64 [S], position in its sequence of the token to be chosen.

    Returns:
        float32 [S]: the upper 24 bits of the first Philox word, times 2**-24.
    """
    seeds = np.asarray(seeds, np.uint64)
    places = np.asarray(positions, np.int64).view(np.uint64)
    zero = np.zeros(seeds.shape, np.uint32)
    words = philox4x32((*_words(places), zero, zero), _words(seeds))
    numbers: NDArray[np.float32] = (words[0] >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return numbers


def derive_seed(seed: int, index: int) -> int:
    """The seed of the index-th of several samples of one request.

    Args:
        seed: the request's seed; any integer, taken modulo 2**64.
        index: 0 and up. Sample 0 has the request's own seed, so that asking for more
            samples does not change the first.

    Returns:
        An integer in [0, 2**64).
    """
    seed %= 2**64
    if index == 0:
        return seed
    key = _words(np.array([seed], np.uint64))
    counter = (*_words(np.array([index], np.uint64)), np.zeros(1, np.uint32), np.ones(1, np.uint32))
    words = philox4x32(counter, key)
    return int(words[0][0]) | int(words[1][0]) << 32


def _words(values: NDArray[np.uint64]) -> tuple[Uint32Array, Uint32Array]:
    return (values & _LOW_WORD).astype(np.uint32), (values >> _WORD_BITS).astype(np.uint32)
