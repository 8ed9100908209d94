"""The completions route, as the openai client and evaluation harnesses see it."""

from __future__ import annotations

from typing import Any

import openai
import pytest

PROMPT = "the quick brown fox jumps"


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "temperature": 0, **fields})


def tokens_of(server: Any, text: str) -> list[int]:
    return list(server.post("/tokenize", {"prompt": text}).json()["tokens"])


def test_sixteen_tokens_are_generated_unless_said_otherwise(client: openai.OpenAI) -> None:
    answer = complete(client, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("cmpl-")


def test_a_prompt_may_be_text_or_token_ids_alone_or_in_lists(server: Any, client: openai.OpenAI) -> None:
    ids = tokens_of(server, PROMPT)
    texts = [
        [choice.text for choice in complete(client, prompt=prompt).choices]
        for prompt in (PROMPT, [PROMPT], ids, [ids], [PROMPT, PROMPT], [ids, ids, ids])
    ]
    expected = texts[0][0]
    assert texts == [[expected]] * 4 + [[expected] * 2, [expected] * 3]


def test_several_prompts_with_n_are_numbered_prompt_by_prompt(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "a tale of two cities"]
    fields = {"prompt": prompts, "n": 2, "temperature": 1.0, "seed": 3, "echo": True}
    choices = complete(client, **fields).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert [choice.text.startswith(prompts[choice.index // 2]) for choice in choices] == [True] * 4


def test_a_stream_of_several_prompts_equals_the_whole_answer(client: openai.OpenAI) -> None:
    fields = {"prompt": [PROMPT, "a tale of two", "to be"], "n": 2, "temperature": 1.0, "seed": 9, "echo": True}
    whole = {choice.index: choice.text for choice in complete(client, **fields).choices}
    streamed = dict.fromkeys(whole, "")
    reasons: dict[int, str] = {}
    usage = None
    for chunk in complete(client, stream=True, stream_options={"include_usage": True}, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert streamed == whole
    assert sorted(reasons) == list(range(6))
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_echo_with_logprobs_scores_prompt_and_output_as_harnesses_read_it(server: Any, client: openai.OpenAI) -> None:
    ids = tokens_of(server, PROMPT)
    answer = complete(client, prompt=ids, max_tokens=1, echo=True, logprobs=1, extra_body={"ignore_eos": True})
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(ids) + 1
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    for token, value, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[
        1:
    ]:
        assert token in top
        assert value <= max(top.values()) + 1e-6
    assert logprobs.text_offset[0] == 0
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert choice.text.startswith(PROMPT)


def test_prompt_scores_do_not_depend_on_what_follows(client: openai.OpenAI) -> None:
    short = complete(client, echo=True, logprobs=0, max_tokens=1).choices[0].logprobs.token_logprobs
    long = complete(client, echo=True, logprobs=5, max_tokens=9).choices[0].logprobs.token_logprobs
    assert long[1 : len(short)] == pytest.approx(short[1:], abs=1e-5)


def test_echo_with_no_new_tokens_gives_the_prompt_alone(client: openai.OpenAI) -> None:
    answer = complete(client, echo=True, max_tokens=0, logprobs=1)
    assert answer.choices[0].text == PROMPT
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens
    chunks = list(complete(client, echo=True, max_tokens=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT


def test_a_stream_echoes_the_prompt_with_its_scores_first(client: openai.OpenAI) -> None:
    whole = complete(client, echo=True, logprobs=2, max_tokens=6).choices[0].logprobs
    tokens, values, offsets = [], [], []
    for chunk in complete(client, echo=True, logprobs=2, max_tokens=6, stream=True):
        if chunk.choices[0].logprobs:
            tokens += chunk.choices[0].logprobs.tokens
            values += chunk.choices[0].logprobs.token_logprobs
            offsets += chunk.choices[0].logprobs.text_offset
    assert tokens == whole.tokens
    assert values[0] is None
    assert values[1:] == pytest.approx(whole.token_logprobs[1:], abs=1e-5)
    assert offsets == whole.text_offset


def test_logprobs_zero_gives_the_chosen_token_only(client: openai.OpenAI) -> None:
    logprobs = complete(client, logprobs=0).choices[0].logprobs
    assert [set(top) == {token} for top, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True)] == [
        True
    ] * len(logprobs.tokens)


def test_token_ids_come_back_when_asked_for(server: Any, client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = complete(client, max_tokens=5, extra_body=extra)
    assert answer.choices[0].prompt_token_ids == tokens_of(server, PROMPT)
    streamed: list[int] = []
    for chunk in complete(client, max_tokens=5, stream=True, extra_body=extra):
        streamed += chunk.choices[0].token_ids
    assert streamed == answer.choices[0].token_ids
    assert len(streamed) == 5


def test_the_second_request_of_a_long_prompt_finds_it_cached(client: openai.OpenAI) -> None:
    prompt = "of three bears " * 30
    first = complete(client, prompt=prompt).usage
    second = complete(client, prompt=prompt).usage
    assert first.prompt_tokens == second.prompt_tokens
    assert second.prompt_tokens_details.cached_tokens > 0.9 * second.prompt_tokens


def test_text_in_any_script_comes_back_whole_from_a_stream(client: openai.OpenAI) -> None:
    prompt = "naïve café, zwölf 東京 🎉"
    fields = {"prompt": prompt, "temperature": 1.3, "seed": 11, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    whole = complete(client, **fields).choices[0].text
    pieces = [chunk.choices[0].text for chunk in complete(client, stream=True, **fields)]
    assert "".join(pieces) == whole
    echoed = complete(client, prompt=prompt, echo=True, max_tokens=1).choices[0].text
    assert echoed.startswith(prompt)
