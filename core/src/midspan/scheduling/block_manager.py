"""Gives cache blocks to requests, in all cache groups at once.

Full groups keep every token of a request. A group with a window gives blocks back
that fell wholly out of it, so what a request owns there is bounded; their table
entries become the padding block. Blocks of equal prefixes are shared by reference
count, through the prefix cache or straight from a request of the same prompt.

It knows block numbers and token ids only: no data, no device, no order of requests.

Invariants (``check_integrity``): see ``BlockPool`` and ``Request``; a block's
reference count is the number of tables in which it stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from midspan.errors import CacheTooSmall, MidspanError, SettingsError
from midspan.scheduling.block_pool import BlockPool
from midspan.scheduling.prefix_cache import extend_keys
from midspan.scheduling.request import NEVER, BlockTable, Request


class CacheGroupShape(Protocol):
    """What is asked of a cache group; ``midspan.interface.cache.CacheGroup`` has it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def window(self) -> int | None:
        """How many tokens a token sees, itself included; None: all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixHit:
    """Blocks that already hold the beginning of a request.

    Attributes:
        tokens: how many tokens, a multiple of the block size.
        blocks: for each group the entries of its table; the padding block before a window.
    """

    tokens: int
    blocks: tuple[list[int], ...]


@dataclass(frozen=True, kw_only=True)
class BlockUsage:
    """Blocks of one group, the padding block not counted.

    Attributes:
        used: owned by requests.
        total: all.
        cached: free or used, with a content that the prefix cache knows.
    """

    used: int
    total: int
    cached: int


class BlockManager:
    """Blocks of every cache group, and who owns them.

    Attributes:
        group_names: names of the groups, in the order of ``Request.tables``.
        block_size: tokens per block.
        enable_prefix_caching: whether contents are remembered and found again.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroupShape],
        blocks_per_group: Sequence[int] | int,
        block_size: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        """Set up empty pools.

        Args:
            groups: name and window of each.
            blocks_per_group: blocks of each group (or one number for all), the padding block included.
            block_size: tokens per block.
            enable_prefix_caching: remember contents.

        Raises:
            SettingsError: there is no group, or numbers do not fit each other.
            CacheTooSmall: a group has no block to give.
        """
        counts = [blocks_per_group] * len(groups) if isinstance(blocks_per_group, int) else list(blocks_per_group)
        if not groups or len(counts) != len(groups) or block_size < 1:
            raise SettingsError(f"{len(groups)} cache groups, {len(counts)} block counts, block size {block_size}.")
        for group, count in zip(groups, counts, strict=True):
            if count < 2:
                raise CacheTooSmall(
                    f"Cache group {group.name!r} has {count} blocks and one of them is padding.",
                    remedy="Give the cache more memory.",
                )
        self.group_names = tuple(group.name for group in groups)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._windows = tuple(group.window for group in groups)
        self._pools = tuple(BlockPool(count) for count in counts)
        self._windowed = any(window is not None for window in self._windows)
        self._longest_request = self._find_longest_request()

    def window_blocks(self, window: int) -> int:
        """Blocks that a request owns at most in a window group between steps of one token."""
        return -(-(window - 1) // self.block_size) + 1

    def longest_request(self) -> int | None:
        """Tokens that a request alone can have in the cache at once; None: no limit."""
        return self._longest_request

    def available(self) -> tuple[int, ...]:
        """Blocks that can be given out, by group."""
        return tuple(pool.available() for pool in self._pools)

    def usage(self) -> dict[str, BlockUsage]:
        """Blocks in use, by name of the group."""
        return {
            name: BlockUsage(used=pool.in_use(), total=pool.blocks - 1, cached=len(pool.index))
            for name, pool in zip(self.group_names, self._pools, strict=True)
        }

    def grow(self, request: Request, tokens: int) -> int:
        """Give a request blocks for more tokens, as far as there are any.

        First gives back what fell out of windows; the next token to run is at
        ``request.computed_tokens``.

        Args:
            request: gets the blocks.
            tokens: how many tokens it wants to have room for.

        Returns:
            The room that it has now, in tokens; less than wanted when a group ran out.
        """
        if not request.tables:
            request.tables = tuple(BlockTable() for _ in self._pools)
        elif self._windowed:
            self._drop_before_windows(request)
        wanted = -(-(tokens - request.capacity) // self.block_size)
        for pool in self._pools:
            wanted = min(wanted, pool.available())
        if wanted > 0:
            for pool, table in zip(self._pools, request.tables, strict=True):
                table.blocks.extend(pool.take(wanted))
            request.capacity += wanted * self.block_size
        return request.capacity

    def release(self, request: Request) -> None:
        """Take all blocks from a request; nothing of it is in the cache any more."""
        if request.tables:
            for pool, table in zip(self._pools, request.tables, strict=True):
                pool.release(reversed(table.blocks[table.dropped :]))
        request.tables = ()
        request.capacity = 0
        request.computed_tokens = 0
        request.committed_blocks = 0
        request.private = False

    def find_prefix(self, request: Request) -> PrefixHit:
        """The longest beginning of a waiting request that blocks already hold.

        It is held by all groups at once: by full groups from the first token on, by window
        groups as far as the token after it sees. At least the last known token is left to
        run, and every prompt row that is still to be scored.

        Args:
            request: its tokens, its salt, and its leader, whose blocks of the prompt serve as well.
        """
        limit = (len(request.token_ids) - 1) // self.block_size
        if request.unscored():
            limit = min(limit, request.scored_tokens // self.block_size)
        if self.enable_prefix_caching:
            self._extend_keys(request, limit)
        found: list[list[int]] = [[] for _ in self._pools]
        for number, window in enumerate(self._windows):
            if window is None:
                found[number] = self._run_of_blocks(request, number, limit)
                limit = len(found[number])
        length = limit
        before = -1
        while length != before:
            before = length
            for number, window in enumerate(self._windows):
                if window is not None:
                    found[number], length = self._window_run(request, number, length)
        return PrefixHit(
            tokens=length * self.block_size,
            blocks=tuple(blocks[:length] for blocks in found),
        )

    def needed_for(self, hit: PrefixHit, tokens: int) -> tuple[int, ...]:
        """Blocks by group that a request needs to be available to claim a hit and grow to ``tokens``.

        A window group is asked only for what it keeps, and what one block more takes.
        """
        fresh = -(-tokens // self.block_size) - hit.tokens // self.block_size
        needed = []
        for pool, window, blocks in zip(self._pools, self._windows, hit.blocks, strict=True):
            claimed = pool.count_free(blocks)
            most = fresh if window is None else min(fresh, self.window_blocks(window))
            needed.append(claimed + most)
        return tuple(needed)

    def claim(self, request: Request, hit: PrefixHit) -> None:
        """Share the blocks of a hit; its tokens count as computed. The request owns no block yet."""
        tables = []
        for pool, blocks in zip(self._pools, hit.blocks, strict=True):
            table = BlockTable()
            table.blocks.extend(blocks)
            table.dropped = blocks.count(0)
            pool.share(blocks[table.dropped :])
            tables.append(table)
        request.tables = tuple(tables)
        request.capacity = request.computed_tokens = hit.tokens
        request.committed_blocks = hit.tokens // self.block_size
        request.private = request.leader is not None and request.leader.private

    def restore(self, request: Request, tokens: int, *, base: Request | None = None, shared_tokens: int = 0) -> bool:
        """Give a request blocks for tokens whose content the caller writes; they count as computed.

        It becomes private. It owns no block yet.

        Args:
            request: gets the blocks.
            tokens: how many; at least 1 and fewer than it has.
            base: a private request that owns blocks and begins with the same tokens.
            shared_tokens: how many these are; their full blocks are shared, in groups that keep all tokens.

        Returns:
            False when a group has too few blocks; nothing was changed.
        """
        entries = -(-tokens // self.block_size)
        shared = 0 if base is None else min(shared_tokens, tokens) // self.block_size
        starts = [shared if window is None else self._first_visible_block(tokens, window) for window in self._windows]
        if any(entries - start > pool.available() for start, pool in zip(starts, self._pools, strict=True)):
            return False
        tables = []
        for number, (pool, window, start) in enumerate(zip(self._pools, self._windows, starts, strict=True)):
            table = BlockTable()
            if window is not None:
                table.blocks.extend([0] * start)
                table.dropped = start
            elif base is not None:
                table.blocks.extend(base.tables[number].blocks[:start])
                pool.share(table.blocks)
            table.blocks.extend(pool.take(entries - start))
            tables.append(table)
        request.tables = tuple(tables)
        request.capacity = entries * self.block_size
        request.computed_tokens = tokens
        request.private = True
        return True

    def commit(self, request: Request) -> int:
        """Offer the blocks that became full to the prefix cache.

        Returns:
            The count of computed tokens at which the next block is full; ``NEVER`` without caching, and
            for a private request.
        """
        if not self.enable_prefix_caching or request.private:
            return NEVER
        full = request.computed_tokens // self.block_size
        keys = request.block_hashes
        self._extend_keys(request, full)
        for pool, table in zip(self._pools, request.tables, strict=bool(request.tables)):
            for position in range(request.committed_blocks, full):
                pool.index.add(keys[position], table.blocks[position])
        request.committed_blocks = full
        return (full + 1) * self.block_size

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, as after a change of the weights."""
        for pool in self._pools:
            pool.forget_contents()

    def check_integrity(self, owners: Iterable[Request]) -> None:
        """Verify every invariant.

        Args:
            owners: all requests that may own blocks.

        Raises:
            MidspanError: names each broken invariant.
        """
        owned: tuple[Counter[int], ...] = tuple(Counter() for _ in self._pools)
        wrong: list[str] = []
        for request in owners:
            for number, table in enumerate(request.tables):
                wrong += self._table_faults(request, number, table)
                owned[number].update(table.blocks[table.dropped :])
        for name, pool, count in zip(self.group_names, self._pools, owned, strict=True):
            wrong += [f"group {name!r}: {fault}" for fault in pool.faults(count)]
        if wrong:
            raise MidspanError("The block accounting is broken: " + "; ".join(wrong))

    def _find_longest_request(self) -> int | None:
        """The limit that the scarcest group sets; a window group that holds its window sets none."""
        limits = [
            (pool.blocks - 1) * self.block_size
            for pool, window in zip(self._pools, self._windows, strict=True)
            if window is None or pool.blocks - 1 < self.window_blocks(window)
        ]
        return min(limits, default=None)

    def _extend_keys(self, request: Request, blocks: int) -> None:
        """Give a request the keys of its first full blocks."""
        extend_keys(
            request.block_hashes, request.token_ids, blocks=blocks, block_size=self.block_size, salt=request.salt
        )

    def _drop_before_windows(self, request: Request) -> None:
        """Give back blocks that no token from ``computed_tokens`` on can see."""
        for pool, table, window in zip(self._pools, request.tables, self._windows, strict=True):
            if window is None:
                continue
            first = self._first_visible_block(request.computed_tokens, window)
            if first > table.dropped:
                pool.release(reversed(table.blocks[table.dropped : first]))
                for position in range(table.dropped, first):
                    table.blocks[position] = 0
                table.dropped = first

    def _first_visible_block(self, position: int, window: int) -> int:
        """Table entry of the first token that the token at ``position`` sees."""
        return max(0, position - window + 1) // self.block_size

    def _block_at(self, request: Request, group: int, position: int) -> int:
        """A block that holds what the request's full block at a table position will; 0: there is none."""
        leader = request.leader
        # The first block of a private request in a window holds only what that request itself still sees.
        if leader is not None and not (leader.private and self._windows[group] is not None):
            shared = min(leader.prompt_length, leader.computed_tokens)
            if (position + 1) * self.block_size <= shared and leader.tables[group].blocks[position]:
                return leader.tables[group].blocks[position]
        if not self.enable_prefix_caching:
            return 0
        return self._pools[group].index.find(request.block_hashes[position])

    def _run_of_blocks(self, request: Request, group: int, limit: int) -> list[int]:
        """Blocks of a full group from the first on, up to the first that is missing."""
        if request.leader is None and self.enable_prefix_caching:
            return self._pools[group].index.find_run(request.block_hashes[:limit])
        blocks: list[int] = []
        for position in range(limit):
            block = self._block_at(request, group, position)
            if not block:
                break
            blocks.append(block)
        return blocks

    def _window_run(self, request: Request, group: int, length: int) -> tuple[list[int], int]:
        """Blocks of a window group for the longest prefix of at most ``length`` blocks, and that length."""
        window = self._windows[group] or 1
        run: list[int] = []
        position = length - 1
        while position >= self._first_visible_block(length * self.block_size, window):
            block = self._block_at(request, group, position)
            if block:
                run.append(block)
            else:
                length = position
                run.clear()
            position -= 1
        return [0] * (length - len(run)) + run[::-1], length

    def _table_faults(self, request: Request, number: int, table: BlockTable) -> list[str]:
        """Broken invariants of one table, in words."""
        wrong = []
        entries = len(table.blocks)
        if entries * self.block_size != request.capacity or request.computed_tokens > request.capacity:
            wrong.append(f"{entries} entries, {request.capacity} tokens' room, {request.computed_tokens} computed")
        window = self._windows[number]
        seen = 0 if window is None else self._first_visible_block(request.computed_tokens, window)
        if table.dropped > seen or any(table.blocks[: table.dropped]) or 0 in table.blocks[table.dropped :]:
            wrong.append(f"padding in the wrong place, {table.dropped} dropped")
        return [f"{request.request_id!r} in group {self.group_names[number]!r}: {fault}" for fault in wrong]
