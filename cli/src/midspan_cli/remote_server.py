"""A small client of the OpenAI API, on the standard library alone.

Knows HTTP and server-sent events, and only what ``chat`` and ``bench`` need.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from midspan.errors import MidspanError, SettingsError

TIMEOUT_SECONDS = 600
DATA = b"data: "
DONE = b"[DONE]"


class ServerRefused(MidspanError):
    """The server answered with an error."""

    code = "server_refused"


@dataclass(frozen=True, kw_only=True)
class RemoteServer:
    """A running server.

    Attributes:
        url: with or without ``/v1`` at its end.
        api_key: sent with each request, or None.
    """

    url: str
    api_key: str | None = None

    def first_model(self) -> str:
        """The first name that the server offers.

        Raises:
            ServerRefused: it offers none, or an error.
            MidspanError: it cannot be reached.
        """
        with self._answer("GET", "/v1/models", None) as answer:
            offered = json.loads(answer.read()).get("data") or []
        if not offered:
            raise ServerRefused(f"The server at {self.url} offers no model.")
        return str(offered[0]["id"])

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed reply.

        Raises:
            ServerRefused: the server answers with an error, at once or in the stream.
            MidspanError: it cannot be reached, or breaks off.
        """
        with self._answer("POST", path, {**body, "stream": True}) as answer:
            for line in _lines(answer, self.url):
                if not line.startswith(DATA):
                    continue
                payload = line[len(DATA) :].strip()
                if payload == DONE:
                    return
                chunk = json.loads(payload)
                if "error" in chunk:
                    raise ServerRefused(f"The server broke off: {_message(chunk)}")
                yield chunk

    def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> HTTPResponse:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"--url {self.url!r} is no http or https address.")
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        try:
            connection.request(method, prefix + path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
        except (OSError, HTTPException) as error:
            connection.close()
            raise MidspanError(
                f"The server at {self.url} cannot be reached: {error}.", remedy="Check --url, and that it runs."
            ) from error
        if answer.status != 200:
            with answer:
                raise ServerRefused(f"The server answered {answer.status}: {_message_of(answer.read())}")
        return answer


def _lines(answer: HTTPResponse, url: str) -> Iterator[bytes]:
    try:
        yield from answer
    except (OSError, HTTPException) as error:
        raise MidspanError(f"The connection to {url} broke off: {error}.") from error


def _message_of(body: bytes) -> str:
    try:
        return _message(json.loads(body))
    except ValueError:
        return body[:200].decode("utf-8", "replace")


def _message(value: Any) -> str:
    error = value.get("error") if isinstance(value, dict) else None
    return str(error.get("message")) if isinstance(error, dict) else str(error or value)
