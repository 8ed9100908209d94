"""The engine's process dies or loses its parent: nobody loses a token, nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midspan import LLM, AsyncEngine, EngineDead, EngineSettings, Environment, RequestOutput, SamplingParams
from midspan.engine.engine_process import start_engine_process
from midspan.engine.output_processing import merge
from midspan.engine.request_stream import RequestStream
from midspan.errors import ModelNotFound

pytestmark = pytest.mark.slow

DEADLINE = 60.0
"""Seconds after which a process that should have ended is taken for stuck."""


def settings(model: Path, **changes: Any) -> EngineSettings:
    chosen = {"device": "reference", "block_size": 4, "kv_cache_memory_bytes": 4 * 2**20, **changes}
    return EngineSettings(model=str(model), **chosen)


def serve(model: Path, folder: Path, work: Callable[[AsyncEngine], Any], **options: Any) -> Any:
    """Run an async function with an engine of its own."""
    chosen = settings(model, device=options.pop("device", "reference"), **options.pop("engine", {}))

    async def go() -> Any:
        environment = Environment(cache_folder=folder, offline=True)
        engine = await AsyncEngine.start(chosen, environment=environment, **options)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(go())


def is_running(pid: int) -> bool:
    """Whether a process lives; one that ended and was not yet collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


PROMPTS: list[Any] = ["the quick", [5, 6, 7], "zwölf 🎉", "to be", "a tale"]
PARAMS = [
    SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=90, temperature=1.0, seed=5, n=3, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=100, temperature=0.8, seed=6, ignore_eos=True, prompt_logprobs=1, frequency_penalty=0.5),
    SamplingParams(max_tokens=150, temperature=1.0, seed=7, ignore_eos=True, stop=["zzzz", "qqqq"]),
    SamplingParams(max_tokens=30, temperature=1.0, seed=8, ignore_eos=True, min_tokens=10),
]


async def join(stream: RequestStream, seen: Callable[[RequestOutput], None] | None = None) -> RequestOutput:
    joined = None
    async for piece in stream:
        joined = merge(joined, piece)
        if seen is not None:
            seen(joined)
    assert joined is not None
    return joined


