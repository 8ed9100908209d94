"""Loads driven through the real engine, in the time of a device that has a clock of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from midspan.devices.discovery import DeviceCatalogue
from midspan.engine.load_clocks import HostClock, VirtualClock
from midspan.engine.load_drive import DriveMoment, DrivenLoad, drive_load
from midspan.engine.loading import LoadedModel, load_model
from midspan.engine.planned_load import LoadShape, PlannedRequest, plan_arrivals, plan_requests
from midspan.engine.step_loop import EngineCore
from midspan.errors import MidspanError, SettingsError
from midspan.interface import Batch, Cache, FinishedStep, Program, StepResult
from midspan.settings import EngineSettings

STEP, TOKEN, CONTEXT = 2**-9, 2**-16, 2**-20
"""Of the ticking device, see its fixture."""

Drive = Callable[..., DrivenLoad]


def settings(path: Path, **fields: Any) -> EngineSettings:
    return EngineSettings(
        **{"model": str(path), "load_format": "dummy", "block_size": 4, "kv_cache_memory_bytes": 2**22, **fields}
    )


@pytest.fixture
def drive(ticking: DeviceCatalogue, config_only: Path) -> Iterator[Drive]:
    """``drive(shape, rate, clock=None, watch=..., max_concurrency=None, **settings)`` on a fresh ticking engine."""
    opened: list[LoadedModel] = []

    def run(shape: LoadShape, rate: float, *, clock: Any = None, limit: int | None = None, **fields: Any) -> DrivenLoad:
        options = {name: fields.pop(name) for name in ("watch",) if name in fields}
        asked = settings(config_only, **fields)
        opened.append(load_model(asked, config_only, catalogue=ticking))
        clock = clock or VirtualClock()
        core = EngineCore(opened[-1], asked, clock=clock.now)
        requests = plan_requests(shape, 96, prompt_seed=0)
        return drive_load(core, requests, plan_arrivals(shape, rate), clock, max_concurrency=limit, **options)

    yield run
    for loaded in opened:
        loaded.close()


def moments(driven: DrivenLoad) -> list[tuple[float, list[float]]]:
    return [(timing.start, timing.moments) for timing in driven.timings]


def test_a_lone_request_takes_what_its_steps_take(drive: Drive) -> None:
    driven = drive(LoadShape(count=1, input_tokens=10, output_tokens=3), math.inf)
    first = STEP + 10 * TOKEN + 10 * CONTEXT
    second = first + STEP + TOKEN + 11 * CONTEXT
    third = second + STEP + TOKEN + 12 * CONTEXT
    assert moments(driven) == [(0.0, [first, second, third])]
    assert (driven.seconds, driven.device_seconds, driven.steps) == (third, third, 3)
    assert driven.timings[0].first() == first
    assert driven.timings[0].per_token() == (third - first) / 2


def test_the_host_adds_its_share_to_each_step(drive: Drive) -> None:
    shape = LoadShape(count=1, input_tokens=10, output_tokens=3)
    alone, slowed = drive(shape, math.inf), drive(shape, math.inf, clock=VirtualClock(host_seconds_per_step=0.5))
    assert slowed.seconds == alone.seconds + 3 * 0.5
    assert slowed.device_seconds == alone.device_seconds


def test_time_without_work_is_skipped_and_latencies_count_from_the_arrival(drive: Drive) -> None:
    shape = LoadShape(count=4, input_tokens=8, output_tokens=2)
    driven = drive(shape, 0.001)
    arrivals = plan_arrivals(shape, 0.001)
    assert [timing.start for timing in driven.timings] == arrivals
    latencies = [timing.whole() for timing in driven.timings]
    assert latencies == [pytest.approx(latencies[0])] * 4
    assert driven.seconds == pytest.approx(arrivals[-1] + (latencies[0] or 0.0))
    assert driven.computed_seconds < driven.seconds  # 4,000 seconds passed, and nobody waited for them


def test_a_request_that_comes_during_a_step_waits_for_its_end(drive: Drive) -> None:
    shape = LoadShape(count=60, input_tokens=20, output_tokens=6)
    driven = drive(shape, 100.0)
    ends = sorted({moment for timing in driven.timings for moment in timing.moments})
    assert any(timing.start not in ends for timing in driven.timings[1:])
    for timing in driven.timings:
        assert timing.first() >= STEP  # type: ignore[operator]


def test_the_same_seed_gives_the_same_numbers_exactly_and_another_gives_others(drive: Drive) -> None:
    shape = LoadShape(count=50, input_tokens=20, output_tokens=10, range_ratio=0.5, seed=3)
    first, second = drive(shape, 80.0), drive(shape, 80.0)
    assert moments(first) == moments(second)
    assert dataclasses.replace(first, computed_seconds=0) == dataclasses.replace(second, computed_seconds=0)
    assert moments(drive(dataclasses.replace(shape, seed=4), 80.0)) != moments(first)


@pytest.mark.parametrize("rate", [20.0, 200.0, math.inf])
def test_the_engines_own_count_of_requests_obeys_littles_law(drive: Drive, rate: float) -> None:
    seen: list[DriveMoment] = []
    driven = drive(LoadShape(count=100, input_tokens=16, output_tokens=8, range_ratio=0.3), rate, watch=seen.append)
    before, area, longest = 0, 0.0, 0.0
    for moment in seen:
        seconds = moment.statistics.step_device_seconds
        assert seconds is not None
        # Whoever was there during a step is there after it, or ended with it.
        inside = moment.statistics.running + moment.statistics.waiting + moment.finished - before
        before, area, longest = moment.finished, area + inside * seconds, max(longest, seconds)
    requests_per_second = len(driven.timings) / driven.seconds
    mean_latency = sum(timing.whole() or 0.0 for timing in driven.timings) / len(driven.timings)
    in_flight = requests_per_second * mean_latency
    # The engine sees a request that comes during a step only once that step has ended.
    assert in_flight - requests_per_second * longest <= area / driven.seconds <= in_flight * (1 + 1e-9)


def test_throughput_grows_with_the_rate_and_is_largest_when_all_come_at_once(drive: Drive) -> None:
    shape = LoadShape(count=80, input_tokens=16, output_tokens=8)
    throughputs = [80 / drive(shape, rate).seconds for rate in (5.0, 50.0, 500.0, math.inf)]
    assert throughputs == sorted(throughputs)
    assert throughputs[0] == pytest.approx(5.0, rel=0.05)  # all that is offered


def test_a_limit_keeps_the_others_outside_where_their_latency_does_not_count(drive: Drive) -> None:
    seen: list[DriveMoment] = []
    driven = drive(LoadShape(count=12, input_tokens=8, output_tokens=4), math.inf, limit=3, watch=seen.append)
    assert max(moment.statistics.running + moment.statistics.waiting for moment in seen) == 3
    starts = sorted({timing.start for timing in driven.timings})
    assert len(starts) == 4
    ends = {timing.moments[-1] for timing in driven.timings}
    assert all(start in ends for start in starts[1:])
    assert max(timing.whole() or 0 for timing in driven.timings) < driven.seconds / 3


def test_preemptions_and_the_fill_of_the_cache_are_told(drive: Drive) -> None:
    shape = LoadShape(count=8, input_tokens=8, output_tokens=40)
    block = 2 * 2 * 8 * 2 * 4 * 4  # layers, kv heads, head size, key and value, tokens, bytes of float32
    tight = drive(shape, math.inf, kv_cache_memory_bytes=30 * block, kv_cache_dtype="float32", max_model_len=64)
    roomy = drive(shape, math.inf)
    assert tight.preemptions > 0
    assert roomy.preemptions == 0
    assert tight.cache_usage_peak > 0.8 > roomy.cache_usage_peak > 0
    assert tight.seconds > roomy.seconds
    assert [timing.tokens for timing in tight.timings] == [40] * 8


def test_a_request_that_cannot_run_is_told_and_the_others_go_on(ticking: DeviceCatalogue, config_only: Path) -> None:
    asked = settings(config_only, max_model_len=32)
    loaded = load_model(asked, config_only, catalogue=ticking)
    clock = VirtualClock()
    requests = [PlannedRequest(prompt_ids=[1] * length, output_tokens=2) for length in (40, 8, 50)]
    core = EngineCore(loaded, asked, clock=clock.now)
    driven = drive_load(core, requests, [0.0, 1.0, 2.0], clock, max_concurrency=1)
    loaded.close()
    assert [timing.error is None for timing in driven.timings] == [False, True, False]
    assert driven.timings[1].tokens == 2


def test_a_virtual_clock_that_says_nothing_is_an_error_of_the_plugin(
    tiny_model: Path, wrapping: Callable[..., DeviceCatalogue]
) -> None:
    def mute(batch: Batch, cache: Cache, program: Program) -> Any:
        return program.run(batch, cache)

    asked = EngineSettings(model=str(tiny_model), kv_cache_memory_bytes=2**20)
    loaded = load_model(asked, tiny_model, catalogue=wrapping(mute))
    clock = VirtualClock()
    core = EngineCore(loaded, asked, clock=clock.now)
    with pytest.raises(MidspanError, match="device_seconds"):
        drive_load(core, [PlannedRequest(prompt_ids=[1], output_tokens=1)], [0.0], clock)
    loaded.close()


def test_a_step_that_fails_whole_passes_no_time_and_fails_its_request_alone(
    tiny_model: Path, wrapping: Callable[..., DeviceCatalogue]
) -> None:
    def picky(batch: Batch, cache: Cache, program: Program) -> Any:
        if 13 in batch.token_ids:
            raise ValueError("no thirteens")
        result = program.run(batch, cache).result()
        return FinishedStep(step_result=StepResult(token_ids=result.token_ids, device_seconds=0.25))

    asked = EngineSettings(model=str(tiny_model), kv_cache_memory_bytes=2**20)
    loaded = load_model(asked, tiny_model, catalogue=wrapping(picky))
    clock = VirtualClock()
    core = EngineCore(loaded, asked, clock=clock.now)
    requests = [PlannedRequest(prompt_ids=[token], output_tokens=1) for token in (13, 14)]
    driven = drive_load(core, requests, [0.0, 1.0], clock)
    loaded.close()
    assert "no thirteens" in str(driven.timings[0].error)
    assert (driven.timings[1].error, driven.seconds) == (None, 1.25)


def test_without_a_clock_of_its_own_a_devices_time_is_the_hosts(tiny_model: Path, reference_only: Any) -> None:
    asked = EngineSettings(model=str(tiny_model), kv_cache_memory_bytes=2**20)
    loaded = load_model(asked, tiny_model, catalogue=reference_only)
    clock = HostClock()
    shape = LoadShape(count=3, input_tokens=8, output_tokens=2)
    core = EngineCore(loaded, asked, clock=clock.now)
    driven = drive_load(core, plan_requests(shape, 320, prompt_seed=0), plan_arrivals(shape, 1000.0), clock)
    loaded.close()
    assert driven.device_seconds is None
    assert 0 < driven.seconds <= driven.computed_seconds * 1.5 + 0.1
    for timing in driven.timings:
        assert timing.start < timing.moments[0] < timing.moments[1] <= driven.seconds


def test_the_seconds_of_a_step_that_ran_in_parts_are_added(
    tiny_model: Path, wrapping: Callable[..., DeviceCatalogue]
) -> None:
    def fussy(batch: Batch, cache: Cache, program: Program) -> Any:
        if len(batch.context_lengths) > 1:
            raise ValueError("one at a time")
        result = program.run(batch, cache).result()
        return FinishedStep(step_result=StepResult(token_ids=result.token_ids, device_seconds=0.25))

    asked = EngineSettings(model=str(tiny_model), kv_cache_memory_bytes=2**20)
    loaded = load_model(asked, tiny_model, catalogue=wrapping(fussy))
    clock = VirtualClock()
    core = EngineCore(loaded, asked, clock=clock.now)
    requests = [PlannedRequest(prompt_ids=[token], output_tokens=1) for token in range(4)]
    driven = drive_load(core, requests, [0.0] * 4, clock)
    loaded.close()
    assert (driven.steps, driven.device_seconds, driven.seconds) == (1, 1.0, 1.0)


@pytest.mark.parametrize("rate", [0.5, 7.0, 300.0])
def test_arrivals_have_the_rate_that_was_asked_and_the_spread_of_a_poisson_process(rate: float) -> None:
    shape = LoadShape(count=4000, input_tokens=1, output_tokens=1)
    arrivals = plan_arrivals(shape, rate)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(4000 / rate)
    gaps = [later - earlier for earlier, later in zip([0.0, *arrivals], arrivals, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    # An exponential's deviation is its mean; over n of them the estimate's own deviation is sqrt(2 / n) of it.
    assert abs(deviation / mean - 1) < 6 * (2 / 4000) ** 0.5
    assert arrivals == pytest.approx([moment / rate for moment in plan_arrivals(shape, 1.0)])


def test_lengths_stay_in_their_range_and_do_not_change_with_the_prompts() -> None:
    shape = LoadShape(count=500, input_tokens=100, output_tokens=10, range_ratio=0.5, seed=1)
    first, second = plan_requests(shape, 96, prompt_seed=0), plan_requests(shape, 96, prompt_seed=None)
    lengths = [len(request.prompt_ids) for request in first]
    assert lengths == [len(request.prompt_ids) for request in second]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert {request.output_tokens for request in first} == set(range(5, 16))
    assert first[0].prompt_ids != second[0].prompt_ids
    assert shape.longest_request() == 165


@pytest.mark.parametrize(
    "fields", [{"count": 0}, {"input_tokens": 0}, {"output_tokens": 0}, {"range_ratio": 1.0}, {"range_ratio": -0.1}]
)
def test_a_shape_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        LoadShape(**{"count": 1, "input_tokens": 1, "output_tokens": 1, **fields})


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_cannot_be_is_refused(rate: float) -> None:
    with pytest.raises(SettingsError, match="rate"):
        plan_arrivals(LoadShape(count=1, input_tokens=1, output_tokens=1), rate)
