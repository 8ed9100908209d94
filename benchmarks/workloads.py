"""Workloads as token ids: the same requests for every engine that is measured.

Deterministic in (name, repetition). Lengths are equal in every repetition, tokens
are new, so that no prefix cache carries over.
"""

from __future__ import annotations

import random
from collections.abc import Callable

Request = tuple[list[int], int]
"""Prompt token ids, and how many tokens to generate."""

LOWEST_ID, HIGHEST_ID = 1000, 40000


def _ids(source: random.Random, count: int) -> list[int]:
    return [source.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(count)]


def decode(repetition: int) -> list[Request]:
    """One stream: 32 tokens in, 128 out."""
    return [(_ids(random.Random(f"decode:{repetition}"), 32), 128)]


def prefill(repetition: int) -> list[Request]:
    """One prompt of 1,024 tokens, one token out."""
    return [(_ids(random.Random(f"prefill:{repetition}"), 1024), 1)]


def throughput(repetition: int) -> list[Request]:
    """64 requests at once: 32 to 256 tokens in, 64 to 128 out."""
    lengths = random.Random("throughput:lengths")
    sizes = [(lengths.randint(32, 256), lengths.randint(64, 128)) for _ in range(64)]
    source = random.Random(f"throughput:{repetition}")
    return [(_ids(source, prompt), output) for prompt, output in sizes]


def shared_prefix(repetition: int) -> list[Request]:
    """32 requests that share 512 tokens and have 16 of their own, 16 out."""
    source = random.Random(f"shared:{repetition}")
    prefix = _ids(source, 512)
    return [(prefix + _ids(source, 16), 16) for _ in range(32)]


WORKLOADS: dict[str, Callable[[int], list[Request]]] = {
    "decode": decode,
    "prefill": prefill,
    "throughput": throughput,
    "shared_prefix": shared_prefix,
}
