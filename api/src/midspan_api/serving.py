"""The state that all routes of one server share.

Holds the engine, admits requests to it and knows which are live, so that the
server can stop cleanly. Knows no routes.

Invariant: every accepted request is in the live set until it is closed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from midspan.decoding.sampling_params import SamplingParams
from midspan.errors import ContextLengthExceeded, EngineDead, InvalidRequest, ModelNotFound, QueueFull
from midspan.observation.logging import current_request_id, log_fields
from midspan.observation.metrics import ObservedEngine, ServerMetrics
from midspan_api.live_request import LiveRequest
from midspan_api.model_naming import served_names
from midspan_api.prompt_preparation import PromptPreparation
from midspan_api.protocol.error_body import ServerDraining
from midspan_api.server_settings import ServerSettings

if TYPE_CHECKING:
    from midspan.engine.serving_engine import ServingEngine

LOGGER = logging.getLogger("midspan.api")

ABORT_GRACE_SECONDS = 2.0
"""Time for aborted requests to tell their clients so."""


class Serving:
    """One model behind one address.

    Args:
        engine: started; one process, or several replicas.
        settings: the server's.
        load_seconds: time that the engine took to start, for the metrics.
    """

    def __init__(self, engine: ServingEngine, settings: ServerSettings, *, load_seconds: float = 0.0) -> None:
        self.engine = engine
        self.settings = settings
        self.model_names = settings.served_model_names or served_names(engine.model.name, engine.model.path)
        self.prompts = PromptPreparation(
            engine.tokenizer,
            chat_template=settings.chat_template,
            trust_request_template=settings.trust_request_chat_template,
        )
        self.metrics = ServerMetrics(
            model_name=self.model_names[0],
            engines=[
                ObservedEngine(
                    statistics=replica.statistics,
                    is_alive=replica.is_alive,
                    cache_config={
                        "block_size": str(replica.model.block_size),
                        "cache_tokens": str(replica.model.cache_tokens),
                        "cache_dtype": replica.model.cache_dtype,
                    },
                )
                for replica in engine.replicas
            ],
            load_seconds=load_seconds,
            compatible_names=settings.vllm_metric_names,
        )
        self._draining = False
        self._live: dict[LiveRequest, str] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._numbers = itertools.count()

    @property
    def draining(self) -> bool:
        """Whether the server was told to stop."""
        return self._draining

    def model_name(self, asked: str | None) -> str:
        """The name to answer with for the model that a request asks for.

        Raises:
            ModelNotFound: it is not served here.
        """
        if asked is None:
            return self.model_names[0]
        if asked in self.model_names:
            return asked
        shown = asked if len(asked) <= 100 else asked[:100] + "[...]"
        raise ModelNotFound(
            f"The model {shown!r} is not served here.", remedy=f"Served: {', '.join(self.model_names)}."
        )

    def admit(self) -> None:
        """Refuse when the server is stopping or has lost its engine.

        Raises:
            ServerDraining: it is stopping.
            EngineDead: its engine is gone.
        """
        if self._draining:
            raise ServerDraining("The server is shutting down and takes no new requests.")
        if not self.engine.is_alive():
            raise EngineDead("The engine of this server has ended.", remedy="Restart the server; its log says why.")

    async def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        parameter: str,
        arrival: float,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> LiveRequest:
        """Hand a prompt to the engine.

        Args:
            token_ids: the prompt.
            params: how to generate.
            parameter: the request field that the prompt came from, for errors.
            arrival: when the HTTP request came in, seconds of the monotonic clock.
            priority: lower runs earlier under the priority policy.
            cache_salt: only requests with the same salt share cached prefixes.

        Raises:
            InvalidRequest: the prompt or a value does not fit the model.
            ContextLengthExceeded: prompt and output are too long for it.
            QueueFull: too many requests wait.
            EngineDead: the engine is gone.
            ServerDraining: the server is stopping.
        """
        self.admit()
        engine_id = f"{current_request_id.get() or uuid.uuid4().hex}-{next(self._numbers)}"
        try:
            stream = await self.engine.submit(
                token_ids, params, request_id=engine_id, priority=priority, cache_salt=cache_salt
            )
        except ContextLengthExceeded as error:
            self.metrics.observe_rejection(error.code)
            raise self._too_long(error, parameter) from None
        except (InvalidRequest, QueueFull) as error:
            self.metrics.observe_rejection(error.code)
            if isinstance(error, InvalidRequest) and error.parameter == "prompt":
                error.parameter = parameter
            raise
        live = LiveRequest(stream, params, arrival=arrival, metrics=self.metrics, closed=self._closed)
        self._live[live] = engine_id
        self._idle.clear()
        return live

    def _closed(self, live: LiveRequest) -> None:
        self._live.pop(live, None)
        if not self._live:
            self._idle.set()
        progress = live.progress
        reasons = set(progress.finish_reasons.values())
        log_fields(
            LOGGER,
            logging.INFO,
            "request done" if len(progress.finish_reasons) == live.params.n else "request ended early",
            prompt_tokens=progress.prompt_tokens,
            cached_tokens=progress.cached_tokens,
            generation_tokens=sum(progress.tokens.values()),
            ttft=progress.seconds_to_first_token(),
            seconds=time.monotonic() - progress.arrival,
            finish=",".join(sorted(reasons)) or None,
        )

    def _too_long(self, error: ContextLengthExceeded, parameter: str) -> ContextLengthExceeded:
        known = f"This model's maximum context length is {self.engine.model.max_model_len} tokens"
        message = error.message if known in error.message else f"{known}. {error.message}"
        return ContextLengthExceeded(message, remedy=error.remedy, parameter=parameter)

    async def drain(self, timeout: float) -> None:
        """Take no new requests, wait for the live ones, abort what is left.

        Args:
            timeout: seconds to wait; may be 0.
        """
        self._draining = True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        for live, engine_id in list(self._live.items()):
            live.interrupt("shutdown", ServerDraining("The server shut down before the request was done."))
            with suppress(EngineDead):
                await self.engine.abort(engine_id)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), ABORT_GRACE_SECONDS)

    def close(self) -> None:
        """Let go of what the server itself holds; the engine is closed by who started it."""
        self.prompts.close()

    def live_requests(self) -> int:
        """Requests that the engine works on now."""
        return len(self._live)
