"""What the suite is made of: checks with names, in levels.

A check knows one device's subject and nothing about who runs it: the command line
and pytest run the same list. Imports no test runner.

Invariants: ids are unique and stable from run to run; why a check does not apply
comes from the device's declared capabilities and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LEVELS: tuple[str, ...] = (
    "lifecycle",
    "operations",
    "caches",
    "collectives",
    "engine",
    "determinism",
    "memory",
    "faults",
    "independence",
)
"""In the order in which they run: each leans on those before it."""


class CheckFailed(Exception):
    """The device did something else than it must; the message is for its author."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must hold.

    Attributes:
        level: one of ``LEVELS``, or the mode that the check belongs to.
        name: words joined by dashes, no spaces; unique in the level.
        run: returns when it holds; raises ``CheckFailed``, or anything else, when not.
        unclaimed: why it does not apply, from declared capabilities only; it is then
            counted as skipped. None: it applies.
        quick: part of the self-test that takes less than a minute in all.
        waits_seconds: for processes of its own, which it ends itself when they take longer; its limit
            is that much longer than that of other checks.
    """

    level: str
    name: str
    run: Callable[[], None]
    unclaimed: str | None = None
    quick: bool = False
    waits_seconds: float = 0.0

    @property
    def id(self) -> str:
        """What people name it by: ``level/name``."""
        return f"{self.level}/{self.name}"
