"""Runs loads on a running server, through its API."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from midspan.engine.load_drive import RequestTiming
from midspan.engine.planned_load import LoadShape, PlannedRequest, plan_arrivals, plan_requests
from midspan.errors import MidspanError
from midspan_cli.goals import Goal
from midspan_cli.live_line import LiveLine
from midspan_cli.load_report import summarize
from midspan_cli.remote_server import RemoteServer

COMMON_IDS = 1000
"""Token ids below this exist in the vocabulary of any server."""

WARM_UP_TOKENS = 2


@dataclass(frozen=True, kw_only=True)
class RemoteLoad:
    """A load for a server.

    Attributes:
        server: where it is.
        model: the name under which it offers the model.
        shape: of the load.
        max_concurrency: requests in flight at most; None: no limit.
        line: shows how far a run is.
    """

    server: RemoteServer
    model: str
    shape: LoadShape
    max_concurrency: int | None
    line: LiveLine

    def warm_up(self, count: int) -> None:
        """Send some short requests of which nothing is noted.

        Raises:
            MidspanError: one failed.
        """
        if count:
            tokens = min(WARM_UP_TOKENS, self.shape.output_tokens)
            shape = dataclasses.replace(self.shape, count=count, output_tokens=tokens, range_ratio=0.0)
            for timing in self._send_all(plan_requests(shape, COMMON_IDS, prompt_seed=None), [0.0] * count):
                if timing.error is not None:
                    raise MidspanError(timing.error)

    def measure(self, rate: float, goals: Sequence[Goal]) -> dict[str, Any]:
        """The figures of the load at a rate, with prompts that the server has not seen."""
        requests = plan_requests(self.shape, COMMON_IDS, prompt_seed=None)
        begun = time.monotonic()
        timings = self._send_all(requests, plan_arrivals(self.shape, rate))
        seconds = time.monotonic() - begun
        input_tokens = sum(len(request.prompt_ids) for request in requests)
        return {
            "model": self.model,
            "url": self.server.url,
            "time": "measured",
            **summarize(timings, input_tokens=input_tokens, seconds=seconds, goals=goals),
        }

    def _send_all(self, requests: Sequence[PlannedRequest], arrivals: Sequence[float]) -> list[RequestTiming]:
        begun = time.monotonic()
        workers = min(self.max_concurrency or len(requests), len(requests))
        timings: list[RequestTiming] = []
        with ThreadPoolExecutor(workers) as threads:
            sent = threads.map(lambda request, arrival: self._send(request, begun + arrival), requests, arrivals)
            for timing in sent:
                timings.append(timing)
                if self.line.is_due():
                    self.line.show(f"{len(timings)}/{len(requests)} requests, at {time.monotonic() - begun:.1f} s")
        return timings

    def _send(self, request: PlannedRequest, moment: float) -> RequestTiming:
        """Send a request at a moment, or at once when that is over; its latency counts from there."""
        left = moment - time.monotonic()
        if left > 0:
            time.sleep(left)
        body = {
            "model": self.model,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        timing = RequestTiming(start=time.monotonic())
        try:
            for chunk in self.server.stream("/v1/completions", body):
                if chunk.get("choices"):
                    timing.moments.append(time.monotonic())
                if chunk.get("usage"):
                    timing.tokens = chunk["usage"]["completion_tokens"]
        except MidspanError as error:
            timing.error = str(error)
        return timing
