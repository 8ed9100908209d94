"""A scheduler with a pretended cache behind it.

The pretended cache remembers, for each slot of each group, which token after which
other tokens was written there. Each step writes as a device would and then checks that
everything that its tokens see is what it should be, so no mistake of sharing,
preemption, window or fork goes unseen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

from midspan.scheduling.block_manager import BlockManager
from midspan.scheduling.request import Request
from midspan.scheduling.scheduler import Scheduler
from midspan.scheduling.step_plan import Chunk, StepPlan

VOCABULARY = 3


@dataclass(frozen=True, kw_only=True)
class Group:
    """What the block manager asks of a cache group."""

    name: str
    window: int | None


def continuation(seed: int, tokens: Sequence[int]) -> int:
    """What the pretended model says after these tokens."""
    return zlib.crc32(bytes([seed, *tokens])) % VOCABULARY


@dataclass
class Expectation:
    """What a test knows of a request, independently of the scheduler."""

    request: Request
    seed: int
    max_new_tokens: int
    initial: list[int]
    scored: list[int] = field(default_factory=list)

    def final_tokens(self) -> list[int]:
        """The tokens that it must end with, in whatever company it ran."""
        tokens = list(self.initial)
        for _ in range(self.max_new_tokens):
            tokens.append(continuation(self.seed, tokens))
        return tokens


class Driver:
    """Runs a scheduler as an engine does, one step in flight."""

    def __init__(
        self,
        *,
        windows: Sequence[int | None] = (None,),
        blocks: Sequence[int] | int = 64,
        block_size: int = 4,
        caching: bool = True,
        seqs: int = 8,
        budget: int = 32,
        max_model_len: int = 512,
        **options: Any,
    ) -> None:
        groups = [Group(name=f"group.{number}", window=window) for number, window in enumerate(windows)]
        self.windows = tuple(windows)
        self.block_size = block_size
        self.manager = BlockManager(groups, blocks, block_size, caching)
        self.scheduler = Scheduler(
            self.manager, max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=max_model_len, **options
        )
        self.expected: dict[str, Expectation] = {}
        self.plan: StepPlan | None = None
        self._cache: dict[tuple[int, int], int] = {}
        self._writes: list[tuple[int, int, int]] = []
        self._names = count()

    def request(
        self, prompt: Sequence[int], new: int = 4, *, outputs: int = 0, seed: int = 0, **options: Any
    ) -> Request:
        """A request that will be told to stop after ``new`` tokens; it brings ``outputs`` more from earlier."""
        tokens = list(prompt)
        for _ in range(outputs):
            tokens.append(continuation(seed, tokens))
        name = f"r{next(self._names)}"
        request = Request(name, prompt, output_ids=tokens[len(prompt) :], max_total_tokens=len(tokens) + new, **options)
        self.expected[name] = Expectation(request, seed, new, tokens)
        return request

    def add(self, prompt: Sequence[int], new: int = 4, **options: Any) -> Request:
        """Make a request and add it."""
        request = self.request(prompt, new, **options)
        self.scheduler.add(request)
        return request

    def launch(self) -> StepPlan:
        """Schedule a step and note what it will write, as a device would be given it."""
        self.plan = self.scheduler.schedule()
        self.check()
        assert self.plan.token_count == sum(self.plan.counts) <= self.scheduler.token_budget
        planned = {id(request) for request in self.plan.requests}
        assert len(planned) == len(self.plan.requests)
        assert not self.plan.admitted or len(planned) <= self.scheduler.max_num_seqs
        assert all(id(request) in planned for request in self.plan.admitted)
        assert all(id(request) not in planned for request in self.plan.preempted)
        self._writes = []
        for chunk in self.plan:
            contents = self.contents(chunk.request)
            for group in range(len(self.windows)):
                for position in range(chunk.start, chunk.start + chunk.count):
                    self._writes.append((group, self.slot(chunk.request, group, position), contents[position]))
        slots = [(group, slot) for group, slot, _content in self._writes]
        assert len(set(slots)) == len(slots), "two tokens of a step are written to one slot"
        return self.plan

    def complete(self) -> None:
        """Run the step that was launched, check what its tokens see, and tell the scheduler and finish who is done."""
        plan = self.plan
        assert plan is not None
        for group, slot, content in self._writes:
            self._cache[group, slot] = content
        tokens: list[int] = []
        rows: list[tuple[Request, int]] = []
        for chunk in plan:
            if not chunk.request.is_finished():
                self.check_reads(chunk)
            for row in chunk.sample_rows():
                known = chunk.request.token_ids[: chunk.start + row + 1]
                seed = self.expected[chunk.request.request_id].seed
                tokens.append(continuation(seed, known))
                rows.append((chunk.request, chunk.start + row))
        self.plan = None
        self.scheduler.update(plan, tokens)
        self.check()
        for request, position in rows:
            if not request.is_finished():
                self.expected[request.request_id].scored.append(position)
        for request in plan.requests:
            done = len(request.token_ids) >= request.max_total_tokens
            if done and self.scheduler.finish(request.request_id, "length"):
                self.check()

    def step(self) -> StepPlan:
        """Launch and complete."""
        plan = self.launch()
        self.complete()
        return plan

    def drain(self) -> int:
        """Step until nobody is left; returns the number of steps, which must not exceed what could be needed."""
        live = [expected.request for expected in self.expected.values() if not expected.request.is_finished()]
        limit = 10 + sum(request.max_total_tokens for request in live) * (len(live) + 1)
        steps = 0
        while self.scheduler.has_requests():
            self.step()
            steps += 1
            assert steps <= limit, "the scheduler does not get on"
        assert all(usage.used == 0 for usage in self.manager.usage().values())
        return steps

    def check(self) -> None:
        """All invariants, and the bound of window groups."""
        self.scheduler.check_integrity()

    def check_outputs(self) -> None:
        """Each request that ran to its end has the tokens that it would have alone, and each prompt row scored once."""
        for expected in self.expected.values():
            request = expected.request
            if request.finish_reason == "length":
                assert request.token_ids == expected.final_tokens()
                if request.score_prompt:
                    rows = [row for row in expected.scored if row < request.prompt_length]
                    assert rows == list(range(request.prompt_length))

    def contents(self, request: Request) -> list[int]:
        """What each of a request's tokens leaves in the cache: a number made of all tokens up to it."""
        content = zlib.crc32(repr(request.salt).encode())
        contents = []
        for token in request.token_ids:
            content = hash((content, token))
            contents.append(content)
        return contents

    def slot(self, request: Request, group: int, position: int) -> int:
        """Where a token is kept."""
        block = request.tables[group].blocks[position // self.block_size]
        assert block != 0, "a token that is needed has no block"
        return block * self.block_size + position % self.block_size

    def check_reads(self, chunk: Chunk) -> None:
        """All that a chunk's tokens see is there."""
        contents = self.contents(chunk.request)
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, chunk.start - window + 1)
            for position in range(first, chunk.start + chunk.count):
                assert self._cache.get((group, self.slot(chunk.request, group, position))) == contents[position]

    def used(self) -> tuple[int, ...]:
        """Blocks in use by group."""
        return tuple(usage.used for usage in self.manager.usage().values())


@pytest.fixture
def make_driver() -> Callable[..., Driver]:
    """Makes a scheduler with a pretended cache."""
    return Driver
