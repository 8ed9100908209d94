"""What a caller holds of a running request: an async iterator of its outputs.

Knows no engine: it is fed from one side, and tells the other side when the caller
loses interest. Invariant: after the output that is ``finished``, or an error, it
is exhausted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from midspan.engine.outputs import RequestOutput
from midspan.engine.request_validation import PreparedRequest
from midspan.errors import MidspanError


class RequestStream:
    """Increments of one request, in order.

    Attributes:
        request_id: as the caller named it.
        prompt: its text, or None when it came as token ids.
        prompt_token_ids: what is run.
    """

    def __init__(self, request_id: str, prepared: PreparedRequest, give_up: Callable[[], None]) -> None:
        self.request_id = request_id
        self.prompt = prepared.prompt
        self.prompt_token_ids = prepared.prompt_ids
        self._give_up = give_up
        self._news: asyncio.Queue[RequestOutput | MidspanError] = asyncio.Queue()
        self._over = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next increment.

        Raises:
            EngineDead: the engine is gone and the request cannot be taken up again.
        """
        if self._over:
            raise StopAsyncIteration
        news = await self._news.get()
        if isinstance(news, MidspanError):
            self._over = True
            raise news
        self._over = news.finished
        return news

    async def aclose(self) -> None:
        """End the request if it still runs; nothing more comes."""
        if not self._over:
            self._over = True
            self._give_up()

    def follow(self, give_up: Callable[[], None]) -> None:
        """Another engine goes on with the request; called by that engine."""
        self._give_up = give_up

    def feed(self, news: RequestOutput | MidspanError) -> None:
        """Add an increment, or the error that ends it; called by the engine."""
        self._news.put_nowait(news)
