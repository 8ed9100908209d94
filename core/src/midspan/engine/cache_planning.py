"""How many cache blocks each group gets.

Arithmetic over sizes; knows no device and allocates nothing. The rules:

* A group whose layers see a window of w tokens needs, for one request, the blocks
  of w tokens and of what one step may add; any other group needs those of the
  longest request. Both have one block more where a step may begin inside a block.
* Beyond that, all groups get the same number of blocks, as many as the bytes allow:
  n tokens in the cache are n tokens in each group while requests are shorter than
  the window, and a window group stops growing where no batch could use more.
* Nothing gets more than ``max_num_seqs`` requests of the longest kind can use.

Every group has one more block, the padding block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from midspan.errors import CacheTooSmall
from midspan.interface.cache import CacheGroup
from midspan.interface.device import MemoryReport
from midspan.settings import EngineSettings

DEFAULT_UTILIZATION = 0.9
"""Share of the free memory of a device that has memory of its own."""
SHARED_UTILIZATION = 0.5
"""Share where the memory is the host's, and so everybody's."""
SHARED_LIMIT_BYTES = 4 * 1024**3
"""And no more than this there, unless asked for."""


@dataclass(frozen=True, kw_only=True)
class CacheDemand:
    """What the cache has to serve.

    Attributes:
        groups: from the graph.
        block_size: tokens per block.
        block_bytes: bytes of one block of each group, as the device lays it out.
        max_num_seqs: sequences in one step.
        max_num_batched_tokens: tokens in one step.
    """

    groups: tuple[CacheGroup, ...]
    block_size: int
    block_bytes: tuple[int, ...]
    max_num_seqs: int
    max_num_batched_tokens: int

    def blocks_for_one(self, length: int) -> tuple[int, ...]:
        """Blocks of each group that one request of a length may hold at once."""
        whole = _blocks(length, self.block_size)
        needed = []
        for group in self.groups:
            if group.window is None:
                needed.append(whole)
            else:
                held = _blocks(group.window + self.max_num_batched_tokens, self.block_size) + 1
                needed.append(min(whole, held))
        return tuple(needed)

    def most_useful(self, length: int) -> tuple[int, ...]:
        """Blocks of each group beyond which no batch of requests of a length could use more."""
        whole = self.max_num_seqs * _blocks(length, self.block_size)
        useful = []
        for group in self.groups:
            if group.window is None:
                useful.append(whole)
            else:
                held = _blocks(group.window + self.max_num_batched_tokens, self.block_size) + 1
                useful.append(min(whole, self.max_num_seqs * held))
        return tuple(useful)

    def bytes_of(self, blocks: Sequence[int]) -> int:
        """Bytes of so many blocks of each group, the padding blocks added."""
        return sum((count + 1) * size for count, size in zip(blocks, self.block_bytes, strict=True))


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What to allocate.

    Attributes:
        blocks: for each group, the padding block included.
        max_model_len: the longest request that is served.
        lowered_from: the model's limit, when ``max_model_len`` had to be lowered to fit.
        bytes: of all blocks.
    """

    blocks: tuple[int, ...]
    max_model_len: int
    lowered_from: int | None
    bytes: int


def cache_budget(settings: EngineSettings, memory: MemoryReport, *, shares_host_memory: bool) -> int:
    """Bytes for the cache.

    Args:
        settings: ``kv_cache_memory_bytes`` and ``memory_utilization`` decide where they are given.
        memory: the device's memory, weights already on it.
        shares_host_memory: see ``Capabilities``; then half of what is free is taken, and 4 GiB at most.
    """
    if settings.kv_cache_memory_bytes is not None:
        return settings.kv_cache_memory_bytes
    if settings.memory_utilization is not None:
        return int(memory.free_bytes * settings.memory_utilization)
    if shares_host_memory:
        return min(int(memory.free_bytes * SHARED_UTILIZATION), SHARED_LIMIT_BYTES)
    return int(memory.free_bytes * DEFAULT_UTILIZATION)


def plan_cache(demand: CacheDemand, *, budget: int, asked: int | None, model_limit: int) -> CachePlan:
    """Divide the bytes among the groups.

    Args:
        demand: what the cache has to serve.
        budget: bytes.
        asked: ``max_model_len`` as asked for; None lets it be lowered to what fits.
        model_limit: tokens for which the model was made.

    Raises:
        CacheTooSmall: one request of the asked length, or of any length, does not fit.
    """
    wanted = model_limit if asked is None else asked
    fits = _longest_that_fits(demand, budget, wanted)
    if fits < wanted and (asked is not None or fits < 1):
        _refuse(demand, budget, wanted, fits)
    blocks = _share(demand, budget, fits)
    return CachePlan(
        blocks=tuple(count + 1 for count in blocks),
        max_model_len=fits,
        lowered_from=wanted if fits < wanted else None,
        bytes=demand.bytes_of(blocks),
    )


def _refuse(demand: CacheDemand, budget: int, wanted: int, fits: int) -> None:
    needed = demand.bytes_of(demand.blocks_for_one(wanted))
    what = f"at most {fits} tokens fit" if fits else "not even one block fits"
    lower = f"Set max_model_len to {fits} or less, or give" if fits else "Give"
    raise CacheTooSmall(
        f"A request of max_model_len={wanted} tokens needs {readable_bytes(needed)} of KV cache, but there are "
        f"{readable_bytes(budget)}: {what}.",
        remedy=f"{lower} the cache at least {needed} bytes (kv_cache_memory_bytes, or more memory_utilization).",
    )


def _longest_that_fits(demand: CacheDemand, budget: int, limit: int) -> int:
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if demand.bytes_of(demand.blocks_for_one(middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _share(demand: CacheDemand, budget: int, length: int) -> tuple[int, ...]:
    least, most = demand.blocks_for_one(length), demand.most_useful(length)

    def blocks(count: int) -> tuple[int, ...]:
        return tuple(min(max(count, low), high) for low, high in zip(least, most, strict=True))

    low, high = 0, max(most, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if demand.bytes_of(blocks(middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return blocks(low)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def readable_bytes(count: int) -> str:
    """A number of bytes for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
