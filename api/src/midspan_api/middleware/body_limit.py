"""Refuses request bodies over a limit, before they are read where their length is declared."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from midspan_api.protocol.error_body import BodyTooLarge, wire_error


class BodyLimit:
    """ASGI middleware.

    A body of undeclared length is counted while it is read; the reader gets
    ``BodyTooLarge`` at the first byte too many.

    Args:
        app: what reads the body.
        limit: bytes that a body may have.
    """

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = _declared_length(scope)
        if declared is not None and declared > self._limit:
            await wire_error(self._error()).response()(scope, receive, send)
            return
        if declared is not None:
            await self._app(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:
                    raise self._error()
            return message

        await self._app(scope, counted, send)

    def _error(self) -> BodyTooLarge:
        return BodyTooLarge(f"The request body is larger than {self._limit} bytes, the limit of this server.")


def _declared_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None
