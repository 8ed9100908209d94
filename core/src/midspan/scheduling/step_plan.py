"""What one step runs: which tokens of which requests, and which of their rows are sampled.

Knows nothing of blocks' contents, devices or sampling. Kept as columns, because a
step may hold ten thousand requests: a record for each would cost more than the
scheduling of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

from midspan.scheduling.request import Request


@dataclass(slots=True, eq=False)
class Chunk:
    """One request's part of a step: tokens ``start`` to ``start + count - 1``.

    Not frozen, because making a frozen record takes three times as long.

    Attributes:
        request: whose tokens they are.
        start: position of the first one; all before it are in the cache.
        count: how many.
        sampled: how many of the last rows are to be sampled. 1 where the chunk reaches the last
            known token (its row gives the next token), 0 where it does not, more where the
            prompt is scored: row of position p then has token ``p + 1`` as its target, if known.
    """

    request: Request
    start: int
    count: int
    sampled: int

    def sample_rows(self) -> range:
        """Rows to sample, counted from the chunk's first token."""
        return range(self.count - self.sampled, self.count)

    def token_ids(self) -> list[int]:
        """The tokens to run."""
        return self.request.token_ids[self.start : self.start + self.count]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """One step. The first four columns have an entry for each request in it, in the same order.

    Attributes:
        requests: whose tokens; each request appears once at most.
        starts: position of its first token in the step.
        counts: how many of its tokens, at least 1.
        sampled: how many of its last rows are sampled, see ``Chunk``.
        admitted: those of ``requests`` that were waiting before.
        preempted: requests that lost their blocks to others; they wait again.
        failed: requests that the scheduler had to end, with ``Request.error`` saying why.
        token_count: sum of ``counts``.
        row_count: sum of ``sampled``.
    """

    requests: list[Request]
    starts: list[int]
    counts: list[int]
    sampled: list[int]
    admitted: tuple[Request, ...] = ()
    preempted: tuple[Request, ...] = ()
    failed: tuple[Request, ...] = ()
    token_count: int = 0
    row_count: int = 0

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Chunk]:
        return map(Chunk, self.requests, self.starts, self.counts, self.sampled)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The columns as records, made anew at each call; for ten thousand requests read the columns."""
        return tuple(self)


class StepDraft:
    """A plan while it is being made.

    Attributes:
        budget: tokens that the step can still take. The others are the plan's columns.
    """

    __slots__ = ("admitted", "budget", "counts", "failed", "preempted", "requests", "sampled", "starts")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.requests: list[Request] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.sampled: list[int] = []
        self.admitted: list[Request] = []
        self.preempted: list[Request] = []
        self.failed: list[Request] = []

    def add(self, request: Request, count: int) -> None:
        """Take the next ``count`` tokens of a request into the step."""
        start = request.computed_tokens
        end = start + count
        sampled = 1 if end == len(request.token_ids) else 0
        if request.unscored():
            sampled = max(sampled, end - max(start, request.scored_tokens))
        self.requests.append(request)
        self.starts.append(start)
        self.counts.append(count)
        self.sampled.append(sampled)
        self.budget -= count

    def settle(self) -> None:
        """Fill in the columns of requests that were appended without them: one token each, sampled."""
        missing = len(self.requests) - len(self.counts)
        self.counts.extend(repeat(1, missing))
        self.sampled.extend(repeat(1, missing))
        self.budget -= missing

    def plan(self) -> StepPlan:
        """The finished plan."""
        return StepPlan(
            requests=self.requests,
            starts=self.starts,
            counts=self.counts,
            sampled=self.sampled,
            admitted=tuple(self.admitted),
            preempted=tuple(self.preempted),
            failed=tuple(self.failed),
            token_count=sum(self.counts),
            row_count=sum(self.sampled),
        )
