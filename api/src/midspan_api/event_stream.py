"""Sends a reply as server-sent events, or a whole one, and notices when the client has gone.

Knows ASGI and the wire's error object, and nothing of what is sent.

Source: the HTML standard, server-sent events; the ASGI HTTP specification 2.3.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from midspan.errors import MidspanError
from midspan_api.protocol.error_body import wire_error
from midspan_api.protocol.reply_header import DONE

LOGGER = logging.getLogger("midspan.api")

Result = TypeVar("Result")

HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


COMMENT = b": waiting\n\n"
"""Readers of events pass over it."""

QUIET_SECONDS = 15.0
"""Below the idle limit of the usual proxies, which begins at 30 s."""


class ClientGone(Exception):
    """The client closed the connection before its reply was ready."""


class EventStream(Response):
    """A reply that is sent while it is made.

    An error after the first byte is sent as an event of its own; the end of the
    stream is marked in any case. When the client goes away, ``events`` is
    cancelled and closed at once. While there is nothing to send, a comment is sent
    from time to time, so that no proxy takes the connection for dead.

    Args:
        events: the events, each already in its wire form.
        close: frees what the events come from; called in any case, even when ``events`` was never started.
        quiet_seconds: time without an event after which a comment is sent.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        *,
        quiet_seconds: float = QUIET_SECONDS,
    ) -> None:
        super().__init__(headers=HEADERS)
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._events = events
        self._close = close
        self._quiet_seconds = quiet_seconds
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply."""
        sending = asyncio.ensure_future(self._send_events(send))
        leaving = asyncio.ensure_future(_client_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not sending.done():
                sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending
            await self._close()

    async def _send_events(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._last_sent = loop.time()
        commenting = asyncio.ensure_future(self._send_comments(send))
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._last_sent = loop.time()
        except MidspanError as error:
            await send({"type": "http.response.body", "body": wire_error(error).event(), "more_body": True})
        except OSError:
            return
        except Exception as error:
            LOGGER.exception("a stream failed")
            await send({"type": "http.response.body", "body": wire_error(error).event(), "more_body": True})
        finally:
            commenting.cancel()
            await self._events.aclose()
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _send_comments(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            rest = self._last_sent + self._quiet_seconds - loop.time()
            if rest <= 0:
                with suppress(OSError):
                    await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                self._last_sent, rest = loop.time(), self._quiet_seconds
            await asyncio.sleep(rest)


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client goes away.

    Args:
        request: its body must have been read.
        work: what makes the reply.

    Raises:
        ClientGone: the client went away first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, MidspanError):
                await working


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