def test_streams_go_on_after_the_engine_was_killed_and_lose_and_repeat_no_token(
    tiny_model: Path, tmp_path: Path, tiny_llm: LLM
) -> None:
    expected = tiny_llm.generate(PROMPTS, PARAMS)
    killed: list[int] = []

    async def work(engine: AsyncEngine) -> list[RequestOutput]:
        def kill(whole: RequestOutput) -> None:
            moments = {0: 7, 1: 50}
            if len(killed) in moments and len(whole.outputs[0].token_ids) >= moments[len(killed)]:
                killed.append(engine.engine_pid())
                os.kill(killed[-1], signal.SIGKILL if len(killed) < 2 else signal.SIGTERM)

        streams = [
            await engine.submit(prompt, params, request_id=str(number))
            for number, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
        ]
        outputs = await asyncio.gather(join(streams[0], kill), *(join(stream) for stream in streams[1:]))
        await engine.check_health(DEADLINE)
        statistics = engine.statistics()
        assert (statistics.restarts, statistics.blocks_in_use) == (2, 0)
        assert engine.is_alive()
        return outputs

    outputs = serve(tiny_model, tmp_path, work)
    assert len(set(killed)) == 2
    assert not any(is_running(pid) for pid in killed)
    for output, wanted in zip(outputs, expected, strict=True):
        for one, other in zip(output.outputs, wanted.outputs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.text == other.text
            assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
            assert (one.logprobs is None) == (other.logprobs is None)
            if one.logprobs is not None and other.logprobs is not None:
                assert [*map(next, map(iter, one.logprobs))] == [*map(next, map(iter, other.logprobs))]
        assert output.prompt_logprobs == wanted.prompt_logprobs


def test_an_engine_takes_the_process_that_was_started_before_it(tiny_model: Path, tmp_path: Path) -> None:
    process = start_engine_process(settings(tiny_model))

    async def work(engine: AsyncEngine) -> int:
        await engine.check_health(DEADLINE)
        return engine.engine_pid()

    assert serve(tiny_model, tmp_path, work, process=process) == process.process.pid
    assert process.process.poll() is not None
    process.abandon()


def test_a_process_that_nobody_needs_is_abandoned(tiny_model: Path) -> None:
    process = start_engine_process(settings(tiny_model))
    assert is_running(process.process.pid)
    process.abandon()
    assert not is_running(process.process.pid)
    process.abandon()


def test_a_model_that_is_not_found_leaves_no_process(tiny_model: Path, tmp_path: Path) -> None:
    process = start_engine_process(settings(tiny_model))
    start = AsyncEngine.start(
        settings(tmp_path / "nowhere"),
        environment=Environment(cache_folder=tmp_path, offline=True),
        process=process,
    )
    with pytest.raises(ModelNotFound):
        asyncio.run(start)
    assert not is_running(process.process.pid)


def test_requests_that_come_and_go_while_the_engine_is_replaced_are_served_or_forgotten(
    tiny_model: Path, tmp_path: Path, tiny_llm: LLM
) -> None:
    expected = tiny_llm.generate(PROMPTS[0], PARAMS[0])[0]

    async def work(engine: AsyncEngine) -> RequestOutput:
        gone = await engine.submit("the", PARAMS[3], request_id="gone")
        await anext(gone)
        os.kill(engine.engine_pid(), signal.SIGKILL)
        while engine.statistics().restarts == 0:
            await asyncio.sleep(0)
        assert engine.is_alive()
        stream = await engine.submit(PROMPTS[0], PARAMS[0], request_id="new")
        await gone.aclose()
        output = await join(stream)
        await engine.check_health(DEADLINE)
        assert engine.statistics().blocks_in_use == 0
        return output

    assert serve(tiny_model, tmp_path, work).outputs == expected.outputs


POISON = 300
"""A token id of which the deadly device's process dies when one step holds it twelve times."""

DEADLY_DEVICE = """
import os
from dataclasses import replace
from midspan.interface import DevicePlugin, Found, hookimpl
from midspan.runtimes.reference.device import PLUGIN as REFERENCE


def open_device(info, options):
    device = REFERENCE.open(info, options)
    compile = device.compile

    def compile_deadly(graph, weights, bounds):
        program = compile(graph, weights, bounds)
        run = program.run

        def run_or_die(batch, cache):
            if list(batch.token_ids).count(POISON) >= 12:
                os._exit(7)
            return run(batch, cache)

        program.run = run_or_die
        return program

    device.compile = compile_deadly
    return device


PLUGIN = DevicePlugin(
    name="deadly",
    interface=REFERENCE.interface,
    probe=lambda: Found((replace(REFERENCE.probe().devices[0], id="deadly"),)),
    open=open_device,
)


@hookimpl
def midspan_devices():
    return (PLUGIN,)
"""


@pytest.fixture
def deadly_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an installed device whose process ends at once when it is given the poison."""
    packages = tmp_path / "packages"
    facts = packages / "deadly-1.0.dist-info"
    facts.mkdir(parents=True)
    (packages / "deadly_device.py").write_text(DEADLY_DEVICE.replace("POISON", str(POISON)))
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: deadly\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[midspan.plugins]\ndeadly = deadly_device\n")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    return "deadly"


async def with_poison(engine: AsyncEngine, rounds: int) -> tuple[list[RequestOutput], list[RequestOutput]]:
    """Streams of all prompts, and while they run one poisoned request after the other."""
    streams = [
        await engine.submit(prompt, params, request_id=str(number))
        for number, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    begun = [await anext(stream) for stream in streams]
    ended = []
    for number in range(rounds):
        poisoned = await engine.submit(
            [POISON] * 12, SamplingParams(max_tokens=5, ignore_eos=True), request_id=f"poison-{number}"
        )
        ended.append(await join(poisoned))
    rest = await asyncio.gather(*(join(stream) for stream in streams))
    return [merge(merge(None, first), last) for first, last in zip(begun, rest, strict=True)], ended


def test_a_request_that_kills_every_engine_is_ended_and_its_neighbours_lose_nothing(
    tiny_model: Path, tmp_path: Path, tiny_llm: LLM, deadly_device: str
) -> None:
    expected = tiny_llm.generate(PROMPTS, PARAMS)

    async def work(engine: AsyncEngine) -> tuple[list[RequestOutput], list[RequestOutput]]:
        found = await with_poison(engine, rounds=2)
        assert engine.is_alive()
        await engine.check_health(DEADLINE)
        assert engine.statistics().blocks_in_use == 0
        assert engine.statistics().restarts > 3
        return found

    outputs, ended = serve(tiny_model, tmp_path, work, device=deadly_device)
    assert [one.outputs[0].finish_reason for one in ended] == ["error", "error"]
    assert "while it ran this request alone" in str(ended[0].outputs[0].error)
    assert [output.outputs for output in outputs] == [one.outputs for one in expected]


def test_an_engine_that_dies_of_nobody_gives_no_request_up(tiny_model: Path, tmp_path: Path, tiny_llm: LLM) -> None:
    expected = tiny_llm.generate(PROMPTS, PARAMS)

    async def work(engine: AsyncEngine) -> list[RequestOutput]:
        streams = [
            await engine.submit(prompt, params, request_id=str(number))
            for number, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
        ]
        begun = [await anext(stream) for stream in streams]
        for _ in range(3):
            os.kill(engine.engine_pid(), signal.SIGKILL)
            for place, stream in enumerate(streams[:4]):
                begun[place] = merge(begun[place], await anext(stream))
        rest = await asyncio.gather(*(join(stream) for stream in streams))
        return [merge(first, last) for first, last in zip(begun, rest, strict=True)]

    outputs = serve(tiny_model, tmp_path, work)
    assert [output.outputs for output in outputs] == [one.outputs for one in expected]


def test_when_it_may_not_be_replaced_streams_and_requests_are_told(tiny_model: Path, tmp_path: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = await engine.submit("the", PARAMS[3], request_id="a")
        await anext(stream)
        os.kill(engine.engine_pid(), signal.SIGKILL)
        with pytest.raises(EngineDead, match="SIGKILL"):
            await join(stream)
        assert not engine.is_alive()
        with pytest.raises(EngineDead):
            await engine.submit("the", PARAMS[0], request_id="b")
        with pytest.raises(EngineDead):
            await engine.check_health(DEADLINE)
        assert engine.live_requests() == 0

    serve(tiny_model, tmp_path, work, max_restarts=0)


def test_a_process_that_falls_silent_is_replaced_and_the_stream_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        expected = await join(await engine.submit("the", PARAMS[1], request_id="undisturbed"))
        stopped: list[int] = []

        def stop(joined: RequestOutput) -> None:
            if not stopped and len(joined.outputs[0].token_ids) > 5:
                stopped.append(engine.engine_pid())
                os.kill(stopped[0], signal.SIGSTOP)

        found = await join(await engine.submit("the", PARAMS[1], request_id="disturbed"), stop)
        assert [choice.token_ids for choice in found.outputs] == [choice.token_ids for choice in expected.outputs]
        assert engine.statistics().restarts == 1
        assert engine.engine_pid() != stopped[0]
        assert not is_running(stopped[0])

    serve(tiny_model, tmp_path, work, engine={"step_timeout": 2.0})


def test_a_silent_process_without_work_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        pid = engine.engine_pid()
        await asyncio.sleep(1.0)  # five times as long as a busy process may be silent
        assert engine.engine_pid() == pid
        assert engine.statistics().restarts == 0

    serve(tiny_model, tmp_path, work, engine={"step_timeout": 0.2})


def test_closing_ends_the_process_and_the_streams_and_an_interrupt_does_not(tiny_model: Path, tmp_path: Path) -> None:
    async def work(engine: AsyncEngine) -> int:
        stream = await engine.submit("the", PARAMS[3], request_id="a")
        await anext(stream)
        pid = engine.engine_pid()
        os.kill(pid, signal.SIGINT)
        await engine.check_health(DEADLINE)
        assert engine.statistics().restarts == 0
        await engine.close()
        with pytest.raises(EngineDead, match="closed"):
            await engine.check_health(DEADLINE)
        with pytest.raises(EngineDead, match="closed"):
            await join(stream)
        with pytest.raises(EngineDead):
            await engine.submit("the", PARAMS[0], request_id="b")
        assert not engine.is_alive()
        return pid

    assert not is_running(serve(tiny_model, tmp_path, work))


PARENT = """
import asyncio, sys
from pathlib import Path
from midspan import AsyncEngine, EngineSettings, Environment, SamplingParams

async def main():
    settings = EngineSettings(model=sys.argv[1], device="reference", kv_cache_memory_bytes=2**20)
    engine = await AsyncEngine.start(settings, environment=Environment(cache_folder=Path(sys.argv[2])))
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    streams = [await engine.submit("the", params, request_id=str(number)) for number in range(4)]
    await anext(streams[0])
    print(engine.engine_pid(), flush=True)
    await asyncio.gather(*(consume(stream) for stream in streams))
    await asyncio.Event().wait()

async def consume(stream):
    async for piece in stream:
        pass

asyncio.run(main())
"""


def test_the_engine_ends_with_a_parent_that_was_killed_mid_stream(tiny_model: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(tiny_model), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
    wait_until(lambda: not is_running(child))
