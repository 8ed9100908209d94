"""Who owns which block, in all groups at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from midspan.errors import CacheTooSmall, MidspanError, SettingsError
from midspan.interface.cache import CacheGroup
from midspan.scheduling.block_manager import BlockManager
from midspan.scheduling.request import Request

MakeManager = Callable[..., BlockManager]


@pytest.fixture
def make_manager() -> MakeManager:
    def make(
        windows: Sequence[int | None] = (None,), blocks: Sequence[int] | int = 9, size: int = 4, caching: bool = True
    ) -> BlockManager:
        groups = [
            CacheGroup(name=f"group.{number}", layers=1, kv_heads=1, key_size=8, value_size=8, window=window)
            for number, window in enumerate(windows)
        ]
        return BlockManager(groups, blocks, size, caching)

    return make


def request(tokens: Sequence[int], **options: Any) -> Request:
    return Request("r", tokens, max_total_tokens=1000, **options)


def fill(manager: BlockManager, owner: Request, *others: Request) -> Request:
    """Have all of a request's tokens computed, beside others."""
    assert manager.grow(owner, len(owner.token_ids)) >= len(owner.token_ids)
    owner.computed_tokens = len(owner.token_ids)
    manager.commit(owner)
    manager.check_integrity([owner, *others])
    return owner


def used(manager: BlockManager) -> list[int]:
    return [usage.used for usage in manager.usage().values()]


def test_every_block_but_the_padding_one_can_be_owned(make_manager: MakeManager) -> None:
    manager = make_manager(blocks=5)
    owner = request([1])
    assert manager.grow(owner, 100) == 16
    assert sorted(owner.tables[0].blocks) == [1, 2, 3, 4]
    assert manager.available() == (0,)
    manager.release(owner)
    manager.check_integrity([])
    assert manager.available() == (4,)


def test_growth_is_held_back_by_the_group_that_has_the_least(make_manager: MakeManager) -> None:
    manager = make_manager(windows=(None, 8), blocks=(9, 4))
    owner = request([1])
    assert manager.grow(owner, 32) == 12
    assert used(manager) == [3, 3]


def test_a_window_group_keeps_no_more_than_its_window_however_long_the_request(make_manager: MakeManager) -> None:
    manager = make_manager(windows=(None, 6), blocks=(40, 40))
    owner = request([1])
    for position in range(120):
        manager.grow(owner, position + 1)
        owner.computed_tokens = position + 1
        manager.commit(owner)
        manager.check_integrity([owner])
        assert used(manager)[1] <= manager.window_blocks(6) == 3
        owner.token_ids.append(0)
    assert used(manager)[0] == 30
    assert list(owner.tables[1].blocks[:27]) == [0] * 27


