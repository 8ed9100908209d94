"""Each fault on demand, met by the real engine: what it does to whom, and who goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midspan import AsyncEngine, EngineDead, EngineSettings, Environment, RequestOutput, SamplingParams
from midspan.conformance.operation_cases import operation_cases
from midspan.conformance.operation_check import disagreement
from midspan.engine.output_processing import merge
from midspan.errors import DeviceLost, MidspanError, OutOfDeviceMemory, UnsupportedOperation
from midspan.interface import Bounds

MakeLLM = Callable[..., Any]
OpenSimulated = Callable[..., Any]

PROMPTS = [[1, 2, 3], [9, 8], [4, 5, 6, 7]]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
DEADLINE = 60.0
"""Seconds after which something that should have ended is taken for stuck."""


@pytest.fixture
def expected(make_llm: MakeLLM) -> Any:
    return [output.outputs for output in make_llm("simulated").generate(PROMPTS, GREEDY)]


def test_a_lost_device_ends_the_engine_in_the_caller_s_process(make_llm: MakeLLM) -> None:
    llm = make_llm("simulated", {"fault": "lost@5"})
    with pytest.raises(DeviceLost, match="is lost, as its option"):
        llm.generate(PROMPTS, GREEDY)


def test_a_lost_device_stays_lost(open_simulated: OpenSimulated, make_llm: MakeLLM) -> None:
    device = open_simulated(fault="lost@1", block_sizes="7")
    program, cache, batch = _compiled(device)
    with pytest.raises(DeviceLost):
        program.run(batch, cache)
    for again in (
        lambda: program.run(batch, cache),
        lambda: device.allocate_cache(cache.layout, (4,)),
        lambda: _compiled(device),
    ):
        with pytest.raises(DeviceLost):
            again()


def _compiled(device: Any) -> tuple[Any, Any, Any]:
    case = next(case for case in operation_cases(block_size=7) if case.cache is not None)
    assert case.cache is not None
    program = device.compile(case.graph(), case, _bounds())
    return program, device.allocate_cache(case.cache.layout("float32"), (case.cache.blocks,)), None


def _bounds() -> Bounds:
    return Bounds(
        max_tokens=512,
        max_requests=64,
        max_context=1024,
        max_sampled_rows=64,
        block_size=7,
        dtype="float32",
        cache_dtype="float32",
    )


@pytest.mark.parametrize("asynchronous", ["off", "on"])
def test_a_step_that_does_not_fit_is_run_in_parts_and_nobody_notices(
    make_llm: MakeLLM, expected: Any, asynchronous: str
) -> None:
    llm = make_llm("simulated", {"fault": "oom@5,oom@9", "asynchronous": asynchronous})
    assert [output.outputs for output in llm.generate(PROMPTS, GREEDY)] == expected


def test_a_step_of_no_numbers_fails_its_requests_and_the_engine_serves_on(make_llm: MakeLLM, expected: Any) -> None:
    llm = make_llm("simulated", {"fault": "nan@6"})
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error"] * 3
    assert "not numbers" in str(outputs[0].outputs[0].error)
    assert [output.outputs for output in llm.generate(PROMPTS, GREEDY)] == expected


def test_a_wrong_step_gives_wrong_tokens_from_there_on(make_llm: MakeLLM, expected: Any) -> None:
    llm = make_llm("simulated", {"fault": "wrong@6"})
    found = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
    right = [outputs[0].token_ids for outputs in expected]
    assert [tokens[:3] for tokens in found] == [tokens[:3] for tokens in right]
    assert all(one[3] == (other[3] + 1) % 320 for one, other in zip(found, right, strict=True))


def test_nothing_compiles_or_is_allocated_where_that_is_asked_for(make_llm: MakeLLM) -> None:
    with pytest.raises(UnsupportedOperation, match="fault=compile"):
        make_llm("simulated", {"fault": "compile"})
    with pytest.raises(OutOfDeviceMemory, match="fault=allocate"):
        make_llm("simulated:h100", {"fault": "allocate", "numerics": "off"})


def test_a_kernel_that_lies_is_found_by_the_operation_s_cases(open_simulated: OpenSimulated) -> None:
    cases = [case for case in operation_cases(block_size=7) if case.op == "linear"]
    for fault, wrong in (("kernel", True), ("nan@1", False)):
        device = open_simulated(fault=fault, block_sizes="7")
        found = []
        for case in cases:
            graph = case.graph()
            outputs = device.compile(graph, case, _bounds()).evaluate(
                dict(zip(graph.inputs, case.inputs, strict=True)), None
            )
            found.append(disagreement(case, "float32", "float32", list(outputs), None) is not None)
        assert any(found) == wrong


@pytest.mark.parametrize("asynchronous", ["off", "on"])
def test_a_step_that_hangs_ends_when_the_model_is_closed_by_another_thread(
    make_llm: MakeLLM, asynchronous: str
) -> None:
    llm = make_llm("simulated", {"fault": "hang@5", "asynchronous": asynchronous})
    injector = llm._core._loaded.device._faults
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        except MidspanError as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    while injector._steps < 5:
        thread.join(0.005)
    thread.join(0.05)
    assert thread.is_alive()
    llm.close()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert [type(error) for error in errors] == [DeviceLost]


async def _joined(stream: Any, seen: Callable[[RequestOutput], None] | None = None) -> RequestOutput:
    joined = None
    async for piece in stream:
        joined = merge(joined, piece)
        if seen is not None:
            seen(joined)
    assert joined is not None
    return joined


def _serve(model: Path, options: dict[str, str], folder: Path, work: Callable[[AsyncEngine], Any]) -> Any:
    settings = EngineSettings(
        model=str(model),
        load_format="dummy",
        device="simulated",
        device_options=options,
        kv_cache_memory_bytes=2**20,
        max_num_seqs=8,
    )

    async def go() -> Any:
        engine = await AsyncEngine.start(settings, environment=Environment(cache_folder=folder, offline=True))
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(go())


def test_a_device_lost_in_the_engine_s_process_is_opened_again_and_streams_lose_and_repeat_nothing(
    tiny: Path, tmp_path: Path, expected: Any
) -> None:
    async def work(engine: AsyncEngine) -> list[RequestOutput]:
        streams = [await engine.submit(prompt, GREEDY, request_id=str(number)) for number, prompt in enumerate(PROMPTS)]
        outputs = await asyncio.gather(*map(_joined, streams))
        assert engine.statistics().restarts == 1
        assert engine.is_alive()
        return outputs

    options = {"fault": "lost@7", "fault_once": str(tmp_path / "happened")}
    outputs = _serve(tiny, options, tmp_path, work)
    assert (tmp_path / "happened").exists()
    assert [output.outputs for output in outputs] == expected


def test_a_device_that_is_lost_again_and_again_is_given_up(tiny: Path, tmp_path: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = await engine.submit([1, 2], SamplingParams(max_tokens=200, ignore_eos=True), request_id="a")
        with pytest.raises(EngineDead, match="is lost"):
            await _joined(stream)
        assert not engine.is_alive()

    _serve(tiny, {"fault": "lost@4"}, tmp_path, work)


def test_an_engine_whose_step_hangs_is_still_closed(tiny: Path, tmp_path: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = await engine.submit([1, 2], GREEDY, request_id="a")
        await anext(stream)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.05)

    _serve(tiny, {"fault": "hang@4"}, tmp_path, work)
