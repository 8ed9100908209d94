"""Two engine processes behind one face: who runs what, and what goes on when one of them leaves or dies."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from midspan import (
    LLM,
    AsyncEngine,
    ContextLengthExceeded,
    EngineDead,
    EngineSettings,
    Environment,
    InvalidRequest,
    QueueFull,
    RequestOutput,
    SamplingParams,
    SettingsError,
)
from midspan.cluster.replica_set import FAR_ABOVE, SPARE_REQUESTS, ReplicaSet
from midspan.engine import async_engine
from midspan.engine.output_processing import merge
from midspan.engine.request_seeds import request_seed
from midspan.engine.request_stream import RequestStream
from midspan.engine.request_validation import PreparedRequest, prepare_request
from midspan.engine.status import StartupPhase
from midspan.errors import MidspanError

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]
LONG = [5 + place % 200 for place in range(64)]


def settings(model: Path, **changes: Any) -> EngineSettings:
    chosen = {"device": "reference", "block_size": 4, "kv_cache_memory_bytes": 2**20, **changes}
    return EngineSettings(model=str(model), **chosen)


@pytest.fixture(scope="module")
def run() -> Iterator[Run[Any]]:
    """Run a coroutine in the loop in which the module's engines live."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(cache_folder=tmp_path_factory.mktemp("cache"), offline=True)


@pytest.fixture(scope="module")
def start(run: Run[Any], tiny_model: Path, environment: Environment) -> Iterator[Callable[..., ReplicaSet]]:
    """``start(first={...}, second={...})``: two replicas with changed settings; closed after the module."""
    started: list[ReplicaSet] = []

    def make(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None, **options: Any) -> ReplicaSet:
        both = [settings(tiny_model, **(first or {})), settings(tiny_model, **{"block_size": 16, **(second or {})})]
        started.append(run(ReplicaSet.start(both, environment=environment, **options)))
        return started[-1]

    yield make
    for replicas in started:
        run(replicas.close())


@pytest.fixture(scope="module")
def phases() -> list[StartupPhase]:
    """What the shared pair reported when it started."""
    return []


@pytest.fixture(scope="module")
def pair(start: Callable[..., ReplicaSet], phases: list[StartupPhase]) -> ReplicaSet:
    """Two replicas of the tiny model, of block sizes 4 and 16. Shared: leave nothing in it."""
    return start(report=phases.append)


async def whole(stream: RequestStream) -> RequestOutput:
    joined = None
    async for piece in stream:
        joined = merge(joined, piece)
    assert joined is not None
    return joined


async def until_idle(replicas: ReplicaSet) -> None:
    """Wait until every engine that is alive has told that nothing runs in it."""
    for engine in replicas.replicas:
        while engine.is_alive():
            await engine.check_health(60)
            now = engine.statistics()
            if now.running == now.waiting == now.blocks_in_use == 0:
                break


def params(number: int, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "temperature": 1.0, "seed": number, "ignore_eos": True, **changes})


def tokens(output: RequestOutput) -> list[list[int]]:
    return [one.token_ids for one in output.outputs]


def test_requests_are_spread_and_give_what_one_engine_gives(run: Run[Any], pair: ReplicaSet, tiny_llm: LLM) -> None:
    prompts = [[number + 1, 9, 9] for number in range(10)]
    expected = tiny_llm.generate(prompts, [params(number, n=1 + number % 2) for number in range(10)])

    async def go() -> tuple[list[RequestOutput], list[int]]:
        streams = [
            await pair.submit(prompt, params(number, n=1 + number % 2), request_id=f"spread-{number}")
            for number, prompt in enumerate(prompts)
        ]
        shares = [engine.live_requests() for engine in pair.replicas]
        results = await asyncio.gather(*(whole(stream) for stream in streams))
        await until_idle(pair)
        return list(results), shares

    results, shares = run(go())
    assert shares == [5, 5]
    assert [tokens(one) for one in results] == [tokens(one) for one in expected]
    now = pair.statistics()
    assert (now.running, now.waiting, now.blocks_in_use, pair.live_requests()) == (0, 0, 0, 0)
    assert now.generation_tokens == sum(engine.statistics().generation_tokens for engine in pair.replicas)
    assert min(engine.statistics().generation_tokens for engine in pair.replicas) > 0


