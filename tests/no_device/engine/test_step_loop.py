"""The engine on the reference device: the same request gives the same tokens, whatever happens around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from midspan import LLM, SamplingParams
from midspan.devices.discovery import DeviceCatalogue
from midspan.engine.messages import AddRequest, SequenceStart
from midspan.engine.outputs import RequestOutput
from midspan.errors import DeviceLost, InvalidRequest, OutOfDeviceMemory
from midspan.interface import Batch, Cache, Program, StepOutput, StepResult
from midspan.interface.program import FinishedStep

pytestmark = pytest.mark.slow

MakeLLM = Callable[..., LLM]
POISON = 7


def prompt(number: int, length: int = 9) -> list[int]:
    """A prompt without the poisoned token; no two are alike."""
    return [8 + (number * 31 + place * place * 5) % 300 for place in range(length)]


def params(number: int, **changes: Any) -> SamplingParams:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 1.2, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"temperature": 1.0, "logprobs": 2, "logit_bias": {11: 5.0}},
    ]
    base = {"max_tokens": 24, "seed": number, "ignore_eos": True, "logit_bias": {POISON: -100.0}}
    return SamplingParams(**{**base, **kinds[number % len(kinds)], **changes})


def tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


def check_all_free(llm: LLM) -> None:
    statistics = llm.statistics()
    assert (statistics.running, statistics.waiting, statistics.blocks_in_use) == (0, 0, 0)
    assert llm._core is not None
    llm._core.scheduler.check_integrity()


@pytest.fixture(scope="module")
def alone(tiny_llm: LLM) -> list[list[list[int]]]:
    """What each of 64 requests generates when nothing else runs."""
    return [tokens(tiny_llm.generate([prompt(i)], params(i))[0]) for i in range(64)]


def test_a_request_gives_the_same_tokens_in_a_batch_of_64(tiny_llm: LLM, alone: list[list[list[int]]]) -> None:
    outputs = tiny_llm.generate([prompt(i) for i in range(64)], [params(i) for i in range(64)])
    assert [tokens(output) for output in outputs] == alone
    assert len({tuple(output[0]) for output in alone}) > 60
    check_all_free(tiny_llm)


def test_a_request_gives_the_same_tokens_after_it_was_preempted(
    make_llm: MakeLLM, alone: list[list[list[int]]]
) -> None:
    llm = make_llm(blocks=30, max_model_len=64, max_num_batched_tokens=16)
    outputs = llm.generate([prompt(i) for i in range(16)], [params(i) for i in range(16)])
    assert [tokens(output) for output in outputs] == alone[:16]
    assert llm.statistics().preemptions > 0
    check_all_free(llm)


def test_a_request_gives_the_same_tokens_when_prompts_are_run_in_small_chunks(
    make_llm: MakeLLM, alone: list[list[list[int]]]
) -> None:
    llm = make_llm(max_num_batched_tokens=3, max_num_seqs=3, enable_prefix_caching=False)
    outputs = llm.generate([prompt(i) for i in range(8)], [params(i) for i in range(8)])
    assert [tokens(output) for output in outputs] == alone[:8]


def test_a_request_gives_the_same_tokens_when_its_neighbours_are_aborted(
    make_llm: MakeLLM, alone: list[list[list[int]]]
) -> None:
    llm = make_llm(blocks=60, max_model_len=64)
    core = llm._core
    assert core is not None
    for number in range(16):
        core.add(add_request(number))
    found: dict[str, list[int]] = {str(number): [] for number in range(16)}
    step = 0
    while core.has_work():
        for event in core.step().sequences:
            found[event.request_id].extend(event.token_ids)
        step += 1
        if step % 2 and step < 20:
            core.abort(str(step))
    assert [found[str(i)] for i in range(0, 16, 2)] == [alone[i][0] for i in range(0, 16, 2)]
    assert all(len(found[str(i)]) < 24 for i in range(1, 16, 2))
    check_all_free(llm)


def add_request(number: int, *, emitted: list[int] | None = None, **changes: Any) -> AddRequest:
    chosen = params(number, **changes)
    return AddRequest(
        request_id=str(number),
        prompt_ids=prompt(number),
        params=chosen,
        sequences=[SequenceStart(index=0, seed=number, emitted_ids=emitted or [])],
    )


def test_a_request_that_is_taken_up_again_goes_on_where_it_was(make_llm: MakeLLM, alone: list[list[list[int]]]) -> None:
    core = make_llm()._core
    assert core is not None
    for number in range(10):
        core.add(add_request(number, emitted=alone[number][0][: 2 * number]))
    found: dict[str, list[int]] = {str(number): [] for number in range(10)}
    while core.has_work():
        for event in core.step().sequences:
            found[event.request_id].extend(event.token_ids)
    assert [found[str(i)] for i in range(10)] == [alone[i][0][2 * i :] for i in range(10)]


def test_n_samples_differ_and_the_first_is_that_of_a_single_one(tiny_llm: LLM, alone: list[list[list[int]]]) -> None:
    output = tiny_llm.generate([prompt(1)], params(1, n=5))[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3, 4]
    assert tokens(output)[0] == alone[1][0]
    assert len({tuple(ids) for ids in tokens(output)}) == 5
    check_all_free(tiny_llm)


def test_n_samples_are_the_same_on_a_repetition_and_under_preemption(tiny_llm: LLM, make_llm: MakeLLM) -> None:
    first = tokens(tiny_llm.generate([prompt(2)], params(2, n=4))[0])
    small = make_llm(blocks=22, max_model_len=64)
    assert tokens(small.generate([prompt(2)], params(2, n=4))[0]) == first
    assert small.statistics().preemptions > 0


def test_n_samples_share_the_blocks_of_their_prompt(make_llm: MakeLLM) -> None:
    llm = make_llm(enable_prefix_caching=False)
    core = llm._core
    assert core is not None
    long = prompt(3, 80)
    starts = [SequenceStart(index=index, seed=index) for index in range(8)]
    core.add(AddRequest(request_id="a", prompt_ids=long, params=params(3, n=8), sequences=starts))
    used = 0
    while core.has_work():
        used = max(used, core.step().statistics.blocks_in_use)
    # 20 blocks of prompt once, and 24 tokens of output for each of 8, against 8 x 26 unshared.
    assert 20 + 8 * 5 <= used <= 20 + 8 * 7


def test_logprobs_are_those_of_the_tokens_and_sum_up(tiny_llm: LLM) -> None:
    output = tiny_llm.generate([prompt(4)], params(4, temperature=0.0, logit_bias=None, logprobs=3))[0].outputs[0]
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids)
    for token, found in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(found)) == token
        assert len(found) == 3
        assert found[token].rank == 1
        ranked = sorted(found.values(), key=lambda candidate: -candidate.logprob)
        assert [candidate.rank for candidate in ranked] == [1, 2, 3]
    total = sum(found[token].logprob for token, found in zip(output.token_ids, output.logprobs, strict=True))
    # Sums of the same Python floats in the same order.
    assert output.cumulative_logprob == pytest.approx(total, rel=1e-12)


def test_logprobs_without_candidates_hold_the_token_alone_and_not_asked_for_there_are_none(tiny_llm: LLM) -> None:
    output = tiny_llm.generate([prompt(4)], params(1, logprobs=0))[0].outputs[0]
    assert output.logprobs is not None
    assert [list(found) for found in output.logprobs] == [[token] for token in output.token_ids]
    output = tiny_llm.generate([prompt(4)], params(1))[0].outputs[0]
    assert output.logprobs is None
    assert output.cumulative_logprob is None


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 300, "max_num_seqs": 2}, {"blocks": 70}])
def test_prompt_logprobs_are_those_that_generation_would_have_given(
    make_llm: MakeLLM, settings: dict[str, Any]
) -> None:
    """Also where a step has more rows to score than a run may hold, and under preemption."""
    llm = make_llm(**settings)
    greedy = SamplingParams(temperature=0.0, max_tokens=200, logprobs=1, ignore_eos=True)
    prompts = [prompt(number, 5) for number in range(3)]
    generated = llm.generate(prompts, greedy)
    whole = [start + output.outputs[0].token_ids for start, output in zip(prompts, generated, strict=True)]
    scored = llm.generate(whole, SamplingParams(max_tokens=2, prompt_logprobs=1, seed=0))
    for start, ids, output, told in zip(prompts, whole, scored, generated, strict=True):
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(ids)
        expected = told.outputs[0].logprobs
        assert expected is not None
        for token, found, wanted in zip(ids[5:], output.prompt_logprobs[5:], expected, strict=True):
            assert found is not None
            assert list(found) == list(wanted) == [token]
            # float32 logits of size 10 carry an error of 1e-6 each; their softmax a few times that.
            assert found[token].logprob == pytest.approx(wanted[token].logprob, abs=2e-5)
        assert len(output.outputs[0].token_ids) == 2
        assert len(start) == 5
    check_all_free(llm)


def test_a_repeated_prompt_is_found_in_the_cache_and_another_salt_does_not_find_it(make_llm: MakeLLM) -> None:
    llm = make_llm()
    first = llm.generate([prompt(5, 40)], params(5))[0]
    again = llm.generate([prompt(5, 40)], params(5))[0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 36)
    assert tokens(first) == tokens(again)
    core = llm._core
    assert core is not None
    for request_id, salt in (("a", "tenant"), ("b", "tenant")):
        request = AddRequest(
            request_id=request_id,
            prompt_ids=prompt(5, 40),
            params=params(5),
            sequences=[SequenceStart(index=0, seed=5)],
            cache_salt=salt,
        )
        core.add(request)
        reports = []
        while core.has_work():
            reports += [event.prompt for event in core.step().sequences if event.prompt is not None]
        assert [report.cached_tokens for report in reports] == [0 if request_id == "a" else 36]


def test_a_stop_token_ends_a_sequence_and_says_so(tiny_llm: LLM, alone: list[list[list[int]]]) -> None:
    ids = alone[1][0]
    place = next(place for place, token in enumerate(ids) if place >= 5 and token not in ids[:place])
    output = tiny_llm.generate([prompt(1)], params(1, stop_token_ids=[ids[place]]))[0].outputs[0]
    assert output.token_ids == ids[: place + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", ids[place])
    longer = tiny_llm.generate([prompt(1)], params(1, stop_token_ids=[ids[place]], min_tokens=place + 1))[0].outputs[0]
    assert len(longer.token_ids) > place + 1


# ---- failures stay with their request


def poisoned(then: Callable[[], Any]) -> Callable[[Batch, Cache, Program], StepOutput]:
    def run(batch: Batch, cache: Cache, program: Program) -> StepOutput:
        if (batch.token_ids == POISON).any():
            then()
        return program.run(batch, cache)

    return run


def fail() -> None:
    raise RuntimeError("a kernel failed on the poisoned token")


@pytest.mark.parametrize("guilty", [0, 3, 7])
def test_a_request_on_which_the_device_fails_fails_alone(
    make_llm: MakeLLM,
    wrapping: Callable[..., DeviceCatalogue],
    alone: list[list[list[int]]],
    guilty: int,
) -> None:
    llm = make_llm(catalogue=wrapping(poisoned(fail)))
    prompts = [prompt(i) for i in range(8)]
    prompts[guilty] = [*prompt(guilty), POISON]
    outputs = llm.generate(prompts, [params(i, n=2) if i == guilty else params(i) for i in range(8)])
    for number, output in enumerate(outputs):
        if number == guilty:
            assert [completion.finish_reason for completion in output.outputs] == ["error", "error"]
            assert "poisoned token" in str(output.outputs[0].error)
            assert output.finished
        else:
            assert tokens(output) == alone[number]
    check_all_free(llm)
    assert tokens(llm.generate([prompt(1)], params(1))[0]) == alone[1]


def test_a_request_that_fails_in_the_midst_of_its_output_keeps_what_it_had(
    make_llm: MakeLLM, wrapping: Callable[..., DeviceCatalogue], alone: list[list[list[int]]]
) -> None:
    bad = next(token for place, token in enumerate(alone[1][0]) if place >= 6 and token not in alone[1][0][:place])

    def run(batch: Batch, cache: Cache, program: Program) -> StepOutput:
        starts = batch.query_starts[:-1][np.diff(batch.query_starts) == 1]
        if (batch.token_ids[starts] == bad).any() and (batch.positions[starts] >= 9).any():
            fail()
        return program.run(batch, cache)

    llm = make_llm(catalogue=wrapping(run))
    output = llm.generate([prompt(1)], params(1))[0].outputs[0]
    assert output.token_ids == alone[1][0][: alone[1][0].index(bad) + 1]
    assert output.finish_reason == "error"


def test_rows_that_could_not_be_sampled_fail_their_request_alone(
    make_llm: MakeLLM, wrapping: Callable[..., DeviceCatalogue], alone: list[list[list[int]]]
) -> None:
    def run(batch: Batch, cache: Cache, program: Program) -> StepOutput:
        result = program.run(batch, cache).result()
        owners = np.searchsorted(batch.query_starts, batch.rows_to_sample, side="right") - 1
        spans = zip(batch.query_starts[:-1], batch.query_starts[1:], strict=True)
        bad = np.array([bool((batch.token_ids[begin:end] == POISON).any()) for begin, end in spans])
        return FinishedStep(
            step_result=StepResult(token_ids=result.token_ids, logprobs=result.logprobs, invalid=bad[owners])
        )

    llm = make_llm(catalogue=wrapping(run))
    outputs = llm.generate([prompt(0), [*prompt(1), POISON], prompt(2)], [params(0), params(1), params(2)])
    assert tokens(outputs[0]) == alone[0]
    assert tokens(outputs[2]) == alone[2]
    assert outputs[1].outputs[0].finish_reason == "error"
    check_all_free(llm)


def test_a_step_that_does_not_fit_the_device_is_run_in_parts(
    make_llm: MakeLLM, wrapping: Callable[..., DeviceCatalogue], alone: list[list[list[int]]]
) -> None:
    def run(batch: Batch, cache: Cache, program: Program) -> StepOutput:
        if len(batch.token_ids) > 4:
            raise OutOfDeviceMemory("more than four tokens do not fit")
        return program.run(batch, cache)

    llm = make_llm(catalogue=wrapping(run))
    outputs = llm.generate([prompt(i) for i in range(6)], [params(i) for i in range(6)])
    assert [tokens(output) for output in outputs] == alone[:6]
    scored = llm.generate([prompt(0)], params(0, prompt_logprobs=0))[0]
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == len(prompt(0))


def test_a_lost_device_is_said_to_the_caller(make_llm: MakeLLM, wrapping: Callable[..., DeviceCatalogue]) -> None:
    def lose() -> None:
        raise DeviceLost("it fell off the bus")

    llm = make_llm(catalogue=wrapping(poisoned(lose)))
    with pytest.raises(DeviceLost, match="fell off"):
        llm.generate([[*prompt(0), POISON]], params(0))


def test_a_request_that_cannot_be_set_up_gets_its_error_and_a_live_id_is_refused(tiny_llm: LLM) -> None:
    core = tiny_llm._core
    assert core is not None
    core.add(add_request(1))
    with pytest.raises(InvalidRequest, match="'1'"):
        core.add(add_request(1))
    too_long = AddRequest(
        request_id="long",
        prompt_ids=prompt(2, 300),
        params=params(2),
        sequences=[SequenceStart(index=index, seed=0) for index in range(2)],
    )
    core.add(too_long)
    failed = core.take_events()
    assert [(event.request_id, event.index, event.finish_reason) for event in failed] == [
        ("long", 0, "error"),
        ("long", 1, "error"),
    ]
    core.abort("1")
    core.abort("nobody")
    assert not core.has_work()
    check_all_free(tiny_llm)


def test_priority_decides_who_runs_first(make_llm: MakeLLM) -> None:
    core = make_llm(scheduling_policy="priority", max_num_seqs=1)._core
    assert core is not None
    for name, priority in (("late", 5), ("soon", 1), ("first", -3)):
        core.add(
            AddRequest(
                request_id=name,
                prompt_ids=prompt(1),
                params=params(1, max_tokens=3),
                sequences=[SequenceStart(index=0, seed=1)],
                priority=priority,
            )
        )
    order: dict[str, None] = {}
    while core.has_work():
        for event in core.step().sequences:
            order[event.request_id] = None
    assert list(order) == ["first", "soon", "late"]
