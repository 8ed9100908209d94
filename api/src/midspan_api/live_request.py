"""One prompt on its way through the engine, on behalf of an HTTP request.

Wraps the engine's stream: measures it, turns failures into errors, and makes
sure that a reader who stops early frees what the request holds. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Union

from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from midspan.errors import MidspanError, RequestFailed
from midspan.observation.metrics import FinishedRequest, ServerMetrics

if TYPE_CHECKING:
    from midspan.engine.request_stream import RequestStream

_Queue = asyncio.Queue[Union[tuple[int, RequestOutput], Exception, None]]


class Interrupted(RequestFailed):
    """The engine ended the request before it was done, for no fault of its own."""

    code = "request_aborted"


@dataclass(kw_only=True)
class Progress:
    """What is known of a request so far.

    Attributes:
        arrival: when it came in, seconds of the monotonic clock.
        prompt_tokens, cached_tokens: of its prompt.
        tokens: generated tokens of each completion.
        finish_reasons: of each completion that ended.
        first_token, last_token: when they came in.
        first_step: when the engine began with it.
    """

    arrival: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: dict[int, int] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    first_token: float | None = None
    last_token: float | None = None
    first_step: float | None = None

    def seconds_to_first_token(self) -> float | None:
        """From arrival to first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    def note_moments(self, moments: RequestMetrics | None) -> None:
        """Take over what the engine measured."""
        if moments is not None and moments.first_scheduled_time is not None:
            self.first_step = moments.first_scheduled_time

    def summary(self, params: SamplingParams) -> FinishedRequest:
        """The whole request for the metrics."""
        first, last = self.first_token, self.last_token
        return FinishedRequest(
            finish_reasons=tuple(self.finish_reasons.values()),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generation_tokens=sum(self.tokens.values()),
            longest_generation=max(self.tokens.values(), default=0),
            n=params.n,
            max_tokens=params.max_tokens,
            end_to_end=(last or time.monotonic()) - self.arrival,
            queue=None if self.first_step is None else max(self.first_step - self.arrival, 0.0),
            prefill=None if first is None or self.first_step is None else max(first - self.first_step, 0.0),
            decode=None if first is None or last is None else last - first,
        )


class LiveRequest:
    """A request that the engine has accepted.

    Args:
        stream: the engine's increments.
        params: what was asked for.
        arrival: seconds of the monotonic clock.
        metrics: where it is counted.
        closed: called once when it is over, in whatever way.
    """

    def __init__(
        self,
        stream: RequestStream,
        params: SamplingParams,
        *,
        arrival: float,
        metrics: ServerMetrics,
        closed: Callable[[LiveRequest], None],
    ) -> None:
        self.progress = Progress(arrival=arrival)
        self.params = params
        self._stream = stream
        self._metrics = metrics
        self._closed = closed
        self._open = True
        self._completed = False
        self._cause = "disconnect"
        self._interruption: MidspanError = Interrupted("The request was aborted before it was done.")

    async def increments(self) -> AsyncGenerator[RequestOutput, None]:
        """The engine's increments, measured. Leaving the loop early aborts the request.

        Raises:
            RequestFailed: the engine could not go on with this request.
            Interrupted: the engine stopped it from outside.
            EngineDead: the engine is gone.
        """
        try:
            async for output in self._stream:
                self._note(output)
                yield output
            self._completed = True
        except MidspanError:
            self._cause = "error" if self._cause == "disconnect" else self._cause
            raise
        finally:
            await self.close()

    def interrupt(self, cause: str, error: MidspanError) -> None:
        """Say why the request is about to be aborted; its reader gets ``error``."""
        self._cause, self._interruption = cause, error

    async def close(self) -> None:
        """Free what the request holds; may be called at any time, again as well."""
        if self._open:
            self._open = False
            if self._completed:
                self._metrics.observe(self.progress.summary(self.params))
            else:
                self._metrics.observe_abort(self._cause)
            self._closed(self)
            await self._stream.aclose()

    def _note(self, output: RequestOutput) -> None:
        progress = self.progress
        now = time.monotonic()
        fresh = False
        for piece in output.outputs:
            if piece.finish_reason is not None:
                self._raise_if_failed(piece)
                progress.finish_reasons[piece.index] = piece.finish_reason
            if piece.token_ids:
                fresh = True
                progress.tokens[piece.index] = progress.tokens.get(piece.index, 0) + len(piece.token_ids)
        if not fresh:
            return
        if progress.first_token is None or progress.last_token is None:
            progress.first_token = now
            progress.prompt_tokens = len(output.prompt_token_ids)
            progress.cached_tokens = output.num_cached_tokens
            progress.note_moments(output.metrics)
            self._metrics.time_to_first_token.observe(now - progress.arrival)
        else:
            self._metrics.inter_token_latency.observe(now - progress.last_token)
        progress.last_token = now

    def _raise_if_failed(self, piece: CompletionOutput) -> None:
        if piece.finish_reason == "error":
            raise RequestFailed(f"The request failed while it ran: {piece.error or 'the engine gave no reason'}")
        if piece.finish_reason == "abort":
            raise self._interruption


async def merged(requests: Sequence[LiveRequest]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The increments of several requests as they come, each with its request's position.

    Raises:
        MidspanError: of the first request that fails; the others are aborted.
    """
    if len(requests) == 1:
        async with aclosing(requests[0].increments()) as increments:
            async for output in increments:
                yield 0, output
        return
    queue: _Queue = asyncio.Queue(maxsize=2 * len(requests))
    tasks = [asyncio.ensure_future(_forward(place, request, queue)) for place, request in enumerate(requests)]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(place: int, request: LiveRequest, queue: _Queue) -> None:
    try:
        async with aclosing(request.increments()) as increments:
            async for output in increments:
                await queue.put((place, output))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
