"""Seeds: of requests that bring none, and of the n sequences of one request.

Pure functions of integers. The mixing is SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), so that neighbouring
numbers give unrelated seeds.
"""

from __future__ import annotations

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(number: int) -> int:
    """One step of SplitMix64 from a state: uint64 -> uint64."""
    state = (number + GOLDEN) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def request_seed(engine_seed: int, number: int) -> int:
    """The seed of a request that brings none: the engine's, and how many came before it."""
    return mix(mix(engine_seed & MASK) ^ (number & MASK))


def sequence_seed(seed: int, index: int) -> int:
    """The seed of one of n sequences; the first one's is the request's own, so that n changes nothing for it."""
    return seed & MASK if index == 0 else mix((seed & MASK) ^ mix(index))
