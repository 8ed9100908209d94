"""What a server needs of an engine: one engine process, or several behind one face.

``AsyncEngine`` and ``cluster.replica_set.ReplicaSet`` offer it. Knows neither of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.request_stream import RequestStream
from midspan.engine.status import EngineStatistics, ModelInfo
from midspan.text.tokenizer import Tokenizer


class EngineReplica(Protocol):
    """One engine process, to be looked at."""

    @property
    def model(self) -> ModelInfo:
        """What it serves, and on what."""
        ...

    def statistics(self) -> EngineStatistics:
        """Its counters and gauges."""
        ...

    def is_alive(self) -> bool:
        """Whether it serves, now or after a restart that is under way."""
        ...


class ServingEngine(Protocol):
    """Takes requests, streams their outputs. Every method means what it means in ``AsyncEngine``."""

    @property
    def model(self) -> ModelInfo:
        """What is served; limits hold for every replica."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        ...

    @property
    def default_params(self) -> dict[str, Any]:
        """From the model's generation config, by names of ``SamplingParams``."""
        ...

    @property
    def replicas(self) -> Sequence[EngineReplica]:
        """The engine processes, in the order of their numbers."""
        ...

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
        """Begin to generate."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a request."""
        ...

    def statistics(self) -> EngineStatistics:
        """Counters and gauges of all replicas together."""
        ...

    def live_requests(self) -> int:
        """Requests that did not end yet."""
        ...

    def is_alive(self) -> bool:
        """Whether requests will be served."""
        ...

    async def check_health(self, timeout: float | None = None) -> None:
        """Have an engine answer; EngineDead: none does."""
        ...

    async def drain(self, timeout: float) -> None:
        """Take no more requests, wait for the live ones, then abort what is left."""
        ...

    async def close(self) -> None:
        """End the engine processes."""
        ...
