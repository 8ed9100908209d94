"""Several engines of one model, each on a device of its own, behind one face.

Offers what ``AsyncEngine`` offers a server. Each request runs in one replica:
the one that was last given the same beginning of a prompt, unless it has far more to do than the
least loaded; otherwise the least loaded, the first named among equals. Knows no HTTP and no
device.

Invariants: a request fits every replica, for limits are the least of all; its seed is drawn here, so
its text does not depend on where it runs as far as the devices agree; ids are unique over all
replicas; while one replica is alive, requests are served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from midspan.cluster.combined_status import combined_model, combined_statistics
from midspan.cluster.prefix_routes import PrefixRoutes, beginnings
from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.async_engine import AsyncEngine
from midspan.engine.engine_process import EngineProcess
from midspan.engine.model_location import locate_model
from midspan.engine.request_seeds import request_seed
from midspan.engine.request_stream import RequestStream
from midspan.engine.status import EngineStatistics, ModelInfo, Report, StartupPhase, ignore_phase
from midspan.errors import EngineDead, InvalidRequest, MidspanError, QueueFull, SettingsError
from midspan.settings import EngineSettings, Environment
from midspan.text.tokenizer import Tokenizer

logger = logging.getLogger("midspan.cluster")

FAR_ABOVE = 2
"""A replica that holds a prompt's beginning is passed over when it has more than so many times the requests of the
least loaded,"""
SPARE_REQUESTS = 8
"""and so many more: to compute a prefix again costs more than to wait behind a few."""


class ReplicaSet:
    """Replicas of one model being served. Made by ``start``.

    Attributes:
        model: what is served: the replicas' common limits, their sizes together.
        tokenizer: the model's.
        default_params: from the model's generation config, by names of ``SamplingParams``.
    """

    def __init__(self, engines: Sequence[AsyncEngine], *, seed: int) -> None:
        """Put started engines of one model behind one face.

        Args:
            engines: at least one; closed by ``close``.
            seed: from which seeds are drawn for requests that bring none.

        Raises:
            SettingsError: they do not serve the same model.
        """
        self._engines = tuple(engines)
        models = [engine.model for engine in engines]
        if len({(model.architecture, model.vocab_size, model.name) for model in models}) != 1:
            raise SettingsError("Replicas must serve one model.", remedy="Start a server for each model.")
        self.model: ModelInfo = combined_model(models)
        self.tokenizer: Tokenizer = engines[0].tokenizer
        self.default_params: dict[str, Any] = engines[0].default_params
        self._seed = seed
        self._requests = 0
        self._routes = PrefixRoutes()
        self._withdrawn: set[int] = set()
        for number, engine in enumerate(engines):
            engine.limit(max_model_len=self.model.max_model_len, max_logprobs=self.model.max_logprobs)
            engine.inherit(partial(self._other_than, number))

    @classmethod
    async def start(
        cls,
        settings: Sequence[EngineSettings],
        *,
        environment: Environment,
        report: Report | None = None,
        max_restarts: int = 3,
        processes: Sequence[EngineProcess] = (),
    ) -> ReplicaSet:
        """Fetch the model once for all, start an engine for each settings, and wait until all take requests.

        Args:
            settings: one for each replica; they differ in the device and what belongs to it.
            environment: where models are kept.
            report: gets each phase, with the replica's number and device in its name.
            max_restarts: see ``AsyncEngine.start``; of each replica.
            processes: the engine processes, where they were started before this call, with the same settings.

        Raises:
            SettingsError: there are no settings.
            MidspanError: whatever kept one of them from starting; then all are ended.
        """
        if not settings:
            raise SettingsError("There is no device to serve on.", remedy="Name at least one.")
        tell = report or ignore_phase
        loop = asyncio.get_running_loop()

        def from_thread(phase: StartupPhase) -> None:
            loop.call_soon_threadsafe(tell, phase)

        await asyncio.to_thread(locate_model, settings[0], environment, report=from_thread)
        given: Sequence[EngineProcess | None] = processes or [None] * len(settings)
        starts = [
            asyncio.ensure_future(
                AsyncEngine.start(
                    own,
                    environment=environment,
                    report=partial(_report_of, tell, f"{number} {own.device}"),
                    max_restarts=max_restarts,
                    process=process,
                )
            )
            for number, (own, process) in enumerate(zip(settings, given, strict=True))
        ]
        try:
            engines = await asyncio.gather(*starts)
            return cls(engines, seed=settings[0].seed)
        except BaseException:
            await _end(starts)
            raise

    @property
    def replicas(self) -> Sequence[AsyncEngine]:
        """The engines, in the order of their numbers."""
        return self._engines

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
        """Begin to generate, in the replica that suits best and has room; otherwise as ``AsyncEngine.submit``."""
        if any(engine.knows(request_id) for engine in self._engines):
            raise InvalidRequest(f"A live request has the id {request_id!r} already.", parameter="request_id")
        number, self._requests = self._requests, self._requests + 1
        if params.seed is None:
            params = params.replace(seed=request_seed(self._seed, number))
        keys = beginnings(prompt, cache_salt)
        refusal: MidspanError = EngineDead("All engines of this server have ended.", remedy="Look at its log.")
        for place in self._by_preference(keys):
            try:
                stream = await self._engines[place].submit(
                    prompt,
                    params,
                    request_id=request_id,
                    priority=priority,
                    cache_salt=cache_salt,
                    add_special_tokens=add_special_tokens,
                )
            except (QueueFull, EngineDead) as error:
                refusal = error
                continue
            self._routes.note(keys, place)
            return stream
        raise refusal

    async def abort(self, request_id: str) -> None:
        """End a request, wherever it runs. Unknown ones are ignored."""
        for engine in self._engines:
            await engine.abort(request_id)

    def statistics(self) -> EngineStatistics:
        """Counters and gauges of all replicas together."""
        return combined_statistics([engine.statistics() for engine in self._engines])

    def live_requests(self) -> int:
        """Requests that did not end yet."""
        return sum(engine.live_requests() for engine in self._engines)

    def is_alive(self) -> bool:
        """Whether any replica serves, now or after a restart that is under way."""
        return any(engine.is_alive() for engine in self._engines)

    async def check_health(self, timeout: float | None = None) -> None:
        """Have one replica answer between two steps, whichever is first.

        Args:
            timeout: seconds to wait; None: as long as it takes.

        Raises:
            EngineDead: none is left, or none answered in time.
        """
        asked = {asyncio.ensure_future(engine.check_health(timeout)) for engine in self._engines}
        waiting, failure = set(asked), None
        try:
            while waiting:
                answered, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for answer in answered:
                    failure = answer.exception()
                    if failure is None:
                        return
        finally:
            for answer in asked:
                answer.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        raise failure or EngineDead("No engine answered.")

    async def withdraw(self, number: int, timeout: float) -> int:
        """Take one replica out of service: its live requests go on in the others, with their cache.

        Those that cannot leave get some time to end here. Its device is released afterwards.

        Args:
            number: which replica.
            timeout: seconds for those that cannot leave.

        Returns:
            How many requests went to others.

        Raises:
            SettingsError: there is no such replica.
        """
        if not 0 <= number < len(self._engines):
            raise SettingsError(f"There is no replica {number}, only 0 to {len(self._engines) - 1}.")
        self._withdrawn.add(number)
        leaving = self._engines[number]
        leaving.refuse()  # first, so that what is being prepared for it goes to another one too
        moved = 0
        for request_id in leaving.live_ids():
            moved += await self._hand_on(request_id, number)
        await leaving.drain(timeout)
        await leaving.close()
        return moved

    async def drain(self, timeout: float) -> None:
        """Take no more requests, wait for the live ones, then abort what is left; ``timeout`` in seconds."""
        await asyncio.gather(*(engine.drain(timeout) for engine in self._engines))

    async def close(self) -> None:
        """End all engine processes; streams that still run get ``EngineDead``. May be called again."""
        await asyncio.gather(*(engine.close() for engine in self._engines))

    async def _hand_on(self, request_id: str, number: int) -> bool:
        """Move a request out of a replica; once more where an engine that took part was lost meanwhile."""
        for _ in self._engines:
            target = self._other_than(number)
            if target is None:
                break
            try:
                if await self._engines[number].migrate(request_id, target):
                    return True
            except MidspanError as error:
                logger.warning("request %s ends where it is: %s", request_id, error)
                break
        return False

    def _open_places(self) -> list[int]:
        """Replicas that may take requests, the least loaded first; those that restart only where there is no other."""
        alive = [
            place for place, engine in enumerate(self._engines) if engine.is_alive() and place not in self._withdrawn
        ]
        ready = [place for place in alive if self._engines[place].is_ready()]
        return sorted(ready or alive, key=lambda place: self._engines[place].live_requests())

    def _by_preference(self, keys: Sequence[bytes]) -> list[int]:
        places = self._open_places()
        holder = self._routes.find(keys)
        if holder is not None and holder in places:
            least = self._engines[places[0]].live_requests()
            if self._engines[holder].live_requests() <= FAR_ABOVE * least + SPARE_REQUESTS:
                places.remove(holder)
                places.insert(0, holder)
        return places

    def _other_than(self, number: int) -> AsyncEngine | None:
        """The least loaded of the others."""
        places = [place for place in self._open_places() if place != number]
        return self._engines[places[0]] if places else None


def _report_of(report: Report, name: str, phase: StartupPhase) -> None:
    report(msgspec.structs.replace(phase, name=f"{phase.name} [{name}]"))


async def _end(starts: Sequence[asyncio.Future[AsyncEngine]]) -> None:
    """End what was started, also what is still starting."""
    for start in starts:
        start.cancel()
    for result in await asyncio.gather(*starts, return_exceptions=True):
        if isinstance(result, AsyncEngine):
            await result.close()
