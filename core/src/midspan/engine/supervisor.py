"""Keeps an engine process alive: starts it, listens to it, replaces it when it dies.

Knows messages and no requests: what shall go on after a restart is asked of its
owner. Invariants: there is one process at a time; the owner hears each message
once and, at the end of all, of the death; nothing here blocks the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from midspan.engine.child import EngineChild
from midspan.engine.engine_process import start_engine_process
from midspan.engine.messages import (
    Attached,
    Detached,
    Fatal,
    Load,
    Piece,
    Ping,
    Pong,
    Problem,
    ProtocolError,
    Shutdown,
    Started,
    StepEvents,
    ToEngine,
)
from midspan.engine.remote_errors import restore_error
from midspan.engine.restart_policy import RestartPolicy
from midspan.engine.status import ModelInfo, Report, StartupPhase, ignore_phase
from midspan.errors import EngineDead, MidspanError
from midspan.settings import EngineSettings

logger = logging.getLogger("midspan.engine")

SHUTDOWN_PATIENCE = 5.0
"""Seconds that the engine process gets to end by itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Owner:
    """Whom a supervisor serves.

    Attributes:
        take_in: hears of events.
        moving: hears of requests that move.
        mourn: hears that the process died; answers whether it is known and gone what it died of.
        resume: hears that a fresh process takes requests, and sends those that shall go on.
        bury: hears that there will be no engine any more.
        is_busy: whether requests wait for the process.
    """

    take_in: Callable[[StepEvents], None]
    moving: Callable[[Union[Piece, Detached, Attached]], None]
    mourn: Callable[[], bool]
    resume: Callable[[], None]
    bury: Callable[[EngineDead], None]
    is_busy: Callable[[], bool]


