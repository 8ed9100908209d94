"""The chat route, as the openai client sees it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

QUESTION: list[Any] = [{"role": "user", "content": "the quick brown fox"}]


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "temperature": 0, **fields}
    return client.chat.completions.create(**fields)


def test_an_answer_has_text_a_finish_reason_and_exact_usage(client: openai.OpenAI) -> None:
    answer = ask(client, extra_body={"ignore_eos": True, "return_token_ids": True})
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert len(choice.token_ids) == 12 == answer.usage.completion_tokens
    assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.model == "tiny"
    assert answer.id.startswith("chatcmpl-")


def test_a_stream_gives_the_same_text_as_a_whole_answer(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=40).choices[0]
    chunks = list(ask(client, max_tokens=40, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [
        whole.finish_reason
    ]
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_usage_chunk_comes_last_and_only_when_asked_for(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_continuous_usage_counts_up_in_every_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk.usage.completion_tokens
        for chunk in ask(client, stream=True, stream_options=options, extra_body={"ignore_eos": True})
    ]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 12


def test_n_gives_as_many_choices_whole_and_streamed(client: openai.OpenAI) -> None:
    fields = {"n": 3, "temperature": 1.0, "seed": 5}
    whole = {choice.index: choice.message.content for choice in ask(client, **fields).choices}
    assert sorted(whole) == [0, 1, 2]
    assert len(set(whole.values())) > 1
    streamed = dict.fromkeys(whole, "")
    for chunk in ask(client, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == whole


def test_a_seed_repeats_and_another_one_differs(client: openai.OpenAI) -> None:
    texts = [ask(client, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_logprobs_come_with_bytes_and_as_many_alternatives_as_asked(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= 0
        assert entry.token == entry.top_logprobs[0].token  # greedy: the chosen one is the most probable
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
    assert (
        b"".join(bytes(entry.bytes) for entry in entries)
        .decode("utf-8", "replace")
        .startswith(answer.choices[0].message.content[:4])
    )


def test_logprobs_of_a_stream_equal_those_of_a_whole_answer(client: openai.OpenAI) -> None:
    whole = [entry.logprob for entry in ask(client, logprobs=True).choices[0].logprobs.content]
    streamed = [
        entry.logprob
        for chunk in ask(client, logprobs=True, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert streamed == pytest.approx(whole)


def test_logprobs_without_alternatives_list_none(client: openai.OpenAI) -> None:
    assert all(not entry.top_logprobs for entry in ask(client, logprobs=True).choices[0].logprobs.content)


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    text = ask(client, max_tokens=30).choices[0].message.content
    stop = text[6:9]
    choice = ask(client, max_tokens=30, stop=stop).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == text[: text.index(stop)]
    assert choice.stop_reason == stop


def test_logit_bias_with_string_keys_forces_a_token(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=3, logit_bias={"40": 100}, extra_body={"return_token_ids": True})
    assert answer.choices[0].token_ids == [40, 40, 40]


def test_max_completion_tokens_wins_over_max_tokens(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=12, max_completion_tokens=2, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 2


def test_extra_fields_of_compatible_servers_take_effect(client: openai.OpenAI) -> None:
    answer = ask(
        client,
        temperature=1.0,
        extra_body={
            "top_k": 1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "min_tokens": 2,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "allowed_token_ids": [50, 51],
            "bad_words": ["fox"],
            "priority": 1,
            "cache_salt": "tenant",
            "truncate_prompt_tokens": 4,
            "add_generation_prompt": True,
            "prompt_logprobs": 1,
            "return_token_ids": True,
        },
    )
    assert set(answer.choices[0].token_ids) <= {50, 51}
    assert answer.usage.prompt_tokens == 4
    assert answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == 4


def test_continue_final_message_leaves_the_last_message_open(server: Any) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "to be or"}]
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
    closed = server.post("/v1/chat/completions", body).json()
    opened = server.post("/v1/chat/completions", {**body, "continue_final_message": True}).json()
    text = server.post("/detokenize", {"tokens": opened["prompt_token_ids"]}).json()["prompt"]
    assert text.endswith("to be or")
    assert opened["prompt_token_ids"] != closed["prompt_token_ids"]


def test_null_is_fine_for_every_optional_field_and_unknown_fields_are_ignored(server: Any) -> None:
    schema = server.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    fields = schema["content"]["application/json"]["schema"]["properties"]
    body = {**dict.fromkeys(fields), "messages": QUESTION, "max_tokens": 2}
    body |= {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True}
    body |= {"no_such_field": [1, {"deep": None}], "reasoning_effort": None, "verbosity": "low", "tool_choice": "auto"}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text


def test_message_content_may_be_a_list_of_text_parts(server: Any) -> None:
    parts = [{"type": "text", "text": "a tale"}, {"type": "text", "text": "of two cities"}]
    body = {"max_tokens": 1, "return_token_ids": True}
    listed = server.post("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": parts}]}).json()
    joined = [{"role": "user", "content": "a tale\nof two cities"}]
    plain = server.post("/v1/chat/completions", {**body, "messages": joined}).json()
    assert listed["prompt_token_ids"] == plain["prompt_token_ids"]


def test_every_event_of_a_stream_is_a_line_of_json_and_the_last_says_done(server: Any) -> None:
    body = {"messages": QUESTION, "max_tokens": 5, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        assert json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_the_request_id_is_echoed_and_becomes_part_of_the_reply_id(server: Any) -> None:
    body = {"messages": QUESTION, "max_tokens": 1}
    answer = server.post("/v1/chat/completions", body, headers={"X-Request-Id": "trace-1.a"})
    assert answer.headers["x-request-id"] == "trace-1.a"
    assert answer.json()["id"] == "chatcmpl-trace-1.a"
    assert server.post("/v1/chat/completions", {**body, "request_id": "own"}).json()["id"] == "chatcmpl-own"


@pytest.mark.parametrize("bad", ["a" * 129, "a b", "a;b", 'x"y'])
def test_a_harmful_request_id_is_replaced(server: Any, bad: str) -> None:
    answer = server.get("/v1/models", headers={"X-Request-Id": bad})
    assert answer.headers["x-request-id"] != bad
    assert len(answer.headers["x-request-id"]) == 32
