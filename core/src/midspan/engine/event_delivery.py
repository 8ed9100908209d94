"""Carries news of sequences from the engine's process to the streams that wait for them.

Keeps the journal's record of what each caller was given, and has the process stop what a
stop string ended. Knows neither how text is made nor how a process is kept alive.

Invariant: what a stream gets stands in the journal before anybody else runs, so no token
is lost or repeated when the process dies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from midspan.engine.live_requests import LiveRequests, LiveStream
from midspan.engine.messages import Abort, SequenceEvent
from midspan.errors import MidspanError

logger = logging.getLogger("midspan.engine")


class EventDelivery:
    """Feeds the streams of the live requests of one engine."""

    def __init__(self, live: LiveRequests, send: Callable[[Abort], None]) -> None:
        """Begin with nothing delivered.

        Args:
            live: whose streams are fed.
            send: gives a message to the process of this moment.
        """
        self._live = live
        self._send = send

    def take_in(self, events: Sequence[SequenceEvent]) -> None:
        """Deliver events in order; those of requests that are not live any more are dropped."""
        now = time.monotonic()
        for event in events:
            live = self._live.find_sent(event.request_id)
            if live is None:
                continue
            try:
                self._deliver(live, event, now)
            except Exception as error:
                # A fault in making one request's text must not stop the others' streams.
                logger.exception("the output of request %s could not be made", live.request_id)
                self._live.give_up(live.wire_id)
                live.stream.feed(MidspanError(f"The output could not be made: {type(error).__name__}: {error}"))

    def end(self, live: LiveStream, reason: str, error: str | None = None) -> None:
        """End a request that was struck off; its stream gets what is left and the reason.

        Args:
            live: the request.
            reason: the finish reason of its sequences that run.
            error: why it failed, where it did.
        """
        events = [
            SequenceEvent(request_id=live.wire_id, index=index, finish_reason=reason, error=error)
            for index in live.entry.live()
        ]
        output = live.processor.process(events, time.monotonic()).output
        if output is not None:
            live.stream.feed(output)

    def _deliver(self, live: LiveStream, event: SequenceEvent, now: float) -> None:
        progress = live.processor.process([event], now)
        scored = event.prompt is not None and event.prompt.scores is not None
        live.entry.emit(event.index, event.token_ids, prompt_scored=scored)
        if live.processor.is_finished(event.index):
            live.entry.end(event.index)
        self._live.generated(event.request_id, event.index)
        for index in progress.stopped:
            self._send(Abort(request_id=event.request_id, index=index, reason="stop"))
        if progress.output is not None:
            if progress.output.finished:
                self._live.strike(live)
            live.stream.feed(progress.output)
