"""Keys of cached blocks."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midspan.scheduling.prefix_cache import PrefixIndex, extend_keys, root_key

TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=0, max_size=24)


def keys_of(tokens: list[int], *, block_size: int = 4, salt: str | None = None) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, blocks=len(tokens) // block_size, block_size=block_size, salt=salt)
    return keys


def test_a_key_is_the_hash_of_the_key_before_and_of_the_tokens_in_little_endian() -> None:
    first = hashlib.sha256(root_key("s") + struct.pack("<4I", 1, 2, 3, 2**32 - 1)).digest()
    second = hashlib.sha256(first + struct.pack("<4I", 5, 6, 7, 8)).digest()
    assert keys_of([1, 2, 3, 2**32 - 1, 5, 6, 7, 8, 9], salt="s") == [first, second]


@given(TOKENS, TOKENS, TOKENS)
def test_keys_are_equal_exactly_as_far_as_all_tokens_are(same: list[int], one: list[int], two: list[int]) -> None:
    first, second = same + one, same + two
    for block, (left, right) in enumerate(zip(keys_of(first), keys_of(second), strict=False)):
        assert (left == right) == (first[: 4 * block + 4] == second[: 4 * block + 4])


@given(TOKENS, st.integers(0, 6), st.integers(1, 5))
def test_keys_made_in_two_goes_are_those_made_in_one(tokens: list[int], early: int, block_size: int) -> None:
    full = len(tokens) // block_size
    keys: list[bytes] = []
    extend_keys(keys, tokens, blocks=min(early, full), block_size=block_size, salt=None)
    extend_keys(keys, tokens, blocks=full, block_size=block_size, salt=None)
    assert keys == keys_of(tokens, block_size=block_size)
    extend_keys(keys, tokens, blocks=0, block_size=block_size, salt=None)
    assert len(keys) == full


def test_tenants_never_share_a_root() -> None:
    roots = [
        root_key(None),
        root_key(""),
        root_key("a"),
        root_key("a", ("b",)),
        root_key("ab"),
        root_key("a", ("", "b")),
        root_key(None, ("a",)),
        root_key("\ud800"),
    ]
    assert len(set(roots)) == len(roots)


def test_what_is_no_token_id_has_no_key() -> None:
    with pytest.raises(OverflowError):
        keys_of([1, 2, 3, -1])
    with pytest.raises(OverflowError):
        keys_of([1, 2, 3, 2**32])


def test_an_index_keeps_the_first_block_of_a_content_and_forgets_it_on_demand() -> None:
    index = PrefixIndex()
    index.add(b"content", 3)
    index.add(b"content", 4)
    assert (index.find(b"content"), 4 in index, len(index)) == (3, False, 1)
    index.forget(3)
    assert (index.find(b"content"), 3 in index, index.faults()) == (0, False, [])
