"""What ``midspan bench`` measures here, on a server, and in the time of a device with a clock of its own."""

from __future__ import annotations

import io
import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from midspan.devices.discovery import DeviceCatalogue
from midspan.engine.load_drive import RequestTiming
from midspan.engine.messages import AddRequest
from midspan.engine.planned_load import LoadShape
from midspan.engine.step_loop import EngineCore
from midspan.errors import SettingsError
from midspan_cli.goals import Goal, parse_goals
from midspan_cli.live_line import LiveLine
from midspan_cli.load_report import percentile, summarize
from midspan_cli.rate_search import find_rate
from midspan_cli.remote_load import RemoteLoad
from midspan_cli.remote_server import RemoteServer

HERE = ("--device", "reference", "--kv-cache-memory-bytes", "4M")
TICKING = ("--load-format", "dummy", "--device", "ticking", "--kv-cache-memory-bytes", "4M")
SMALL = ("--num-prompts", "4", "--input-len", "8", "--output-len", "5")


@pytest.fixture
def bench(midspan: Any, ticking: DeviceCatalogue, config_only: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``bench(...)`` on the ticking device, with a folder that holds config.json alone; returns the JSON."""

    def run(*arguments: str, text: bool = False) -> Any:
        with monkeypatch.context() as changes:
            changes.setattr("midspan.engine.loading.discover", lambda: ticking)
            done = midspan("bench", str(config_only), *TICKING, *arguments, *(() if text else ("--json",)))
        assert done.returncode == 0, done.stderr
        return done.stdout if text else json.loads(done.stdout)

    return run


def test_it_reports_what_was_generated(midspan: Any, tiny_model: Path) -> None:
    done = midspan("bench", str(tiny_model), *SMALL, *HERE, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["input_tokens"], result["output_tokens"], result["failed"]) == (32, 20, 0)
    assert (result["time"], result["engine"]["device_busy"]) == ("measured", None)
    assert result["output_tokens_per_second"] == pytest.approx(20 / result["seconds"])
    assert result["total_tokens_per_second"] == pytest.approx(52 / result["seconds"])
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"):
        spread = result[name]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"]
    assert result["e2el_ms"]["mean"] == pytest.approx(result["ttft_ms"]["mean"] + 4 * result["tpot_ms"]["mean"])
    assert "output tokens/s" in midspan("bench", str(tiny_model), *SMALL, *HERE).stdout


def test_no_measured_prompt_was_seen_in_the_warm_up(monkeypatch: pytest.MonkeyPatch, bench: Any) -> None:
    seen: list[AddRequest] = []
    add = EngineCore.add

    def noting(core: EngineCore, request: AddRequest) -> None:
        seen.append(request)
        add(core, request)

    monkeypatch.setattr(EngineCore, "add", noting)
    result = bench(*SMALL, "--num-warmups", "3")
    assert result["requests"] == 4
    assert len({tuple(request.prompt_ids) for request in seen}) == len(seen) == 7
    assert [request.params.max_tokens for request in seen] == [2] * 3 + [5] * 4


def test_modelled_time_is_told_from_measured_time(bench: Any) -> None:
    result = bench(*SMALL, "--request-rate", "0.01")
    assert (result["time"], result["load_format"]) == ("modelled", "dummy")
    assert result["seconds"] > 300 > result["computed_seconds"]
    assert result["engine"]["device_busy"] < 0.01
    text = bench(*SMALL, text=True)
    assert re.search(r"^modelled time of ticking, computed in [\d.]+ s$", text, re.MULTILINE)
    assert "ticking as bfloat16, with random numbers for weights" in text


def test_the_same_command_gives_the_same_numbers(bench: Any) -> None:
    load = ("--num-prompts", "40", "--input-len", "20", "--output-len", "8", "--random-range-ratio", "0.4")
    runs = [bench(*load, "--request-rate", "50", "--seed", seed) for seed in ("1", "1", "2")]
    for run in runs:
        del run["computed_seconds"]
    assert runs[0] == runs[1]
    assert runs[0]["ttft_ms"] != runs[2]["ttft_ms"]


def test_the_host_adds_its_share_of_each_step(bench: Any) -> None:
    load = ("--num-prompts", "1", "--input-len", "8", "--output-len", "5")
    device, both = bench(*load), bench(*load, "--host-seconds-per-step", "0.25")
    assert both["seconds"] == pytest.approx(device["seconds"] + 5 * 0.25)
    assert both["engine"]["device_busy"] == pytest.approx(device["seconds"] / both["seconds"])


def test_a_limit_of_requests_in_flight_is_kept(bench: Any) -> None:
    result = bench(*SMALL, "--max-concurrency", "2")
    assert result["peak_concurrency"] == 2
    assert result["load"]["max_concurrency"] == 2
    assert bench(*SMALL)["peak_concurrency"] == 4


def test_a_limit_is_kept_in_the_hosts_time_too(midspan: Any, tiny_model: Path) -> None:
    done = midspan("bench", str(tiny_model), *HERE, *SMALL, "--max-concurrency", "2", "--json")
    assert json.loads(done.stdout)["peak_concurrency"] == 2


def test_goodput_counts_the_requests_that_kept_every_goal(bench: Any) -> None:
    # A step takes half of the prompts, so that the other half has its first token a step later.
    load = ("--num-prompts", "40", "--input-len", "40", "--output-len", "8", "--max-num-batched-tokens", "800")
    every = bench(*load)
    middle = every["ttft_ms"]["p50"]
    result = bench(*load, "--goodput", f"ttft:{middle:.4f}", "e2el:100000", "--seed", "0")
    assert result["goodput"]["good_requests"] == 20
    assert result["goodput"]["goals"] == [f"ttft:{middle:g}", "e2el:100000"]
    assert result["goodput"]["requests_per_second"] == pytest.approx(20 / result["seconds"])
    assert bench(*load, "--goodput", "e2el:0.001")["goodput"]["good_requests"] == 0
    joined = bench(*load, "--goodput=ttft:100000", "e2el:0.001")
    assert joined["goodput"]["goals"] == ["ttft:100000", "e2el:0.001"]


def test_the_largest_rate_that_keeps_the_goals_is_found(bench: Any) -> None:
    load = ("--num-prompts", "150", "--input-len", "40", "--output-len", "8")
    result = bench(*load, "--goodput", "ttft:10", "tpot:6", "--find-rate")
    search = result["search"]
    rate = search["rate"]
    assert not search["saturated"]
    assert result["load"]["request_rate"] == rate
    assert result["ttft_ms"]["p99"] <= 10
    assert result["tpot_ms"]["p99"] <= 6
    # What it found holds, and a little more does not.
    assert search["tried"][0]["name"] == "one by one"
    refused = min(run["rate"] for run in search["tried"] if run["rate"] and not run["kept"])
    assert rate < refused <= rate * 1.03
    again = bench(*load, "--request-rate", str(refused))
    assert again["ttft_ms"]["p99"] > 10 or again["tpot_ms"]["p99"] > 6


def test_a_goal_beyond_reach_and_one_that_binds_nothing_are_told_apart(bench: Any) -> None:
    beyond = bench(*SMALL, "--goodput", "ttft:0.5", "--find-rate", text=True)
    assert "No rate keeps ttft:0.5 at p99: a request alone takes longer." in beyond
    idle = bench(*SMALL, "--goodput", "ttft:60000", "--find-rate", text=True)
    assert "up to all that it can serve" in idle


@pytest.mark.parametrize("limit", [0.7, 5.0, 42.0, 99.0])
def test_the_search_closes_in_on_the_rate_where_a_goal_breaks(limit: float) -> None:
    counts: list[int] = []

    def measure(rate: float, count: int) -> dict[str, Any]:
        counts.append(count)
        latency = 1e9 if math.isinf(rate) else 10.0 if rate <= limit else 30.0
        figures = {"failed": 0, "requests": count, "requests_per_second": min(rate, 100.0)}
        return {**figures, "ttft_ms": {"p99": latency}, "e2el_ms": {"mean": 2000.0}}

    found = find_rate(measure, (Goal(metric="ttft", milliseconds=20),), alone=measure(0.1, 1), count=100)
    tried = [run.rate for run in found.tried if run.rate is not None]
    if limit < 100 / 64:
        assert found.best is None
        assert min(tried) <= 100 / 32
    else:
        assert found.best is not None
        assert found.best.rate is not None
        assert limit * 0.97 <= found.best.rate <= limit
        # It lasts ten times as long as one of its requests, which takes two seconds.
        assert found.best.figures["requests"] >= max(100, 10 * 2 * found.best.rate)
    assert len(tried) <= 12


def test_a_rate_that_only_a_short_run_keeps_is_not_taken() -> None:
    def measure(rate: float, count: int) -> dict[str, Any]:
        queue = 0.0 if rate <= 50 else 0.2 * count  # it grows with each request that comes
        figures = {"failed": 0, "requests": count, "requests_per_second": min(rate, 60.0)}
        return {**figures, "ttft_ms": {"p99": 10 + queue}, "e2el_ms": {"mean": 500.0 + queue}}

    goals = (Goal(metric="ttft", milliseconds=60),)
    assert measure(60.0, 100)["ttft_ms"]["p99"] <= 60
    found = find_rate(measure, goals, alone=measure(0.1, 1), count=100)
    assert found.best is not None
    assert found.best.rate is not None
    assert 50 * 0.98 <= found.best.rate <= 50


def test_a_server_that_fails_every_request_at_once_is_not_called_saturated() -> None:
    def measure(rate: float, count: int) -> dict[str, Any]:
        return {"failed": count, "requests": count, "requests_per_second": 0.0, "ttft_ms": None, "e2el_ms": None}

    alone = {"failed": 0, "requests": 1, "requests_per_second": 1.0, "ttft_ms": {"p99": 1.0}, "e2el_ms": None}
    found = find_rate(measure, (Goal(metric="ttft", milliseconds=20),), alone=alone, count=10).described()
    assert (found["rate"], found["saturated"]) == (None, False)


def test_a_run_too_short_for_a_steady_state_is_noted(bench: Any) -> None:
    short = bench(*SMALL, "--request-rate", "1000", text=True)
    found = re.search(r"take --num-prompts (\d+) or more", short)
    assert found is not None
    assert int(found[1]) > 4
    assert "note" not in bench(*SMALL, "--request-rate", "1", text=True)


def test_the_result_is_also_written_where_asked(bench: Any, tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    printed = bench(*SMALL, "--output-json", str(target))
    assert json.loads(target.read_text()) == printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--goodput", "speed:3"), "ttft, tpot, e2el"),
        (("--goodput", "ttft"), "METRIC:MILLISECONDS"),
        (("--goodput", "ttft:1", "ttft:2"), "twice"),
        (("--find-rate",), "--goodput ttft:200 tpot:50"),
        (("--find-rate", "--goodput", "ttft:1", "--request-rate", "3"), "Leave out --request-rate"),
        (("--request-rate", "0"), "above 0"),
        (("--request-rate", "nan"), "above 0"),
        (("--random-range-ratio", "1"), "below 1"),
        (("--host-seconds-per-step", "-1"), "0 or more"),
        (("--load-format", "guess"), "auto or dummy"),
        (("--output-json", "/no/such/folder/result.json"), "/no/such/folder"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(midspan: Any, arguments: tuple[str, ...], text: str) -> None:
    done = midspan("bench", "/no/such/model", *arguments)
    assert done.returncode == 1
    assert text in done.stderr
    assert "/no/such/model" not in done.stderr


def test_what_does_not_fit_the_model_or_the_device_is_said_with_a_remedy(midspan: Any, tiny_model: Path) -> None:
    long = midspan("bench", str(tiny_model), *HERE, "--input-len", "200", "--output-len", "100")
    assert long.returncode == 1
    assert "up to 300 tokens" in long.stderr
    assert "--input-len" in long.stderr
    host = midspan("bench", str(tiny_model), *HERE, *SMALL, "--host-seconds-per-step", "0.1")
    assert host.returncode == 1
    assert "clock of their own" in host.stderr


def test_dummy_weights_serve_no_text_without_a_tokenizer(midspan: Any, config_only: Path) -> None:
    done = midspan("run", str(config_only), "hello", "--load-format", "dummy", *HERE)
    assert done.returncode == 1
    assert "has no tokenizer" in done.stderr
    assert "--tokenizer" in done.stderr


def test_dummy_weights_with_a_tokenizer_serve_text(midspan: Any, config_only: Path, tiny_model: Path) -> None:
    borrowed = ("--tokenizer", str(tiny_model), "--max-tokens", "3", "--temperature", "0")
    allowed = ("--load-format", "dummy", *HERE)
    done = midspan("run", str(config_only), "a", *borrowed, *allowed)
    assert done.returncode == 0, done.stderr
    assert "random numbers for weights" in done.stderr


class TokenServer(BaseHTTPRequestHandler):
    """As much of the API as a load test needs; notes what it was sent."""

    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.answer(json.dumps({"data": [{"id": "served"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        chunks: list[dict[str, Any]] = [{"choices": [{"text": "x"}]}] * body["max_tokens"]
        chunks = [*chunks, {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}]
        self.answer("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")

    def answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        """Stay silent."""


@pytest.fixture
def token_server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    handler = type("Handler", (TokenServer,), {"bodies": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.bodies  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_gets_the_same_load(midspan: Any, token_server: tuple[str, list[dict[str, Any]]]) -> None:
    url, bodies = token_server
    load = ("--random-range-ratio", "0.5", "--request-rate", "200", "--max-concurrency", "2", "--goodput", "e2el:60000")
    done = midspan("bench", "--url", url, *SMALL, *load, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(bodies) == 1 + 4
    measured = bodies[1:]
    assert result["input_tokens"] == sum(len(body["prompt"]) for body in measured)
    assert result["output_tokens"] == sum(body["max_tokens"] for body in measured)
    assert len({tuple(body["prompt"]) for body in bodies}) == 5
    assert result["peak_concurrency"] <= 2
    assert (result["model"], result["failed"], result["goodput"]["good_share"]) == ("served", 0, 1.0)
    # The next run has other prompts, which no prefix cache of the server holds.
    midspan("bench", "--url", url, *SMALL, "--json")
    assert len({tuple(body["prompt"]) for body in bodies}) == 10


def test_a_load_on_a_server_takes_as_many_threads_as_requests_are_in_flight() -> None:
    threads: set[int] = set()

    class QuickServer(RemoteServer):
        def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
            threads.add(threading.get_ident())
            yield {"choices": [{}], "usage": {"completion_tokens": body["max_tokens"]}}

    shape = LoadShape(count=60, input_tokens=4, output_tokens=2)
    server = QuickServer(url="http://nowhere.invalid", api_key=None)
    load = RemoteLoad(server=server, model="quick", shape=shape, max_concurrency=None, line=LiveLine(quiet=True))
    figures = load.measure(300.0, ())
    assert (figures["requests"], figures["failed"], figures["output_tokens"]) == (60, 0, 120)
    assert len(threads) < 30


def test_figures_of_known_timings() -> None:
    timings = [
        RequestTiming(start=0.0, tokens=3, moments=[0.1, 0.2, 0.4]),
        RequestTiming(start=0.2, tokens=1, moments=[0.5]),
        RequestTiming(start=0.4, error="broke"),
    ]
    result = summarize(timings, input_tokens=30, seconds=1.0, goals=parse_goals(["ttft:150"]))
    assert (result["requests"], result["failed"], result["errors"]) == (3, 1, ["broke"])
    assert result["ttft_ms"] == pytest.approx({"mean": 200, "p50": 200, "p90": 280, "p99": 298})
    assert result["tpot_ms"] == pytest.approx(dict.fromkeys(("mean", "p50", "p90", "p99"), 150))
    assert result["itl_ms"]["p50"] == pytest.approx(150)
    assert result["e2el_ms"]["mean"] == pytest.approx(350)
    assert result["mean_concurrency"] == pytest.approx(0.7)
    assert result["peak_concurrency"] == 2
    assert (result["goodput"]["good_requests"], result["goodput"]["good_share"]) == (1, pytest.approx(1 / 3))


def test_percentiles_lie_between_neighbours() -> None:
    assert [percentile([1.0, 2.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 1.5, 2.0, 3.0, 4.0]
    assert percentile([7.0], 0.99) == 7.0


def test_goals_may_be_written_together_or_apart() -> None:
    wanted = (Goal(metric="ttft", milliseconds=200), Goal(metric="tpot", milliseconds=50.5))
    for texts in (["ttft:200 tpot:50.5"], ["ttft:200", "tpot:50.5"], ["ttft:200,tpot:50.5"]):
        assert parse_goals(texts) == wanted
    for bad in ("ttft:0", "ttft:-1", "ttft:", "itl:5", "ttft:1e3"):
        with pytest.raises(SettingsError):
            parse_goals([bad])


class Terminal(io.StringIO):
    """A stream that somebody looks at."""

    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_terminals_alone() -> None:
    watched, piped = Terminal(), io.StringIO()
    for stream in (watched, piped):
        line = LiveLine(stream=stream)
        line.heading = "4 requests/s: "
        if line.is_due():
            line.show("3/10 requests")
        line.close()
    assert "4 requests/s: 3/10 requests" in watched.getvalue()
    assert watched.getvalue().endswith("\r\x1b[K")
    assert piped.getvalue() == ""
    assert not LiveLine(stream=watched, quiet=True).is_due()
