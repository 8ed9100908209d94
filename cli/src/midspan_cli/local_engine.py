"""An engine for one person at a terminal: started in a thread, used from plain code.

The event loop runs in a thread of its own, so that it stays awake while the
terminal waits for a key. Knows the engine and no terminal.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from midspan.engine.async_engine import AsyncEngine

if TYPE_CHECKING:
    from midspan.decoding.sampling_params import SamplingParams
    from midspan.engine.outputs import RequestOutput
    from midspan.engine.status import StartupPhase
    from midspan.settings import EngineSettings, Environment

Result = TypeVar("Result")

PATIENCE_SECONDS = 10.0
"""Time for what was interrupted to let go of what it holds, such as an engine that was just being started."""


class LocalEngine:
    """A started engine, closed when its context ends.

    Args:
        settings: what to run.
        environment: what the process environment says.
        report: gets each moment of the start, in the engine's thread.

    Attributes:
        engine: to be used in its event loop only, by ``call``.
    """

    engine: AsyncEngine

    def __init__(
        self, settings: EngineSettings, environment: Environment, report: Callable[[StartupPhase], None] | None = None
    ) -> None:
        self._settings = settings
        self._environment = environment
        self._report = report
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="engine", daemon=True)
        self._numbers = itertools.count()

    def __enter__(self) -> LocalEngine:
        self._thread.start()
        try:
            self.engine = self.call(
                AsyncEngine.start(self._settings, environment=self._environment, report=self._report)
            )
        except BaseException:
            self._stop_loop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.call(self.engine.close())
        finally:
            self._stop_loop()

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run ``work`` in the engine's event loop and wait for its result."""
        future: Future[Result] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def outputs(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[RequestOutput]:
        """Generate, and give the increments as they come. Leaving the loop early aborts.

        Raises:
            InvalidRequest: the prompt or the parameters do not fit the model.
            EngineDead: the engine is gone.
        """
        request_id = f"local-{next(self._numbers)}"
        stream = self.call(self.engine.submit(prompt, params, request_id=request_id))
        news: queue.SimpleQueue[RequestOutput | BaseException | None] = queue.SimpleQueue()

        async def forward() -> None:
            try:
                async for output in stream:
                    news.put(output)
            except BaseException as error:
                news.put(error)
                raise
            news.put(None)

        future = asyncio.run_coroutine_threadsafe(forward(), self._loop)
        try:
            while (item := news.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()
            self.call(stream.aclose())

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _stop_loop(self) -> None:
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_end_tasks(), self._loop).result(PATIENCE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
