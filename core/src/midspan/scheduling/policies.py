"""Who goes first, and who gives way.

A policy gives each request a rank once, when it is added. Smaller ranks are scheduled
first and admitted first; when blocks run out, the largest rank among the running ones
gives way. Knows nothing of blocks or budgets.

Invariant: no two requests of a scheduler have the same rank, because it ends with the
number that the scheduler gave.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from midspan.scheduling.request import Request


class Policy(Protocol):
    """An order of requests."""

    def rank(self, request: Request) -> tuple[float, ...]:
        """The request's sort key; ``sequence`` is set."""
        ...

    def first_displaced(self, running: Sequence[Request], waiting: Request) -> int:
        """Index in ``running``, sorted by rank, from which on requests give way to a waiting one."""
        ...


class FirstComeFirstServed:
    """Earlier arrivals first; nobody who runs gives way to one who waits."""

    def rank(self, request: Request) -> tuple[float, ...]:
        """Arrival, then order of addition."""
        return (request.arrival, request.sequence)

    def first_displaced(self, running: Sequence[Request], waiting: Request) -> int:
        """None of them."""
        return len(running)


class PriorityFirst:
    """Smaller priorities first, earlier arrivals among equals; strictly larger priorities give way."""

    def rank(self, request: Request) -> tuple[float, ...]:
        """Priority, then arrival, then order of addition."""
        return (request.priority, request.arrival, request.sequence)

    def first_displaced(self, running: Sequence[Request], waiting: Request) -> int:
        """The first of a strictly larger priority."""
        if not running or running[-1].priority <= waiting.priority:
            return len(running)
        return bisect_right(running, waiting.priority, key=lambda request: request.priority)


POLICIES: Mapping[str, Policy] = MappingProxyType({"fcfs": FirstComeFirstServed(), "priority": PriorityFirst()})
"""Policies by the name of the setting."""
