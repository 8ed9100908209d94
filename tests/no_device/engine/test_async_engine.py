"""Many streams over one engine process: they end, their blocks are free, and nobody sees another's tokens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

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
)
from midspan.engine.output_processing import merge
from midspan.engine.request_stream import RequestStream
from midspan.engine.status import StartupPhase
from midspan.errors import DeviceNotFound, MidspanError, ModelNotFound, SettingsError

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]


def settings(model: Path, **changes: Any) -> EngineSettings:
    chosen = {"device": "reference", "block_size": 4, "kv_cache_memory_bytes": 4 * 2**20, **changes}
    return EngineSettings(model=str(model), **chosen)


@pytest.fixture(scope="module")
def run() -> Iterator[Run[Any]]:
    """Run a coroutine in the loop in which the module's engine lives."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(cache_folder=tmp_path_factory.mktemp("cache"), offline=True)


@pytest.fixture(scope="module")
def engine(run: Run[Any], tiny_model: Path, environment: Environment) -> Iterator[AsyncEngine]:
    """One engine for the module, 50 blocks of four tokens: enough for a few requests at once."""
    started = run(
        AsyncEngine.start(
            settings(tiny_model, kv_cache_memory_bytes=200 * 1024, max_model_len=128, max_queued_requests=400),
            environment=environment,
        )
    )
    yield started
    run(started.close())


async def whole(stream: RequestStream) -> RequestOutput:
    joined = None
    async for piece in stream:
        joined = merge(joined, piece)
    assert joined is not None
    return joined


async def until_idle(engine: AsyncEngine) -> None:
    """Wait until the engine has told that nothing runs."""
    while True:
        await engine.check_health(60)
        found = engine.statistics()
        if found.running == found.waiting == 0:
            return


def params(number: int, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "temperature": 1.0, "seed": number, "ignore_eos": True, **changes})


def test_streams_give_what_the_offline_class_gives(run: Run[Any], engine: AsyncEngine, tiny_llm: LLM) -> None:
    prompts: list[Any] = ["the quick", [5, 6, 7], "zwölf 🎉", "to be"]
    chosen = [
        params(1),
        params(2, n=2, logprobs=2),
        params(3, prompt_logprobs=1),
        params(4, stop=["a", "e", "t"]),
    ]

    async def stream() -> list[RequestOutput]:
        streams = [
            await engine.submit(prompt, one, request_id=f"same-{number}")
            for number, (prompt, one) in enumerate(zip(prompts, chosen, strict=True))
        ]
        return list(await asyncio.gather(*(whole(one) for one in streams)))

    offline = tiny_llm.generate(prompts, chosen)
    for streamed, expected in zip(run(stream()), offline, strict=True):
        assert streamed.outputs == expected.outputs
        assert streamed.prompt == expected.prompt
        assert streamed.prompt_token_ids == expected.prompt_token_ids
        assert streamed.prompt_logprobs == expected.prompt_logprobs
        assert streamed.finished


def test_a_long_text_is_tokenized_beside_the_loop(run: Run[Any], engine: AsyncEngine) -> None:
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 128 tokens"):
        run(engine.submit("the fox " * 5000, params(1), request_id="long"))


