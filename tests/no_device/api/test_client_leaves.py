"""A client that goes away frees what its request holds; here over real sockets."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

LONG = 3500
COMPLETIONS = "/v1/completions"
SEED = 20


def raw_request(server: Any, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request over a socket of its own and return the socket."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    )
    connection.sendall(head.encode() + b"\r\n" + payload)
    return connection


def long_body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "the quick", "max_tokens": LONG, "ignore_eos": True, "temperature": 1.0, **fields}


def aborted(server: Any) -> int:
    lines = server.get("/metrics").text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("midspan:request_aborted_total{"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, long_body(stream=True)),
        (COMPLETIONS, long_body()),
        (COMPLETIONS, long_body(n=4, prompt=["a", "b", "c"])),
        (COMPLETIONS, long_body(n=2, prompt=["a", "b", "c"], stream=True)),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": LONG, "ignore_eos": True, "stream": True},
        ),
    ],
    ids=["stream", "whole", "several", "several-streamed", "chat"],
)
def test_closing_the_socket_ends_the_request(server: Any, path: str, body: dict[str, Any]) -> None:
    before = aborted(server)
    connection = raw_request(server, path, body)
    server.wait_until(lambda: server.serving.engine.statistics().blocks_in_use > 0)
    prompts = body.get("prompt")
    connection.close()
    server.wait_until(server.nothing_is_held, seconds=10)
    assert aborted(server) == before + (len(prompts) if isinstance(prompts, list) else 1)


def test_a_client_that_stops_sending_but_still_reads_gets_its_answer(server: Any) -> None:
    connection = raw_request(server, COMPLETIONS, long_body(max_tokens=5))
    with connection:
        answer = b""
        while b"completion_tokens" not in answer:
            received = connection.recv(65536)
            assert received
            answer += received
    assert b"200 OK" in answer


def test_closing_in_the_middle_of_the_body_starts_nothing(server: Any) -> None:
    received = server.serving.engine.statistics().received
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
        connection.sendall(b'Content-Length: 1000\r\n\r\n{"prompt": "a"')
    assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200
    server.wait_until(server.nothing_is_held)
    assert server.serving.engine.statistics().received == received + 1


def test_two_hundred_streams_with_random_ends_leave_no_block_in_use(server: Any) -> None:
    """Some are read to the end, some are dropped after a few chunks, some before the first."""
    chance = random.Random(SEED)
    expected = [len(text) for text in asyncio.run(_many_streams(server.url, chance, count=200))]
    assert len(expected) == 200
    server.wait_until(server.nothing_is_held, seconds=20)
    now = server.serving.engine.statistics()
    assert (now.running, now.waiting, now.blocks_in_use, now.restarts) == (0, 0, 0, 0)
    answer = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 3, "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 3


async def _many_streams(url: str, chance: random.Random, *, count: int) -> list[str]:
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
        plans = [(chance.choice([0, 1, 5, 20, LONG]), chance.randint(1, 3)) for _ in range(count)]
        return await asyncio.gather(*(_one_stream(client, chunks, n) for chunks, n in plans))


async def _one_stream(client: httpx.AsyncClient, chunks: int, n: int) -> str:
    """Read so many chunks and leave; streams that are left early would go on for long."""
    body = long_body(stream=True, n=n, max_tokens=20 if chunks == LONG else LONG)
    text = ""
    async with client.stream("POST", COMPLETIONS, json=body) as answer:
        assert answer.status_code == 200
        if chunks:
            async for line in answer.aiter_lines():
                text += line
                chunks -= line.startswith("data: ")
                if not chunks:
                    break
        if chunks > 0 and text:
            assert text.endswith("data: [DONE]")
    return text


def test_requests_keep_their_own_text_while_others_come_and_go(server: Any, http: httpx.Client) -> None:
    fields = {"prompt": "a tale of two", "max_tokens": 60, "temperature": 1.2, "seed": 4, "ignore_eos": True}
    alone = server.post(COMPLETIONS, fields).json()["choices"][0]["text"]
    others = [raw_request(server, COMPLETIONS, long_body(stream=True, prompt=f"to be {i}")) for i in range(20)]
    stop = _closer(others)
    crowded = server.post(COMPLETIONS, fields).json()["choices"][0]["text"]
    stop()
    assert crowded == alone
    server.wait_until(server.nothing_is_held, seconds=20)


def _closer(connections: list[socket.socket]) -> Callable[[], None]:
    for connection in connections[::2]:
        connection.close()

    def close_rest() -> None:
        for connection in connections[1::2]:
            connection.close()

    return close_rest
