"""Bad input in each place gets its error and harms nobody else."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
JSON = {"Content-Type": "application/json"}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, checked for OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert "x-request-id" in answer.headers
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert error["message"]
    assert len(answer.content) < 2000
    for leak in ("Traceback", "pydantic", "msgspec", ".py"):
        assert leak not in answer.text
    return dict(error)


@pytest.mark.parametrize(
    ("fields", "parameter", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": 1e9}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"min_p": 2}, "min_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 1000}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**30}, "max_tokens", "invalid_value"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens", "invalid_value"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["x" * 257]}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_type"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "invalid_value"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "invalid_value"),
        ({"allowed_token_ids": [1] * (2**18 + 1)}, "allowed_token_ids", "invalid_value"),
        ({"priority": 2**31}, "priority", "invalid_value"),
        ({"priority": -(2**70)}, "priority", "invalid_value"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 1000}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(key): 1 for key in range(1025)}}, "logit_bias", "invalid_value"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids", "invalid_value"),
        ({"bad_words": [""]}, "bad_words", "invalid_value"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"cache_salt": ""}, "cache_salt", "invalid_value"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "unsupported_parameter"),
        ({"guided_json": {}}, "guided_json", "unsupported_parameter"),
        ({"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
    ],
)
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_a_bad_value_is_refused_by_name(
    server: Any, route: str, fields: dict[str, Any], parameter: str, code: str
) -> None:
    prompt = {"messages": MESSAGES} if route == CHAT else {"prompt": "hello"}
    error = error_of(server.post(route, {**prompt, **fields}), 400)
    assert (error["param"], error["code"]) == (parameter, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "parameter", "code"),
    [
        ({}, "messages", "missing_field"),
        ({"messages": []}, "messages", "empty_prompt"),
        ({"messages": "hello"}, "messages", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages", "missing_field"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", "invalid_type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "unsupported_content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "missing_field"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"messages": MESSAGES, "functions": [{}]}, "functions", "unsupported_parameter"),
        ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "invalid_value"),
        (
            {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "invalid_value",
        ),
    ],
)
def test_a_bad_conversation_is_refused_by_name(server: Any, fields: dict[str, Any], parameter: str, code: str) -> None:
    error = error_of(server.post(CHAT, fields), 400)
    assert (error["param"], error["code"]) == (parameter, code)


@pytest.mark.parametrize("arguments", ["[" * 100_000, "[" * 500 + "]" * 500, "{", '"\\ud800"', "9" * 5000])
def test_arguments_of_a_call_that_cannot_be_read_are_refused(server: Any, arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}, *MESSAGES]
    assert error_of(server.post(CHAT, {"messages": messages}), 400)["param"] == "messages"


def test_a_text_may_hold_as_many_digits_as_it_likes(server: Any) -> None:
    digits = "31415926" * 700
    fields = {"max_tokens": 1, "truncate_prompt_tokens": 4}
    assert server.post(COMPLETIONS, {"prompt": digits, **fields}).status_code == 200
    messages = [{"role": "user", "content": digits}]
    assert server.post(CHAT, {"messages": messages, **fields}).status_code == 200


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_a_text_too_long_for_any_tokens_is_refused_before_it_is_tokenized(
    server: Any, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = server.serving.engine.tokenizer
    monkeypatch.setattr(tokenizer, "encode", lambda text, add_special_tokens: pytest.fail("it was tokenized"))
    text = "x" * (5 * 4096 * (tokenizer.longest_token() or 0))
    body = {"prompt": text} if route == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    error = error_of(server.post(route, body), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == ("prompt" if route == COMPLETIONS else "messages")
    assert "at least" in error["message"]


@pytest.mark.parametrize(
    ("fields", "parameter", "code"),
    [
        ({}, "prompt", "missing_field"),
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "empty_prompt"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_type"),
        ({"prompt": [320]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [10**25]}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 1025}, "prompt", "invalid_value"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        ({"prompt": "a", "best_of": 4}, "best_of", "unsupported_parameter"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
    ],
)
def test_a_bad_prompt_is_refused_by_name(server: Any, fields: dict[str, Any], parameter: str, code: str) -> None:
    error = error_of(server.post(COMPLETIONS, fields), 400)
    assert (error["param"], error["code"]) == (parameter, code)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("route", "parameter"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
def test_a_prompt_that_is_too_long_is_refused_before_the_stream_starts(
    server: Any, route: str, parameter: str, stream: bool
) -> None:
    text = "東京 🎉 " * 3000
    prompt = {"messages": [{"role": "user", "content": text}]} if route == CHAT else {"prompt": text}
    error = error_of(server.post(route, {**prompt, "stream": stream}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", parameter)
    assert "This model's maximum context length is 4096 tokens" in error["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"not json", "invalid_json"),
        (b'{"prompt": "a", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "a", "temperature": 1e999}', "invalid_value"),
        (b'{"prompt": "\\ud83d"}', "invalid_json"),
        (b'{"prompt": "\xff\xfe"}', "invalid_json"),
        (b"[1, 2]", "invalid_type"),
        (b'"text"', "invalid_type"),
        (b"null", "invalid_type"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "invalid_value"),
        (b'{"prompt": "a", "response_format": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", "invalid_json"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server: Any, body: bytes, code: str) -> None:
    assert error_of(server.post(COMPLETIONS, content=body, headers=JSON), 400)["code"] == code


def test_a_huge_bad_value_is_not_sent_back(server: Any) -> None:
    error_of(server.post(COMPLETIONS, {"prompt": "a", "model": "m" * 100_000}), 404)
    error_of(server.post(COMPLETIONS, {"prompt": ["a"] * 50_000 + [None]}), 400)
    error_of(server.post(CHAT, {"messages": [{"role": "x" * 100_000}]}), 400)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_another_content_type_is_refused(server: Any, content_type: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = server.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
    assert error_of(answer, 415)["code"] == "unsupported_media_type"


def test_content_type_may_have_parameters(server: Any) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert server.post(COMPLETIONS, content=b'{"prompt": "a", "max_tokens": 1}', headers=headers).status_code == 200


def test_an_unknown_route_and_a_wrong_method_are_told_apart(server: Any) -> None:
    assert error_of(server.get("/v1/nothing"), 404)["code"] == "route_not_found"
    answer = server.get(CHAT)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, "/tokenize"])
def test_an_unknown_model_is_answered_with_those_that_are_served(server: Any, route: str) -> None:
    body = {"model": "other", "prompt": "a", "messages": MESSAGES}
    error = error_of(server.post(route, body), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "team/tiny" in error["message"]


def test_a_body_over_the_limit_is_refused_with_and_without_a_declared_length(start_server: Any) -> None:
    small = start_server(max_body_bytes=1000)
    body = json.dumps({"prompt": "a" * 2000}).encode()
    assert error_of(small.post(COMPLETIONS, content=body, headers=JSON), 413)["code"] == "body_too_large"
    chunked = httpx.post(
        small.url + COMPLETIONS, content=(body[i : i + 100] for i in range(0, len(body), 100)), headers=JSON
    )
    assert error_of(chunked, 413)["code"] == "body_too_large"
    assert small.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_full_queue_is_answered_with_429_and_when_to_come_back(start_server: Any) -> None:
    full = start_server(engine={"max_queued_requests": 1, "max_num_seqs": 1})
    with full.client() as client:
        streams = []
        refused = None
        for _ in range(8):
            try:
                stream = client.completions.create(
                    model="tiny", prompt="a", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
                )
            except openai.RateLimitError as error:
                refused = error
                break
            streams.append(stream)
        assert refused is not None
        assert refused.code == "queue_full"
        assert refused.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
    full.wait_until(full.nothing_is_held)


def test_a_failing_request_leaves_its_neighbours_alone(server: Any, client: openai.OpenAI) -> None:
    alone = client.completions.create(model="tiny", prompt="to be or", temperature=0, max_tokens=64)
    stream = client.completions.create(model="tiny", prompt="to be or", temperature=0, max_tokens=64, stream=True)
    pieces = []
    for number, chunk in enumerate(stream):
        pieces.append(chunk.choices[0].text)
        if number < 5:
            error_of(server.post(COMPLETIONS, {"prompt": [999999]}), 400)
    assert "".join(pieces) == alone.choices[0].text


def test_the_client_library_raises_its_own_error_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nothing", prompt="a")
