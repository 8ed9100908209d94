"""A request as the scheduler sees it: token ids, how many are computed, in which blocks.

It knows nothing of sampling parameters, text, clients or devices.

Invariants: ``token_ids`` is the prompt followed by the output, and only grows;
``computed_tokens`` of them have their keys and values in the cache, fewer than are
known; every table has the same number of entries, ``capacity`` tokens' worth; a
request that is not running owns no block (unless it was ended while a step of it
was under way: then until that step is over).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType

from midspan.errors import InvalidRequest, MidspanError

NEVER = sys.maxsize
"""A count of tokens that no request reaches."""


class RequestStatus(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


TRANSITIONS: Mapping[RequestStatus, frozenset[RequestStatus]] = MappingProxyType(
    {
        RequestStatus.WAITING: frozenset({RequestStatus.RUNNING, RequestStatus.FINISHED}),
        RequestStatus.RUNNING: frozenset({RequestStatus.PREEMPTED, RequestStatus.FINISHED}),
        RequestStatus.PREEMPTED: frozenset({RequestStatus.RUNNING, RequestStatus.FINISHED}),
        RequestStatus.FINISHED: frozenset(),
    }
)
"""Which status may follow which."""


class BlockTable:
    """The blocks of one request in one cache group.

    Attributes:
        blocks: int32; entry i holds positions ``i * block_size`` and on. It offers the
            buffer protocol, so ``numpy.frombuffer(table.blocks, numpy.int32)`` copies
            nothing, and ``b"".join`` takes many at once. Do not keep such a view: while
            it lives the table cannot grow.
        dropped: entries at the front that fell out of the window; they are the padding block.
    """

    __slots__ = ("blocks", "dropped")

    def __init__(self) -> None:
        self.blocks: array[int] = array("i")
        self.dropped = 0


class Request:
    """One sequence to be continued.

    Attributes:
        request_id: unique among the live requests of a scheduler.
        token_ids: prompt and output, in order. The scheduler appends to it.
        prompt_length: how many of them are the prompt.
        priority: smaller goes first, under the priority policy.
        arrival: smaller goes first; equal ones go in the order of ``Scheduler.add``.
        salt: requests share cached prefixes only with requests of the same salt.
        max_total_tokens: prompt and output together never exceed this.
        score_prompt: the logprob of each prompt token is wanted, so each prompt row is sampled.
        fork_of: id of the request of the same prompt whose blocks this one shares; None for none.
        status: changed by ``move_to`` alone.
        computed_tokens: tokens, from the first on, whose keys and values are in the cache.
        scored_tokens: rows of the prompt that have been sampled, where ``score_prompt``.
        tables: one per cache group, in the order of the block manager's groups.
        capacity: tokens that the tables' entries can hold.
        cached_tokens: tokens found in the prefix cache (or in the leader's blocks) at the first
            admission; None before it.
        preemptions: how many times it lost its blocks.
        finish_reason: what it was finished with; None while it lives.
        error: what went wrong, where the scheduler itself ended it; otherwise None.
        sequence: place in the order of ``Scheduler.add``.
        rank: the policy's sort key; the smallest goes first.
        leader: the live request that ``fork_of`` names, until this one is first admitted.
        block_hashes: prefix-cache keys of its full blocks, as far as they were needed.
        committed_blocks: full blocks that were offered to the prefix cache.
        milestone: count of computed tokens from which a commit is more than counting.
        private: its blocks hold, or depend on, what another engine computed, so they are not offered to
            the prefix cache; until it loses them.
    """

    __slots__ = (
        "arrival",
        "block_hashes",
        "cached_tokens",
        "capacity",
        "committed_blocks",
        "computed_tokens",
        "error",
        "finish_reason",
        "fork_of",
        "leader",
        "max_total_tokens",
        "milestone",
        "preemptions",
        "priority",
        "private",
        "prompt_length",
        "rank",
        "request_id",
        "salt",
        "score_prompt",
        "scored_tokens",
        "sequence",
        "status",
        "tables",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        *,
        max_total_tokens: int,
        output_ids: Sequence[int] = (),
        priority: int = 0,
        arrival: float = 0,
        salt: str | None = None,
        score_prompt: bool = False,
        fork_of: str | None = None,
    ) -> None:
        """Describe a request; ``output_ids`` are tokens that an earlier run already produced.

        Raises:
            InvalidRequest: the prompt is empty, or nothing is left to generate.
        """
        if not prompt_ids:
            raise InvalidRequest(f"Request {request_id!r} has an empty prompt.", parameter="prompt")
        self.token_ids = [*prompt_ids, *output_ids]
        if len(self.token_ids) >= max_total_tokens:
            raise InvalidRequest(
                f"Request {request_id!r} has {len(self.token_ids)} of {max_total_tokens} tokens, so nothing to do.",
                remedy="Allow at least one more token.",
                parameter="max_tokens",
            )
        self.request_id = request_id
        self.prompt_length = len(prompt_ids)
        self.max_total_tokens = max_total_tokens
        self.priority = priority
        self.arrival = arrival
        self.salt = salt
        self.score_prompt = score_prompt
        self.fork_of = fork_of
        self.status = RequestStatus.WAITING
        self.computed_tokens = self.scored_tokens = 0
        self.tables: tuple[BlockTable, ...] = ()
        self.capacity = 0
        self.cached_tokens: int | None = None
        self.preemptions = 0
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.sequence = 0
        self.rank: tuple[float, ...] = ()
        self.leader: Request | None = None
        self.block_hashes: list[bytes] = []
        self.committed_blocks = 0
        self.milestone = NEVER
        self.private = False

    @property
    def prompt_ids(self) -> list[int]:
        """A copy of the prompt."""
        return self.token_ids[: self.prompt_length]

    @property
    def output_ids(self) -> list[int]:
        """A copy of the output so far."""
        return self.token_ids[self.prompt_length :]

    @property
    def output_length(self) -> int:
        """How many tokens the output has."""
        return len(self.token_ids) - self.prompt_length

    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.status is RequestStatus.FINISHED

    def unscored(self) -> bool:
        """Whether rows of the prompt are still to be sampled for their logprobs."""
        return self.score_prompt and self.scored_tokens < self.prompt_length

    def move_to(self, status: RequestStatus) -> None:
        """Change the status.

        Raises:
            MidspanError: the transition is not one of ``TRANSITIONS``.
        """
        if status not in TRANSITIONS[self.status]:
            raise MidspanError(f"Request {self.request_id!r} cannot go from {self.status.value} to {status.value}.")
        self.status = status

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, tokens={self.prompt_length}+{self.output_length}, "
            f"computed={self.computed_tokens})"
        )
