"""Samples of one prompt share its blocks, with and without a prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from midspan.errors import InvalidRequest

MakeDriver = Callable[..., Any]
PROMPT = [1] * 4 + [2] * 4 + [0, 1]


@pytest.mark.parametrize("caching", [True, False])
def test_forks_wait_for_the_prompt_and_then_run_only_its_last_partial_block(
    make_driver: MakeDriver, caching: bool
) -> None:
    driver = make_driver(caching=caching)
    leader = driver.add(PROMPT)
    forks = [driver.add(PROMPT, seed=seed, fork_of=leader.request_id) for seed in (1, 2)]
    assert driver.step().requests == [leader]
    plan = driver.launch()
    assert (plan.requests, plan.counts) == ([leader, *forks], [1, 2, 2])
    assert [fork.cached_tokens for fork in forks] == [8, 8]
    assert driver.used() == (2 + 3,)
    driver.complete()
    driver.drain()
    driver.check_outputs()


def test_forks_share_blocks_of_a_window_group_too(make_driver: MakeDriver) -> None:
    driver = make_driver(windows=(None, 6), caching=False)
    leader = driver.add(PROMPT, 20)
    fork = driver.add(PROMPT, 20, seed=1, fork_of=leader.request_id)
    driver.step()
    driver.step()
    assert fork.cached_tokens == 8
    driver.drain()
    driver.check_outputs()


def test_a_fork_that_comes_late_shares_what_its_leader_still_has(make_driver: MakeDriver) -> None:
    driver = make_driver(caching=False)
    leader = driver.add(PROMPT, 20)
    for _ in range(8):
        driver.step()
    fork = driver.add(PROMPT, seed=1, fork_of=leader.request_id)
    driver.step()
    assert fork.cached_tokens == 8
    driver.drain()
    driver.check_outputs()


def test_a_resumed_fork_shares_the_prompt_and_never_its_leaders_output(make_driver: MakeDriver) -> None:
    driver = make_driver(caching=False)
    leader = driver.add(PROMPT, 20)
    for _ in range(12):
        driver.step()
    fork = driver.add(PROMPT, outputs=12, seed=1, fork_of=leader.request_id)
    driver.step()
    assert fork.cached_tokens == 8
    driver.drain()
    driver.check_outputs()


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_forks_of_a_leader_that_ended_early_go_their_own_way(make_driver: MakeDriver, end: str) -> None:
    driver = make_driver(budget=4)
    leader = driver.add(PROMPT)
    fork = driver.add(PROMPT, seed=1, fork_of=leader.request_id)
    ended = driver.add(PROMPT, seed=2, fork_of=leader.request_id)
    driver.step()
    driver.scheduler.abort(ended.request_id)
    getattr(driver.scheduler, end)(leader.request_id)
    assert driver.step().requests == [fork]
    driver.drain()
    driver.check_outputs()
    assert fork.finish_reason == "length"


def test_a_fork_of_nobody_runs_alone(make_driver: MakeDriver) -> None:
    driver = make_driver()
    fork = driver.add(PROMPT, fork_of="gone")
    driver.drain()
    assert fork.finish_reason == "length"


def test_a_fork_never_takes_what_its_preempted_leader_has_not_computed_again(make_driver: MakeDriver) -> None:
    driver = make_driver(caching=False, policy="priority", seqs=1)
    leader = driver.add(PROMPT, 20, priority=1)
    fork = driver.add(PROMPT, seed=1, priority=2, fork_of=leader.request_id)
    driver.step()
    first = driver.add([2, 2], 1, priority=0)
    assert driver.step().requests == [first]
    assert leader.preemptions == 1
    driver.scheduler.set_token_budget(6)
    driver.step()
    assert leader.computed_tokens == 6
    driver.scheduler.set_max_num_seqs(2)
    driver.scheduler.set_token_budget(9)
    driver.step()
    assert fork.cached_tokens == 4
    driver.drain()
    driver.check_outputs()


def test_a_fork_must_repeat_its_leaders_prompt_and_salt(make_driver: MakeDriver) -> None:
    driver = make_driver()
    leader = driver.add(PROMPT)
    for prompt, salt in (([*PROMPT, 1], None), ([0, *PROMPT[1:]], None), (PROMPT, "other")):
        with pytest.raises(InvalidRequest, match="another prompt or salt"):
            driver.add(prompt, salt=salt, fork_of=leader.request_id)
    assert driver.scheduler.statistics().waiting == 1
