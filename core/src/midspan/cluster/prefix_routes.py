"""Remembers which replica was last given which beginning of a prompt.

A guess at what the replicas' prefix caches hold, made without asking them. Knows
no engine and no load.

Invariants: at most ``limit`` beginnings are remembered, those used last; a beginning leads to one
replica.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from midspan.scheduling.prefix_cache import extend_keys

CHUNK_TOKENS = 16
"""Beginnings are compared in steps of so many tokens: no cached prefix is shorter than a block, and few blocks are."""

CHUNK_BYTES = 64
"""The same for prompts that come as text: about as many bytes as a chunk of tokens has."""

MAX_CHUNKS = 256
"""Chunks of a prompt that are looked at: beyond 4096 equal tokens it does not matter which replica has more."""


def beginnings(prompt: str | Sequence[int], salt: str | None) -> list[bytes]:
    """Keys of a prompt's first one, two, ... chunks; empty for a short prompt, and for one that nobody can run.

    Args:
        prompt: text or token ids.
        salt: requests of different salts share no cache.
    """
    keys: list[bytes] = []
    size = CHUNK_BYTES if isinstance(prompt, str) else CHUNK_TOKENS
    head = prompt[: size * MAX_CHUNKS]
    try:
        ids = list(head.encode("utf-8")) if isinstance(head, str) else list(head)
        extend_keys(keys, ids, blocks=min(len(ids) // size, MAX_CHUNKS), block_size=size, salt=salt)
    except (TypeError, OverflowError, UnicodeEncodeError):
        return []  # No prompt at all; whoever runs it says why.
    return keys


class PrefixRoutes:
    """A bounded map from beginnings to numbers of replicas."""

    def __init__(self, limit: int = 1 << 17) -> None:
        self._limit = limit
        self._numbers: OrderedDict[bytes, int] = OrderedDict()

    def find(self, keys: Sequence[bytes]) -> int | None:
        """The replica of the longest known beginning."""
        for key in reversed(keys):
            number = self._numbers.get(key)
            if number is not None:
                return number
        return None

    def note(self, keys: Sequence[bytes], number: int) -> None:
        """A replica was given these beginnings."""
        for key in keys:
            self._numbers[key] = number
            self._numbers.move_to_end(key)
        while len(self._numbers) > self._limit:
            self._numbers.popitem(last=False)