@pytest.mark.parametrize(
    ("prompt", "changes"),
    [("", {}), ([], {}), ([320], {}), ([5] * 128, {}), ("\ud800", {}), ("the", {"allowed_token_ids": [4000]})],
)
def test_bad_requests_are_refused_at_the_door(
    run: Run[Any], engine: AsyncEngine, prompt: Any, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        run(engine.submit(prompt, params(1, **changes), request_id="bad"))
    assert engine.live_requests() == 0


@pytest.mark.parametrize("priority", [2**31, -(2**70)])
def test_a_priority_that_no_message_can_carry_is_refused(run: Run[Any], engine: AsyncEngine, priority: int) -> None:
    with pytest.raises(InvalidRequest, match="priority"):
        run(engine.submit("the", params(1), request_id="bad", priority=priority))
    assert engine.live_requests() == 0


def test_an_id_can_be_used_again_only_when_its_request_is_over(run: Run[Any], engine: AsyncEngine) -> None:
    async def go() -> tuple[RequestOutput, RequestOutput]:
        first = await engine.submit("the", params(1), request_id="twice")
        with pytest.raises(InvalidRequest, match="twice"):
            await engine.submit("the", params(1), request_id="twice")
        await engine.abort("twice")
        second = await engine.submit("a tale", params(2), request_id="twice")
        return await whole(first), await whole(second)

    first, second = run(go())
    assert first.outputs[0].finish_reason == "abort"
    assert second.outputs[0].finish_reason == "length"
    assert len(second.outputs[0].token_ids) == 20


def test_an_abort_ends_the_stream_and_frees_its_blocks(run: Run[Any], engine: AsyncEngine) -> None:
    async def go() -> RequestOutput:
        stream = await engine.submit("the", params(1, n=2, max_tokens=100), request_id="abort")
        joined = None
        async for piece in stream:
            joined = merge(joined, piece)
            if len(joined.outputs[0].token_ids) == 3:
                await engine.abort("abort")
        await engine.abort("abort")
        await until_idle(engine)
        assert joined is not None
        return joined

    output = run(go())
    assert {one.finish_reason for one in output.outputs} == {"abort"}
    assert output.finished
    assert len(output.outputs[0].token_ids) < 100
    assert engine.statistics().blocks_in_use == 0


def test_a_stream_that_is_closed_frees_its_blocks_and_is_exhausted(run: Run[Any], engine: AsyncEngine) -> None:
    async def go() -> list[RequestOutput]:
        stream = await engine.submit("the", params(1, max_tokens=100), request_id="closed")
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        await until_idle(engine)
        return [piece async for piece in stream]

    assert run(go()) == []
    assert engine.statistics().blocks_in_use == 0
    assert engine.live_requests() == 0


def test_a_stop_string_frees_the_blocks(run: Run[Any], engine: AsyncEngine) -> None:
    async def go() -> RequestOutput:
        stream = await engine.submit("to be", params(4, stop=["a", "e", "t"], max_tokens=100), request_id="stop")
        output = await whole(stream)
        await until_idle(engine)
        return output

    output = run(go())
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason in ("a", "e", "t")
    assert engine.statistics().blocks_in_use == 0


def test_200_streams_with_random_aborts_end_with_no_block_in_use(
    run: Run[Any], engine: AsyncEngine, tiny_llm: LLM
) -> None:
    chance = random.Random(7)
    expected = [one.outputs[0].token_ids for one in tiny_llm.generate(["the"] * 10, [params(i) for i in range(10)])]

    async def one(number: int, after: int | None, how: int) -> list[int] | None:
        stream = await engine.submit("the", params(number % 10), request_id=f"many-{number}")
        found: list[int] = []
        async for piece in stream:
            found += piece.outputs[0].token_ids
            if after is not None and len(found) >= after:
                if how == 0:
                    await stream.aclose()
                else:
                    await engine.abort(f"many-{number}")
                return None
        return found

    async def go() -> list[list[int] | None]:
        work = [one(number, chance.choice([None, 1, 5, 15]), chance.randrange(2)) for number in range(200)]
        results = await asyncio.gather(*work)
        await until_idle(engine)
        return results

    results = run(go())
    finished = [(number, found) for number, found in enumerate(results) if found is not None]
    assert 20 < len(finished) < 100
    assert all(found == expected[number % 10] for number, found in finished)
    statistics = engine.statistics()
    assert (statistics.running, statistics.waiting, statistics.blocks_in_use) == (0, 0, 0)
    assert engine.live_requests() == 0
    assert engine.is_alive()


def test_more_waiting_requests_than_the_limit_are_refused(run: Run[Any], engine: AsyncEngine) -> None:
    async def go() -> None:
        await until_idle(engine)
        streams = []
        # Nothing here lets the loop run, so the engine has told of none of them yet.
        for number in range(400):
            streams.append(await engine.submit([5], params(1, max_tokens=1), request_id=f"queue-{number}"))
        with pytest.raises(QueueFull, match="limit is 400"):
            await engine.submit([5], params(1), request_id="queue-one-too-many")
        await asyncio.gather(*(whole(stream) for stream in streams))
        await until_idle(engine)
        await whole(await engine.submit([5], params(1, max_tokens=1), request_id="queue-again"))

    run(go())


def test_statistics_count_what_was_done(run: Run[Any], engine: AsyncEngine) -> None:
    async def go() -> RequestOutput:
        output = await whole(await engine.submit([9] * 30, params(1, max_tokens=7), request_id="count"))
        await until_idle(engine)
        return output

    run(go())
    before = engine.statistics()
    again = run(go())
    after = engine.statistics()
    assert after.generation_tokens - before.generation_tokens == 7
    assert after.prompt_tokens - before.prompt_tokens == 30
    assert after.prefix_hits - before.prefix_hits == again.num_cached_tokens == 28
    assert after.finished["length"] - before.finished["length"] == 1
    metrics = again.metrics
    assert metrics is not None
    assert metrics.first_scheduled_time is not None
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    moments = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time]
    assert moments == sorted(moments)


def test_start_reports_its_phases_and_raises_what_went_wrong(
    run: Run[Any], tiny_model: Path, environment: Environment, tmp_path: Path
) -> None:
    phases: list[StartupPhase] = []
    with pytest.raises(DeviceNotFound, match="reference"):
        run(AsyncEngine.start(settings(tiny_model, device="warp"), environment=environment, report=phases.append))
    assert phases == []
    with pytest.raises(SettingsError, match="block_size"):
        run(AsyncEngine.start(settings(tiny_model, block_size=5), environment=environment, report=phases.append))
    assert [phase.name for phase in phases] == ["device", "checkpoint", "graph"]
    with pytest.raises(ModelNotFound):
        run(AsyncEngine.start(settings(tmp_path / "nowhere"), environment=environment))
    with pytest.raises(MidspanError, match="tokenizer"):
        run(AsyncEngine.start(settings(tiny_model, tokenizer=str(tmp_path / "nothing")), environment=environment))


def test_draining_lets_live_requests_end_and_takes_no_more(
    run: Run[Any], tiny_model: Path, environment: Environment
) -> None:
    async def go() -> tuple[RequestOutput, RequestOutput]:
        engine = await AsyncEngine.start(settings(tiny_model), environment=environment)
        try:
            short = await engine.submit("the", params(1, max_tokens=5), request_id="short")
            await engine.drain(60.0)
            with pytest.raises(EngineDead, match="shutting down"):
                await engine.submit("the", params(1), request_id="late")
            return await whole(short), await abort_by_drain(engine)
        finally:
            await engine.close()

    async def abort_by_drain(engine: AsyncEngine) -> RequestOutput:
        engine._draining = False
        long = await engine.submit("the", params(1, max_tokens=200), request_id="long")
        await engine.drain(0.0)
        assert engine.live_requests() == 0
        return await whole(long)

    short, long = run(go())
    assert short.outputs[0].finish_reason == "length"
    assert long.outputs[0].finish_reason == "abort"
