"""Latencies that requests should keep, as ``--goodput`` says them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from midspan.errors import SettingsError

METRICS = ("ttft", "tpot", "e2el")
GOAL = re.compile(r"(\w+):(\d+(?:\.\d+)?)")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A latency that a request should keep.

    Attributes:
        metric: ``"ttft"`` (to the first token), ``"tpot"`` (mean of each next one) or ``"e2el"`` (to the last one).
        milliseconds: at most.
    """

    metric: str
    milliseconds: float

    def __str__(self) -> str:
        return f"{self.metric}:{self.milliseconds:g}"


def parse_goals(texts: Sequence[str]) -> tuple[Goal, ...]:
    """``METRIC:MS`` texts, several in one or one in each, as goals.

    Raises:
        SettingsError: a text is no known metric and number, or a metric comes twice.
    """
    goals: dict[str, Goal] = {}
    for word in [word for text in texts for word in text.replace(",", " ").split()]:
        match = GOAL.fullmatch(word)
        if match is None or match[1] not in METRICS or float(match[2]) == 0:
            raise SettingsError(
                f"--goodput {word!r} is not of the form METRIC:MILLISECONDS.",
                remedy=f"Metrics are {', '.join(METRICS)}: --goodput ttft:200 tpot:50.",
            )
        if match[1] in goals:
            raise SettingsError(f"--goodput gives {match[1]} twice.", remedy="Give each metric one limit.")
        goals[match[1]] = Goal(metric=match[1], milliseconds=float(match[2]))
    return tuple(goals.values())