class EngineSupervisor:
    """One engine process after the other. Made by ``start``; listens from ``watch`` on.

    Attributes:
        model: what the engine serves.
        restarts: how often the process was replaced.
        death: why there will be no engine any more, or None.
    """

    def __init__(
        self, settings: EngineSettings, path: Path, child: EngineChild, model: ModelInfo, policy: RestartPolicy
    ) -> None:
        self.model = model
        self.restarts = 0
        self.death: EngineDead | None = None
        self._settings = settings
        self._path = path
        self._child = child
        self._policy = policy
        self._ready = asyncio.Event()
        self._ready.set()
        self._closing = False
        self._pings = self._heard = 0
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, settings: EngineSettings, child: EngineChild, path: Path, *, report: Report, policy: RestartPolicy
    ) -> EngineSupervisor:
        """Have a process load the model and wait until it takes requests.

        Args:
            settings: with which the process was started; others are started with them.
            child: the first process. It is ended when the loading fails.
            path: the model's files.
            report: gets each phase.
            policy: how often the process is replaced.

        Raises:
            MidspanError: whatever kept the model from being loaded.
        """
        model = await _load(child, path, report)
        return cls(settings, path, child, model, policy)

    @property
    def pid(self) -> int:
        """Process id of the engine's process."""
        return self._child.pid

    @property
    def closing(self) -> bool:
        """Whether ``close`` was called."""
        return self._closing

    def is_ready(self) -> bool:
        """Whether a process is there to be sent to."""
        return self._ready.is_set() and self.death is None and not self._closing

    def watch(self, owner: Owner) -> None:
        """Begin to listen."""
        self._task = asyncio.create_task(self._watch(owner), name="engine supervisor")

    def send(self, message: ToEngine) -> None:
        """Send to the process of this moment; dropped where there is none."""
        self._child.send(message)

    async def ping(self) -> None:
        """Wait until the engine answers between two steps; waits for a restart and asks again where one is needed.

        Raises:
            EngineDead: it is gone for good.
        """
        while True:
            await self._ready.wait()
            if self.death is not None or self._closing:
                raise self.death or EngineDead("The engine was closed.")
            if await self._answers_once():
                return

    async def _answers_once(self) -> bool:
        """Ask the process of this moment; False when it ended before it answered."""
        self._pings += 1
        number = self._pings
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._child.send(Ping(number=number))
        try:
            return await answer
        finally:
            del self._answers[number]

    async def close(self) -> None:
        """End the process, gently and then not. May be called again."""
        if not self._closing:
            self._closing = True
            self._child.send(Shutdown())
            self._forget_pings()
        if self._task is not None:
            _, unfinished = await asyncio.wait({self._task}, timeout=SHUTDOWN_PATIENCE)
            if unfinished:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
        await self._child.end(0.0)

    async def _watch(self, owner: Owner) -> None:
        try:
            while await self._outlive(owner):
                logger.info("the engine goes on in a fresh process")
        except Exception as error:
            logger.exception("the engine's supervisor failed")
            self._bury(owner, EngineDead(f"The engine's supervisor failed: {type(error).__name__}: {error}"))
            await self._child.end(0.0)

    async def _outlive(self, owner: Owner) -> bool:
        """Listen to one process until it ends; whether another one took its place."""
        last_words = await self._last_words(owner)
        how = await self._child.end(1.0)
        if self._closing:
            return False
        self._ready.clear()
        reason = f"The engine process ended: {how}." if last_words is None else last_words.message
        logger.error("%s", reason)
        self._forget_pings()
        if owner.mourn():
            self._policy.forgive()
        if (last_words is not None and not last_words.restartable) or not self._policy.allows(time.monotonic()):
            self._bury(owner, EngineDead(reason, remedy="Look at the server's log and restart it."))
            return False
        try:
            await self._replace(owner)
        except MidspanError as error:
            self._bury(owner, EngineDead(f"{reason} It could not be replaced: {error}"))
            return False
        return True

    async def _last_words(self, owner: Owner) -> Fatal | None:
        """Listen until the process is gone or stuck; what it said last, or what we say in its place."""
        ends = [asyncio.create_task(self._listen(owner))]
        if self._settings.step_timeout is not None:
            ends.append(asyncio.create_task(self._silence(owner, self._settings.step_timeout)))
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return next(end for end in ends if end.done()).result()
        finally:
            for end in ends:
                end.cancel()

    async def _listen(self, owner: Owner) -> Fatal | None:
        """Take in messages until the process is gone; its last words, if it had any."""
        while True:
            try:
                message = await self._child.receive()
            except ProtocolError as error:
                return Fatal(code=error.code, message=error.message)
            self._heard += 1
            if message is None or isinstance(message, Fatal):
                return message
            if isinstance(message, StepEvents):
                owner.take_in(message)
            elif isinstance(message, (Piece, Detached, Attached)):
                owner.moving(message)
            elif isinstance(message, Pong):
                answer = self._answers.get(message.number)
                if answer is not None and not answer.done():
                    answer.set_result(True)
            elif isinstance(message, Problem):
                logger.error("the engine refused a message: %s", message.message)

    async def _silence(self, owner: Owner, patience: float) -> Fatal | None:
        """Wait until the process has work and gives no sign for so many seconds."""
        heard, was_silent = self._heard, False
        while True:
            # Twice half the time: work that came a moment ago is no reason yet.
            await asyncio.sleep(patience / 2)
            silent = heard == self._heard and (owner.is_busy() or bool(self._answers))
            if silent and was_silent:
                message = f"The engine process gave no sign for {patience:g} s although it has work."
                return Fatal(code=EngineDead.code, message=message, restartable=True)
            heard, was_silent = self._heard, silent

    async def _replace(self, owner: Owner) -> None:
        self.restarts += 1
        self._child = await EngineChild.connect(start_engine_process(self._settings))
        model = await _load(self._child, self._path, ignore_phase)
        if model.max_model_len < self.model.max_model_len:
            await self._child.end(0.0)
            raise EngineDead(
                f"The cache has room for requests of {model.max_model_len} tokens now, not {self.model.max_model_len}."
            )
        if self._closing:
            self._child.send(Shutdown())
        owner.resume()
        self._ready.set()

    def _bury(self, owner: Owner, death: EngineDead) -> None:
        self.death = death
        self._ready.set()
        self._forget_pings()
        owner.bury(death)

    def _forget_pings(self) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(False)


async def _load(child: EngineChild, path: Path, report: Report) -> ModelInfo:
    """Have a process load the model; it is ended when it cannot."""
    try:
        child.send(Load(path=str(path)))
        while True:
            message = await child.receive()
            if isinstance(message, Started):
                return message.model
            if isinstance(message, StartupPhase):
                report(message)
            elif isinstance(message, Fatal):
                raise restore_error(message.code, message.message, message.remedy)
            elif message is None:
                how = await child.end(1.0)
                raise EngineDead(
                    f"The engine process ended while it loaded the model: {how}.", remedy="Its log says why."
                )
    except BaseException:
        await child.end(0.0)
        raise
