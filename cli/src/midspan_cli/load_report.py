"""What a load test came to, as figures and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from midspan_cli.goals import Goal
from midspan_cli.text_table import table

if TYPE_CHECKING:
    from midspan.engine.load_drive import RequestTiming

MILLISECONDS = 1000.0
STEADY_LATENCIES = 10
"""A load shorter than so many of its own latencies begins and ends, and is never in its steady state."""

PERCENTILES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
TITLES: Mapping[str, str] = {
    "ttft_ms": "first token",
    "tpot_ms": "each next token",
    "itl_ms": "between two tokens",
    "e2el_ms": "whole request",
}
"""Figures in milliseconds, by vLLM's names -> what they are."""


def summarize(
    timings: Sequence[RequestTiming], *, input_tokens: int, seconds: float, goals: Sequence[Goal] = ()
) -> dict[str, Any]:
    """The figures of a load test.

    Args:
        timings: of all requests.
        input_tokens: tokens of all prompts together.
        seconds: from the start to the last end.
        goals: for each, how many requests kept it; a request is good that kept them all.
    """
    good = [timing for timing in timings if timing.error is None]
    output_tokens = sum(timing.tokens for timing in good)
    errors = sorted({timing.error for timing in timings if timing.error is not None})
    seconds = max(seconds, 1e-9)
    result = {
        "requests": len(timings),
        "failed": len(timings) - len(good),
        "errors": errors[:5],
        "seconds": seconds,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (input_tokens + output_tokens) / seconds,
        "mean_concurrency": sum(timing.whole() or 0.0 for timing in good) / seconds,
        "peak_concurrency": _peak(good),
        "ttft_ms": _spread([timing.first() for timing in good]),
        "tpot_ms": _spread([timing.per_token() for timing in good]),
        "itl_ms": _spread([gap for timing in good for gap in timing.gaps()]),
        "e2el_ms": _spread([timing.whole() for timing in good]),
    }
    if goals:
        kept = sum(all(_keeps(timing, goal) for goal in goals) for timing in good)
        result["goodput"] = {
            "goals": [str(goal) for goal in goals],
            "good_requests": kept,
            "good_share": kept / len(timings),
            "requests_per_second": kept / seconds,
        }
    return result


def text(result: Mapping[str, Any]) -> str:
    """The figures for people."""
    spreads = [(title, result[key]) for key, title in TITLES.items() if result[key] is not None]
    rows = [(title, *(f"{value:.1f} ms" for value in spread.values())) for title, spread in spreads]
    lines = [
        f"requests          {result['requests']}, {result['failed']} failed, in {result['seconds']:.2f} s",
        f"offered           {_offered(result['load'])}",
        f"tokens            {result['input_tokens']} in, {result['output_tokens']} out",
        f"throughput        {result['requests_per_second']:.2f} requests/s, "
        f"{result['output_tokens_per_second']:.1f} output tokens/s, {result['total_tokens_per_second']:.1f} tokens/s",
        f"in flight         {result['mean_concurrency']:.1f} in the mean, {result['peak_concurrency']} at most",
        *_engine_lines(result),
        *_goal_lines(result),
        *_length_lines(result),
    ]
    if rows:
        lines += ["", table(("latency".ljust(16), "mean", "median", "p90", "p99"), rows)]
    lines += [f"error: {error}" for error in result["errors"]]
    return "\n".join(lines)


def search_text(search: Mapping[str, Any]) -> str:
    """What a search for a rate found, and the runs that it took."""
    wanted = " ".join(search["goals"])
    metrics = [goal.partition(":")[0] for goal in search["goals"]]
    if search["rate"] is None:
        tried = [run["rate"] for run in search["tried"] if run["rate"] is not None]
        why = f"the lowest one tried was {min(tried):.4g} requests/s" if tried else "a request alone takes longer"
        answer = f"No rate keeps {wanted} at p99: {why}."
    elif search["saturated"]:
        answer = f"{wanted} is kept at p99 up to all that it can serve: {search['rate']:.4g} requests/s."
    else:
        answer = f"The largest rate that keeps {wanted} at p99: {search['rate']:.4g} requests/s."
    rows = [
        (
            run["name"],
            str(run["requests"]),
            f"{run['requests_per_second']:.4g}",
            *("-" if run[metric] is None else f"{run[metric]:.1f} ms" for metric in metrics),
            "yes" if run["kept"] else "no",
        )
        for run in search["tried"]
    ]
    heading = ("requests/s", "requests", "served/s", *(f"p99 {metric}" for metric in metrics), "kept")
    return f"{answer}\n\n{table(heading, rows)}"


def _engine_lines(result: Mapping[str, Any]) -> list[str]:
    engine = result.get("engine")
    if engine is None:
        return []
    busy = "" if engine["device_busy"] is None else f", device busy {engine['device_busy']:.0%}"
    return [
        f"engine            {engine['steps']} steps, {engine['preemptions']} preemptions, "
        f"KV cache {engine['cache_usage_peak']:.1%} full at most{busy}"
    ]


def _goal_lines(result: Mapping[str, Any]) -> list[str]:
    goodput = result.get("goodput")
    if goodput is None:
        return []
    return [
        f"goodput           {goodput['requests_per_second']:.2f} requests/s, "
        f"{goodput['good_share']:.1%} of the requests kept {' '.join(goodput['goals'])}"
    ]


def steady_count(rate: float, figures: Mapping[str, Any]) -> int:
    """How many requests at a rate make a load long enough to show its steady state, as far as its latencies tell."""
    latency = figures["e2el_ms"]
    return 1 if latency is None else math.ceil(STEADY_LATENCIES * rate * latency["mean"] / MILLISECONDS)


def _length_lines(result: Mapping[str, Any]) -> list[str]:
    rate = result["load"]["request_rate"]
    if rate is None or result["requests"] >= (enough := steady_count(rate, result)):
        return []
    return [
        f"note              requests stop coming after {result['requests'] / rate:.1f} s, too soon for a steady state: "
        f"take --num-prompts {enough} or more"
    ]


def _offered(load: Mapping[str, Any]) -> str:
    rate = load["request_rate"]
    limit = load["max_concurrency"]
    arrivals = "all at once" if rate is None else f"{rate:.4g} requests/s, Poisson"
    return arrivals if limit is None else f"{arrivals}; at most {limit} in flight"


def _keeps(timing: RequestTiming, goal: Goal) -> bool:
    seconds = {"ttft": timing.first, "tpot": timing.per_token, "e2el": timing.whole}[goal.metric]()
    return seconds is None or seconds * MILLISECONDS <= goal.milliseconds


def _peak(timings: Sequence[RequestTiming]) -> int:
    changes = [(timing.start, 1) for timing in timings if timing.moments]
    changes += [(timing.moments[-1], -1) for timing in timings if timing.moments]
    now = peak = 0
    for _, change in sorted(changes):  # of one moment, ends come before starts
        now += change
        peak = max(peak, now)
    return peak


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = sorted(value * MILLISECONDS for value in values if value is not None)
    if not known:
        return None
    return {
        "mean": sum(known) / len(known),
        **{name: percentile(known, share) for name, share in PERCENTILES.items()},
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, linear between neighbours.

    Args:
        ordered: rising, at least one.
        share: 0 to 1.
    """
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
