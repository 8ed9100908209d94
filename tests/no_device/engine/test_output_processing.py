"""Events of token ids become text, logprobs and reasons, piece by piece."""

from __future__ import annotations

from typing import Any

import pytest

from midspan import LLM, RequestOutput, SamplingParams
from midspan.engine.messages import PromptReport, SequenceEvent, TokenScores
from midspan.engine.output_processing import OutputProcessor, merge
from midspan.engine.request_validation import prepare_request

MakeProcessor = Any


@pytest.fixture
def make_processor(tiny_llm: LLM) -> MakeProcessor:
    def make(**params: Any) -> OutputProcessor:
        tokenizer = tiny_llm.get_tokenizer()
        prepared = prepare_request("the", SamplingParams(**params), tokenizer=tokenizer, model=tiny_llm.model)
        return OutputProcessor("a", prepared, tokenizer, arrival_time=1.0)

    return make


def event(*tokens: int, index: int = 0, **fields: Any) -> SequenceEvent:
    return SequenceEvent(request_id="a", index=index, token_ids=list(tokens), **fields)


def run(processor: OutputProcessor, events: list[SequenceEvent]) -> tuple[list[RequestOutput], list[int]]:
    outputs, stopped = [], []
    for now, one in enumerate(events):
        progress = processor.process([one], float(now + 2))
        stopped += progress.stopped
        if progress.output is not None:
            outputs.append(progress.output)
    return outputs, stopped


def test_pieces_join_to_the_text_and_no_piece_holds_half_a_character(
    make_processor: MakeProcessor, tiny_llm: LLM
) -> None:
    text = " the 東京 🎉 fox"
    ids = tiny_llm.get_tokenizer().encode(text)
    events = [event(token) for token in ids[:-1]] + [event(ids[-1], finish_reason="length")]
    outputs, _ = run(make_processor(), events)
    pieces = [output.outputs[0].text for output in outputs]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [token for output in outputs for token in output.outputs[0].token_ids] == ids
    assert [output.finished for output in outputs] == [False] * (len(ids) - 1) + [True]


def test_what_is_half_a_character_at_the_end_is_said_so(make_processor: MakeProcessor, tiny_llm: LLM) -> None:
    ids = tiny_llm.get_tokenizer().encode("🎉")
    assert len(ids) > 1
    outputs, _ = run(make_processor(), [event(ids[0], finish_reason="length")])
    assert outputs[-1].outputs[0].text == "\ufffd"


def test_a_stop_string_ends_its_sequence_alone_and_is_cut_off(make_processor: MakeProcessor, tiny_llm: LLM) -> None:
    encode = tiny_llm.get_tokenizer().encode
    processor = make_processor(n=2, stop=["over"])
    ids = encode("fox over the dog")
    events = [event(token) for token in ids] + [event(ids[0], index=1, finish_reason="length")]
    outputs, stopped = run(processor, events)
    whole = None
    for output in outputs:
        whole = merge(whole, output)
    assert whole is not None
    assert stopped == [0]
    first, second = whole.outputs
    assert (first.text, first.finish_reason, first.stop_reason) == ("fox ", "stop", "over")
    assert first.token_ids == encode("fox over")
    assert second.finish_reason == "length"
    assert whole.finished


def test_a_stop_string_is_kept_when_asked_for(make_processor: MakeProcessor, tiny_llm: LLM) -> None:
    ids = tiny_llm.get_tokenizer().encode("fox over the dog")
    outputs, _ = run(make_processor(stop=["over"], include_stop_str_in_output=True), [event(token) for token in ids])
    assert "".join(output.outputs[0].text for output in outputs) == "fox over"


@pytest.mark.parametrize("include", [False, True])
def test_the_token_that_ends_a_sequence_is_text_only_when_asked_for(
    make_processor: MakeProcessor, tiny_llm: LLM, include: bool
) -> None:
    *ids, last = tiny_llm.get_tokenizer().encode("fox over")
    events = [event(token) for token in ids] + [event(last, finish_reason="stop", stop_reason=last)]
    outputs, _ = run(make_processor(include_stop_str_in_output=include), events)
    text = tiny_llm.get_tokenizer().decode([*ids, last] if include else ids)
    assert "".join(output.outputs[0].text for output in outputs) == text
    assert outputs[-1].outputs[0].token_ids == [last]
    assert outputs[-1].outputs[0].stop_reason == last


def test_what_comes_after_the_end_is_dropped(make_processor: MakeProcessor) -> None:
    processor = make_processor()
    outputs, _ = run(processor, [event(5, finish_reason="length"), event(6), event(7, finish_reason="stop")])
    assert len(outputs) == 1
    assert processor.finished


def test_without_detokenizing_there_are_ids_and_no_text(make_processor: MakeProcessor) -> None:
    outputs, _ = run(make_processor(detokenize=False), [event(70), event(71, finish_reason="length")])
    assert [output.outputs[0].text for output in outputs] == ["", ""]
    assert [output.outputs[0].token_ids for output in outputs] == [[70], [71]]


def test_logprobs_name_the_token_first_and_count_it_once(make_processor: MakeProcessor) -> None:
    scores = TokenScores(token_id=70, logprob=-2.0, rank=3, top_ids=[71, 72], top=[-0.5, -1.0])
    among = TokenScores(token_id=72, logprob=-1.0, rank=2, top_ids=[71, 72], top=[-0.5, -1.0])
    outputs, _ = run(
        make_processor(logprobs=2), [event(70, scores=[scores]), event(72, scores=[among], finish_reason="length")]
    )
    first, second = outputs[0].outputs[0], outputs[1].outputs[0]
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert [(token, found.rank) for token, found in first.logprobs[0].items()] == [(70, 3), (71, 1), (72, 2)]
    assert [(token, found.rank) for token, found in second.logprobs[0].items()] == [(72, 2), (71, 1)]
    assert (first.cumulative_logprob, second.cumulative_logprob) == (-2.0, -3.0)


def test_the_prompts_report_gives_moments_cached_tokens_and_logprobs(make_processor: MakeProcessor) -> None:
    scores = [TokenScores(token_id=70, logprob=-2.0, rank=3, top_ids=[], top=[])]
    report = PromptReport(cached_tokens=4, scheduled_time=1.5, scores=scores)
    outputs, _ = run(make_processor(prompt_logprobs=0), [event(70, prompt=report), event(71, finish_reason="length")])
    for output in outputs:
        assert output.num_cached_tokens == 4
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert output.prompt_logprobs[1] is not None
        assert list(output.prompt_logprobs[1]) == [70]
    metrics = outputs[-1].metrics
    assert metrics is not None
    assert (metrics.arrival_time, metrics.first_scheduled_time) == (1.0, 1.5)
    assert (metrics.first_token_time, metrics.finished_time) == (2.0, 3.0)


def test_a_failure_comes_with_its_message(make_processor: MakeProcessor) -> None:
    outputs, _ = run(make_processor(), [event(70), event(finish_reason="error", error="it broke")])
    assert (outputs[-1].outputs[0].finish_reason, outputs[-1].outputs[0].error) == ("error", "it broke")
    assert outputs[-1].finished
