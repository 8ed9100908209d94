"""The engine's process spoken to byte by byte: rubbish, wrong order, an early end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from midspan import EngineSettings
from midspan.engine.frames import LENGTH, frame, receive_frame
from midspan.engine.messages import (
    Fatal,
    FromEngine,
    Load,
    Ping,
    Pong,
    Problem,
    Shutdown,
    Start,
    Started,
    decode_from_engine,
    encode,
)
from midspan.engine.status import StartupPhase

DEADLINE = 60.0
"""Seconds after which a process that should have ended is taken for stuck."""


def settings(model: Path, **changes: Any) -> EngineSettings:
    chosen = {"device": "reference", "block_size": 4, "kv_cache_memory_bytes": 4 * 2**20, **changes}
    return EngineSettings(model=str(model), **chosen)


class Wire:
    """An engine process spoken to byte by byte."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(DEADLINE)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "midspan.engine.process", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stderr=subprocess.DEVNULL,
            )

    def send(self, payload: bytes) -> None:
        self.socket.sendall(frame(payload))

    def receive(self, kind: type) -> FromEngine:
        """The next message of a kind; others before it are passed over."""
        while True:
            payload = receive_frame(self.socket)
            assert payload is not None, "the process ended"
            message = decode_from_engine(payload)
            if isinstance(message, kind):
                return message

    def close(self) -> int:
        self.socket.close()
        return self.process.wait(DEADLINE)


@pytest.fixture
def wire() -> Any:
    made = Wire()
    yield made
    made.socket.close()
    made.process.kill()
    made.process.wait(DEADLINE)


def test_rubbish_between_good_messages_is_answered_and_changes_nothing(wire: Wire, tiny_model: Path) -> None:
    start, load = encode(Start(settings=settings(tiny_model))), encode(Load(path=str(tiny_model)))
    wire.send(start)
    wire.send(load)
    wire.receive(Started)
    for rubbish in (b"", b"\xc1", b"\x81\xa4type\xa5dream", start, load):
        wire.send(rubbish)
        problem = wire.receive(Problem)
        assert isinstance(problem, Problem)
        assert problem.code == "protocol_error"
    wire.send(encode(Ping(number=9)))
    assert wire.receive(Pong) == Pong(number=9)
    wire.send(encode(Shutdown()))
    assert wire.process.wait(DEADLINE) == 0


def test_a_stream_that_lost_its_frames_ends_the_engine_with_a_word(wire: Wire, tiny_model: Path) -> None:
    wire.send(encode(Start(settings=settings(tiny_model))))
    wire.send(encode(Load(path=str(tiny_model))))
    wire.receive(Started)
    wire.socket.sendall(LENGTH.pack(2**32 - 1))
    fatal = wire.receive(Fatal)
    assert isinstance(fatal, Fatal)
    assert (fatal.code, fatal.restartable) == ("protocol_error", False)
    assert wire.process.wait(DEADLINE) == 1


def test_a_first_message_that_is_no_start_is_refused(wire: Wire) -> None:
    wire.send(encode(Ping(number=1)))
    fatal = wire.receive(Fatal)
    assert isinstance(fatal, Fatal)
    assert "first message" in fatal.message
    assert wire.process.wait(DEADLINE) == 1


def test_the_device_is_opened_before_the_model_is_known(wire: Wire, tiny_model: Path) -> None:
    wire.send(encode(Start(settings=settings(tiny_model))))
    phase = wire.receive(StartupPhase)
    assert isinstance(phase, StartupPhase)
    assert phase.name == "device"
    wire.send(encode(Start(settings=settings(tiny_model))))
    fatal = wire.receive(Fatal)
    assert isinstance(fatal, Fatal)
    assert "second message must be a Load" in fatal.message
    assert wire.process.wait(DEADLINE) == 1


def test_a_process_told_to_end_before_it_knows_its_model_ends_well(wire: Wire, tiny_model: Path) -> None:
    wire.send(encode(Start(settings=settings(tiny_model))))
    wire.send(encode(Shutdown()))
    assert wire.process.wait(DEADLINE) == 0


def test_the_process_ends_when_its_socket_does(wire: Wire) -> None:
    assert wire.close() == 0
