"""Whatever happens in whatever order: the accounting holds, the cache is right, everybody ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from midspan.errors import CacheTooSmall

pytestmark = pytest.mark.slow

BEGINNINGS = ([0] * 9, [0] * 5 + [1] * 12, [1, 2, 0, 1, 2, 0, 1, 2], [2])
BUDGETS = st.sampled_from([24, 13, 7, 3, 1])
SEATS = st.sampled_from([6, 4, 2, 1])


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps, aborts, fails, forgets and changes budgets, on a cache that is too small."""

    def __init__(self, make_driver: Callable[..., Any], policy: str) -> None:
        super().__init__()
        self.make_driver = make_driver
        self.policy = policy

    @initialize(
        windows=st.sampled_from([(None,), (None, 6), (5,), (None, 1, 9), (3, None)]),
        blocks=st.sampled_from([24, 16, 12, 9]),
        block_size=st.sampled_from([1, 2, 4]),
        caching=st.booleans(),
        seqs=SEATS,
        budget=BUDGETS,
        threshold=st.none() | st.integers(1, 9),
        watermark=st.sampled_from([0.0, 0.2]),
    )
    def start(self, blocks: int, threshold: int | None, windows: tuple[int | None, ...], **options: Any) -> None:
        self.driver = self.make_driver(
            blocks=[blocks + 2 * number for number in range(len(windows))],
            windows=windows,
            policy=self.policy,
            long_prefill_token_threshold=threshold,
            **options,
        )

    def live(self) -> list[Any]:
        return [known.request for known in self.driver.expected.values() if not known.request.is_finished()]

    def try_to_add(self, request: Any) -> None:
        try:
            self.driver.scheduler.add(request)
        except CacheTooSmall:
            del self.driver.expected[request.request_id]
            longest = self.driver.manager.longest_request()
            assert longest is not None
            assert request.max_total_tokens - 1 > longest

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        rest=st.lists(st.integers(0, 2), max_size=12),
        new=st.integers(1, 10),
        seed=st.integers(0, 3),
        outputs=st.sampled_from([0, 0, 0, 5]),
        priority=st.integers(0, 2),
        arrival=st.sampled_from([0, 0, 1, 2]),
        salt=st.sampled_from([None, None, "tenant"]),
        score_prompt=st.sampled_from([False, False, False, True]),
    )
    def add(self, beginning: list[int], rest: list[int], **options: Any) -> None:
        self.try_to_add(self.driver.request(beginning + rest, **options))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), forks=st.integers(1, 3), outputs=st.sampled_from([0, 0, 3]))
    def fork(self, data: st.DataObject, forks: int, outputs: int) -> None:
        leader = data.draw(st.sampled_from(self.live()))
        for seed in range(1, forks + 1):
            self.try_to_add(
                self.driver.request(
                    leader.prompt_ids,
                    6,
                    seed=seed,
                    outputs=outputs,
                    priority=leader.priority,
                    salt=leader.salt,
                    fork_of=leader.request_id,
                )
            )

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        if self.driver.plan is not None:
            self.driver.complete()
        for _ in range(steps):
            self.driver.step()

    @precondition(lambda self: self.driver.plan is None)
    @rule()
    def launch(self) -> None:
        self.driver.launch()

    @precondition(lambda self: self.driver.plan is not None)
    @rule()
    def complete(self) -> None:
        self.driver.complete()

    @precondition(lambda self: self.driver.plan is not None)
    @rule()
    def lose_the_step_and_plan_again(self) -> None:
        self.driver.launch()

    @precondition(lambda self: self.live())
    @rule(data=st.data(), how=st.sampled_from(["abort", "fail"]))
    def end_one(self, data: st.DataObject, how: str) -> None:
        request = data.draw(st.sampled_from(self.live()))
        assert getattr(self.driver.scheduler, how)(request.request_id)
        assert request.finish_reason == {"abort": "abort", "fail": "error"}[how]
        assert not self.driver.scheduler.abort(request.request_id)

    @rule(budget=BUDGETS, seqs=SEATS)
    def change_budgets(self, budget: int, seqs: int) -> None:
        if self.driver.plan is not None:
            self.driver.complete()
        self.driver.scheduler.set_token_budget(budget)
        self.driver.scheduler.set_max_num_seqs(seqs)

    @rule()
    def forget_prefixes(self) -> None:
        self.driver.manager.forget_prefixes()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if hasattr(self, "driver"):
            self.driver.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            if self.driver.plan is not None:
                self.driver.complete()
            self.driver.drain()
            assert all(known.request.is_finished() for known in self.driver.expected.values())
            assert all(known.request.error is None for known in self.driver.expected.values())
            self.driver.check_outputs()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_any_course_of_events_keeps_the_accounting_the_cache_and_the_outputs_right(
    make_driver: Callable[..., Any], policy: str
) -> None:
    run_state_machine_as_test(
        lambda: SchedulerMachine(make_driver, policy),
        settings=settings(
            max_examples=80,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("windows", [(None,), (None, 7), (4, 11)])
def test_hundreds_of_steps_under_a_load_that_does_not_fit_keep_everything_right(
    make_driver: Callable[..., Any], policy: str, caching: bool, windows: tuple[int | None, ...]
) -> None:
    chance = random.Random(f"{policy} {caching} {windows}")
    driver = make_driver(
        windows=windows,
        blocks=[14 + 3 * number for number in range(len(windows))],
        block_size=3,
        caching=caching,
        seqs=7,
        budget=19,
        policy=policy,
        long_prefill_token_threshold=11,
        watermark=0.0,
    )
    live: list[Any] = []
    for turn in range(1000):
        live = [request for request in live if not request.is_finished()]
        while len(live) < 12:
            prompt = chance.choice(BEGINNINGS) + [chance.randrange(2) for _ in range(chance.randrange(6))]
            options = {"priority": chance.randrange(3), "arrival": turn, "salt": chance.choice([None, "a"])}
            leader = driver.add(prompt, chance.randrange(1, 14), score_prompt=chance.random() < 0.3, **options)
            live.append(leader)
            for seed in range(chance.choice([0, 0, 2])):
                outputs = chance.choice([0, 4])
                live.append(driver.add(prompt, 5, seed=seed, outputs=outputs, fork_of=leader.request_id, **options))
        driver.launch()
        if chance.random() < 0.15:
            driver.scheduler.abort(chance.choice(live).request_id)
        driver.complete()
        if turn % 50 == 49:
            driver.scheduler.set_token_budget(chance.choice([6, 19, 40]))
            driver.scheduler.set_max_num_seqs(chance.choice([3, 7]))
    statistics = driver.scheduler.statistics()
    assert statistics.preemptions > 0
    assert (statistics.prefix_hit_tokens > 0) or not caching
    driver.drain()
    driver.check_outputs()
