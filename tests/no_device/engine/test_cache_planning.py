"""How cache memory is divided: never too much, always enough for one request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midspan.engine.cache_planning import (
    SHARED_LIMIT_BYTES,
    CacheDemand,
    cache_budget,
    plan_cache,
)
from midspan.errors import CacheTooSmall
from midspan.interface import CacheGroup, CacheLayout, MemoryReport, block_bytes, packed_block_bytes
from midspan.settings import EngineSettings

GIB = 2**30


def group(name: str, window: int | None = None) -> CacheGroup:
    return CacheGroup(name=name, layers=2, kv_heads=2, key_size=8, value_size=8, window=window)


def demand(*groups: CacheGroup, seqs: int = 4, tokens: int = 32, block_size: int = 4) -> CacheDemand:
    return CacheDemand(
        groups=groups,
        block_size=block_size,
        block_bytes=tuple(block_bytes(group, block_size, 4) for group in groups),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
    )


FULL, WINDOW = group("full"), group("window.16", 16)
BLOCK = 2 * 2 * 16 * 4 * 4


def test_a_full_group_gets_all_that_fits() -> None:
    plan = plan_cache(demand(FULL), budget=41 * BLOCK + 17, asked=100, model_limit=256)
    assert plan.blocks == (41,)
    assert plan.bytes == 41 * BLOCK


def test_nothing_gets_more_than_the_most_requests_of_the_longest_kind_can_use() -> None:
    plan = plan_cache(demand(FULL, seqs=3), budget=GIB, asked=10, model_limit=256)
    assert plan.blocks == (3 * 3 + 1,)


def test_a_window_group_stops_growing_where_no_batch_could_use_more() -> None:
    plan = plan_cache(demand(FULL, WINDOW), budget=GIB, asked=200, model_limit=256)
    # One request holds at most the blocks of 16 + 32 tokens, and one more where a step begins inside a block.
    assert plan.blocks == (4 * 50 + 1, 4 * 13 + 1)


def test_scarce_memory_is_shared_evenly_beyond_what_one_request_needs() -> None:
    plan = plan_cache(demand(FULL, WINDOW), budget=100 * BLOCK, asked=120, model_limit=256)
    assert sum(plan.blocks) <= 100
    full, window = plan.blocks
    assert full >= 31
    assert window >= 14
    assert abs(full - window) <= 1


def test_a_length_that_was_asked_for_and_does_not_fit_is_an_error_that_says_what_fits() -> None:
    with pytest.raises(CacheTooSmall) as caught:
        plan_cache(demand(FULL), budget=11 * BLOCK, asked=100, model_limit=256)
    assert "at most 40 tokens" in caught.value.message
    assert str(26 * BLOCK) in caught.value.remedy
    assert plan_cache(demand(FULL), budget=26 * BLOCK, asked=100, model_limit=256).max_model_len == 100
    assert plan_cache(demand(FULL), budget=11 * BLOCK, asked=40, model_limit=256).blocks == (11,)


def test_a_length_that_nobody_asked_for_is_lowered_to_what_fits() -> None:
    plan = plan_cache(demand(FULL), budget=11 * BLOCK, asked=None, model_limit=256)
    assert (plan.max_model_len, plan.lowered_from) == (40, 256)
    assert plan_cache(demand(FULL), budget=GIB, asked=None, model_limit=256).lowered_from is None


def test_memory_for_not_even_one_block_is_an_error() -> None:
    with pytest.raises(CacheTooSmall, match="not even one block"):
        plan_cache(demand(FULL), budget=BLOCK, asked=None, model_limit=256)


@given(
    windows=st.lists(st.none() | st.integers(1, 300), min_size=1, max_size=3),
    seqs=st.integers(1, 300),
    tokens=st.integers(1, 3000),
    block_size=st.sampled_from([1, 4, 7, 16, 24]),
    budget=st.integers(0, 2**26),
    limit=st.integers(1, 5000),
)
def test_a_plan_fits_its_budget_and_serves_its_longest_request(
    windows: list[int | None], seqs: int, tokens: int, block_size: int, budget: int, limit: int
) -> None:
    groups = [group(f"group.{number}", window) for number, window in enumerate(windows)]
    wanted = demand(*groups, seqs=seqs, tokens=tokens, block_size=block_size)
    try:
        plan = plan_cache(wanted, budget=budget, asked=None, model_limit=limit)
    except CacheTooSmall:
        assert wanted.bytes_of(wanted.blocks_for_one(1)) > budget
        return
    sizes = wanted.block_bytes
    assert plan.bytes == sum(count * size for count, size in zip(plan.blocks, sizes, strict=True)) <= budget
    for count, window in zip(plan.blocks, windows, strict=True):
        held = plan.max_model_len if window is None else min(plan.max_model_len, window + tokens)
        assert (count - 1) * block_size >= held
    if plan.max_model_len < limit:
        assert wanted.bytes_of(wanted.blocks_for_one(plan.max_model_len + 1)) > budget


def test_the_budget_is_what_was_asked_for_or_a_modest_share() -> None:
    memory = MemoryReport(total_bytes=100 * GIB, free_bytes=40 * GIB, used_bytes=0)
    small = MemoryReport(total_bytes=4 * GIB, free_bytes=2 * GIB, used_bytes=0)
    asked = EngineSettings(kv_cache_memory_bytes=5, memory_utilization=0.5)
    assert cache_budget(asked, memory, shares_host_memory=True) == 5
    assert cache_budget(EngineSettings(memory_utilization=0.5), memory, shares_host_memory=True) == 20 * GIB
    assert cache_budget(EngineSettings(), memory, shares_host_memory=True) == SHARED_LIMIT_BYTES
    assert cache_budget(EngineSettings(), small, shares_host_memory=True) == GIB
    assert cache_budget(EngineSettings(), memory, shares_host_memory=False) == int(36 * GIB)


def test_blocks_of_8_bits_count_their_scales() -> None:
    group = CacheGroup(name="full", layers=3, kv_heads=2, key_size=64, value_size=32)

    def size(dtype: str) -> int:
        return packed_block_bytes(CacheLayout(groups=(group,), block_size=16, dtype=dtype))[0]

    numbers = 3 * 2 * (64 + 32) * 16
    assert size("float32") == 4 * numbers
    assert size("float8_e4m3") == numbers
    assert size("int8") == numbers + 3 * 2 * 2 * 16 * 2
