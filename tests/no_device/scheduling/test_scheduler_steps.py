"""What goes into a step, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from midspan.errors import CacheTooSmall, ContextLengthExceeded, InvalidRequest, MidspanError, SettingsError
from midspan.scheduling.request import TRANSITIONS, Request, RequestStatus

MakeDriver = Callable[..., Any]


def test_a_long_prompt_is_run_in_chunks_and_only_its_end_is_sampled(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=8)
    request = driver.add([1] * 20, 2)
    chunks = [driver.step().chunks[0] for _ in range(4)]
    assert [(chunk.start, chunk.count, chunk.sampled) for chunk in chunks] == [
        (0, 8, 0),
        (8, 8, 0),
        (16, 4, 1),
        (20, 1, 1),
    ]
    assert [list(chunk.sample_rows()) for chunk in chunks] == [[], [], [3], [0]]
    assert chunks[2].token_ids() == [1] * 4
    assert request.finish_reason == "length"
    driver.check_outputs()


def test_those_who_decode_get_their_token_while_an_earlier_prompt_is_run(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=6, policy="priority")
    quick = [driver.add([number, 1], 8, priority=2) for number in range(3)]
    driver.step()
    late = driver.add([1] * 30, priority=1)
    for _ in range(3):
        plan = driver.step()
        assert (plan.requests, plan.counts) == ([late, *quick], [3, 1, 1, 1])


def test_one_prompt_takes_no_more_of_a_step_than_the_threshold(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=32, long_prefill_token_threshold=5)
    driver.add([1] * 12)
    driver.add([2] * 3)
    assert driver.step().counts == [5, 3]


def test_no_more_requests_run_than_there_are_seats(make_driver: MakeDriver) -> None:
    driver = make_driver(seqs=2)
    requests = [driver.add([number], 3) for number in range(3)]
    assert driver.step().admitted == tuple(requests[:2])
    driver.scheduler.set_max_num_seqs(3)
    assert driver.step().admitted == (requests[2],)
    driver.scheduler.set_max_num_seqs(1)
    assert len(driver.step()) == 3


def test_the_budget_can_be_changed_between_steps(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=4)
    driver.add([1] * 30)
    assert driver.step().counts == [4]
    driver.scheduler.set_token_budget(9)
    assert driver.step().counts == [9]
    for change in (driver.scheduler.set_token_budget, driver.scheduler.set_max_num_seqs):
        with pytest.raises(SettingsError):
            change(0)


def test_first_come_first_served_goes_by_arrival_and_then_by_order_of_addition(make_driver: MakeDriver) -> None:
    driver = make_driver(seqs=1)
    names = [driver.add([1], 1, arrival=arrival).request_id for arrival in (5, 3, 3, 4)]
    order = [driver.step().requests[0].request_id for _ in range(4)]
    assert order == [names[1], names[2], names[3], names[0]]


def test_a_better_priority_takes_the_seat_of_a_worse_one_but_not_of_its_equal(make_driver: MakeDriver) -> None:
    driver = make_driver(seqs=2, policy="priority")
    low, middle = driver.add([1], 9, priority=5), driver.add([2], 9, priority=3)
    driver.step()
    equal = driver.add([3], 9, priority=5)
    assert driver.step().admitted == ()
    high = driver.add([4], 3, priority=0)
    plan = driver.step()
    assert (plan.requests, plan.preempted) == ([high, middle], (low,))
    assert low.status is RequestStatus.PREEMPTED
    driver.drain()
    assert (low.preemptions, equal.preemptions, middle.preemptions) == (1, 0, 0)
    driver.check_outputs()


def test_a_better_priority_takes_the_blocks_of_worse_ones(make_driver: MakeDriver) -> None:
    driver = make_driver(blocks=9, policy="priority", watermark=0.0)
    low = [driver.add([1] * 10, 2, priority=5), driver.add([2] * 10, 2, priority=4)]
    driver.step()
    high = driver.add([0] * 20, priority=1)
    plan = driver.step()
    assert plan.requests == [high, low[1]]
    assert plan.preempted == (low[0],)
    driver.drain()
    driver.check_outputs()


def test_when_blocks_run_out_the_latest_arrival_is_preempted_and_later_ends_with_the_same_tokens(
    make_driver: MakeDriver,
) -> None:
    driver = make_driver(blocks=8, seqs=3, watermark=0.0)
    requests = [driver.add([number] * 4, 16) for number in range(3)]
    preempted = []
    while driver.scheduler.has_requests():
        preempted += driver.step().preempted
    assert preempted[0] is requests[2]
    assert requests[0] not in preempted
    assert driver.scheduler.statistics().preemptions == len(preempted) == sum(each.preemptions for each in requests)
    assert driver.scheduler.statistics().prefix_query_tokens == 12
    driver.check_outputs()


def test_the_last_one_waits_with_its_blocks_while_there_is_none_for_its_next_token(make_driver: MakeDriver) -> None:
    driver = make_driver(blocks=3, watermark=0.0)
    first, second = driver.add([1], 4), driver.add([2] * 4, 2)
    assert driver.step().requests == [first, second]
    for _ in range(3):
        assert driver.step().requests == [first]
        assert second.computed_tokens == 4
    plan = driver.step()
    assert (plan.requests, plan.starts) == ([second], [4])
    assert driver.scheduler.statistics().preemptions == 0
    driver.check_outputs()


def test_a_request_is_not_admitted_before_all_that_is_known_of_it_fits(make_driver: MakeDriver) -> None:
    driver = make_driver(blocks=9, budget=8, watermark=0.0)
    first = driver.add([1] * 14, 2)
    second = driver.add([2] * 18, 2)
    while not first.is_finished():
        assert second not in driver.step().requests
    assert driver.step().requests == [second]


def test_a_share_of_the_blocks_is_left_to_those_who_run(make_driver: MakeDriver) -> None:
    driver = make_driver(blocks=11, watermark=0.3)
    driver.add([1] * 4, 9)
    driver.add([2] * 25, 2)
    assert len(driver.step()) == 1
    fits = make_driver(blocks=11, watermark=0.3)
    fits.add([1] * 4, 9)
    fits.add([2] * 24, 2)
    assert len(fits.step()) == 2


def test_what_could_never_run_is_refused_with_the_numbers(make_driver: MakeDriver) -> None:
    driver = make_driver(blocks=9, max_model_len=40)
    driver.add([1] * 30, 3)
    with pytest.raises(CacheTooSmall, match="34 tokens; the whole cache holds 32") as refusal:
        driver.add([1] * 30, 4)
    assert "33" in refusal.value.remedy
    with pytest.raises(ContextLengthExceeded, match="41 tokens; the limit is 40"):
        driver.add([1] * 30, 11)
    driver.drain()
    driver_of_windows = make_driver(windows=(8,), blocks=4, max_model_len=100)
    driver_of_windows.add([1] * 60, 30)
    driver_of_windows.drain()
    driver_of_windows.check_outputs()


def test_requests_without_sense_are_refused(make_driver: MakeDriver) -> None:
    driver = make_driver()
    request = driver.add([1], 2)
    with pytest.raises(InvalidRequest, match="alive"):
        driver.scheduler.add(Request(request.request_id, [1], max_total_tokens=3))
    driver.scheduler.abort(request.request_id)
    with pytest.raises(InvalidRequest, match="added before"):
        driver.scheduler.add(request)
    with pytest.raises(InvalidRequest, match="empty"):
        Request("r", [], max_total_tokens=3)
    with pytest.raises(InvalidRequest, match="nothing to do"):
        Request("r", [1, 2], output_ids=[3], max_total_tokens=3)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "random"},
        {"watermark": 1.0},
        {"watermark": -0.1},
        {"long_prefill_token_threshold": 0},
        {"max_model_len": 0},
        {"seqs": 0},
        {"budget": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(make_driver: MakeDriver, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        make_driver(**options)


def test_a_request_can_be_aborted_while_it_waits_and_while_it_runs(make_driver: MakeDriver) -> None:
    driver = make_driver(seqs=1)
    running, waiting = driver.add([1], 9), driver.add([2], 9)
    driver.step()
    assert driver.scheduler.abort(waiting.request_id)
    assert driver.scheduler.abort(running.request_id)
    assert not driver.scheduler.abort(running.request_id)
    driver.check()
    assert driver.used() == (0,)
    assert not driver.scheduler.has_requests()
    assert len(driver.step()) == 0


def test_an_abort_during_a_step_drops_its_token_and_frees_its_blocks_when_the_step_is_over(
    make_driver: MakeDriver,
) -> None:
    driver = make_driver()
    gone, stays = driver.add([1, 2], 9), driver.add([2, 1], 9)
    driver.step()
    driver.launch()
    assert driver.scheduler.abort(gone.request_id)
    assert len(gone.tables[0].blocks) == 1
    assert driver.used() == (2,)
    driver.complete()
    assert (gone.output_length, stays.output_length) == (1, 2)
    assert gone.tables == ()
    assert driver.used() == (1,)
    assert driver.step().requests == [stays]


def test_one_request_fails_and_the_step_counts_for_the_others(make_driver: MakeDriver) -> None:
    driver = make_driver()
    bad, good = driver.add([1, 2], 3), driver.add([2, 1], 3)
    driver.launch()
    assert driver.scheduler.fail(bad.request_id, "its logits were not numbers")
    driver.complete()
    assert (bad.finish_reason, bad.error, bad.output_length) == ("error", "its logits were not numbers", 0)
    driver.drain()
    assert good.finish_reason == "length"
    driver.check_outputs()


def test_a_step_that_was_lost_is_planned_again(make_driver: MakeDriver) -> None:
    driver = make_driver()
    driver.add([1] * 6, 3)
    lost, again = driver.launch(), driver.launch()
    assert (again.starts, again.counts, again.sampled) == (lost.starts, lost.counts, lost.sampled)
    with pytest.raises(MidspanError, match="already updated"):
        driver.scheduler.update(lost, [0])
    with pytest.raises(MidspanError, match="samples 1 rows, but 2"):
        driver.scheduler.update(again, [0, 0])
    driver.complete()
    driver.drain()
    driver.check_outputs()


def test_tokens_from_before_a_restart_are_run_again_and_the_rest_follows(make_driver: MakeDriver) -> None:
    driver = make_driver()
    request = driver.add([1, 2, 0], 4, outputs=6)
    assert driver.step().counts == [9]
    driver.drain()
    assert request.output_length == 10
    driver.check_outputs()


def test_each_row_of_a_scored_prompt_is_sampled_once_and_none_is_taken_from_the_cache(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=5)
    driver.add([1] * 12, 1)
    driver.drain()
    driver.scheduler.set_token_budget(5)
    scored = driver.add([1] * 12, 2, score_prompt=True)
    plans = [driver.step() for _ in range(4)]
    assert [plan.sampled for plan in plans] == [[5], [5], [2], [1]]
    assert scored.cached_tokens == 0
    assert driver.expected[scored.request_id].scored == list(range(13))


def test_scoring_goes_on_where_a_preemption_cut_it(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=5, seqs=1, policy="priority")
    scored = driver.add([1] * 12, 2, score_prompt=True, priority=1)
    driver.step()
    driver.add([0], 1, priority=0)
    plan = driver.step()
    assert plan.preempted == (scored,)
    plan = driver.step()
    assert (plan.starts, plan.counts, plan.sampled) == ([4], [5], [4])
    driver.drain()
    driver.check_outputs()


def test_equal_prefixes_are_found_and_counted_once_per_request(make_driver: MakeDriver) -> None:
    driver = make_driver()
    driver.add([1] * 12, 1)
    driver.drain()
    request = driver.add([1] * 8 + [2] * 3, 2)
    plan = driver.step()
    assert (plan.starts, plan.counts, request.cached_tokens) == ([8], [3], 8)
    driver.add([1] * 12, 2, salt="other")
    driver.drain()
    statistics = driver.scheduler.statistics()
    assert (statistics.prefix_query_tokens, statistics.prefix_hit_tokens) == (12 + 11 + 12, 8)
    driver.check_outputs()


def test_statistics_tell_who_runs_who_waits_and_how_full_the_cache_is(make_driver: MakeDriver) -> None:
    driver = make_driver(seqs=2, windows=(None, 5), blocks=(11, 21))
    leader = driver.add([1] * 9)
    driver.add([1] * 9, fork_of=leader.request_id)
    driver.add([2], 2)
    driver.add([0], 2)
    driver.launch()
    statistics = driver.scheduler.statistics()
    assert (statistics.running, statistics.waiting) == (2, 2)
    assert {name: usage.used for name, usage in statistics.blocks.items()} == {"group.0": 4, "group.1": 4}
    assert statistics.cache_usage() == 0.4
    driver.complete()
    driver.drain()
    statistics = driver.scheduler.statistics()
    assert (statistics.running, statistics.waiting, statistics.cache_usage()) == (0, 0, 0.0)


def test_a_status_follows_only_those_that_it_may(make_driver: MakeDriver) -> None:
    assert set(TRANSITIONS) == set(RequestStatus)
    request = Request("r", [1], max_total_tokens=2)
    with pytest.raises(MidspanError, match="from waiting to preempted"):
        request.move_to(RequestStatus.PREEMPTED)
    request.move_to(RequestStatus.FINISHED)
    assert request.is_finished()
    assert "finished" in repr(request)


def test_ending_thousands_in_the_queue_leaves_the_others_in_order(make_driver: MakeDriver) -> None:
    driver = make_driver(seqs=1)
    requests = [driver.add([1], 1) for _ in range(300)]
    for number, request in enumerate(requests):
        if number % 7:
            driver.scheduler.abort(request.request_id)
    driver.check()
    order = []
    while driver.scheduler.has_requests():
        order += driver.step().requests
    assert order == requests[::7]
