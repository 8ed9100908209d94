"""Devices that work together, each in a process of its own.

Claimed by a ``Capabilities.max_world_size`` above 1. Where the plugin's probe found numbered devices
(``name:0``, ``name:1``), rank r opens the r-th of them, counted on from the one under examination and again
from the first when they are used up; otherwise all ranks open the same one. A device that cannot
be opened twice must claim no more than there are. Groups form on the loopback address.

The list of what they do is ``collective_cases``. The operations of one world run in one group of
processes, whose results the checks of that world share.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.child_process import ChildEnd, device_arguments, run_children
from midspan.conformance.children.collective_rank import LEAVING_CODE
from midspan.conformance.collective_cases import OPERATIONS
from midspan.conformance.subject import Subject
from midspan.devices.contract import check_device

LEVEL = "collectives"
WORLDS = (2, 3, 4)
_RANK = "midspan.conformance.children.collective_rank"
_GROUP_SECONDS = 30.0
"""How long ranks wait for each other; what is due in a moment is lost long before that."""
_CHILD_SECONDS = 120.0
"""After which a group of processes counts as hanging."""
_SHORT_SECONDS = 1.0
_SHOWN_PROBLEMS = 5


def checks(subject: Subject) -> Sequence[Check]:
    """The checks of this level."""
    largest = subject.capabilities.max_world_size
    unclaimed = None if largest > 1 else "max_world_size is 1"
    found = []
    for size in WORLDS:
        group = _Group(subject, size)
        missing = unclaimed or (None if size <= largest else f"max_world_size is {largest}")
        for operation in OPERATIONS:
            found.append(
                Check(
                    level=LEVEL,
                    name=f"{operation}-of-{size}",
                    run=lambda group=group, operation=operation: group.check(operation),  # type: ignore[misc]
                    unclaimed=missing,
                    quick=size == WORLDS[0],
                    waits_seconds=_CHILD_SECONDS,
                )
            )
    ends = _Ends(subject)
    ending = (
        ("a-rank-that-dies-is-an-error", ends.rank_dies, True),
        ("a-rank-that-never-comes-is-an-error", ends.rank_missing, False),
        ("a-group-too-large-is-refused", ends.too_large, False),
    )
    found += [
        Check(level=LEVEL, name=name, run=run, unclaimed=unclaimed, quick=quick, waits_seconds=_CHILD_SECONDS)
        for name, run, quick in ending
    ]
    return found


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _run(subject: Subject, part: str, ranks: Sequence[int], world_size: int, seconds: float) -> list[ChildEnd]:
    check_device(subject.device(), subject.plugin)
    address = _free_address()
    arguments = [
        device_arguments(subject, part=part, rank=rank, world_size=world_size, address=address, seconds=seconds)
        for rank in ranks
    ]
    return run_children(_RANK, arguments, seconds=_CHILD_SECONDS)


@dataclass(frozen=True, kw_only=True)
class _CaseResult:
    """What one case came to: by rank what is wrong, and the digests that must be equal."""

    name: str
    problems: tuple[str | None, ...]
    digests: tuple[str | None, ...]


class _Group:
    """One world; its processes run when the first of its checks does."""

    def __init__(self, subject: Subject, size: int) -> None:
        self._subject = subject
        self._size = size
        self._results: dict[str, list[_CaseResult]] | None = None
        self._failure: CheckFailed | None = None

    def check(self, operation: str) -> None:
        """Hold what one operation's cases gave against what they must give."""
        problems = []
        for result in self._of_all()[operation]:
            problems += [f"{result.name}: rank {rank}: {what}" for rank, what in enumerate(result.problems) if what]
            if len({digest for digest in result.digests if digest is not None}) > 1:
                problems.append(f"{result.name}: the ranks have different bits")
        if problems:
            listed = "\n".join(problems[:_SHOWN_PROBLEMS])
            raise CheckFailed(f"{len(problems)} problems of {operation} among {self._size} devices:\n{listed}")

    def _of_all(self) -> dict[str, list[_CaseResult]]:
        if self._failure is not None:
            raise self._failure
        if self._results is None:
            try:
                self._results = self._collect()
            except CheckFailed as failure:
                self._failure = failure
                raise
        return self._results

    def _collect(self) -> dict[str, list[_CaseResult]]:
        ends = _run(self._subject, "cases", range(self._size), self._size, _GROUP_SECONDS)
        lost = [f"rank {rank} {end.ending()}" for rank, end in enumerate(ends) if end.answer is None]
        if lost:
            raise CheckFailed(f"Of a group of {self._size} there is no answer:\n" + "\n".join(lost))
        answers = [end.require("A rank") for end in ends]
        for rank, answer in enumerate(answers):
            place = (answer["rank"], answer["world_size"])
            if place != (rank, self._size):
                raise CheckFailed(f"Rank {rank} of {self._size} says that it is {place[0]} of {place[1]}.")
        results: dict[str, list[_CaseResult]] = {name: [] for name in OPERATIONS}
        for rows in zip(*(answer["results"] for answer in answers), strict=True):
            operation, name = rows[0][:2]
            problems, digests = tuple(row[2] for row in rows), tuple(row[3] for row in rows)
            results[operation].append(_CaseResult(name=name, problems=problems, digests=digests))
        return results


class _Ends:
    """Groups that go wrong."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def rank_dies(self) -> None:
        """The others must hear of it as ``DeviceLost``, and not wait for ever."""
        largest = min(self._subject.capabilities.max_world_size, 3)
        *others, last = _run(self._subject, "leave", range(largest), largest, _GROUP_SECONDS)
        if last.exit_code != LEAVING_CODE:
            last.require("The rank that was to die")
            raise CheckFailed("The rank that was to die did not come that far.")
        for rank, end in enumerate(others):
            found = end.require(f"Rank {rank}, when rank {largest - 1} had died,")
            if found["outcome"] != "lost":
                raise CheckFailed(
                    f"When rank {largest - 1} had died, rank {rank} got {found['outcome']} and not DeviceLost. "
                    f"{found['message']}".rstrip()
                )

    def rank_missing(self) -> None:
        """A group that does not become complete within its time is ``DeviceLost``."""
        (end,) = _run(self._subject, "join", [0], 2, _SHORT_SECONDS)
        found = end.require("A rank whose partner never came")
        if found["outcome"] != "lost":
            raise CheckFailed(f"Joining a group whose other member never came {found['outcome']}, not DeviceLost.")

    def too_large(self) -> None:
        """More devices than are claimed are a ``SettingsError``."""
        size = self._subject.capabilities.max_world_size + 1
        (end,) = _run(self._subject, "join", [0], size, _SHORT_SECONDS)
        found = end.require(f"A rank of a group of {size}")
        if found["outcome"] != "refused":
            raise CheckFailed(
                f"max_world_size is {size - 1}, and joining a group of {size} was {found['outcome']} and not refused "
                "with SettingsError."
            )
