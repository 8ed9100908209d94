"""Cache content leaves blocks of one size and enters blocks of another, token by token the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from midspan.engine import cache_pieces
from midspan.engine.cache_pieces import fault, joined, read_tokens, token_bytes, write_tokens
from midspan.engine.messages import CachePiece
from midspan.interface import CacheGroup, CacheLayout
from midspan.runtimes.reference import ReferenceCache
from midspan.scheduling.block_manager import BlockManager
from midspan.scheduling.request import Request

FULL = CacheGroup(name="full", layers=2, kv_heads=2, key_size=3, value_size=3)


def window(tokens: int) -> CacheGroup:
    return CacheGroup(name="window", layers=1, kv_heads=1, key_size=2, value_size=5, window=tokens)


def content(group: CacheGroup, tokens: int) -> NDArray[np.float32]:
    """A number of its own for each place of each token, zero where the canonical layout pads."""
    width = max(group.key_size, group.value_size)
    data = np.arange(1, 1 + group.layers * 2 * tokens * group.kv_heads * width, dtype=np.float32)
    shaped = data.reshape(group.layers, 2, tokens, group.kv_heads, width)
    shaped[:, 0, ..., group.key_size :] = 0
    shaped[:, 1, ..., group.value_size :] = 0
    return shaped


class Side:
    """A cache, its block accounting, and requests in it."""

    def __init__(self, groups: tuple[CacheGroup, ...], block_size: int, *, blocks: int = 200) -> None:
        self.groups = groups
        self.cache = ReferenceCache(
            CacheLayout(groups=groups, block_size=block_size, dtype="float32"), (blocks,) * len(groups)
        )
        for group in groups:
            rubbish = self.cache.read(group.name, range(blocks))
            rubbish[:] = np.nan
            self.cache.write(group.name, range(blocks), rubbish)
        self.manager = BlockManager(groups, blocks, block_size, enable_prefix_caching=True)
        self.requests: list[Request] = []

    def request(self, tokens: int) -> Request:
        self.requests.append(Request(str(len(self.requests)), [5] * (tokens + 1), max_total_tokens=tokens + 2))
        return self.requests[-1]

    def fill(self, request: Request, pieces: list[CachePiece], *, first: int = 0) -> None:
        for number, group in enumerate(self.groups):
            begin = first if group.window is None else max(0, request.computed_tokens - group.window + 1)
            own = [piece for piece in pieces if piece.group == group.name]
            table = request.tables[number].blocks
            write_tokens(self.cache, group, table, own, first=begin, end=request.computed_tokens)

    def take(self, request: Request) -> list[CachePiece]:
        pieces: list[CachePiece] = []
        for number, group in enumerate(self.groups):
            end = request.computed_tokens
            begin = 0 if group.window is None else max(0, end - group.window + 1)
            table = request.tables[number].blocks
            pieces += read_tokens(self.cache, group, table, request_id="a", index=0, first=begin, end=end)
        return pieces

    def check(self) -> None:
        self.manager.check_integrity(self.requests)


def whole(groups: tuple[CacheGroup, ...], tokens: int) -> list[CachePiece]:
    return [
        CachePiece(
            request_id="a", index=0, group=group.name, first=0, tokens=tokens, data=content(group, tokens).tobytes()
        )
        for group in groups
    ]


@given(
    tokens=st.integers(1, 70),
    sizes=st.lists(st.sampled_from([1, 2, 3, 4, 7, 12, 16, 24, 64]), min_size=2, max_size=4),
    seen=st.sampled_from([1, 2, 5, 16, 33, 100]),
    piece_bytes=st.sampled_from([1, 500, 1 << 24]),
)
@settings(deadline=None, max_examples=150)
def test_content_survives_any_chain_of_block_sizes(tokens: int, sizes: list[int], seen: int, piece_bytes: int) -> None:
    groups = (FULL, window(seen))
    pieces = whole(groups, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_pieces, "PIECE_BYTES", piece_bytes)
        for size in sizes:
            side = Side(groups, size)
            request = side.request(tokens)
            assert side.manager.restore(request, tokens)
            side.fill(request, pieces)
            side.check()
            pieces = side.take(request)
            largest = max(token_bytes(group) for group in groups)
            assert max(len(piece.data) for piece in pieces) <= max(piece_bytes, largest)
            side.manager.release(request)
            side.check()
            assert side.manager.available() == (199, 199)
    for group in groups:
        own = [piece for piece in pieces if piece.group == group.name]
        first = 0 if group.window is None else max(0, tokens - group.window + 1)
        assert fault(own, group, first, tokens) is None
        assert np.array_equal(joined(own, group, first, tokens), content(group, tokens)[:, :, first:])


@given(
    tokens=st.integers(1, 60),
    other=st.integers(1, 60),
    shared=st.integers(0, 60),
    size=st.sampled_from([1, 3, 4, 16, 32]),
    seen=st.sampled_from([1, 7, 40]),
)
@settings(deadline=None, max_examples=150)
def test_a_shared_beginning_stands_once_and_is_read_by_both(
    tokens: int, other: int, shared: int, size: int, seen: int
) -> None:
    shared = min(shared, tokens, other)
    groups = (FULL, window(seen))
    side = Side(groups, size)
    base, fork = side.request(tokens), side.request(other)
    assert side.manager.restore(base, tokens)
    side.fill(base, whole(groups, tokens))
    before = side.manager.available()
    assert side.manager.restore(fork, other, base=base, shared_tokens=shared)
    taken = [then - now for then, now in zip(before, side.manager.available(), strict=True)]
    assert taken[0] == -(-other // size) - shared // size
    assert taken[1] <= min(-(-other // size), -(-(seen - 1) // size) + 1)
    side.fill(fork, whole(groups, other), first=shared // size * size)
    side.check()
    expected = content(FULL, other)
    expected[:, :, : shared // size * size] = content(FULL, tokens)[:, :, : shared // size * size]
    own = [piece for piece in side.take(fork) if piece.group == "full"]
    assert np.array_equal(joined(own, FULL, 0, other), expected)
    side.manager.release(base)
    side.check()
    again = [piece for piece in side.take(fork) if piece.group == "full"]
    assert np.array_equal(joined(again, FULL, 0, other), expected)


@given(tokens=st.integers(1, 40), size=st.sampled_from([1, 4, 16]), seen=st.sampled_from([3, 20]))
@settings(deadline=None, max_examples=60)
def test_a_request_that_does_not_fit_takes_nothing(tokens: int, size: int, seen: int) -> None:
    groups = (FULL, window(seen))
    for blocks in range(2, 45):
        side = Side(groups, size, blocks=blocks)
        request = side.request(tokens)
        fits = -(-tokens // size) <= blocks - 1
        assert side.manager.restore(request, tokens) == fits
        side.check()
        if not fits:
            assert request.computed_tokens == 0
            assert side.manager.available() == (blocks - 1, blocks - 1)
            continue
        break
    assert fits


def test_missing_tokens_and_wrong_sizes_are_told() -> None:
    (piece,) = whole((FULL,), 10)
    assert token_bytes(FULL) == 2 * 2 * 2 * 3 * 4
    assert fault([piece], FULL, 0, 10) is None
    assert fault([piece], FULL, 3, 8) is None
    assert fault([piece], FULL, 0, 11) == "group 'full' lacks the tokens from 10 to 10"
    assert fault([], FULL, 2, 4) == "group 'full' lacks the tokens from 2 to 3"
    assert "bytes" in str(fault([CachePiece("a", 0, "full", 0, 11, piece.data)], FULL, 0, 10))
    assert "bytes" in str(fault([CachePiece("a", 0, "full", -1, 10, piece.data)], FULL, 0, 9))
    late = CachePiece("a", 0, "full", 12, 10, piece.data)
    assert fault([late, piece], FULL, 0, 20) == "group 'full' lacks the tokens from 10 to 19"
