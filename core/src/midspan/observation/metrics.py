"""The numbers that a server shows to Prometheus.

Knows the engine's counters by name and no HTTP framework. Each metric is kept
once, under the canonical prefix ``midspan:``; on request it is written a second
time under ``vllm:``, the names that dashboards and autoscalers already read,
with the aliases that older dashboards use. Labels are few and bounded: a model
name, an engine number, a route template, a status, a reason; never a path or an
id that a client chose.

Source of the names: the metrics of vLLM 0.32; of the text format: Prometheus'
exposition format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics_core import METRIC_TYPES
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

PREFIX = "midspan:"
COMPATIBLE_PREFIX = "vllm:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

ALIASES: Mapping[str, tuple[str, ...]] = {
    "inter_token_latency_seconds": ("time_per_output_token_seconds",),
    "kv_cache_usage_perc": ("gpu_cache_usage_perc",),
    "prefix_cache_queries": ("gpu_prefix_cache_queries",),
    "prefix_cache_hits": ("gpu_prefix_cache_hits",),
}
"""Canonical name -> older names, written under the compatible prefix only."""

OWN_ONLY = frozenset({"engine_up", "engine_restarts", "http_requests", "model_load_seconds", "request_aborted"})
"""Metrics without a compatible twin."""

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20)
REQUEST_SECONDS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
COMPLETIONS = (1, 2, 5, 10, 20)


class EngineReading(Protocol):
    """The engine's counters and gauges, as ``AsyncEngine.statistics`` gives them."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def cache_usage(self) -> float: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def generation_tokens(self) -> int: ...
    @property
    def restarts(self) -> int: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ObservedEngine:
    """One engine process; its metrics bear its place in the list as the label ``engine``.

    Attributes:
        statistics: reads its counters; called at each scrape.
        is_alive: whether it serves; called at each scrape.
        cache_config: facts about its KV cache, as labels of ``cache_config_info``; the same names for all.
    """

    statistics: Callable[[], EngineReading]
    is_alive: Callable[[], bool]
    cache_config: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class FinishedRequest:
    """What is measured of one prompt's generation; durations in seconds, None where it did not get so far.

    Attributes:
        finish_reasons: of each completion.
        prompt_tokens: length of the prompt.
        cached_tokens: prompt tokens from the prefix cache.
        generation_tokens: over all completions.
        longest_generation: tokens of the longest completion.
        n: completions asked for.
        max_tokens: limit asked for, or None.
        end_to_end: from arrival to the last token.
        queue: from arrival to the first step.
        prefill: from the first step to the first token.
        decode: from the first token to the last.
    """

    finish_reasons: tuple[str, ...]
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    longest_generation: int
    n: int
    max_tokens: int | None
    end_to_end: float
    queue: float | None
    prefill: float | None
    decode: float | None


class ServerMetrics:
    """All metrics of one server.

    Args:
        model_name: label of every metric.
        engines: one or more, in the order of their numbers. What the server itself measures of a request
            is not divided among them and bears the number 0.
        load_seconds: time that the start took.
        compatible_names: write everything a second time under ``vllm:``.
    """

    def __init__(
        self,
        *,
        model_name: str,
        engines: Sequence[ObservedEngine],
        load_seconds: float,
        compatible_names: bool = True,
    ) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_EngineCollector(model_name, engines))
        self._output = CollectorRegistry(auto_describe=False)
        self._output.register(_Renamed(self._registry, compatible_names))
        self._create_histograms()
        self._create_counters()
        self._gauge("model_load_seconds", "Seconds from the start of loading until ready.").set(load_seconds)

    def _create_histograms(self) -> None:
        histogram = self._histogram
        self.time_to_first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", SECONDS)
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Time between two pieces of a stream.", TOKEN_SECONDS
        )
        self._time_per_token = histogram(
            "request_time_per_output_token_seconds", "A request's mean time for a token after the first.", TOKEN_SECONDS
        )
        self._end_to_end = histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_SECONDS)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first step.", REQUEST_SECONDS)
        self._inference = histogram("request_inference_time_seconds", "First step to last token.", REQUEST_SECONDS)
        self._prefill = histogram("request_prefill_time_seconds", "First step to first token.", REQUEST_SECONDS)
        self._decode = histogram("request_decode_time_seconds", "First token to last token.", REQUEST_SECONDS)
        self._prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._generation_tokens = histogram("request_generation_tokens", "Tokens generated for a request.", TOKENS)
        self._longest = histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest completion.", TOKENS
        )
        self._n = histogram("request_params_n", "Completions asked for.", COMPLETIONS)
        self._max_tokens = histogram("request_params_max_tokens", "Limit of tokens asked for.", TOKENS)

    def _create_counters(self) -> None:
        self._success = self._counter("request_success", "Completions that ended.", "finished_reason")
        self._rejections = self._counter("admission_rejections", "Requests refused before they ran.", "reason")
        self._cached = self._counter("prompt_tokens_cached", "Prompt tokens taken from the prefix cache.")
        self._aborted = self._counter("request_aborted", "Requests ended before they were done.", "cause")
        self._http = self._counter("http_requests", "HTTP requests answered.", "route", "code")

    def observe(self, request: FinishedRequest) -> None:
        """Count a request that ran to its end."""
        for reason in request.finish_reasons:
            self._success.labels(**self._labels, finished_reason=reason).inc()
        self._cached.labels(**self._labels).inc(request.cached_tokens)
        self._end_to_end.observe(request.end_to_end)
        self._prompt_tokens.observe(request.prompt_tokens)
        self._generation_tokens.observe(request.generation_tokens)
        self._longest.observe(request.longest_generation)
        self._n.observe(request.n)
        if request.max_tokens is not None:
            self._max_tokens.observe(request.max_tokens)
        if request.queue is not None:
            self._queue.observe(request.queue)
        if request.prefill is not None:
            self._prefill.observe(request.prefill)
        if request.decode is None:
            return
        self._decode.observe(request.decode)
        self._inference.observe(request.decode + (request.prefill or 0.0))
        if request.longest_generation > 1:
            self._time_per_token.observe(request.decode / (request.longest_generation - 1))

    def observe_abort(self, cause: str) -> None:
        """Count a request that ended early: ``disconnect``, ``shutdown`` or ``error``."""
        self._aborted.labels(**self._labels, cause=cause).inc()

    def observe_rejection(self, reason: str) -> None:
        """Count a request that was refused, by its error code."""
        self._rejections.labels(**self._labels, reason=reason).inc()

    def observe_http(self, route: str, status: int) -> None:
        """Count an answer, by route template and status."""
        self._http.labels(**self._labels, route=route, code=str(status)).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._output)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(PREFIX + name, text, tuple(self._labels), registry=self._registry, buckets=buckets)
        return histogram.labels(**self._labels)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, (*self._labels, *labels), registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, tuple(self._labels), registry=self._registry).labels(**self._labels)


