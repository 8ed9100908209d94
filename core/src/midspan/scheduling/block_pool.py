"""The blocks of one cache group: which are free, which are in use and how often.

A free block that still holds a cached prefix is kept as long as possible: blocks
without cached content are taken first, then the one that was freed the longest ago.
Knows nothing of requests or tokens.

Invariants: block 0 is the padding block and is never given out; every other block
is in exactly one of: in use (reference count above 0), unused, evictable; evictable
blocks are those free ones that the prefix index knows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from midspan.scheduling.prefix_cache import PrefixIndex


class BlockPool:
    """Reference-counted blocks ``1 .. blocks - 1`` with an order of eviction.

    Attributes:
        blocks: how many there are, the padding block included.
        index: contents of its blocks; stays empty without prefix caching.
    """

    __slots__ = ("_evictable", "_references", "_unused", "blocks", "index")

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.index = PrefixIndex()
        self._references = [0] * blocks
        self._unused = list(range(blocks - 1, 0, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()

    def available(self) -> int:
        """Blocks that ``take`` can give."""
        return len(self._unused) + len(self._evictable)

    def in_use(self) -> int:
        """Blocks that some request owns."""
        return self.blocks - 1 - self.available()

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody owns; the padding block is not counted."""
        references = self._references
        return sum([1 for block in blocks if block and not references[block]])

    def take(self, count: int) -> list[int]:
        """Give out blocks with one reference each; there must be that many ``available``."""
        unused = self._unused
        if count == 1 and unused:
            block = unused.pop()
            self._references[block] = 1
            return [block]
        kept = len(unused) - count
        if kept >= 0:
            taken = unused[kept:]
            del unused[kept:]
            taken.reverse()
        else:
            taken = unused[::-1]
            unused.clear()
            for _ in range(-kept):
                block, _nothing = self._evictable.popitem(last=False)
                self.index.forget(block)
                taken.append(block)
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that are in use, or free with cached content."""
        references = self._references
        for block in blocks:
            if not references[block]:
                del self._evictable[block]
            references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Take one reference from each block; give the one to be evicted first, first."""
        references = self._references
        for block in blocks:
            left = references[block] - 1
            references[block] = left
            if left == 0:
                if block in self.index:
                    self._evictable[block] = None
                else:
                    self._unused.append(block)

    def forget_contents(self) -> None:
        """Drop all cached prefixes; blocks in use stay with their owners."""
        self._unused.extend(self._evictable)
        self._evictable.clear()
        self.index = PrefixIndex()

    def faults(self, owned: Mapping[int, int]) -> list[str]:
        """Broken invariants, in words.

        Args:
            owned: for each block in a request's table, in how many tables it stands.
        """
        wrong = self.index.faults()
        free = [*self._unused, *self._evictable]
        if len(set(free)) != len(free):
            wrong.append("a block is free twice")
        if 0 in free or 0 in self.index or self._references[0] != 0:
            wrong.append("the padding block was given out")
        is_free = set(free)
        for block in range(1, self.blocks):
            count = self._references[block]
            if count != owned.get(block, 0):
                wrong.append(f"block {block} has {count} references but stands in {owned.get(block, 0)} tables")
            if (count == 0) != (block in is_free):
                wrong.append(
                    f"block {block} has {count} references and is {'free' if block in is_free else 'not free'}"
                )
        wrong += [f"free block {block} is cached but not evictable" for block in self._unused if block in self.index]
        wrong += [f"block {block} is evictable but not cached" for block in self._evictable if block not in self.index]
        return wrong
