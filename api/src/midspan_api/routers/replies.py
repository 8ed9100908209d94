"""What the two generating routes share: ids, times and how a reply is sent."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from midspan.engine.outputs import RequestOutput
from midspan.observation.logging import current_request_id
from midspan_api.event_stream import EventStream, unless_client_leaves
from midspan_api.live_request import LiveRequest, merged
from midspan_api.protocol.reply_header import ReplyHeader
from midspan_api.serving import Serving

HARMLESS_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def serving_of(request: Request) -> Serving:
    """The state behind the application that serves this request."""
    serving: Serving = request.app.state.serving
    return serving


def reply_header(prefix: str, model: str, body_id: str | None, request: Request) -> ReplyHeader:
    """Identity of a reply: the request's header id, the id in its body, or the generated one."""
    own = current_request_id.get() or ""
    if body_id is not None and HARMLESS_ID.fullmatch(body_id) and "x-request-id" not in request.headers:
        own = body_id
    return ReplyHeader(id=prefix + own, created=int(time.time()), model=model)


def json_response(value: Any) -> Response:
    """A reply with a JSON body."""
    return Response(msgspec.json.encode(value), media_type="application/json")


async def close_all(requests: Sequence[LiveRequest]) -> None:
    """Free what requests hold."""
    for live in requests:
        await live.close()


def streamed(
    requests: Sequence[LiveRequest],
    events: Callable[[int, RequestOutput], bytes],
    closing: Callable[[], bytes],
) -> Response:
    """A reply that is sent while the engine works."""

    async def produce() -> AsyncGenerator[bytes, None]:
        async with aclosing(merged(requests)) as outputs:
            async for position, output in outputs:
                written = events(position, output)
                if written:
                    yield written
        last = closing()
        if last:
            yield last

    return EventStream(produce(), lambda: close_all(requests))


async def collected(
    request: Request,
    requests: Sequence[LiveRequest],
    add: Callable[[int, RequestOutput], None],
    finish: Callable[[], dict[str, Any]],
) -> Response:
    """A reply that is sent whole; the work stops when the client goes away."""

    async def collect() -> None:
        async with aclosing(merged(requests)) as outputs:
            async for position, output in outputs:
                add(position, output)

    try:
        await unless_client_leaves(request, collect())
    finally:
        await close_all(requests)
    return json_response(finish())