class _EngineCollector(Collector):
    """Reads the engines' counters when they are asked for."""

    def __init__(self, model_name: str, engines: Sequence[ObservedEngine]) -> None:
        self._model_name = model_name
        self._engines = tuple(engines)

    def collect(self) -> Iterator[Metric]:
        now = [engine.statistics() for engine in self._engines]
        yield self._gauge("num_requests_running", "Sequences that hold cache blocks.", [one.running for one in now])
        yield self._gauge("num_requests_waiting", "Sequences that wait for their turn.", [one.waiting for one in now])
        yield self._gauge(
            "kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", [one.cache_usage for one in now]
        )
        yield self._gauge(
            "engine_up", "1 while the engine serves.", [float(engine.is_alive()) for engine in self._engines]
        )
        yield self._counter("prompt_tokens", "Prompt tokens processed.", [one.prompt_tokens for one in now])
        yield self._counter("generation_tokens", "Tokens generated.", [one.generation_tokens for one in now])
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", [one.prefix_queries for one in now]
        )
        yield self._counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache.", [one.prefix_hits for one in now]
        )
        yield self._counter(
            "num_preemptions", "Sequences that lost their blocks to others.", [one.preemptions for one in now]
        )
        yield self._counter(
            "engine_restarts", "Times that the engine process was replaced.", [one.restarts for one in now]
        )
        yield self._cache_config()

    def _gauge(self, name: str, text: str, values: Sequence[float]) -> Metric:
        return self._filled(GaugeMetricFamily(PREFIX + name, text, labels=("model_name", "engine")), values)

    def _counter(self, name: str, text: str, values: Sequence[float]) -> Metric:
        return self._filled(CounterMetricFamily(PREFIX + name, text, labels=("model_name", "engine")), values)

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, values: Sequence[float]) -> Metric:
        for number, value in enumerate(values):
            family.add_metric([self._model_name, str(number)], value)
        return family

    def _cache_config(self) -> Metric:
        names = tuple(self._engines[0].cache_config)
        family = GaugeMetricFamily(
            PREFIX + "cache_config_info",
            "Facts about the KV cache, as labels.",
            labels=("model_name", "engine", *names),
        )
        for number, engine in enumerate(self._engines):
            facts = [engine.cache_config[name] for name in names]
            family.add_metric([self._model_name, str(number), *facts], 1)
        return family


class _Renamed(Collector):
    """Passes metrics on, and repeats them under the compatible prefix."""

    def __init__(self, source: CollectorRegistry, compatible_names: bool) -> None:
        self._source = source
        self._compatible_names = compatible_names

    def collect(self) -> Iterator[Metric]:
        for metric in self._source.collect():
            yield _with_name(metric, metric.name)
            name = metric.name.removeprefix(PREFIX)
            if not self._compatible_names or name in OWN_ONLY:
                continue
            for other in (name, *ALIASES.get(name, ())):
                yield _with_name(metric, COMPATIBLE_PREFIX + other)


def _with_name(metric: Metric, name: str) -> Metric:
    kind = metric.type if metric.type in METRIC_TYPES else "unknown"
    copy = Metric(name, metric.documentation, kind)
    for sample in metric.samples:
        if not sample.name.endswith("_created"):
            renamed = name + sample.name.removeprefix(metric.name)
            copy.samples.append(Sample(renamed, sample.labels, sample.value, sample.timestamp, sample.exemplar))
    return copy
