"""The parts of the protocol that need no server: chunks, log probabilities, errors, listening."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from midspan.engine.outputs import CompletionOutput, Logprob, RequestOutput
from midspan.errors import EngineDead, InvalidRequest, QueueFull, SettingsError
from midspan_api import ServerSettings
from midspan_api.event_stream import EventStream
from midspan_api.listening import bind, is_loopback, url_of
from midspan_api.model_naming import served_names
from midspan_api.prompt_preparation import truncated
from midspan_api.protocol.chat_reply import ChatChunks
from midspan_api.protocol.chat_request import ChatRequest, template_messages
from midspan_api.protocol.completion_request import CompletionRequest
from midspan_api.protocol.error_body import wire_error
from midspan_api.protocol.json_body import decode
from midspan_api.protocol.logprob_objects import chat_logprobs, top_candidates
from midspan_api.protocol.reply_header import ReplyHeader, event
from midspan_api.protocol.text_chunks import TextChunks

HEADER = ReplyHeader(id='cmpl-"x"', created=1, model="näme/\\\n")
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELD_NAMES = [field.name for field in msgspec.structs.fields(ChatRequest)]


@given(text=st.text(), index=st.integers(0, 99), delta=st.booleans(), null_usage=st.booleans())
def test_a_prepared_chunk_equals_the_encoded_object(text: str, index: int, delta: bool, null_usage: bool) -> None:
    chunks = TextChunks(HEADER, "kind", delta=delta, null_usage=null_usage)
    content: dict[str, Any] = {"delta": {"content": text}} if delta else {"text": text}
    expected = HEADER.json_object("kind")
    expected["choices"] = [{"index": index, **content, "logprobs": None, "finish_reason": None}]
    if null_usage:
        expected["usage"] = None
    assert chunks.event(index, text) == event(expected)
    assert chunks.event(index, text) == event(expected)  # the second time from what was kept


@given(body=st.dictionaries(st.sampled_from(FIELD_NAMES) | st.text(max_size=5), ANY_JSON, max_size=6))
def test_any_json_object_is_read_or_refused_with_a_short_message(body: dict[str, Any]) -> None:
    for record in (ChatRequest, CompletionRequest):
        refusal = refusal_of(json.dumps(body).encode(), record)
        assert refusal is None or len(wire_error(refusal).body()) < 1500


def refusal_of(body: bytes, record: type[ChatRequest] | type[CompletionRequest]) -> InvalidRequest | None:
    """What reading and checking a body raises; any other error is a fault."""
    try:
        request = decode(body, record)
        request.refuse_unserved()
        request.sampling({})
        if isinstance(request, ChatRequest):
            template_messages(request.messages)
        else:
            request.prompts(10)
    except InvalidRequest as error:
        return error
    return None


@given(body=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode(body, CompletionRequest)


def test_a_model_default_counts_where_the_request_is_silent() -> None:
    defaults = {"temperature": 0.3, "top_p": 0.8, "max_tokens": 77}
    request = decode(b'{"messages": [], "temperature": 0, "top_p": null}', ChatRequest)
    params = request.sampling(defaults)
    assert (params.temperature, params.top_p, params.max_tokens) == (0, 0.8, 77)
    assert decode(b'{"messages": []}', ChatRequest).sampling({}).max_tokens is None
    assert decode(b'{"prompt": "a"}', CompletionRequest).sampling({}).max_tokens == 16


def test_the_chosen_token_is_listed_among_the_top_ones_only_if_it_is_one_of_them() -> None:
    place = {
        7: Logprob(logprob=-5.0, rank=9, decoded_token="g"),
        1: Logprob(logprob=-0.1, rank=1, decoded_token="a"),
        2: Logprob(logprob=-3.0, rank=2, decoded_token="b"),
    }
    assert [key for key, _ in top_candidates(place, 2)] == [1, 2]
    assert top_candidates(place, 0) == []
    (entry,) = chat_logprobs([place], [7], 2, lambda token: bytes([token]))["content"]
    assert (entry["token"], entry["bytes"], len(entry["top_logprobs"])) == ("g", [7], 2)


def test_minus_infinity_becomes_a_number_that_json_can_write() -> None:
    place = {1: Logprob(logprob=float("-inf"), rank=1, decoded_token="a")}
    (entry,) = chat_logprobs([place], [1], 1, lambda token: b"a")["content"]
    assert entry["logprob"] == -9999.0


def test_a_token_without_text_sends_nothing_unless_it_has_news() -> None:
    chunks = ChatChunks(decode(b'{"messages": []}', ChatRequest), HEADER, lambda token: b"")

    def output(piece: CompletionOutput) -> RequestOutput:
        return RequestOutput(request_id="r", prompt=None, prompt_token_ids=[1], outputs=[piece], finished=False)

    assert chunks.events(output(CompletionOutput(index=0, text="", token_ids=[1]))).count(b"data: ") == 1
    assert chunks.events(output(CompletionOutput(index=0, text="", token_ids=[2]))) == b""
    last = chunks.events(output(CompletionOutput(index=0, text="é", token_ids=[3], finish_reason="stop")))
    assert json.loads(last.removeprefix(b"data: "))["choices"][0]["delta"] == {"content": "é"}
    assert chunks.closing() == b""


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequest("no"), 400, "invalid_value"),
        (QueueFull("full"), 429, "queue_full"),
        (EngineDead("gone"), 503, "engine_dead"),
        (ValueError("secret path /home/me"), 500, "internal_error"),
    ],
)
def test_errors_have_their_status_and_keep_secrets(error: Exception, status: int, code: str) -> None:
    wire = wire_error(error)
    assert (wire.status, wire.code) == (status, code)
    assert b"secret" not in wire.body()


def test_a_lone_surrogate_in_an_error_message_can_still_be_sent() -> None:
    assert json.loads(wire_error(InvalidRequest("bad \ud83d text")).body())["error"]["message"] == "bad ? text"


async def _collect(stream: EventStream) -> list[dict[str, Any]]:
    import asyncio

    sent: list[dict[str, Any]] = []
    never = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await never.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await stream({"type": "http"}, receive, send)
    return sent


@pytest.mark.parametrize(("error", "code"), [(EngineDead("gone"), "engine_dead"), (KeyError("x"), "internal_error")])
def test_an_error_in_a_stream_is_an_event_and_the_stream_still_ends_well(error: Exception, code: str) -> None:
    import asyncio

    closed = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise error

    async def close() -> None:
        closed.append(True)

    sent = asyncio.run(_collect(EventStream(events(), close)))
    bodies = [message["body"] for message in sent[1:]]
    assert bodies[0] == b"data: 1\n\n"
    assert json.loads(bodies[1].removeprefix(b"data: "))["error"]["code"] == code
    assert bodies[2] == b"data: [DONE]\n\n"
    assert [message.get("more_body") for message in sent[1:]] == [True, True, False]
    assert closed == [True]


def test_a_comment_is_sent_while_there_is_nothing_to_send() -> None:
    import asyncio

    async def collect() -> list[dict[str, Any]]:
        commented = asyncio.Event()
        sent: list[dict[str, Any]] = []

        async def events() -> AsyncGenerator[bytes, None]:
            await commented.wait()
            yield b"data: 1\n\n"

        async def close() -> None:
            pass

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message.get("body", b"").startswith(b":"):
                commented.set()

        await asyncio.wait_for(EventStream(events(), close, quiet_seconds=0.01)({"type": "http"}, receive, send), 30)
        return sent

    bodies = [message["body"] for message in asyncio.run(collect())[1:]]
    assert bodies[0] == b": waiting\n\n"
    assert bodies[-2:] == [b"data: 1\n\n", b"data: [DONE]\n\n"]


@pytest.mark.parametrize(
    ("given", "path", "names"),
    [
        ("pypi:llm", "/cache/llm/1/Some-135M-Instruct.Q4_1.gguf", ("pypi:llm", "Some-135M-Instruct")),
        ("/m/some-7b-q4_k_m.gguf", "/m/some-7b-q4_k_m.gguf", ("/m/some-7b-q4_k_m.gguf", "some-7b")),
        ("/m/a.gguf", "/m/a-f16-00001-of-00002.gguf", ("/m/a.gguf", "a")),
        ("team/Model-1B", "/hub/models--team--Model-1B/snapshots/0a1b", ("team/Model-1B", "Model-1B")),
        ("Model-1B", "/hub/snapshots/0a1b", ("Model-1B",)),
        ("/", "/", ("/",)),
    ],
)
def test_a_model_has_the_name_it_was_given_and_a_readable_one(given: str, path: str, names: tuple[str, ...]) -> None:
    assert served_names(given, path) == names


def test_a_prompt_is_cut_from_its_beginning() -> None:
    assert truncated([1, 2, 3, 4], 2, 10) == [3, 4]
    assert truncated([1, 2], None, 10) == [1, 2]
    assert truncated(list(range(20)), -1, 10) == list(range(11, 20))
    for bad in (0, -2, 11):
        with pytest.raises(InvalidRequest):
            truncated([1], bad, 10)


def test_addresses_are_told_apart_and_shown() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener, "0.0.0.0", encrypted=False) == f"http://127.0.0.1:{port}"
        assert url_of(listener, "::1", encrypted=True) == f"https://[::1]:{port}"
    with pytest.raises(SettingsError, match="cannot be resolved"):
        bind("no.such.host.invalid", 0)


def test_a_bound_port_refuses_a_second_server() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingsError, match="already in use"):
            bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    "bad",
    [
        {"port": 70000},
        {"max_body_bytes": 0},
        {"shutdown_timeout": float("nan")},
        {"api_keys": ("",)},
        {"root_path": "api"},
    ],
)
def test_server_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        ServerSettings(**bad)


def test_keys_do_not_show_in_the_settings_text() -> None:
    assert "secret" not in repr(ServerSettings(api_keys=("secret",)))
