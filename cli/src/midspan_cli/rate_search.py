"""Finds the largest request rate at which latencies stay within their goals.

Knows numbers only: how a load is run at a rate is passed in.

The search lies below what the device completes when all requests come at once: at a higher
rate the queue would grow for as long as requests keep coming, whatever a short run shows. A
run that keeps the goals counts only when it is long enough to show its steady state, or was made longer
``LARGEST_GROWTH`` times and still keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midspan_cli.goals import Goal
from midspan_cli.load_report import steady_count

PRECISION = 0.02
"""The rate is found to within this share of itself."""

LEAST_SHARE = 1 / 64
"""Rates below this share of the saturated throughput are not tried: there a request is nearly always alone."""

LARGEST_GROWTH = 4
"""How often a run is repeated with more requests."""

Figures = Mapping[str, Any]
"""What a load came to, see ``load_report.summarize``."""

Measure = Callable[[float, int], Figures]
"""Runs the load at a rate, with so many requests."""


@dataclass(frozen=True, kw_only=True)
class TriedLoad:
    """One run of a search.

    Attributes:
        name: what was sent, for people.
        rate: requests a second; None: all at once, or one after the other.
        figures: what it came to.
    """

    name: str
    rate: float | None
    figures: Figures


@dataclass(frozen=True, kw_only=True)
class FoundRate:
    """What a search found.

    Attributes:
        goals: what was to be kept.
        best: the run at the largest rate that kept all goals; None: no rate does.
        saturated: whether that rate is the saturated throughput itself, and no goal limits it.
        tried: all runs in order.
    """

    goals: Sequence[Goal]
    best: TriedLoad | None
    saturated: bool
    tried: Sequence[TriedLoad]

    def described(self) -> dict[str, Any]:
        """The search for a report; latencies are 99th percentiles in milliseconds."""
        return {
            "goals": [str(goal) for goal in self.goals],
            "rate": None if self.best is None else self.best.rate,
            "saturated": self.saturated,
            "tried": [
                {
                    "name": run.name,
                    "rate": run.rate,
                    "requests": run.figures["requests"],
                    "requests_per_second": run.figures["requests_per_second"],
                    **{goal.metric: _p99(run.figures, goal) for goal in self.goals},
                    "kept": keeps(run.figures, self.goals),
                }
                for run in self.tried
            ],
        }


def find_rate(measure: Measure, goals: Sequence[Goal], *, alone: Figures, count: int) -> FoundRate:
    """Search by bisection.

    Args:
        measure: see ``Measure``; called about ten times.
        goals: kept where the 99th percentile of each metric is within its limit.
        alone: requests one after the other; where these do not keep the goals, no rate does.
        count: requests of a run at least.
    """
    tried = [TriedLoad(name="one by one", rate=None, figures=alone)]
    if not keeps(alone, goals):
        return FoundRate(goals=goals, best=None, saturated=False, tried=tried)
    tried.append(TriedLoad(name="all at once", rate=None, figures=measure(math.inf, count)))
    saturation = high = float(tried[-1].figures["requests_per_second"])
    best: TriedLoad | None = None
    low, rate, latest = 0.0, high, alone
    while low < high * (1 - PRECISION) and rate > saturation * LEAST_SHARE:
        latest = _steady(measure, rate, max(count, steady_count(rate, latest)), goals)
        run = TriedLoad(name=f"{rate:.4g}", rate=rate, figures=latest)
        tried.append(run)
        if keeps(run.figures, goals):
            low, best = rate, run
        else:
            high = rate
        rate = (low + high) / 2
    return FoundRate(goals=goals, best=best, saturated=best is not None and low == saturation, tried=tried)


def _steady(measure: Measure, rate: float, count: int, goals: Sequence[Goal]) -> Figures:
    """The load at a rate, with more requests until it breaks the goals, shows its steady state or has grown enough."""
    for _ in range(LARGEST_GROWTH):
        figures = measure(rate, count)
        enough = steady_count(rate, figures)
        if count >= enough or not keeps(figures, goals):
            break
        count = enough
    return figures


def keeps(figures: Figures, goals: Sequence[Goal]) -> bool:
    """Whether all requests succeeded, with the 99th percentile of each metric within its goal."""
    return not figures["failed"] and all((_p99(figures, goal) or 0.0) <= goal.milliseconds for goal in goals)


def _p99(figures: Figures, goal: Goal) -> float | None:
    spread = figures[f"{goal.metric}_ms"]
    return None if spread is None else float(spread["p99"])
