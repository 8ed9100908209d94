"""Counts that a scheduler can tell about itself. Knows no metric names and no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from midspan.scheduling.block_manager import BlockUsage


@dataclass(frozen=True, kw_only=True)
class SchedulerStatistics:
    """One look at a scheduler.

    Attributes:
        running: requests that own blocks and take part in steps.
        waiting: all other live ones: not yet admitted, preempted, or waiting for their leader.
        preemptions: how often a request lost its blocks, since the start.
        prefix_query_tokens: known tokens of requests at their first admission, since the start;
            requests that may not read the prefix cache are left out.
        prefix_hit_tokens: how many of those were found in blocks.
        blocks: usage of each cache group by name.
    """

    running: int
    waiting: int
    preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    blocks: Mapping[str, BlockUsage]

    def cache_usage(self) -> float:
        """Share of blocks in use in the fullest group, 0 to 1."""
        return max(usage.used / usage.total for usage in self.blocks.values())
