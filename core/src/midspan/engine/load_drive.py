"""Drives an engine with a planned load and notes when each token came.

One loop for both kinds of time: in the host's it is a load test, in a device's own it is a
discrete-event simulation, in which a step moves the clock by what the device says of it and
idle time is skipped. Knows no text, no server and no terminal.

Invariants: a request enters between two steps, and its latency counts from its arrival, or from
the moment at which the limit of requests in flight let it in; with a virtual clock the
same load gives the same numbers, bit for bit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.load_clocks import LoadClock
from midspan.engine.messages import AddRequest, SequenceEvent, SequenceStart
from midspan.engine.planned_load import PlannedRequest
from midspan.engine.status import EngineStatistics
from midspan.engine.step_loop import EngineCore


@dataclass(kw_only=True)
class RequestTiming:
    """One request of a load test; moments in seconds of one clock.

    Attributes:
        start: when it was sent.
        tokens: generated tokens.
        moments: when each piece came.
        error: why it failed, or None.
    """

    start: float
    tokens: int = 0
    moments: list[float] = field(default_factory=list)
    error: str | None = None

    def first(self) -> float | None:
        """Seconds to the first token."""
        return self.moments[0] - self.start if self.moments else None

    def per_token(self) -> float | None:
        """Mean seconds for a token after the first."""
        if len(self.moments) < 2 or self.tokens < 2:
            return None
        return (self.moments[-1] - self.moments[0]) / (self.tokens - 1)

    def whole(self) -> float | None:
        """Seconds to the last token."""
        return self.moments[-1] - self.start if self.moments else None

    def gaps(self) -> list[float]:
        """Seconds from each piece to the next."""
        return [later - earlier for earlier, later in zip(self.moments, self.moments[1:], strict=False)]


@dataclass(frozen=True, kw_only=True)
class DrivenLoad:
    """What came of a load.

    Attributes:
        timings: of the requests, in the order of their arrival.
        seconds: from the start to the end of the last request, by the drive's clock.
        steps: of the engine.
        preemptions: sequences that lost their blocks for others.
        cache_usage_peak: the largest share of the cache in use after a step, 0 to 1.
        device_seconds: the device's own time of all steps; None where it does not tell.
        computed_seconds: how long the drive took, by the host's clock.
    """

    timings: Sequence[RequestTiming]
    seconds: float
    steps: int
    preemptions: int
    cache_usage_peak: float
    device_seconds: float | None
    computed_seconds: float


@dataclass(frozen=True, kw_only=True)
class DriveMoment:
    """How far a drive is, after a step.

    Attributes:
        now: by the drive's clock.
        finished: requests that ended.
        statistics: the engine's.
    """

    now: float
    finished: int
    statistics: EngineStatistics


def ignore_moment(moment: DriveMoment) -> None:
    """Nobody watches."""


def drive_load(
    core: EngineCore,
    requests: Sequence[PlannedRequest],
    arrivals: Sequence[float],
    clock: LoadClock,
    *,
    max_concurrency: int | None = None,
    watch: Callable[[DriveMoment], None] = ignore_moment,
) -> DrivenLoad:
    """Run a load to its end.

    Args:
        core: with no request in it, and ``clock.now`` for its clock.
        requests: what is sent.
        arrivals: when, in seconds of the clock, rising; one for each request.
        clock: at its start.
        max_concurrency: requests in flight at most; more wait outside, and their latency does not count yet.
        watch: hears of each step.

    Raises:
        DeviceLost: nothing on the device can be used any more.
        MidspanError: the clock needs what the device does not tell.
    """
    began = time.monotonic()
    drive = _Drive(core, clock, max_concurrency)
    drive.outside.extend(zip(requests, arrivals, strict=True))
    while drive.outside or drive.in_flight:
        drive.admit()
        if not core.has_work():
            # What was refused at once makes events without a step.
            drive.take_in(core.take_events())
            if drive.outside and not drive.is_full():
                clock.wait_until(drive.outside[0][1])
            continue
        drive.step()
        watch(DriveMoment(now=drive.moment, finished=drive.finished, statistics=drive.statistics))
    return DrivenLoad(
        timings=drive.timings,
        seconds=drive.moment,
        steps=drive.statistics.steps,
        preemptions=drive.statistics.preemptions,
        cache_usage_peak=drive.cache_usage_peak,
        device_seconds=drive.device_seconds,
        computed_seconds=time.monotonic() - began,
    )


class _Drive:
    """The state of one load.

    Attributes:
        outside: requests that were not sent, with their arrivals.
        timings: of those that were sent; a request's id is its place here.
        in_flight: how many of them did not end.
        finished: how many did.
        statistics: the engine's, after the last step.
        moment: when something was taken in last.
        cache_usage_peak, device_seconds: as in ``DrivenLoad``.
    """

    def __init__(self, core: EngineCore, clock: LoadClock, max_concurrency: int | None) -> None:
        self.outside: deque[tuple[PlannedRequest, float]] = deque()
        self.timings: list[RequestTiming] = []
        self.in_flight = self.finished = 0
        self.statistics = core.statistics()
        self.moment = 0.0
        self.cache_usage_peak = 0.0
        self.device_seconds: float | None = None
        self._core = core
        self._clock = clock
        self._limit = max_concurrency
        self._full_until = 0.0
        self._params: dict[int, SamplingParams] = {}

    def is_full(self) -> bool:
        """Whether the limit of requests in flight is reached."""
        return self._limit is not None and self.in_flight >= self._limit

    def admit(self) -> None:
        """Send what has arrived."""
        now = self._clock.now()
        while self.outside and self.outside[0][1] <= now and not self.is_full():
            request, arrival = self.outside.popleft()
            start = max(arrival, self._full_until)
            self._send(request, start)

    def step(self) -> None:
        """Run one step of the engine and note what came of it."""
        full, before = self.is_full(), self.statistics.steps
        events = self._core.step()
        self.statistics = events.statistics
        if self.statistics.steps > before:
            seconds = self.statistics.step_device_seconds
            if seconds is not None or not any(event.error for event in events.sequences):
                self._clock.pass_step(seconds)  # a step of which every run failed has no duration to tell
            if seconds is not None:
                self.device_seconds = (self.device_seconds or 0.0) + seconds
            self.cache_usage_peak = max(self.cache_usage_peak, self.statistics.cache_usage)
        self.take_in(events.sequences)
        if full:
            self._full_until = self.moment

    def take_in(self, events: Sequence[SequenceEvent]) -> None:
        """Note tokens and ends, all at one moment."""
        now = self.moment = self._clock.now()
        for event in events:
            timing = self.timings[int(event.request_id)]
            if event.token_ids:
                timing.tokens += len(event.token_ids)
                timing.moments.append(now)
            if event.finish_reason is not None:
                timing.error = event.error
                self.in_flight -= 1
                self.finished += 1

    def _send(self, request: PlannedRequest, start: float) -> None:
        tokens = request.output_tokens
        if tokens not in self._params:
            self._params[tokens] = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        number = len(self.timings)
        self.timings.append(RequestTiming(start=start))
        self.in_flight += 1
        self._core.add(
            AddRequest(
                request_id=str(number),
                prompt_ids=list(request.prompt_ids),
                params=self._params[tokens],
                sequences=[SequenceStart(index=0, seed=number)],
                arrival_time=start,
            )
        )
