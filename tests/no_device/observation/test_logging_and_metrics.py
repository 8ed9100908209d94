"""Log lines, and the numbers that a server shows."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from midspan.engine.status import EngineStatistics
from midspan.errors import SettingsError
from midspan.observation.logging import configure_logging, current_request_id, log_fields
from midspan.observation.metrics import FinishedRequest, ObservedEngine, ServerMetrics


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What the project's loggers write; they are as before afterwards."""
    logger = logging.getLogger("midspan")
    before = list(logger.handlers), logger.level, logger.propagate
    yield io.StringIO()
    logger.handlers[:], logger.level, logger.propagate = before


LOGGER = logging.getLogger("midspan.test")


def test_a_text_line_carries_the_request_id_and_the_fields(stream: io.StringIO) -> None:
    configure_logging(style="text", stream=stream)
    token = current_request_id.set("abc")
    log_fields(LOGGER, logging.INFO, "request done", tokens=3, ttft=0.123456, finish=None, note="two words")
    current_request_id.reset(token)
    line = stream.getvalue()
    assert line.endswith('INFO midspan.test [abc] request done tokens=3 ttft=0.1235 note="two words"\n')


def test_a_json_line_is_one_object(stream: io.StringIO) -> None:
    configure_logging(style="json", stream=stream)
    log_fields(LOGGER, logging.WARNING, "läuft\nweiter", tokens=3)
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["message"] == "läuft\nweiter"
    assert (record["level"], record["logger"], record["tokens"]) == ("warning", "midspan.test", 3)
    assert "request_id" not in record


def test_a_message_cannot_forge_a_second_line(stream: io.StringIO) -> None:
    configure_logging(style="text", stream=stream)
    LOGGER.info("real\n2030-01-01 INFO forged")
    assert len(stream.getvalue().splitlines()) == 1


def test_an_exception_is_logged_with_its_traceback(stream: io.StringIO) -> None:
    configure_logging(style="json", stream=stream)
    try:
        raise ValueError("broken")
    except ValueError:
        LOGGER.exception("failed")
    assert "ValueError: broken" in json.loads(stream.getvalue())["exception"]


def test_lines_below_the_level_are_left_out(stream: io.StringIO) -> None:
    configure_logging(level="warning", stream=stream)
    LOGGER.info("quiet")
    log_fields(LOGGER, logging.INFO, "quiet too")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("bad", [{"style": "xml"}, {"level": "loud"}])
def test_an_unknown_format_or_level_is_refused(bad: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        configure_logging(**bad)


def make_metrics(statistics: EngineStatistics, *, alive: bool = True) -> ServerMetrics:
    return ServerMetrics(
        model_name='odd"name\\',
        engines=[
            ObservedEngine(statistics=lambda: statistics, is_alive=lambda: alive, cache_config={"block_size": "16"})
        ],
        load_seconds=2.5,
    )


def values(metrics: ServerMetrics) -> dict[str, float]:
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_the_engine_is_read_at_each_scrape() -> None:
    found = values(make_metrics(EngineStatistics(running=3, waiting=2, cache_usage=0.25, preemptions=7), alive=False))
    assert found["midspan:num_requests_running"] == found["vllm:num_requests_running"] == 3
    assert found["midspan:num_requests_waiting"] == 2
    assert found["vllm:gpu_cache_usage_perc"] == found["midspan:kv_cache_usage_perc"] == 0.25
    assert found["vllm:num_preemptions_total"] == 7
    assert found["midspan:engine_up"] == 0
    assert found["midspan:model_load_seconds"] == 2.5
    assert "vllm:engine_up" not in found


def test_both_sets_of_names_hold_the_same_values() -> None:
    metrics = make_metrics(EngineStatistics())
    metrics.observe(
        FinishedRequest(
            finish_reasons=("stop", "length"),
            prompt_tokens=10,
            cached_tokens=4,
            generation_tokens=30,
            longest_generation=21,
            n=2,
            max_tokens=50,
            end_to_end=3.0,
            queue=0.5,
            prefill=0.5,
            decode=2.0,
        )
    )
    found = values(metrics)
    for name in ("e2e_request_latency_seconds_sum", "request_decode_time_seconds_sum", "prompt_tokens_cached_total"):
        assert found[f"midspan:{name}"] == found[f"vllm:{name}"] > 0
    assert found["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(2.0 / 20)
    assert found["vllm:request_inference_time_seconds_sum"] == 2.5
    assert not any(name.endswith("_created") for name in found)


def test_a_request_that_never_got_a_token_is_measured_as_far_as_it_came() -> None:
    metrics = make_metrics(EngineStatistics())
    metrics.observe(
        FinishedRequest(
            finish_reasons=("stop",),
            prompt_tokens=10,
            cached_tokens=0,
            generation_tokens=0,
            longest_generation=0,
            n=1,
            max_tokens=None,
            end_to_end=3.0,
            queue=None,
            prefill=None,
            decode=None,
        )
    )
    found = values(metrics)
    assert found["midspan:e2e_request_latency_seconds_count"] == 1
    assert found["midspan:request_decode_time_seconds_count"] == 0
