"""Runs an engine, or one for each of several devices, and its application until a signal ends them.

The order: take the port, start the engines, serve, and at the first SIGTERM or
SIGINT drain; a second one ends at once. Signals are heeded from before the
engines start. The exit status is 0 after a wanted end and 1 when the last engine died.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from midspan.observation.logging import LOGGER as ROOT_LOGGER
from midspan_api.application import create_app
from midspan_api.guarded_protocol import GuardedProtocol
from midspan_api.listening import bind, check_certificate, url_of
from midspan_api.server_settings import ServerSettings
from midspan_api.serving import Serving

if TYPE_CHECKING:
    from midspan.engine.engine_process import EngineProcess
    from midspan.engine.serving_engine import ServingEngine
    from midspan.engine.status import ModelInfo, StartupPhase
    from midspan.settings import EngineSettings, Environment

LOGGER = logging.getLogger("midspan.api")

ALIVE_CHECK_SECONDS = 0.5
CONNECTION_GRACE_SECONDS = 3
CLEAN_END = 0
ENGINE_DIED = 1
KEEP_ALIVE_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What is known when the server takes requests.

    Attributes:
        url: where, without a slash at its end.
        model_name: the first name under which the model is served.
        model: the engine's description of it.
        replicas: the same of each engine, in the order of their numbers.
        has_chat_template: whether it takes conversations.
        seconds: from the call of ``run_server`` until now.
    """

    url: str
    model_name: str
    model: ModelInfo
    replicas: tuple[ModelInfo, ...]
    has_chat_template: bool
    seconds: float


def run_server(
    engine_settings: Sequence[EngineSettings],
    server_settings: ServerSettings,
    *,
    environment: Environment,
    report: Callable[[StartupPhase], None] | None = None,
    ready: Callable[[Ready], None] | None = None,
    processes: Sequence[EngineProcess] = (),
) -> int:
    """Serve until told to stop.

    Args:
        engine_settings: one for each engine; several serve the same model on a device each.
        server_settings: the server's.
        environment: what the process environment says.
        report: gets each moment of the engine's start.
        ready: called once when requests are taken.
        processes: the engines' processes, where they were started already.

    Returns:
        The exit status for the process.

    Raises:
        SettingsError: the port cannot be had, or the certificate is none.
        MidspanError: the engine could not start.
    """
    begun = time.monotonic()
    if server_settings.ssl_certfile is not None and server_settings.ssl_keyfile is not None:
        check_certificate(server_settings.ssl_certfile, server_settings.ssl_keyfile)
    listener = bind(server_settings.host, server_settings.port)
    loop = auto_loop_factory()()
    asyncio.set_event_loop(loop)
    run = _Run(engine_settings, server_settings, environment, listener, begun, processes)
    try:
        return loop.run_until_complete(run.main(report, ready))
    finally:
        listener.close()
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


class _Run:
    """One run of a server."""

    def __init__(
        self,
        engine_settings: Sequence[EngineSettings],
        server_settings: ServerSettings,
        environment: Environment,
        listener: socket.socket,
        begun: float,
        processes: Sequence[EngineProcess],
    ) -> None:
        self._engine_settings = engine_settings
        self._settings = server_settings
        self._environment = environment
        self._listener = listener
        self._begun = begun
        self._processes = processes
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def main(self, report: Callable[[StartupPhase], None] | None, ready: Callable[[Ready], None] | None) -> int:
        """Start, serve, stop."""
        with self._heeding_signals():
            engine = await self._start(report)
            if engine is None:
                return CLEAN_END
            try:
                return await self._serve(engine, ready)
            finally:
                await engine.close()

    async def _start(self, report: Callable[[StartupPhase], None] | None) -> ServingEngine | None:
        starting = asyncio.ensure_future(self._engines(report))
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            stopped.cancel()
            return starting.result()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await starting).close()
        return None

    async def _engines(self, report: Callable[[StartupPhase], None] | None) -> ServingEngine:
        if len(self._engine_settings) > 1:
            from midspan.cluster.replica_set import ReplicaSet

            return await ReplicaSet.start(
                self._engine_settings, environment=self._environment, report=report, processes=self._processes
            )
        from midspan.engine.async_engine import AsyncEngine

        process = self._processes[0] if self._processes else None
        return await AsyncEngine.start(
            self._engine_settings[0], environment=self._environment, report=report, process=process
        )

    async def _serve(self, engine: ServingEngine, ready: Callable[[Ready], None] | None) -> int:
        app = create_app(engine, self._settings, load_seconds=time.monotonic() - self._begun)
        serving: Serving = app.state.serving
        server = _Server(self._uvicorn_config(app))
        running = asyncio.ensure_future(server.serve(sockets=[self._listener]))
        stopped = asyncio.ensure_future(self._stop.wait())
        died = asyncio.ensure_future(_death(engine))
        try:
            await server.wait_started(running)
            if ready is not None and server.started:
                ready(self._ready(serving))
            await asyncio.wait({running, stopped, died}, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                LOGGER.error("the engine has ended; the server ends as well")
            await self._drain(serving, 0.0 if died.done() else self._settings.shutdown_timeout)
            server.stop(at_once=self._stop_now.is_set())
            await running
            return ENGINE_DIED if died.done() else CLEAN_END
        finally:
            for task in (stopped, died, running):
                task.cancel()
            serving.close()

    async def _drain(self, serving: Serving, timeout: float) -> None:
        draining = asyncio.ensure_future(serving.drain(timeout))
        impatient = asyncio.ensure_future(self._stop_now.wait())
        if serving.live_requests():
            LOGGER.info("finishing %d live requests within %g s", serving.live_requests(), timeout)
        await asyncio.wait({draining, impatient}, return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, impatient):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await draining
        if self._stop_now.is_set():
            await serving.drain(0.0)

    def _ready(self, serving: Serving) -> Ready:
        return Ready(
            url=url_of(self._listener, self._settings.host, encrypted=self._settings.ssl_keyfile is not None)
            + self._settings.root_path,
            model_name=serving.model_names[0],
            model=serving.engine.model,
            replicas=tuple(replica.model for replica in serving.engine.replicas),
            has_chat_template=bool(self._settings.chat_template or serving.engine.tokenizer.chat_template),
            seconds=time.monotonic() - self._begun,
        )

    def _uvicorn_config(self, app: Any) -> uvicorn.Config:
        uvicorn_logger = logging.getLogger("uvicorn")
        uvicorn_logger.handlers[:] = logging.getLogger(ROOT_LOGGER).handlers
        uvicorn_logger.setLevel(logging.ERROR)  # its warnings tell what clients did wrong
        uvicorn_logger.propagate = False
        return uvicorn.Config(
            app,
            http=GuardedProtocol,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CONNECTION_GRACE_SECONDS,
            ssl_keyfile=self._settings.ssl_keyfile,
            ssl_certfile=self._settings.ssl_certfile,
        )

    @contextlib.contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def wait_started(self, running: asyncio.Future[None]) -> None:
        """Return when connections are accepted, or when serving has ended before that."""
        while not self.started and not running.done():
            await asyncio.sleep(0.01)

    def stop(self, *, at_once: bool) -> None:
        """Close connections, the busy ones as well if ``at_once``."""
        self.should_exit = True
        self.force_exit = at_once


async def _death(engine: ServingEngine) -> None:
    while engine.is_alive():
        await asyncio.sleep(ALIVE_CHECK_SECONDS)
