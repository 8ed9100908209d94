"""Keys: every route is guarded except the few that say whether the server lives."""

from __future__ import annotations

from typing import Any

import openai
import pytest

OPEN = ["/livez", "/readyz", "/health", "/ping", "/version"]
GUARDED = [
    "/v1/models",
    "/v1/models/tiny",
    "/metrics",
    "/openapi.json",
    "/nothing",
    "/livez/",
    "//livez",
    "/livez%2f..",
]


@pytest.fixture(scope="module")
def guarded(start_server: Any) -> Any:
    """A server with two keys."""
    return start_server(api_keys=("first-key", "schlüssel"))


@pytest.mark.parametrize("path", OPEN)
def test_open_routes_need_no_key(guarded: Any, path: str) -> None:
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "first-key", "Basic first-key", "Bearer first-key2", "Bearer first"]
)
def test_every_other_route_needs_a_key_even_one_that_does_not_exist(
    guarded: Any, path: str, header: str | None
) -> None:
    answer = guarded.get(path, headers={} if header is None else {"Authorization": header})
    assert answer.status_code == 401
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    assert "first-key" not in answer.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_posting_needs_a_key(guarded: Any, path: str) -> None:
    assert guarded.post(path, {"prompt": "a"}).status_code == 401


@pytest.mark.parametrize("key", ["first-key", "schlüssel"])
def test_each_key_opens(guarded: Any, key: str) -> None:
    answer = guarded.get("/v1/models", headers={b"Authorization": f"Bearer {key}".encode()})
    assert answer.status_code == 200


def test_the_client_library_gets_in_with_its_key(guarded: Any) -> None:
    with guarded.client(api_key="first-key") as client:
        assert client.models.list().data
    with guarded.client(api_key="none") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
