"""Decides which tokens of which requests run in the next step.

One budget of tokens per step, for prompts and for decoding alike. A step goes through
the running requests in the order of their rank; each gets its one token, or as much of
its prompt as leaves one token for everybody behind it. What is left admits waiting
requests. When blocks run out, the running request of the largest rank loses its own and
waits to be recomputed; as it stands behind all others, nothing of the step so far has
to be taken back, and the request of the smallest rank always gets on, so all finish.

It knows no tensor, no device, no clock and no sampling parameters: the caller says
which tokens came out, and which requests ended.

Life of a step: ``schedule`` -> the caller runs the plan -> ``update`` -> ``finish`` for
those that ended. A plan that was never updated is forgotten by the next ``schedule``,
which plans the same tokens again. ``adopt`` may come between steps, ``add``, ``abort``, ``fail`` and ``finish`` at
any moment; blocks of a request that ends while a plan is under way are given back only
when that plan is over, so nothing else can be written into them meanwhile.

Invariants (``check_integrity``): the running requests are sorted by rank, and only
they own blocks, besides those that ended during the plan under way.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from itertools import islice
from operator import attrgetter

from midspan.errors import InvalidRequest, MidspanError, SettingsError
from midspan.scheduling.admission_room import AdmissionRoom
from midspan.scheduling.admission_rules import queue_faults, refuse_foreign_fork, refuse_impossible
from midspan.scheduling.block_manager import BlockManager, PrefixHit
from midspan.scheduling.policies import POLICIES
from midspan.scheduling.request import Request, RequestStatus
from midspan.scheduling.statistics import SchedulerStatistics
from midspan.scheduling.step_plan import StepDraft, StepPlan
from midspan.scheduling.waiting_queue import WaitingQueue

_RANK = attrgetter("rank")


class Scheduler:
    """Continuous batching over one block manager.

    Attributes:
        block_manager: owns the blocks.
        max_model_len: tokens of one request at most.
        policy: ``fcfs`` or ``priority``.
        long_prefill_token_threshold: tokens of one prompt that one step runs at most; None: the budget.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: str = "fcfs",
        long_prefill_token_threshold: int | None = None,
        watermark: float = 0.01,
    ) -> None:
        """Start with no request.

        Args:
            block_manager: not shared with another scheduler.
            max_num_seqs: requests in one step.
            max_num_batched_tokens: tokens in one step.
            max_model_len: see the attribute.
            policy: see the attribute.
            long_prefill_token_threshold: see the attribute.
            watermark: share of the blocks that an admission leaves free for those who run already.

        Raises:
            SettingsError: a number is out of its range, or the policy is not known.
        """
        if policy not in POLICIES:
            raise SettingsError(
                f"Scheduling policy {policy!r} is not known.", remedy=f"Take one of {', '.join(POLICIES)}."
            )
        if max_model_len < 1 or (long_prefill_token_threshold is not None and long_prefill_token_threshold < 1):
            raise SettingsError("max_model_len and long_prefill_token_threshold must be at least 1.")
        self.block_manager = block_manager
        self.max_model_len = max_model_len
        self.policy = policy
        self.long_prefill_token_threshold = long_prefill_token_threshold
        self.set_max_num_seqs(max_num_seqs)
        self.set_token_budget(max_num_batched_tokens)
        self._policy = POLICIES[policy]
        self._room = AdmissionRoom(block_manager, watermark)
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []
        self._waiting = WaitingQueue()
        self._plan: StepPlan | None = None
        self._ended_in_step: list[Request] = []
        self._ended_running = 0
        self._sequence = 0
        self._preemptions = 0
        self._prefix_query_tokens = 0
        self._prefix_hit_tokens = 0

    @property
    def max_num_seqs(self) -> int:
        """Requests in one step."""
        return self._max_num_seqs

    @property
    def token_budget(self) -> int:
        """Tokens in one step."""
        return self._token_budget

    def set_max_num_seqs(self, count: int) -> None:
        """Change the number of requests in one step; who runs already runs on. SettingsError: it is below 1."""
        if count < 1:
            raise SettingsError(f"max_num_seqs must be at least 1, not {count}.")
        self._max_num_seqs = count

    def set_token_budget(self, tokens: int) -> None:
        """Change the number of tokens in one step. SettingsError: it is below 1."""
        if tokens < 1:
            raise SettingsError(f"max_num_batched_tokens must be at least 1, not {tokens}.")
        self._token_budget = tokens

    def add(self, request: Request) -> None:
        """Take a request into the queue.

        A request with ``fork_of`` waits until that one's prompt is computed, then shares its
        blocks; if that one is not there any more, it goes its own way.

        Raises:
            InvalidRequest: the id is taken, the request was used before, or it is a fork of another prompt.
            ContextLengthExceeded: it may become longer than the model allows.
            CacheTooSmall: it could not run even alone.
        """
        self._line_up(request, self._register(request))

    def adopt(self, request: Request, tokens: int, *, base: Request | None = None, shared_tokens: int = 0) -> bool:
        """Take a request that was computed elsewhere; the caller fills its blocks before the next step.

        Args:
            request: as for ``add``.
            tokens: how many of its tokens count as computed.
            base: see ``BlockManager.restore``.
            shared_tokens: see ``BlockManager.restore``.

        Returns:
            False when a seat or blocks are missing: it waits and will be computed from its tokens.

        Raises:
            MidspanError: as ``add``.
        """
        leader = self._register(request)
        seated = len(self._running) - self._ended_running < self._max_num_seqs
        if not seated or not self.block_manager.restore(request, tokens, base=base, shared_tokens=shared_tokens):
            self._line_up(request, leader)
            return False
        request.move_to(RequestStatus.RUNNING)
        insort(self._running, request, key=_RANK)
        self._pass_milestone(request)
        return True

    def abort(self, request_id: str) -> bool:
        """End a request at any moment; tokens of a step under way are dropped. False: no such request."""
        return self._end(request_id, "abort")

    def fail(self, request_id: str, error: str | None = None) -> bool:
        """End a request that went wrong; the plan under way can be updated for the others. False: no such request."""
        return self._end(request_id, "error", error)

    def finish(self, request_id: str, reason: str) -> bool:
        """End a request that is done; ``reason`` is kept as its ``finish_reason``. False: no such request."""
        return self._end(request_id, reason)

    def get(self, request_id: str) -> Request | None:
        """The live request of that id."""
        return self._requests.get(request_id)

    def has_requests(self) -> bool:
        """Whether any request lives."""
        return bool(self._requests)

    def schedule(self) -> StepPlan:
        """Plan the next step; empty when there is nothing to run."""
        self._leave_plan()
        self._sweep_running()
        draft = StepDraft(self._token_budget)
        position = 0
        admitting = True
        while True:
            head = self._next_waiting(draft) if admitting else None
            running = self._running
            stop = len(running) if head is None else self._policy.first_displaced(running, head)
            stalled = self._plan_running(draft, position, stop)
            if head is None or stalled or draft.budget == 0:
                break
            position = min(stop, len(running))
            admitting = self._next_waiting(draft) is head and self._admit(head, draft)
            position += admitting
        self._plan = draft.plan()
        return self._plan

    def update(self, plan: StepPlan, token_ids: Sequence[int]) -> None:
        """Take in what a step did: its tokens are in the cache, and here is what was sampled.

        Args:
            plan: the one that ``schedule`` returned last.
            token_ids: one int for each sampled row, in the plan's order. Those of requests that
                ended meanwhile, and of rows that only score a prompt, are dropped.

        Raises:
            MidspanError: the plan is over, or the number of tokens is wrong.
        """
        if plan is not self._plan:
            raise MidspanError("This step was already updated, or another one was scheduled after it.")
        if len(token_ids) != plan.row_count:
            raise MidspanError(f"The step samples {plan.row_count} rows, but {len(token_ids)} tokens came.")
        row = -1
        alive = RequestStatus.RUNNING
        for request, start, count, sampled in zip(plan.requests, plan.starts, plan.counts, plan.sampled, strict=True):
            row += sampled
            if request.status is not alive:
                continue
            end = start + count
            request.computed_tokens = end
            if end >= request.milestone:
                self._pass_milestone(request)
            if sampled and end == len(request.token_ids):
                request.token_ids.append(token_ids[row])
        self._leave_plan()

    def statistics(self) -> SchedulerStatistics:
        """Counts of this moment."""
        running = len(self._running) - self._ended_running
        return SchedulerStatistics(
            running=running,
            waiting=len(self._requests) - running,
            preemptions=self._preemptions,
            prefix_query_tokens=self._prefix_query_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            blocks=self.block_manager.usage(),
        )

    def check_integrity(self) -> None:
        """Verify every invariant of the queues and of the blocks; for tests, slow.

        Raises:
            MidspanError: names what is broken.
        """
        alive = [request for request in self._running if request.status is RequestStatus.RUNNING]
        wrong = queue_faults(self._requests.values(), alive, list(self._waiting))
        ranks = [request.rank for request in self._running]
        if ranks != sorted(ranks) or len(self._running) - len(alive) != self._ended_running:
            wrong.append("the running requests are out of order")
        if self._ended_in_step and self._plan is None:
            wrong.append("ended requests keep their blocks without a step")
        if wrong:
            raise MidspanError("The scheduler's queues are broken: " + "; ".join(wrong))
        self.block_manager.check_integrity([*alive, *self._ended_in_step])

    def _register(self, request: Request) -> Request | None:
        """Give a new request its place in the order; its leader, if that one is alive."""
        leader = self._requests.get(request.fork_of) if request.fork_of is not None else None
        if request.request_id in self._requests:
            raise InvalidRequest(
                f"A request {request.request_id!r} is alive already.", remedy="Give each request an id of its own."
            )
        refuse_impossible(request, self.max_model_len, self.block_manager.longest_request())
        if leader is not None:
            refuse_foreign_fork(request, leader)
        request.sequence = self._sequence
        self._sequence += 1
        request.rank = self._policy.rank(request)
        self._requests[request.request_id] = request
        return leader

    def _line_up(self, request: Request, leader: Request | None) -> None:
        """Let a registered request wait, for its turn or for its leader."""
        request.leader = leader
        if leader is not None and leader.computed_tokens < leader.prompt_length:
            self._waiting.hold(request, leader.request_id)
            self._pass_milestone(leader)
        else:
            self._waiting.push(request)

    def _plan_running(self, draft: StepDraft, first: int, stop: int) -> bool:
        """Plan ``running[first:stop]``; True when blocks ran out even so."""
        add_request, add_start = draft.requests.append, draft.starts.append
        left = draft.budget
        for request in islice(self._running, first, stop):
            if not left:
                break
            start = request.computed_tokens
            if start < request.capacity and len(request.token_ids) - start == 1:
                add_request(request)
                add_start(start)
                left -= 1
                continue
            draft.settle()
            if not self._plan_one(request, draft):
                return True
            left = draft.budget
        draft.settle()
        return False

    def _plan_one(self, request: Request, draft: StepDraft) -> bool:
        """Plan as many tokens of a running request as budget and blocks allow, at the cost of those behind it.

        All before it in ``_running`` are planned and none behind it, so the number of planned
        requests tells its place. False: it stands last and there is no block for it; it keeps
        what it has and waits for those before it to end.
        """
        running = self._running
        start = request.computed_tokens
        behind = len(running) - len(draft.requests) - 1
        count = min(len(request.token_ids) - start, max(1, draft.budget - behind))
        if self.long_prefill_token_threshold is not None:
            count = min(count, self.long_prefill_token_threshold)
        room = self.block_manager.grow(request, start + count) - start
        while room <= 0:
            if running[-1] is request:
                if len(running) == 1:
                    self._end(request.request_id, "error", "The KV cache cannot hold this request any more.")
                    draft.failed.append(request)
                return False
            self._preempt_last(draft)
            room = self.block_manager.grow(request, start + count) - start
        draft.add(request, min(count, room))
        return True

    def _preempt_last(self, draft: StepDraft) -> None:
        """Take its blocks from the running request of the largest rank."""
        victim = self._running.pop()
        self.block_manager.release(victim)
        victim.move_to(RequestStatus.PREEMPTED)
        victim.preemptions += 1
        self._preemptions += 1
        self._waiting.push(victim)
        draft.preempted.append(victim)

    def _next_waiting(self, draft: StepDraft) -> Request | None:
        """The request to be admitted next, unless it lost its blocks in this very step."""
        head = self._waiting.first()
        return None if head is None or head in draft.preempted else head

    def _admit(self, head: Request, draft: StepDraft) -> bool:
        """Let the first waiting request run, at the cost of those that its policy displaces. False: no room."""
        while len(self._running) >= self._max_num_seqs:
            if not self._displace(head, draft):
                return False
        hit = self._make_room(head, draft)
        if hit is None:
            return False
        self._waiting.pop()
        self.block_manager.claim(head, hit)
        head.move_to(RequestStatus.RUNNING)
        head.leader = None
        if head.cached_tokens is None:
            head.cached_tokens = hit.tokens
            if not head.score_prompt:
                self._prefix_query_tokens += len(head.token_ids)
                self._prefix_hit_tokens += hit.tokens
        insort(self._running, head, key=_RANK)
        draft.admitted.append(head)
        self._pass_milestone(head)
        return self._plan_one(head, draft)

    def _make_room(self, head: Request, draft: StepDraft) -> PrefixHit | None:
        """Find the cached beginning of a request, where blocks for the rest of what is known are free."""
        if self._running and self._room.is_refused_still(head):
            return None
        hit = self._room.find(head, alone=not self._running)
        while hit is None and self._displace(head, draft):
            hit = self._room.find(head, alone=not self._running)
        return hit

    def _displaces(self, head: Request) -> bool:
        """Whether some running request gives way to ``head``."""
        return self._policy.first_displaced(self._running, head) < len(self._running)

    def _displace(self, head: Request, draft: StepDraft) -> bool:
        """Preempt the last running request if it gives way to ``head``."""
        displaces = self._displaces(head)
        if displaces:
            self._preempt_last(draft)
        return displaces

    def _pass_milestone(self, request: Request) -> None:
        """Do what the count of computed tokens calls for, and set the next count that calls for something."""
        milestone = self.block_manager.commit(request)
        if request.unscored():
            request.scored_tokens = max(request.scored_tokens, min(request.computed_tokens, request.prompt_length))
            milestone = min(milestone, request.computed_tokens + 1)
        if self._waiting.has_held(request.request_id):
            if request.computed_tokens >= request.prompt_length:
                self._waiting.release_held(request.request_id)
            else:
                milestone = min(milestone, request.prompt_length)
        request.milestone = milestone

    def _end(self, request_id: str, reason: str, error: str | None = None) -> bool:
        """Finish a request, wherever it is."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        was_running = request.status is RequestStatus.RUNNING
        request.move_to(RequestStatus.FINISHED)
        request.finish_reason = reason
        request.error = error
        request.leader = None
        self._waiting.release_held(request_id)
        if not was_running:
            self._waiting.note_ended()
            return True
        self._ended_running += 1
        if self._plan is None:
            self.block_manager.release(request)
        else:
            self._ended_in_step.append(request)
        return True

    def _leave_plan(self) -> None:
        """The step is over: nothing writes into blocks of requests that ended during it."""
        self._plan = None
        for request in self._ended_in_step:
            self.block_manager.release(request)
        self._ended_in_step.clear()

    def _sweep_running(self) -> None:
        """Take the ended requests out of the running ones."""
        if self._ended_running:
            self._running = [request for request in self._running if request.status is RequestStatus.RUNNING]
            self._ended_running = 0