def test_seeds_of_requests_without_one_are_those_of_a_single_engine(
    run: Run[Any], pair: ReplicaSet, tiny_llm: LLM
) -> None:
    first = pair._requests
    free = SamplingParams(max_tokens=12, ignore_eos=True)
    seeded = [free.replace(seed=request_seed(0, first + number)) for number in range(6)]
    expected = tiny_llm.generate([[9, 9, 9]] * 6, seeded)

    async def go() -> list[RequestOutput]:
        streams = [await pair.submit([9, 9, 9], free, request_id=str(number)) for number in range(6)]
        results = await asyncio.gather(*(whole(stream) for stream in streams))
        await until_idle(pair)
        return list(results)

    results = run(go())
    assert [tokens(one) for one in results] == [tokens(one) for one in expected]
    assert len({tuple(tokens(one)[0]) for one in results}) == 6


def test_equal_beginnings_go_to_the_replica_that_holds_them(run: Run[Any], pair: ReplicaSet) -> None:
    async def go() -> list[tuple[int, int]]:
        found = []
        for number in range(6):
            # Somebody is busy in the first replica, so without the rule the second one would be taken every time.
            prompt = [*LONG[number % 2 :], 9, number]
            before = [engine.statistics().prefix_hits for engine in pair.replicas]
            filler = await pair.submit([number + 1], params(1, max_tokens=1), request_id=f"filler-{number}")
            output = await whole(await pair.submit(prompt, params(number), request_id=f"sticky-{number}"))
            await whole(filler)
            await until_idle(pair)
            after = [engine.statistics().prefix_hits for engine in pair.replicas]
            hit = [now - then for now, then in zip(after, before, strict=True)]
            found.append((hit.index(max(hit)) if any(hit) else -1, output.num_cached_tokens))
        return found

    found = run(go())
    assert [cached for _, cached in found[:2]] == [0, 0]
    homes = {place % 2: found[place][0] for place in (2, 3)}
    assert -1 not in homes.values()
    assert all(found[place][0] == homes[place % 2] for place in (2, 3, 4, 5))
    assert all(cached >= 48 for _, cached in found[2:])


def test_a_replica_that_holds_a_beginning_is_passed_over_when_it_is_overloaded(run: Run[Any], pair: ReplicaSet) -> None:
    async def go() -> list[int]:
        await whole(await pair.submit([*LONG, 1], params(1, max_tokens=1), request_id="first"))
        streams = [
            await pair.submit([*LONG, number], params(number, max_tokens=30), request_id=f"crowd-{number}")
            for number in range(30)
        ]
        shares = [engine.live_requests() for engine in pair.replicas]
        await asyncio.gather(*(whole(stream) for stream in streams))
        await until_idle(pair)
        return sorted(shares)

    few, many = run(go())
    assert few > 0
    assert many <= FAR_ABOVE * few + SPARE_REQUESTS + 1
    assert many > few


def test_an_id_is_unique_over_all_replicas_and_an_abort_finds_it(run: Run[Any], pair: ReplicaSet) -> None:
    async def go() -> list[str | None]:
        streams = [await pair.submit([7], params(1, max_tokens=200), request_id=f"id-{number}") for number in range(2)]
        for number in range(2):
            with pytest.raises(InvalidRequest, match=f"id-{number}"):
                await pair.submit([7], params(1), request_id=f"id-{number}")
        assert [engine.live_requests() for engine in pair.replicas] == [1, 1]
        for number in range(2):
            await pair.abort(f"id-{number}")
        results = await asyncio.gather(*(whole(stream) for stream in streams))
        await until_idle(pair)
        return [one.outputs[0].finish_reason for one in results]

    assert run(go()) == ["abort", "abort"]
    assert pair.live_requests() == 0


def test_limits_are_the_least_of_all_and_a_full_queue_is_passed_over(
    run: Run[Any], start: Callable[..., ReplicaSet]
) -> None:
    replicas = start({"max_model_len": 100, "max_queued_requests": 0}, {"max_model_len": 80, "max_queued_requests": 2})
    assert replicas.model.max_model_len == 80

    async def go() -> int:
        refused = 0
        streams = []
        for number in range(5):
            try:
                streams.append(await replicas.submit([7], params(1, max_tokens=200), request_id=f"queue-{number}"))
            except QueueFull:
                refused += 1
        results = await asyncio.gather(*(whole(stream) for stream in streams))
        assert {len(one.outputs[0].token_ids) for one in results} == {79}
        return refused

    refused = run(go())
    assert 1 <= refused <= 3


