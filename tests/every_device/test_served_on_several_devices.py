"""One address, an engine on each of several devices: ``midspan serve`` as people run it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

pytestmark = pytest.mark.slow

DEVICES = ("reference", "cpu", "simulated")
PROMPT = [7 + place % 200 for place in range(80)]


class Server:
    """A running ``midspan serve``."""

    def __init__(self, process: subprocess.Popen[str], url: str, said: str) -> None:
        self.process = process
        self.url = url
        self.said = said
        self.http = httpx.Client(timeout=60)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def metric(self, name: str) -> dict[str, float]:
        """Values of a metric, by the engine's number."""
        text = self.http.get(f"{self.url}/metrics").text
        found = re.findall(rf'^midspan:{name}{{[^}}]*engine="(\d)"[^}}]*}} (\S+)$', text, re.MULTILINE)
        return {engine: float(value) for engine, value in found}

    def wait_until_idle(self) -> None:
        while True:
            running, waiting = self.metric("num_requests_running"), self.metric("num_requests_waiting")
            if not any((*running.values(), *waiting.values())):
                return

    def engines(self) -> list[int]:
        """Process ids of the engines, in the order of their start."""
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in sorted(children, key=psutil.Process.create_time)]


@pytest.fixture(scope="module")
def server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "midspan_cli", "serve", str(small_model), "--port", str(port)]
    command += [word for name in DEVICES for word in ("--device", name)]
    command += ["--device-option", "simulated/block_sizes=12,20", "--device-option", "cpu/threads=1"]
    command += ["--dtype", "float32", "--kv-cache-memory-bytes", "8M", "--served-model-name", "small"]
    environment = {**os.environ, "MIDSPAN_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("Try it:"):
            break
    else:
        pytest.fail(process.stderr.read())
    running = Server(process, f"http://127.0.0.1:{port}", said)
    yield running
    running.http.close()
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    for number, name in enumerate(DEVICES):
        assert re.search(rf"device \[{number} {name}\]: Device {name} \(.*, as asked\.", told), told


def stream(server: Server, number: int, tokens: int, gone: list[int] | None = None) -> tuple[str, str | None]:
    """One streamed completion; its text and how it ended. Notes the number when half of it came."""
    pieces, reason = [], None
    with server.client() as client:
        events = client.completions.create(
            model="small",
            prompt=[5 + number, 9, 200],
            max_tokens=tokens,
            temperature=0.9,
            seed=number,
            stream=True,
            extra_body={"top_k": 3, "ignore_eos": True},
        )
        for event in events:
            choice = event.choices[0]
            pieces.append(choice.text)
            reason = choice.finish_reason or reason
            if gone is not None and len(pieces) == tokens // 4:
                gone.append(number)
    return "".join(pieces), reason


def test_it_says_where_it_runs(server: Server) -> None:
    for name in DEVICES:
        assert re.search(rf"{name} \(.*\), float32", server.said), server.said
    assert server.metric("engine_up") == {"0": 1.0, "1": 1.0, "2": 1.0}
    config = server.http.get(f"{server.url}/metrics").text
    assert set(re.findall(r'^midspan:cache_config_info{block_size="(\d+)"', config, re.MULTILINE)) == {"16", "12"}


def test_streams_are_spread_over_all_engines_and_none_is_different_for_it(server: Server) -> None:
    before = server.metric("generation_tokens_total")
    alone = [stream(server, number, 12) for number in range(6)]
    server.wait_until_idle()
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda number: stream(server, number % 6, 12), range(12)))
    server.wait_until_idle()
    assert together == alone * 2
    after = server.metric("generation_tokens_total")
    assert sum(after.values()) - sum(before.values()) == 18 * 12
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda number: stream(server, number, 300), range(12)))
    server.wait_until_idle()
    busy = server.metric("generation_tokens_total")
    assert all(busy[engine] > before[engine] for engine in busy)
    assert set(server.metric("kv_cache_usage_perc").values()) == {0.0}


def test_equal_beginnings_are_found_in_the_engine_that_holds_them(server: Server) -> None:
    with server.client() as client:
        cached = []
        for number in range(4):
            reply = client.completions.create(model="small", prompt=[*PROMPT, number], max_tokens=2, temperature=0)
            assert reply.usage is not None
            details = reply.usage.prompt_tokens_details
            cached.append(0 if details is None else details.cached_tokens or 0)
    assert cached[0] == 0
    assert all(count >= 72 for count in cached[1:])
    assert sorted(server.metric("prefix_cache_hits_total").values())[-1] >= 3 * 72


def test_an_engine_that_is_killed_takes_no_stream_with_it(server: Server) -> None:
    expected = [stream(server, number, 200) for number in range(6)]
    server.wait_until_idle()
    victim = server.engines()[0]
    under_way: list[int] = []
    with ThreadPoolExecutor(6) as pool:
        work = [pool.submit(stream, server, number, 200, under_way) for number in range(6)]
        while len(under_way) < 3:
            assert not all(one.done() for one in work)
        os.kill(victim, signal.SIGKILL)
        results = [one.result(120) for one in work]
    assert results == expected
    assert server.http.get(f"{server.url}/health").status_code == 200
    server.wait_until_idle()
    assert sum(server.metric("engine_restarts_total").values()) == 1
    assert set(server.metric("engine_up").values()) == {1.0}
    assert set(server.metric("kv_cache_usage_perc").values()) == {0.0}
    assert stream(server, 1, 200) == expected[1]