def test_the_last_token_is_always_left_to_run(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.release(fill(manager, request([1, 2, 3, 4, 5, 6, 7, 8])))
    assert manager.find_prefix(request([1, 2, 3, 4, 5, 6, 7, 8])).tokens == 4
    assert manager.find_prefix(request([1, 2, 3, 4, 5, 6, 7, 8, 9])).tokens == 8


def test_prefixes_are_found_within_a_salt_only_and_never_without_caching(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.release(fill(manager, request([1] * 9, salt="a")))
    assert [manager.find_prefix(request([1] * 9, salt=salt)).tokens for salt in ("a", "b", None)] == [8, 0, 0]
    uncached = make_manager(caching=False)
    uncached.release(fill(uncached, request([1] * 9)))
    assert uncached.find_prefix(request([1] * 9)).tokens == 0


def test_a_claimed_prefix_is_shared_until_its_last_owner_is_gone(make_manager: MakeManager) -> None:
    manager = make_manager()
    first = fill(manager, request([1] * 9))
    second = request([1] * 8 + [2])
    manager.claim(second, manager.find_prefix(second))
    fill(manager, second, first)
    assert used(manager) == [4]
    assert first.tables[0].blocks[:2] == second.tables[0].blocks[:2]
    manager.release(first)
    manager.check_integrity([second])
    assert used(manager) == [3]
    manager.release(second)
    assert used(manager) == [0]


def test_cached_blocks_are_taken_last_and_the_longest_unused_end_of_a_prefix_first(make_manager: MakeManager) -> None:
    manager = make_manager(blocks=7)
    manager.release(fill(manager, request([1] * 12)))
    manager.release(fill(manager, request([2] * 8)))
    taker = request([3])
    manager.grow(taker, 4)
    assert manager.find_prefix(request([1] * 13)).tokens == 12
    manager.grow(taker, 8)
    assert manager.find_prefix(request([1] * 13)).tokens == 8
    manager.grow(taker, 16)
    assert manager.find_prefix(request([1] * 13)).tokens == 0
    assert manager.find_prefix(request([2] * 9)).tokens == 8
    manager.check_integrity([taker])


def test_using_a_prefix_again_saves_it_from_eviction(make_manager: MakeManager) -> None:
    manager = make_manager(blocks=5)
    manager.release(fill(manager, request([1] * 8)))
    manager.release(fill(manager, request([2] * 8)))
    again = request([1] * 9)
    manager.claim(again, manager.find_prefix(again))
    manager.release(again)
    manager.grow(request([3]), 8)
    assert manager.find_prefix(request([1] * 9)).tokens == 8
    assert manager.find_prefix(request([2] * 9)).tokens == 0


def test_a_hit_needs_all_blocks_of_full_groups_but_only_the_window_of_others(make_manager: MakeManager) -> None:
    manager = make_manager(windows=(None, 5), blocks=(40, 40))
    owner = fill(manager, request(range(24)))
    manager.grow(owner, 25)
    manager.release(owner)
    follower = request(range(25))
    hit = manager.find_prefix(follower)
    assert hit.tokens == 24
    assert 0 not in hit.blocks[0]
    assert [bool(block) for block in hit.blocks[1]] == [False] * 5 + [True]
    manager.claim(follower, hit)
    manager.check_integrity([follower])


def test_a_block_that_the_window_misses_shortens_the_hit_of_every_group(make_manager: MakeManager) -> None:
    manager = make_manager(windows=(None, 5), blocks=(40, 7))
    manager.release(fill(manager, request(range(24))))
    manager.grow(request([99]), 8)
    assert manager.find_prefix(request(range(25))).tokens == 16
    manager.forget_prefixes()
    assert manager.find_prefix(request(range(25))).tokens == 0


def test_what_the_cache_holds_of_one_request_is_set_by_the_scarcest_group(make_manager: MakeManager) -> None:
    assert make_manager(windows=(None,), blocks=9).longest_request() == 32
    assert make_manager(windows=(8,), blocks=4).longest_request() is None
    assert make_manager(windows=(8,), blocks=3).longest_request() == 8
    assert make_manager(windows=(8, None), blocks=(4, 6)).longest_request() == 20


def test_impossible_shapes_are_refused(make_manager: MakeManager) -> None:
    with pytest.raises(SettingsError):
        make_manager(windows=())
    with pytest.raises(SettingsError):
        make_manager(blocks=(9, 9))
    with pytest.raises(SettingsError):
        make_manager(size=0)
    with pytest.raises(CacheTooSmall, match=r"group\.0"):
        make_manager(blocks=1)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda pool, owner: pool.take(1), "references but stands in 0 tables"),
        (lambda pool, owner: pool.share(owner.tables[0].blocks[:1]), "2 references but stands in 1 tables"),
        (lambda pool, owner: pool.release(owner.tables[0].blocks), "0 references but stands in 1 tables"),
        (lambda pool, owner: pool.release([0]), "padding block"),
        (lambda pool, owner: owner.tables[0].blocks.append(0), "padding in the wrong place"),
        (lambda pool, owner: pool.index.add(b"key", 8), "cached but not evictable"),
    ],
)
def test_broken_accounting_is_noticed_and_named(make_manager: MakeManager, harm: Any, words: str) -> None:
    manager = make_manager()
    owner = fill(manager, request([1] * 9))
    harm(manager._pools[0], owner)
    with pytest.raises(MidspanError, match=words):
        manager.check_integrity([owner])
