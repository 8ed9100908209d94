"""Real servers on loopback: in a thread around a real engine, and as a process of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from midspan.engine.async_engine import AsyncEngine
from midspan.settings import EngineSettings, Environment
from midspan_api import ServerSettings, create_app
from midspan_api.listening import bind
from midspan_api.serving import Serving

CONTEXT = 4096
BLOCK_SIZE = 4
START_SECONDS = 60.0


@pytest.fixture(scope="session")
def served_model(write_model: Callable[..., Path]) -> Path:
    """A tiny model with room for long answers."""
    return write_model(seed=3, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(cache_folder=tmp_path_factory.mktemp("cache"), offline=True)


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """One client for all plain requests: making one takes longer than most requests."""
    with httpx.Client(timeout=60) as http:
        yield http


@pytest.fixture(scope="session")
def engine_settings(served_model: Path) -> EngineSettings:
    return EngineSettings(
        model=str(served_model),
        device="reference",
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=32 * 2**20,
        max_num_seqs=64,
        max_num_batched_tokens=512,
    )


@dataclass
class RunningServer:
    """A server in a thread of this process; its engine is a process of its own."""

    url: str
    serving: Serving
    loop: asyncio.AbstractEventLoop
    http: httpx.Client

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(START_SECONDS)

    def wait_until(self, condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
        """Poll in the server's event loop until ``condition`` holds."""

        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.01)

        self.call(asyncio.wait_for(poll(), seconds))

    def nothing_is_held(self) -> bool:
        now = self.serving.engine.statistics()
        return self.serving.live_requests() == 0 and (now.running, now.waiting, now.blocks_in_use) == (0, 0, 0)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options
        )

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(self.url + path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(self.url + path, **options)


class _ThreadServer:
    """Starts and stops a ``RunningServer``."""

    def __init__(
        self, engine_settings: EngineSettings, settings: ServerSettings, environment: Environment, http: httpx.Client
    ) -> None:
        self._engine_settings = engine_settings
        self._settings = settings
        self._environment = environment
        self._http = http
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._uvicorn: uvicorn.Server | None = None
        self.running: RunningServer | None = None

    def start(self) -> RunningServer:
        self._thread.start()
        assert self._ready.wait(START_SECONDS)
        if self._failure is not None:
            raise self._failure
        assert self.running is not None
        return self.running

    def stop(self) -> None:
        assert self._uvicorn is not None
        self._uvicorn.should_exit = True
        self._thread.join(START_SECONDS)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        listener = bind("127.0.0.1", 0)
        try:
            engine = await AsyncEngine.start(self._engine_settings, environment=self._environment)
        except BaseException as error:
            self._failure = error
            self._ready.set()
            listener.close()
            return
        app = create_app(engine, self._settings)
        config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=5)
        self._uvicorn = uvicorn.Server(config)
        serving = asyncio.ensure_future(self._uvicorn.serve(sockets=[listener]))
        while not self._uvicorn.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.running = RunningServer(url, app.state.serving, asyncio.get_running_loop(), self._http)
        self._ready.set()
        await serving
        await engine.close()


StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def start_server(
    engine_settings: EngineSettings, environment: Environment, http: httpx.Client
) -> Iterator[StartServer]:
    """Start a server: ``start_server(engine={...}, **server_settings)``; stopped after the module."""
    started: list[_ThreadServer] = []

    def start(*, engine: dict[str, Any] | None = None, **settings: Any) -> RunningServer:
        server = _ThreadServer(
            replace(engine_settings, **(engine or {})),
            ServerSettings(**{"served_model_names": ("tiny", "team/tiny"), **settings}),
            environment,
            http,
        )
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> RunningServer:
    """A server with default settings, shared by a module's tests."""
    return start_server()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@dataclass
class ServerProcess:
    """``midspan serve`` as a process."""

    process: subprocess.Popen[str]
    url: str

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 30.0) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def serve_process(served_model: Path, environment: Environment) -> Iterator[Callable[..., ServerProcess]]:
    """Run ``midspan serve`` with further flags and wait until it is ready."""
    processes: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> ServerProcess:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "midspan_cli", "serve", str(served_model), "--device", "reference"]
        command += ["--port", str(port), "--served-model-name", "tiny", "--kv-cache-memory-bytes", "32M", *flags]
        variables = {**os.environ, "MIDSPAN_CACHE": str(environment.cache_folder), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
        processes.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Try it:"):
                break
        else:
            assert process.stderr is not None
            pytest.fail(f"the server did not start: {process.stderr.read()}")
        return ServerProcess(process, f"http://127.0.0.1:{port}")

    yield start
    for process in processes:
        process.kill()
        process.communicate()