@pytest.mark.parametrize("from_number", [0, 1])
def test_a_request_moves_between_processes_and_its_stream_goes_on(
    run: Run[Any], pair: ReplicaSet, tiny_llm: LLM, from_number: int
) -> None:
    chosen = params(4, n=3, max_tokens=60, logprobs=1, repetition_penalty=1.1)
    expected = tiny_llm.generate([LONG], chosen)[0]
    first, second = pair.replicas[from_number], pair.replicas[1 - from_number]

    async def go() -> tuple[RequestOutput, int]:
        stream = await first.submit(LONG, chosen, request_id="moving")
        joined, moves, engines = None, 0, [first, second]
        before = second.statistics().prefix_queries
        async for piece in stream:
            joined = merge(joined, piece)
            if moves < 4 and len(joined.outputs[0].token_ids) > 10 * (moves + 1):
                assert await engines[moves % 2].migrate("moving", engines[1 - moves % 2])
                moves += 1
        await until_idle(pair)
        assert joined is not None
        # What was taken over was never looked up: nothing was computed again.
        assert second.statistics().prefix_queries == before
        return joined, moves

    output, moves = run(go())
    assert moves == 4
    assert tokens(output) == tokens(expected)
    assert [one.finish_reason for one in output.outputs] == ["length"] * 3
    assert output.outputs == expected.outputs
    assert pair.statistics().blocks_in_use == 0


def test_moving_what_is_not_there_or_cannot_fit_changes_nothing(run: Run[Any], pair: ReplicaSet) -> None:
    first, second = pair.replicas

    async def go() -> None:
        assert not await first.migrate("nobody", second)
        stream = await first.submit([7], params(1, max_tokens=100), request_id="stays")
        twin = await second.submit([7], params(1, max_tokens=100), request_id="stays")
        assert not await first.migrate("stays", first)
        with pytest.raises(InvalidRequest, match="stays"):
            await first.migrate("stays", second)
        limits = {"max_model_len": second.model.max_model_len, "max_logprobs": second.model.max_logprobs}
        for wants, tight, error in (
            (params(1, max_tokens=100), {"max_model_len": 100}, ContextLengthExceeded),
            (params(1, max_tokens=100, logprobs=5), {"max_logprobs": 4}, InvalidRequest),
        ):
            large = await first.submit([7], wants, request_id="too large")
            second.limit(**{**limits, **tight})
            with pytest.raises(error, match="other engine"):
                await first.migrate("too large", second)
            second.limit(**limits)
            await large.aclose()
        outputs = await asyncio.gather(whole(stream), whole(twin))
        assert tokens(outputs[0]) == tokens(outputs[1])
        await until_idle(pair)

    run(go())


def test_nobody_takes_an_id_at_the_target_while_its_request_is_on_the_way(run: Run[Any], pair: ReplicaSet) -> None:
    first, second = pair.replicas

    async def go() -> None:
        stream = await first.submit(LONG, params(1, max_tokens=100), request_id="taken")
        await anext(stream)
        moving = asyncio.ensure_future(first.migrate("taken", second))
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="taken"):
            await second.submit([7], params(1), request_id="taken")
        assert not await first.migrate("taken", second), "it is leaving already"
        assert await moving
        await stream.aclose()
        late = await second.submit([7], params(1), request_id="taken")
        assert (await whole(late)).outputs[0].finish_reason == "length"
        await until_idle(pair)

    run(go())
    assert pair.live_requests() == 0


