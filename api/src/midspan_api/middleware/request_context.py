"""The outermost layer: gives each request an id, counts it, and turns what nobody caught into a 500.

The id is the client's ``X-Request-Id`` where that is harmless, and a new one
otherwise; it is sent back, stands in every log line, and is part of the reply's
own id.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from midspan.errors import MidspanError
from midspan.observation.logging import current_request_id
from midspan_api.protocol.error_body import wire_error

LOGGER = logging.getLogger("midspan.api")

HARMLESS_ID = re.compile(rb"[A-Za-z0-9_.-]{1,128}")
UNMATCHED = "unmatched"


class RequestContext:
    """ASGI middleware.

    Args:
        app: the rest of the application.
        count: called with route template and status when a reply begins.
    """

    def __init__(self, app: ASGIApp, *, count: Callable[[str, int], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, and answer it in any case."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        header = (b"x-request-id", request_id.encode())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), header]}
                self._count(_route(scope), message["status"])
            await send(message)

        token = current_request_id.set(request_id)
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if not isinstance(error, MidspanError):
                LOGGER.exception("a request failed")
            if not started:
                await wire_error(error).response()(scope, receive, send_with_id)
        finally:
            current_request_id.reset(token)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and HARMLESS_ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex


def _route(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else UNMATCHED
