"""The engine as a server uses it: many requests at once, from one event loop.

Tokenizes and detokenizes here, computes in another process, and keeps that process
alive: when it dies it is replaced, and every live request is resumed from the
journal. Knows no HTTP and no device.

Invariants: each token reaches its stream once, in order, whatever happens to the
engine process; a stream that is closed frees its blocks; everything here runs in
the thread of the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.child import EngineChild
from midspan.engine.engine_process import EngineProcess, start_engine_process
from midspan.engine.event_delivery import EventDelivery
from midspan.engine.live_requests import LiveRequests
from midspan.engine.messages import AddRequest, SequenceStart, StepEvents
from midspan.engine.model_location import locate_model
from midspan.engine.model_text import ModelText, load_model_text
from midspan.engine.output_processing import OutputProcessor
from midspan.engine.request_moves import RequestMoves
from midspan.engine.request_seeds import request_seed, sequence_seed
from midspan.engine.request_stream import RequestStream
from midspan.engine.request_validation import PreparedRequest, check_priority, check_text, prepare_request
from midspan.engine.restart_policy import RestartPolicy
from midspan.engine.status import EngineStatistics, ModelInfo, Report, StartupPhase, ignore_phase
from midspan.engine.supervisor import EngineSupervisor, Owner
from midspan.errors import ContextLengthExceeded, EngineDead, InvalidRequest, QueueFull
from midspan.settings import EngineSettings, Environment
from midspan.text.tokenizer import Tokenizer

logger = logging.getLogger("midspan.engine")

LONG_TEXT = 20_000
"""Characters from which a prompt is tokenized beside the event loop."""


class AsyncEngine:
    """A model being served. Made by ``start``.

    Attributes:
        model: what is served.
        tokenizer: the model's.
        default_params: from the model's generation config, by names of ``SamplingParams``.
    """

    def __init__(self, settings: EngineSettings, text: ModelText, supervisor: EngineSupervisor) -> None:
        self.model: ModelInfo = supervisor.model
        self.tokenizer: Tokenizer = text.tokenizer
        self.default_params: dict[str, Any] = text.default_params
        self._settings = settings
        self._eos_token_ids = text.eos_token_ids
        self._supervisor = supervisor
        self._live = LiveRequests(supervisor)
        self._moves = RequestMoves(self._live, supervisor)
        self._delivery = EventDelivery(self._live, supervisor.send)
        self._pending: set[str] = set()
        self._statistics = EngineStatistics()
        self._draining = False
        self._find_heir: Callable[[], AsyncEngine | None] | None = None
        supervisor.watch(
            Owner(
                take_in=self._take_in,
                moving=self._moves.hear,
                mourn=self._mourn,
                resume=self._resume,
                bury=self._bury,
                is_busy=lambda: len(self._live) > 0,
            )
        )

    @classmethod
    async def start(
        cls,
        settings: EngineSettings,
        *,
        environment: Environment,
        report: Report | None = None,
        max_restarts: int = 3,
        process: EngineProcess | None = None,
    ) -> AsyncEngine:
        """Find the model, start the engine process and wait until it takes requests.

        Args:
            settings: what to serve, and how.
            environment: where models are kept.
            report: gets each phase, in the event loop's thread.
            max_restarts: how often an engine process that died of nobody knows what is replaced within ten minutes.
            process: the engine process, where it was started before this call, with the same settings.

        Raises:
            MidspanError: whatever kept the model from being loaded, see ``loading``.
        """
        report = report or ignore_phase
        child = await EngineChild.connect(start_engine_process(settings) if process is None else process)
        loop = asyncio.get_running_loop()

        def from_thread(phase: StartupPhase) -> None:
            loop.call_soon_threadsafe(report, phase)

        try:
            path = await asyncio.to_thread(locate_model, settings, environment, report=from_thread)
        except BaseException:
            await child.end(0.0)
            raise
        loading = asyncio.create_task(asyncio.to_thread(load_model_text, settings, path))
        try:
            supervisor = await EngineSupervisor.start(
                settings, child, path, report=report, policy=RestartPolicy(restarts=max_restarts)
            )
        except BaseException:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            raise
        try:
            text = await loading
        except BaseException:
            await supervisor.close()
            raise
        model = supervisor.model
        report(StartupPhase(name="ready", detail=f"{model.architecture} on {model.device}"))
        return cls(settings, text, supervisor)

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
    ) -> RequestStream:
        """Begin to generate.

        Args:
            prompt: text or token ids.
            params: how to generate.
            request_id: unique among live requests.
            priority: lower runs earlier under the priority policy.
            cache_salt: only requests with the same salt share cached prefixes.
            add_special_tokens: whether the tokenizer adds its own to a text prompt.

        Raises:
            InvalidRequest: the request can never succeed.
            ContextLengthExceeded: its prompt is too long.
            QueueFull: too many wait already.
            EngineDead: the engine is gone or about to go.
        """
        self._check_open(request_id)
        check_text(request_id, "request_id")
        check_priority(priority)
        check_text(cache_salt or "", "cache_salt")
        self._pending.add(request_id)
        try:
            prepare = partial(
                prepare_request,
                prompt,
                params,
                tokenizer=self.tokenizer,
                model=self.model,
                add_special_tokens=add_special_tokens,
            )
            prepared = await asyncio.to_thread(prepare) if len(prompt) > LONG_TEXT else prepare()
            self._check_alive()
        finally:
            self._pending.discard(request_id)
        return self._open(request_id, prepared, priority, cache_salt)

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets what is left with the finish reason ``"abort"``. Unknown ones are ignored."""
        live = self._live.find(request_id)
        if live is not None:
            self._live.abort(live)
            self._delivery.end(live, "abort")

    async def migrate(self, request_id: str, target: AsyncEngine) -> bool:
        """Have another engine of the same model go on with a live request, with its cache; its stream goes on.

        Where the cache cannot be taken over, the other engine computes it again.

        Args:
            request_id: unknown ones are ignored.
            target: another engine, in the same event loop.

        Returns:
            Whether it moved; False: it has ended, goes on here, or is moving already.

        Raises:
            InvalidRequest: the other engine has a request of that id.
            ContextLengthExceeded: the request may become longer than the other engine serves.
            InvalidRequest: it wants more logprobs than the other engine's device gives.
            EngineDead: the other engine is gone or about to go.
        """
        live = self._live.find(request_id)
        if live is None or target is self or self._moves.is_leaving(live):
            return False
        target._check_alive()
        if target.knows(request_id):
            raise InvalidRequest(f"A live request has the id {request_id!r} already.", parameter="request_id")
        target._check_room(live.entry.request)
        target._pending.add(request_id)  # nobody else may take the id while the request is on its way
        try:
            return await self._moves.leave(live, target._moves)
        finally:
            target._pending.discard(request_id)

    def inherit(self, find_heir: Callable[[], AsyncEngine | None]) -> None:
        """Let live requests go on elsewhere when this engine is gone for good.

        Args:
            find_heir: gives an engine that is alive, or None; asked for each request.
        """
        self._find_heir = find_heir

    def limit(self, *, max_model_len: int, max_logprobs: int) -> None:
        """Serve no more than this, so that every request of this engine can go on in another; before the first one."""
        self.model = msgspec.structs.replace(self.model, max_model_len=max_model_len, max_logprobs=max_logprobs)

    def knows(self, request_id: str) -> bool:
        """Whether a live request has this id, or one that is being prepared."""
        return self._live.find(request_id) is not None or request_id in self._pending

    def live_ids(self) -> tuple[str, ...]:
        """Ids of the live requests, in the order of their arrival."""
        return tuple(live.request_id for live in self._live)

    def is_ready(self) -> bool:
        """Whether new requests run now: it takes some, and no restart is under way."""
        return self._supervisor.is_ready() and not self._draining

    @property
    def replicas(self) -> Sequence[AsyncEngine]:
        """The engines behind this one: itself."""
        return (self,)

    def statistics(self) -> EngineStatistics:
        """Counters and gauges as the engine last told them; while it has no process, all live requests wait."""
        told, restarts = self._statistics, self._supervisor.restarts
        if self._supervisor.is_ready():
            waiting = told.waiting + self._live.unread(told.received)
            return msgspec.structs.replace(told, waiting=waiting, restarts=restarts)
        return msgspec.structs.replace(
            told, running=0, waiting=len(self._live), blocks_in_use=0, cache_usage=0.0, restarts=restarts
        )

    def live_requests(self) -> int:
        """Requests that did not end yet."""
        return len(self._live)

    def engine_pid(self) -> int:
        """Process id of the engine's own process."""
        return self._supervisor.pid

    def is_alive(self) -> bool:
        """Whether requests will be served, now or after a restart that is under way."""
        return self._supervisor.death is None and not self._supervisor.closing

    async def check_health(self, timeout: float | None = None) -> None:
        """Have the engine answer between two steps; waits for a restart that is under way.

        Args:
            timeout: seconds to wait; None: as long as it takes.

        Raises:
            EngineDead: it is gone, or did not answer in time.
        """
        try:
            await asyncio.wait_for(self._supervisor.ping(), timeout)
        except asyncio.TimeoutError as error:
            raise EngineDead(
                f"The engine did not answer within {timeout} seconds.",
                remedy="Look at its log; restart it if it hangs.",
            ) from error

    def refuse(self) -> None:
        """Take no more requests from now on, those that are being prepared among them."""
        self._draining = True

    async def drain(self, timeout: float) -> None:
        """Take no more requests, wait for the live ones, then abort what is left.

        Args:
            timeout: seconds to wait.
        """
        self.refuse()
        try:
            await asyncio.wait_for(self._live.idle.wait(), timeout)
        except asyncio.TimeoutError:
            for request_id in self.live_ids():
                await self.abort(request_id)

    async def close(self) -> None:
        """End the engine process; streams that still run get ``EngineDead``. May be called again."""
        self._draining = True
        self._end_streams(EngineDead("The engine was closed."))
        await self._supervisor.close()

    def _check_alive(self) -> None:
        if self._supervisor.death is not None:
            raise self._supervisor.death
        if self._draining:
            raise EngineDead("The engine is shutting down.", remedy="Send the request to another server.")

    def _check_open(self, request_id: str) -> None:
        self._check_alive()
        if self.knows(request_id):
            raise InvalidRequest(f"A live request has the id {request_id!r} already.", parameter="request_id")
        limit = self._settings.max_queued_requests
        waiting = self.statistics().waiting
        if limit is not None and waiting >= limit:
            raise QueueFull(f"{waiting} requests wait already; the limit is {limit}.", remedy="Try again later.")

    def _open(self, request_id: str, prepared: PreparedRequest, priority: int, cache_salt: str | None) -> RequestStream:
        number = self._live.next_number()
        params, now = prepared.params, time.monotonic()
        seed = params.seed if params.seed is not None else request_seed(self._settings.seed, number)
        # A number of our own before it: news of an aborted request never reach a later one of the same id.
        wire_id = f"{number}:{request_id}"
        request = AddRequest(
            request_id=wire_id,
            prompt_ids=prepared.prompt_ids,
            params=params,
            sequences=[SequenceStart(index=index, seed=sequence_seed(seed, index)) for index in range(params.n)],
            eos_token_ids=self._eos_token_ids,
            bad_word_ids=prepared.bad_word_ids,
            priority=priority,
            cache_salt=cache_salt,
            arrival_time=now,
        )
        processor = OutputProcessor(request_id, prepared, self.tokenizer, arrival_time=now)
        stream = RequestStream(request_id, prepared, partial(self._live.give_up, wire_id))
        self._live.open(request, request_id, processor, stream)
        return stream

    def _check_room(self, request: AddRequest) -> None:
        most = len(request.prompt_ids) + (request.params.max_tokens or 0)
        if most > self.model.max_model_len:
            raise ContextLengthExceeded(
                f"The request may reach {most} tokens; the limit of the other engine is {self.model.max_model_len}.",
                remedy="Let it end where it is.",
            )
        wanted = max(request.params.logprobs or 0, request.params.prompt_logprobs or 0)
        if wanted > self.model.max_logprobs:
            raise InvalidRequest(
                f"The request wants {wanted} logprobs; the other engine gives {self.model.max_logprobs}.",
                remedy="Let it end where it is.",
                parameter="logprobs",
            )

    def _mourn(self) -> bool:
        """The engine process died; whether a request was found guilty of it, and ended."""
        self._moves.lost()
        guilty = self._live.lost()
        if guilty is None:
            return False
        logger.error("the engine process died of request %s", guilty.request_id)
        self._live.strike(guilty)
        self._delivery.end(guilty, "error", "The engine process died again while it ran this request alone.")
        return True

    def _resume(self) -> None:
        """Have a fresh engine process go on with what is live."""
        self._statistics = EngineStatistics()
        logger.warning("%d requests go on in a fresh engine process", self._live.resume())

    def _take_in(self, message: StepEvents) -> None:
        self._statistics = message.statistics
        self._delivery.take_in(message.sequences)

    def _bury(self, error: EngineDead) -> None:
        """There will be no process any more: live requests go to heirs, or end."""
        for live in self._live:
            heir = None if self._find_heir is None else self._find_heir()
            if heir is not None and heir._live.find(live.request_id) is None:
                self._live.strike(live)
                heir._moves.take_over(live, None)
        self._end_streams(error)

    def _end_streams(self, error: EngineDead) -> None:
        self._moves.lost()
        self._live.lost()
        for live in self._live:
            self._live.strike(live)
            live.stream.feed(error)
