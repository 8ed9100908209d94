"""Messages survive the way over a socket, and rubbish on the way is an error and nothing worse."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.child import read_frame
from midspan.engine.frames import LENGTH, MAX_FRAME_BYTES, BrokenStream, frame, receive_frame
from midspan.engine.messages import (
    Abort,
    AddRequest,
    Fatal,
    FromEngine,
    Load,
    Ping,
    Pong,
    Problem,
    PromptReport,
    ProtocolError,
    SequenceEvent,
    SequenceStart,
    Shutdown,
    Start,
    StepEvents,
    ToEngine,
    TokenScores,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from midspan.engine.remote_errors import restore_error
from midspan.engine.status import EngineStatistics, StartupPhase
from midspan.errors import CacheTooSmall, DeviceNotFound, EngineDead, InvalidRequest, MidspanError
from midspan.settings import EngineSettings

ADD = AddRequest(
    request_id="é",
    prompt_ids=[1, 2, 3],
    params=SamplingParams(stop=["x", "yz"], logit_bias={3: -1.5}, seed=2**64 - 1, max_tokens=5, n=2),
    sequences=[SequenceStart(index=0, seed=2**64 - 1), SequenceStart(index=1, seed=0, emitted_ids=[4, 5])],
    eos_token_ids=(0, 2),
    bad_word_ids=((1, 2), (3,)),
    cache_salt="tenant",
)


@pytest.mark.parametrize(
    "message",
    [
        Start(settings=EngineSettings(model="m", device_options={"a": "b"}, served_model_name=("x",))),
        Load(path="/m"),
        ADD,
        Abort(request_id="a"),
        Abort(request_id="a", index=3, reason="stop"),
        Ping(number=7),
        Shutdown(),
    ],
)
def test_messages_to_the_engine_come_back_as_they_were(message: ToEngine) -> None:
    assert decode_to_engine(encode(message)) == message
    with pytest.raises(ProtocolError):
        decode_from_engine(encode(message))


@pytest.mark.parametrize(
    "message",
    [
        StartupPhase(name="weights", detail="x", done=1, total=2),
        StepEvents(
            sequences=[
                SequenceEvent(
                    request_id="a",
                    index=1,
                    token_ids=[5],
                    scores=[TokenScores(token_id=5, logprob=-0.5, rank=1, top_ids=[5, 6], top=[-0.5, -1.0])],
                    finish_reason="stop",
                    stop_reason=5,
                    prompt=PromptReport(cached_tokens=4, scheduled_time=1.5, scores=[]),
                ),
                SequenceEvent(request_id="b", index=0, finish_reason="error", error="why"),
            ],
            statistics=EngineStatistics(finished={"stop": 3}),
        ),
        Problem(code="c", message="m"),
        Fatal(code="c", message="m", remedy="r", restartable=True),
        Pong(number=7),
    ],
)
def test_messages_from_the_engine_come_back_as_they_were(message: FromEngine) -> None:
    assert decode_from_engine(encode(message)) == message
    with pytest.raises(ProtocolError):
        decode_to_engine(encode(message))


@given(st.binary(max_size=60))
def test_rubbish_is_a_protocol_error(payload: bytes) -> None:
    for decode in (decode_to_engine, decode_from_engine):
        with pytest.raises(ProtocolError):
            decode(payload)


@given(st.data())
def test_a_damaged_message_is_a_protocol_error_or_another_message(data: st.DataObject) -> None:
    payload = bytearray(encode(ADD))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = decode_to_engine(bytes(payload))
    except ProtocolError:
        return
    assert isinstance(message, msgspec.Struct)


def test_parameters_that_no_request_may_have_do_not_come_over_the_wire() -> None:
    payload = encode(ADD).replace(b"\xabtemperature\xcb\x3f\xf0", b"\xabtemperature\xcb\x7f\xf8")
    assert payload != encode(ADD)
    with pytest.raises(ProtocolError, match="temperature"):
        decode_to_engine(payload)


@pytest.fixture
def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def test_frames_are_received_whole_however_they_are_cut(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    with left, right:
        whole = frame(b"one") + frame(b"") + frame(b"three")
        for begin in range(0, len(whole), 2):
            left.sendall(whole[begin : begin + 2])
        assert [receive_frame(right) for _ in range(3)] == [b"one", b"", b"three"]
        left.sendall(frame(b"cut off")[:-1])
        left.close()
        assert receive_frame(right) is None


def test_a_length_made_of_rubbish_is_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    with left, right:
        left.sendall(LENGTH.pack(MAX_FRAME_BYTES + 1))
        with pytest.raises(BrokenStream):
            receive_frame(right)


def test_asyncio_reads_the_same_frames() -> None:
    async def read() -> list[bytes | None]:
        reader = asyncio.StreamReader()
        reader.feed_data(frame(b"one") + frame(b"two") + frame(b"cut")[:-1])
        reader.feed_eof()
        found = [await read_frame(reader) for _ in range(3)]
        broken = asyncio.StreamReader()
        broken.feed_data(b"\xff" * 8)
        with pytest.raises(BrokenStream):
            await read_frame(broken)
        return found

    assert asyncio.run(read()) == [b"one", b"two", None]


def test_errors_cross_the_border_as_what_they_were() -> None:
    for kind in (CacheTooSmall, DeviceNotFound, EngineDead, InvalidRequest):
        error = restore_error(kind.code, "what", "Do this.")
        assert type(error) is kind
        assert (error.message, error.remedy) == ("what", "Do this.")
    for code in ("plugin_error", "unsupported_operation", "a_code_of_tomorrow"):
        error = restore_error(code, "what", "Do this.")
        assert type(error) is MidspanError
        assert error.code == code
