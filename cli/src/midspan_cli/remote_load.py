"""Runs loads on a running server, through its API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
            for timing in self._send_all(
                plan_requests(self.shape.warm_up(count), COMMON_IDS, prompt_seed=None), [0.0] * count
            ):
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
        sent: list[Future[RequestTiming]] = []
        with ThreadPoolExecutor(workers) as threads:
            for request, arrival in zip(requests, arrivals, strict=True):
                # Handed over when it is due, so that there are as many threads as requests in flight.
                time.sleep(max(0.0, begun + arrival - time.monotonic()))
                sent.append(threads.submit(self._send, request))
                self._show(sent, len(requests), begun)
            for future in sent:
                wait([future])
                self._show(sent, len(requests), begun)
        return [future.result() for future in sent]

    def _show(self, sent: Sequence[Future[RequestTiming]], count: int, begun: float) -> None:
        if self.line.is_due():
            done = sum(future.done() for future in sent)
            self.line.show(f"{done}/{count} requests, at {time.monotonic() - begun:.1f} s")

    def _send(self, request: PlannedRequest) -> RequestTiming:
        """Send a request; its latency counts from now."""
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
