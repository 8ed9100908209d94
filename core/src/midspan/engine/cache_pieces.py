"""Cache content without blocks: read out of one cache, written into another whose blocks are of another size.

A piece is a run of tokens of one sequence in one cache group, float32. Cutting it
into blocks and joining it again is all that happens here; a cache's own element
type and layout are behind ``Cache.read`` and ``Cache.write``. Knows no request's
state and no device.

Invariant: what is written at a position is what was read at that position, bit
for bit, as far as the target's element type holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from midspan.engine.messages import CachePiece
from midspan.interface.cache import Cache, CacheGroup

PIECE_BYTES = 16 * 2**20
"""What one piece holds at most, where a token is not larger: far below a message's limit, however large blocks are."""

CANONICAL = np.dtype("<f4")


def token_bytes(group: CacheGroup) -> int:
    """Bytes of one token of a group in a piece; the smaller of keys and values is padded there."""
    return group.layers * 2 * group.kv_heads * max(group.key_size, group.value_size) * CANONICAL.itemsize


def read_tokens(
    cache: Cache, group: CacheGroup, table: Sequence[int], *, request_id: str, index: int, first: int, end: int
) -> Iterator[CachePiece]:
    """Read tokens ``first`` to ``end - 1`` of a sequence.

    Args:
        cache: holds them.
        group: one of its groups.
        table: the sequence's blocks in that group; those of the tokens asked for are none of padding.
        request_id: of the pieces.
        index: of the pieces.
        first: position of the first token.
        end: position behind the last one.
    """
    size = cache.layout.block_size
    most = max(1, PIECE_BYTES // token_bytes(group))
    for entry, last in _runs(group, size, first, end):
        blocks = cache.read(group.name, [int(block) for block in table[entry:last]])
        tokens = blocks.reshape(*blocks.shape[:2], -1, *blocks.shape[4:])
        reached = min(end, last * size)
        for begin in range(max(first, entry * size), reached, most):
            stop = min(begin + most, reached)
            chosen = tokens[:, :, begin - entry * size : stop - entry * size]
            yield CachePiece(
                request_id=request_id,
                index=index,
                group=group.name,
                first=begin,
                tokens=stop - begin,
                data=chosen.astype(CANONICAL).tobytes(),
            )


def write_tokens(
    cache: Cache, group: CacheGroup, table: Sequence[int], pieces: Sequence[CachePiece], *, first: int, end: int
) -> None:
    """Write tokens ``first`` to ``end - 1`` of a sequence; other slots of the blocks that they stand in become zero.

    Args:
        cache: gets them.
        group: one of its groups.
        table: the sequence's blocks in that group.
        pieces: of that group; where two have the same token, the later one counts.
        first: position of the first token.
        end: position behind the last one.
    """
    size = cache.layout.block_size
    for entry, last in _runs(group, size, first, end):
        tokens = joined(pieces, group, entry * size, last * size)
        data = tokens.reshape(*tokens.shape[:2], last - entry, size, *tokens.shape[3:])
        cache.write(group.name, [int(block) for block in table[entry:last]], data)


def _runs(group: CacheGroup, block_size: int, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Table entries of tokens ``first`` to ``end - 1``, as (first, behind the last) of runs of about a piece each."""
    step = max(1, PIECE_BYTES // (token_bytes(group) * block_size))
    behind = -(-end // block_size) if first < end else 0
    for entry in range(first // block_size, behind, step):
        yield entry, min(entry + step, behind)


def joined(pieces: Sequence[CachePiece], group: CacheGroup, first: int, end: int) -> NDArray[np.float32]:
    """Tokens ``first`` to ``end - 1``: float32 ``[layers, 2, tokens, kv_heads, head_size]``, zero where no piece is."""
    rows = (group.kv_heads, max(group.key_size, group.value_size))
    result = np.zeros((group.layers, 2, end - first, *rows), np.float32)
    for piece in pieces:
        begin, stop = max(first, piece.first), min(end, piece.first + piece.tokens)
        if begin < stop:
            content = np.frombuffer(piece.data, CANONICAL).reshape(group.layers, 2, piece.tokens, *rows)
            result[:, :, begin - first : stop - first] = content[:, :, begin - piece.first : stop - piece.first]
    return result


def fault(pieces: Sequence[CachePiece], group: CacheGroup, first: int, end: int) -> str | None:
    """Why pieces do not hold all of tokens ``first`` to ``end - 1`` of a group, in words; None: they do."""
    reached = first
    for piece in sorted(pieces, key=lambda piece: piece.first):
        if piece.first < 0 or piece.tokens < 1 or len(piece.data) != piece.tokens * token_bytes(group):
            return f"a piece of {piece.tokens} tokens of group '{group.name}' has {len(piece.data)} bytes"
        if piece.first > reached:
            break
        reached = max(reached, piece.first + piece.tokens)
    if reached < end:
        return f"group '{group.name}' lacks the tokens from {reached} to {end - 1}"
    return None
