"""Turns errors into the wire's error object, in OpenAI's shape.

Knows every error class of the core that can reach a client, and no route. What
is not a deliberate error becomes a bare 500: its text stays in the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.responses import Response

from midspan.errors import (
    DeviceLost,
    EngineDead,
    InvalidRequest,
    MidspanError,
    ModelNotFound,
    QueueFull,
)
from midspan_api.protocol.json_body import UnsupportedMediaType

MESSAGE_LIMIT = 1000
"""Characters of an error message at most; a client's own input must not come back at length."""

RETRY_AFTER_SECONDS = "1"


class ServerDraining(MidspanError):
    """The server was told to stop and takes or keeps no requests."""

    code = "server_draining"


class BodyTooLarge(MidspanError):
    """The request body is over the limit."""

    code = "body_too_large"


class Unauthorized(MidspanError):
    """The request brings no key, or a wrong one."""

    code = "invalid_api_key"


@dataclass(frozen=True, kw_only=True)
class WireError:
    """An error as a client sees it.

    Attributes:
        status: HTTP status, also where the error travels inside a stream.
        kind: OpenAI's ``type``.
        message: for people.
        code: for programs.
        parameter: the request field at fault, or None.
        headers: extra reply headers.
    """

    status: int
    kind: str
    message: str
    code: str
    parameter: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The JSON text of the error object."""
        return msgspec.json.encode({"error": self._object()})

    def event(self) -> bytes:
        """The same as a server-sent event."""
        return b"data: " + self.body() + b"\n\n"

    def response(self) -> Response:
        """The same as an HTTP reply."""
        return Response(self.body(), self.status, dict(self.headers), "application/json")

    def _object(self) -> dict[str, Any]:
        return {"message": self.message, "type": self.kind, "param": self.parameter, "code": self.code}


def wire_error(error: BaseException) -> WireError:
    """What a client is told of ``error``."""
    if isinstance(error, InvalidRequest):
        return _made(error, 400, "invalid_request_error", error.parameter)
    if isinstance(error, ModelNotFound):
        return _made(error, 404, "invalid_request_error", "model")
    if isinstance(error, UnsupportedMediaType):
        return _made(error, 415, "invalid_request_error")
    if isinstance(error, BodyTooLarge):
        return _made(error, 413, "invalid_request_error")
    if isinstance(error, Unauthorized):
        return _made(error, 401, "authentication_error", headers={"WWW-Authenticate": "Bearer"})
    if isinstance(error, QueueFull):
        return _made(error, 429, "rate_limit_error", headers={"Retry-After": RETRY_AFTER_SECONDS})
    if isinstance(error, ServerDraining):
        return _made(error, 503, "service_unavailable_error", headers={"Retry-After": RETRY_AFTER_SECONDS})
    if isinstance(error, (EngineDead, DeviceLost)):
        return _made(error, 503, "service_unavailable_error")
    if isinstance(error, MidspanError):
        return _made(error, 500, "server_error")
    return WireError(
        status=500,
        kind="server_error",
        message="The server failed on this request; its log says why.",
        code="internal_error",
    )


def http_error(status: int, detail: str, headers: Mapping[str, str] | None = None) -> WireError:
    """The error of a route that does not exist or does not take this method."""
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(status, f"http_{status}")
    kind = "invalid_request_error" if status < 500 else "server_error"
    return WireError(status=status, kind=kind, message=detail, code=code, headers=headers or {})


def _made(
    error: MidspanError,
    status: int,
    kind: str,
    parameter: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> WireError:
    text = str(error)
    if len(text) > MESSAGE_LIMIT:
        text = text[:MESSAGE_LIMIT] + " [...]"
    text = text.encode("utf-8", "replace").decode("utf-8")
    return WireError(
        status=status, kind=kind, message=text, code=error.code, parameter=parameter, headers=headers or {}
    )
