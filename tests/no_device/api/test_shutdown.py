"""``midspan serve`` as a process: signals, the end of the engine, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = pytest.mark.slow

COMPLETIONS = "/v1/completions"
ENDLESS = {"prompt": "the quick", "max_tokens": 4000, "ignore_eos": True, "stream": True, "temperature": 0.8}


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came to pass"
        time.sleep(0.02)


def events(answer: httpx.Response) -> Iterator[Any]:
    """The payloads of a stream: JSON objects, and at last the text [DONE]."""
    for line in answer.iter_lines():
        if line:
            payload = line.removeprefix("data: ")
            yield payload if payload == "[DONE]" else json.loads(payload)


def processes_of(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in processes)


def readiness(http: httpx.Client, url: str) -> int:
    return http.get(f"{url}/readyz").status_code


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(serve_process: Any, http: httpx.Client) -> None:
    server = serve_process("--shutdown-timeout", "60")
    body = {**ENDLESS, "max_tokens": 400}
    with http.stream("POST", server.url + COMPLETIONS, json=body) as answer:
        stream = events(answer)
        next(stream)
        server.signal(signal.SIGTERM)
        wait_until(lambda: readiness(http, server.url) == 503)
        refused = http.post(server.url + COMPLETIONS, json={"prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_draining"
        assert http.get(f"{server.url}/livez").status_code == 200
        rest = list(stream)
    assert rest[-1] == "[DONE]"
    assert rest[-2]["choices"][0]["finish_reason"] == "length"
    assert server.wait() == 0


def test_what_does_not_finish_in_time_is_told_so(serve_process: Any, http: httpx.Client) -> None:
    server = serve_process("--shutdown-timeout", "0.1")
    with http.stream("POST", server.url + COMPLETIONS, json=ENDLESS) as answer:
        stream = events(answer)
        next(stream)
        server.signal(signal.SIGTERM)
        rest = list(stream)
    assert rest[-1] == "[DONE]"
    assert rest[-2]["error"]["code"] == "server_draining"
    assert server.wait() == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(serve_process: Any, http: httpx.Client, second: signal.Signals) -> None:
    server = serve_process("--shutdown-timeout", "600")
    with http.stream("POST", server.url + COMPLETIONS, json=ENDLESS) as answer:
        stream = events(answer)
        next(stream)
        server.signal(signal.SIGINT)
        wait_until(lambda: readiness(http, server.url) == 503)
        server.signal(second)
        rest = list(stream)
    assert rest[-2]["error"]["code"] == "server_draining"
    assert server.wait() == 0


def test_an_idle_server_ends_cleanly_and_says_nothing_alarming(serve_process: Any) -> None:
    server = serve_process()
    family = processes_of(server.process.pid)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    wait_until(lambda: all_gone(family))
    complaints = server.process.stderr.read()
    assert "Traceback" not in complaints
    assert "Task was destroyed" not in complaints


def test_a_signal_during_the_start_ends_it_cleanly(served_model: Path, environment: Any) -> None:
    command = [sys.executable, "-m", "midspan_cli", "serve", str(served_model), "--device", "reference", "--port", "0"]
    variables = {**os.environ, "MIDSPAN_CACHE": str(environment.cache_folder)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stderr is not None
        process.stderr.readline()
        family = processes_of(process.pid)
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert "Traceback" not in rest
    wait_until(lambda: all_gone(family))


def test_killing_the_server_leaves_no_process_behind(serve_process: Any, http: httpx.Client) -> None:
    server = serve_process()
    with http.stream("POST", server.url + COMPLETIONS, json=ENDLESS) as answer:
        stream = events(answer)
        next(stream)
        family = processes_of(server.process.pid)
        assert len(family) > 1
        server.process.kill()
        with pytest.raises(httpx.HTTPError):
            list(stream)
    wait_until(lambda: all_gone(family))


def test_a_stream_goes_on_when_the_engine_process_is_killed(serve_process: Any, http: httpx.Client) -> None:
    server = serve_process()
    body = {**ENDLESS, "max_tokens": 150, "seed": 7}
    with http.stream("POST", server.url + COMPLETIONS, json=body) as answer:
        undisturbed = "".join(e["choices"][0]["text"] for e in events(answer) if e != "[DONE]")
    with http.stream("POST", server.url + COMPLETIONS, json=body) as answer:
        stream = events(answer)
        text = next(stream)["choices"][0]["text"]
        for engine in processes_of(server.process.pid)[1:]:
            engine.kill()
        text += "".join(e["choices"][0]["text"] for e in stream if e != "[DONE]")
    assert text == undisturbed
    assert http.get(f"{server.url}/health").status_code == 200


def test_an_engine_that_cannot_be_brought_back_ends_the_server_with_an_error(
    serve_process: Any, http: httpx.Client
) -> None:
    server = serve_process()

    def kill_engine() -> bool:
        if server.process.poll() is not None:
            return True
        for engine in processes_of(server.process.pid)[1:]:
            engine.kill()
        return False

    wait_until(kill_engine, seconds=60)
    assert server.wait() == 1
    complaints = server.process.stderr.read()
    assert "the engine has ended" in complaints


def test_a_connection_whose_headers_do_not_end_is_closed_and_others_are_served(
    serve_process: Any, http: httpx.Client
) -> None:
    server = serve_process()
    port = httpx.URL(server.url).port
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Filler: ")
        answer = b""
        try:
            for _ in range(1000):
                connection.sendall(b"a" * 65536)
        except OSError:
            pass
        else:
            pytest.fail("64 MiB of headers were taken")
        with contextlib.suppress(ConnectionError):
            answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 431") or not answer
    with_many = {f"x-{number}": "a" * 1000 for number in range(30)}
    assert http.get(f"{server.url}/livez", headers=with_many).status_code == 200


def test_a_port_in_use_is_said_before_anything_is_loaded(served_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "midspan_cli", "serve", str(served_model), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"Port {port} on 127.0.0.1 is already in use" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr
    assert "checkpoint" not in done.stderr