def test_a_client_that_leaves_during_a_move_leaves_nothing_behind(run: Run[Any], pair: ReplicaSet) -> None:
    first, second = pair.replicas

    async def go() -> None:
        streams = [await first.submit(LONG, params(i, max_tokens=150), request_id=f"leaver-{i}") for i in range(6)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        moves = [asyncio.ensure_future(first.migrate(f"leaver-{number}", second)) for number in range(6)]
        await asyncio.sleep(0)
        for stream in streams[:3]:
            await stream.aclose()
        left = await asyncio.gather(*moves)
        assert left[:3] == [False] * 3
        assert left[3:] == [True] * 3
        for stream in streams[3:]:
            await stream.aclose()
        await until_idle(pair)

    run(go())
    assert pair.live_requests() == 0
    assert pair.statistics().blocks_in_use == 0


def test_an_engine_that_is_killed_is_avoided_and_its_requests_go_on(
    run: Run[Any], start: Callable[..., ReplicaSet], tiny_llm: LLM
) -> None:
    replicas = start()
    expected = tiny_llm.generate([[number + 1, 9] for number in range(8)], [params(i, max_tokens=40) for i in range(8)])

    async def go() -> tuple[list[RequestOutput], RequestOutput]:
        streams = [
            await replicas.submit([number + 1, 9], params(number, max_tokens=40), request_id=f"kill-{number}")
            for number in range(8)
        ]
        await asyncio.gather(*(anext(stream) for stream in streams[:2]))
        victim = replicas.replicas[0]
        firsts = [await anext(stream) for stream in streams]
        os.kill(victim.engine_pid(), signal.SIGKILL)
        assert victim.is_ready(), "nobody has noticed yet"
        assert not await victim.migrate("kill-0", replicas.replicas[1])
        assert not victim.is_ready()
        assert await victim.migrate("kill-2", replicas.replicas[1])
        await replicas.check_health(60)
        assert replicas.is_alive()
        late = await replicas.submit([200, 9], params(1, max_tokens=40), request_id="late")
        assert replicas.replicas[1].knows("late")
        late_output = await whole(late)
        rest = await asyncio.gather(*(whole(stream) for stream in streams))
        await until_idle(replicas)
        return [merge(first, one) for first, one in zip(firsts, rest, strict=True)], late_output

    results, late = run(go())
    for number, (output, wanted) in enumerate(zip(results, expected, strict=True)):
        found = tokens(output)[0]
        # The first two gave one piece before.
        assert found == tokens(wanted)[0][-len(found) :]
        assert len(found) >= 39 - (number < 2)
    assert late.outputs[0].finish_reason == "length"
    now = replicas.statistics()
    assert (now.blocks_in_use, replicas.live_requests(), now.restarts) == (0, 0, 1)


def test_requests_of_an_engine_that_cannot_be_replaced_go_on_in_the_other(
    run: Run[Any], start: Callable[..., ReplicaSet], tiny_llm: LLM
) -> None:
    replicas = start(max_restarts=0)
    expected = tiny_llm.generate([[3, 9]], params(3, n=2, max_tokens=60))[0]

    async def go() -> RequestOutput:
        stream = await replicas.submit([3, 9], params(3, n=2, max_tokens=60), request_id="orphan")
        joined = merge(None, await anext(stream))
        dying, other = replicas.replicas
        assert dying.knows("orphan")
        os.kill(dying.engine_pid(), signal.SIGKILL)
        async for piece in stream:
            joined = merge(joined, piece)
        assert not dying.is_alive()
        gone = dying.statistics()
        assert (gone.running, gone.waiting, gone.blocks_in_use, gone.cache_usage) == (0, 0, 0, 0.0)
        assert gone.generation_tokens > 0
        assert replicas.is_alive()
        await replicas.check_health(60)
        os.kill(other.engine_pid(), signal.SIGKILL)
        while replicas.is_alive():
            await asyncio.sleep(0.005)
        with pytest.raises(EngineDead):
            await replicas.check_health(60)
        with pytest.raises(EngineDead):
            await replicas.submit([3], params(1), request_id="too late")
        return joined

    assert tokens(run(go())) == tokens(expected)


def test_a_replica_that_is_withdrawn_hands_its_requests_on_with_their_cache(
    run: Run[Any], start: Callable[..., ReplicaSet], tiny_llm: LLM
) -> None:
    replicas = start()
    prompts = [[*LONG, number] for number in range(6)]
    chosen = [
        params(number, n=1 + number % 3, max_tokens=80, prompt_logprobs=number % 2 or None) for number in range(6)
    ]
    expected = tiny_llm.generate(prompts, chosen)
    leaving, staying = replicas.replicas

    async def go() -> tuple[list[RequestOutput], int]:
        streams = [
            await leaving.submit(prompt, one, request_id=f"on-{number}")
            for number, (prompt, one) in enumerate(zip(prompts, chosen, strict=True))
        ]
        work = [asyncio.ensure_future(whole(stream)) for stream in streams]
        while leaving.statistics().generation_tokens < 20:
            await asyncio.sleep(0.005)
        moved = await replicas.withdraw(0, 30.0)
        results = await asyncio.gather(*work)
        await until_idle(replicas)
        late = await whole(await replicas.submit([9], params(1), request_id="late"))
        assert late.outputs[0].finish_reason == "length"
        return list(results), moved

    results, moved = run(go())
    assert moved == 6
    assert [one.outputs for one in results] == [one.outputs for one in expected]
    assert [one.prompt_logprobs for one in results] == [one.prompt_logprobs for one in expected]
    assert not leaving.is_alive()
    assert replicas.is_alive()
    assert (staying.statistics().blocks_in_use, replicas.live_requests()) == (0, 0)
    with pytest.raises(SettingsError, match="no replica 2"):
        run(replicas.withdraw(2, 1.0))


def test_a_request_that_is_prepared_while_its_replica_is_withdrawn_goes_to_another_one(
    run: Run[Any], start: Callable[..., ReplicaSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas = start()
    leaving, staying = replicas.replicas
    gate = threading.Event()

    def prepare_late(*arguments: Any, **options: Any) -> PreparedRequest:
        assert gate.wait(60)
        return prepare_request(*arguments, **options)

    async def go() -> RequestOutput:
        busy = await leaving.submit(LONG, params(1, max_tokens=150), request_id="busy")
        filler = await staying.submit(LONG, params(1, max_tokens=150), request_id="filler")
        await anext(busy)
        monkeypatch.setattr(async_engine, "LONG_TEXT", 0)
        monkeypatch.setattr(async_engine, "prepare_request", prepare_late)
        submitting = asyncio.ensure_future(replicas.submit([9], params(1), request_id="late"))
        await asyncio.sleep(0)
        assert leaving.knows("late")
        withdrawing = asyncio.ensure_future(replicas.withdraw(0, 60.0))
        await asyncio.sleep(0)
        gate.set()
        stream = await submitting
        assert staying.knows("late")
        assert await withdrawing == 1
        for other in (busy, filler):
            await other.aclose()
        output = await whole(stream)
        await until_idle(replicas)
        return output

    assert run(go()).outputs[0].finish_reason == "length"


def test_a_replica_that_dies_while_it_is_withdrawn_still_hands_all_its_requests_on(
    run: Run[Any], start: Callable[..., ReplicaSet], tiny_llm: LLM
) -> None:
    replicas = start()
    expected = tiny_llm.generate([LONG] * 3, [params(number, max_tokens=120) for number in range(3)])
    leaving = replicas.replicas[0]

    async def go() -> tuple[list[RequestOutput], int]:
        streams = [await leaving.submit(LONG, params(i, max_tokens=120), request_id=f"sick-{i}") for i in range(3)]
        work = [asyncio.ensure_future(whole(stream)) for stream in streams]
        while leaving.statistics().generation_tokens < 9:
            await asyncio.sleep(0)
        os.kill(leaving.engine_pid(), signal.SIGKILL)
        moved = await replicas.withdraw(0, 0.0)
        results = await asyncio.gather(*work)
        await until_idle(replicas)
        return list(results), moved

    results, moved = run(go())
    assert moved == 3
    assert [tokens(one) for one in results] == [tokens(one) for one in expected]


def test_a_start_tells_what_each_device_was_taken_for(pair: ReplicaSet, phases: list[StartupPhase]) -> None:
    told = {phase.name: phase.detail for phase in phases}
    for number in range(len(pair.replicas)):
        assert "as asked" in told[f"device [{number} reference]"]
        assert told[f"ready [{number} reference]"] == "LlamaForCausalLM on reference"


def test_a_start_fails_as_a_whole_when_one_engine_fails(
    run: Run[Any], tiny_model: Path, environment: Environment
) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(SettingsError, match="block_size"):
        run(ReplicaSet.start([settings(tiny_model), settings(tiny_model, block_size=5)], environment=environment))
    assert set(psutil.Process().children()) <= before
    with pytest.raises(MidspanError, match="no device"):
        run(ReplicaSet.start([], environment=environment))


def test_an_engine_of_another_model_is_no_replica_and_takes_no_cache(
    run: Run[Any], pair: ReplicaSet, write_model: Callable[..., Path], environment: Environment
) -> None:
    other = run(AsyncEngine.start(settings(write_model(seed=9, num_hidden_layers=1)), environment=environment))
    with pytest.raises(SettingsError, match="one model"):
        ReplicaSet([pair.replicas[0], other], seed=0)

    async def go() -> RequestOutput:
        stream = await pair.replicas[0].submit(LONG, params(1, max_tokens=60), request_id="stray")
        joined = merge(None, await anext(stream))
        assert await pair.replicas[0].migrate("stray", other)
        async for piece in stream:
            joined = merge(joined, piece)
        await until_idle(pair)
        await other.check_health(60)
        return joined

    output = run(go())
    assert len(output.outputs[0].token_ids) == 60
    # It was computed again from its tokens, by the model that is there.
    assert other.statistics().prefix_queries > len(LONG)
    alone = ReplicaSet([other], seed=0)
    assert alone.model == other.model
    run(alone.close())
    assert not alone.is_alive()
