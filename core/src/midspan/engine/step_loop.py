"""The engine itself: takes requests, runs steps, tells what came of them.

Each step is schedule, run, take in. Knows token ids only: no text, no client, no
process border; the offline ``LLM`` and the engine's own process drive the same one.

Invariants: a request that fails takes nobody with it; whatever ends a sequence, its
blocks are given back by the end of the step; a token is reported once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from midspan.engine.batch_building import StepSlice
from midspan.engine.loading import LoadedModel
from midspan.engine.messages import AddRequest, MovedRequest, SequenceEvent, StepEvents, TokenScores
from midspan.engine.migration import arrivals, pack, settle
from midspan.engine.runner import Runner, StepOutcome
from midspan.engine.sequence import Sequence, make_sequence, sequence_id
from midspan.engine.status import EngineStatistics, ModelInfo
from midspan.errors import InvalidRequest, MidspanError
from midspan.scheduling.block_manager import BlockManager
from midspan.scheduling.scheduler import Scheduler
from midspan.scheduling.step_plan import StepPlan
from midspan.settings import EngineSettings

logger = logging.getLogger("midspan.engine")


class EngineCore:
    """A loaded model and its requests.

    Attributes:
        model: what is served.
        scheduler: which decides the steps; for tests and benchmarks to look at.
    """

    def __init__(
        self, loaded: LoadedModel, settings: EngineSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.model: ModelInfo = loaded.info
        self._loaded = loaded
        self._clock = clock
        bounds, graph = loaded.bounds, loaded.graph
        self.scheduler = Scheduler(
            BlockManager(graph.cache, loaded.cache.blocks, bounds.block_size, settings.enable_prefix_caching),
            max_num_seqs=bounds.max_requests,
            max_num_batched_tokens=bounds.max_tokens,
            max_model_len=loaded.info.max_model_len,
            policy=settings.scheduling_policy,
        )
        self._runner = Runner(
            loaded.program,
            loaded.cache,
            groups=graph.cache,
            block_size=bounds.block_size,
            vocab_size=graph.vocab_size,
            max_sampled_rows=bounds.max_sampled_rows,
        )
        self._sequences: dict[str, Sequence] = {}
        self._indexes: dict[str, set[int]] = {}
        self._events: list[SequenceEvent] = []
        self._finished: dict[str, int] = {}
        self._received = self._steps = self._prompt_tokens = self._generation_tokens = 0
        self._step_tokens, self._step_seconds = 0, 0.0
        self._device_seconds: float | None = None

    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._sequences)

    def add(self, request: AddRequest) -> None:
        """Take a request; one that cannot run is answered with events of its failure.

        Raises:
            InvalidRequest: a live request has its id.
        """
        self._received += 1
        if request.request_id in self._indexes:
            raise InvalidRequest(f"A live request has the id {request.request_id!r} already.", parameter="request_id")
        if not request.sequences:
            return
        self._indexes[request.request_id] = set()
        try:
            for start in request.sequences:
                self._add_sequence(
                    make_sequence(
                        request,
                        start,
                        leader=request.sequences[0],
                        vocab_size=self._loaded.graph.vocab_size,
                        max_model_len=self.model.max_model_len,
                    )
                )
        except Exception as error:
            if not isinstance(error, MidspanError):
                logger.exception("request %s could not be set up", request.request_id)
            self._end_all(request.request_id, "error")
            message = str(error) if isinstance(error, MidspanError) else f"{type(error).__name__}: {error}"
            for start in request.sequences:
                self._events.append(_failed(request.request_id, start.index, message))

    def abort(self, request_id: str, index: int | None = None, *, reason: str = "abort") -> None:
        """Stop a request, or one of its sequences; makes no event. Unknown ones are ignored."""
        if index is None:
            self._end_all(request_id, reason)
        else:
            self._end(request_id, index, reason)

    def detach(self, request_id: str) -> MovedRequest:
        """Give a live request away with all its sequences and their cache content; its blocks are free afterwards.

        Returns:
            What ``attach`` of another engine of the same model takes, or of this one.

        Raises:
            InvalidRequest: there is no such live request.
        """
        indexes = sorted(self._indexes.get(request_id, ()))
        if not indexes:
            raise InvalidRequest(f"There is no live request {request_id!r}.", parameter="request_id")
        moved = pack([self._sequences[sequence_id(request_id, index)] for index in indexes], self._loaded)
        for index in indexes:
            name = sequence_id(request_id, index)
            del self._sequences[name]
            self.scheduler.finish(name, "moved")
        del self._indexes[request_id]
        return moved

    def attach(self, moved: MovedRequest) -> int:
        """Go on with a request of another engine, at the token where it was.

        Sequences for which there is no seat or no block wait, and are computed again from their tokens.

        Returns:
            How many tokens' cache content was taken over, over all sequences.

        Raises:
            InvalidRequest: a live request has its id.
            MidspanError: it cannot go on here, see ``migration.arrivals``; this engine is unchanged.
        """
        request_id = moved.request.request_id
        self._received += 1
        if request_id in self._indexes:
            raise InvalidRequest(f"A live request has the id {request_id!r} already.", parameter="request_id")
        arriving = arrivals(moved, self._loaded)
        taken = settle(arriving, moved.pieces, self.scheduler, self._loaded)
        for arrival in arriving:
            self._sequences[arrival.sequence.scheduled.request_id] = arrival.sequence
        self._indexes[request_id] = {arrival.sequence.index for arrival in arriving}
        return taken

    def step(self) -> StepEvents:
        """Run one step.

        Returns:
            What happened in it, and since the last one.

        Raises:
            DeviceLost: nothing on the device can be used any more.
        """
        began = self._clock()
        self._device_seconds = None
        plan = self.scheduler.schedule()
        for request in plan.failed:
            self._fail(self._sequences[request.request_id], request.error or "the scheduler gave it up")
        if len(plan):
            sequences = [self._sequences[request.request_id] for request in plan.requests]
            outcome = self._runner.run(_whole(plan, sequences))
            for place, message in outcome.failures.items():
                self._fail(sequences[place], message)
            lengths = [len(request.token_ids) for request in plan.requests]
            self.scheduler.update(plan, outcome.token_ids)
            self._take_in(plan, sequences, lengths, outcome, began)
            self._steps += 1
            self._device_seconds = outcome.device_seconds
            self._step_tokens = plan.token_count
        self._step_seconds = self._clock() - began
        return StepEvents(sequences=self.take_events(), statistics=self.statistics())

    def take_events(self) -> list[SequenceEvent]:
        """Events that were not yet told."""
        events, self._events = self._events, []
        return events

    def statistics(self) -> EngineStatistics:
        """Counters and gauges now."""
        scheduler = self.scheduler.statistics()
        return EngineStatistics(
            received=self._received,
            running=scheduler.running,
            waiting=scheduler.waiting,
            blocks_in_use=sum(usage.used for usage in scheduler.blocks.values()),
            blocks_total=sum(usage.total for usage in scheduler.blocks.values()),
            cache_usage=scheduler.cache_usage(),
            prefix_queries=scheduler.prefix_query_tokens,
            prefix_hits=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps,
            finished=dict(self._finished),
            step_tokens=self._step_tokens,
            step_seconds=self._step_seconds,
            step_device_seconds=self._device_seconds,
        )

    def close(self) -> None:
        """Release the model and its device."""
        self._loaded.close()

    def _add_sequence(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence.scheduled)
        self._sequences[sequence.scheduled.request_id] = sequence
        self._indexes[sequence.request_id].add(sequence.index)

    def _take_in(
        self,
        plan: StepPlan,
        sequences: list[Sequence],
        lengths: list[int],
        outcome: StepOutcome,
        began: float,
    ) -> None:
        row = 0
        columns = zip(sequences, plan.starts, plan.counts, plan.sampled, lengths, strict=True)
        for place, (sequence, start, count, sampled, length) in enumerate(columns):
            if sequence.scheduled_time is None:
                sequence.scheduled_time = began
            first, row = row, row + sampled
            if not sampled or place in outcome.failures or sequence.scheduled.is_finished():
                continue
            end = start + count
            if sequence.scheduled.score_prompt:
                _keep_prompt_scores(sequence, end - sampled + 1, range(first, row), outcome.scores)
            if end == length:
                self._advance(sequence, outcome.token_ids[row - 1], outcome.scores.get(row - 1))

    def _advance(self, sequence: Sequence, token: int, scores: TokenScores | None) -> None:
        self._generation_tokens += 1
        sequence.state.append(token)
        stop = sequence.rule.check(sequence.scheduled.output_length, token)
        prompt = sequence.report_prompt()
        if prompt is not None and sequence.scheduled.fork_of is None:
            self._prompt_tokens += sequence.scheduled.prompt_length
        self._events.append(
            SequenceEvent(
                request_id=sequence.request_id,
                index=sequence.index,
                token_ids=[token],
                scores=None if scores is None else [scores],
                finish_reason=None if stop is None else stop.finish_reason,
                stop_reason=None if stop is None else stop.stop_reason,
                prompt=prompt,
            )
        )
        if stop is not None:
            self._end(sequence.request_id, sequence.index, stop.finish_reason)

    def _fail(self, sequence: Sequence, message: str) -> None:
        """End the whole request of a sequence that failed."""
        for index in sorted(self._indexes.get(sequence.request_id, ())):
            self._events.append(_failed(sequence.request_id, index, message))
        self._end_all(sequence.request_id, "error")

    def _end_all(self, request_id: str, reason: str) -> None:
        for index in sorted(self._indexes.get(request_id, ())):
            self._end(request_id, index, reason)
        self._indexes.pop(request_id, None)

    def _end(self, request_id: str, index: int, reason: str) -> None:
        name = sequence_id(request_id, index)
        if self._sequences.pop(name, None) is None:
            return
        self.scheduler.finish(name, reason)
        self._finished[reason] = self._finished.get(reason, 0) + 1
        indexes = self._indexes[request_id]
        indexes.discard(index)
        if not indexes:
            del self._indexes[request_id]


def _whole(plan: StepPlan, sequences: Iterable[Sequence]) -> StepSlice:
    rows = []
    row = 0
    for sampled in plan.sampled:
        rows.append(row)
        row += sampled
    return StepSlice(
        requests=plan.requests,
        states=[sequence.state for sequence in sequences],
        starts=plan.starts,
        counts=plan.counts,
        sampled=plan.sampled,
        places=range(len(plan)),
        rows=rows,
    )


def _keep_prompt_scores(sequence: Sequence, position: int, rows: range, scores: dict[int, TokenScores]) -> None:
    for offset, row in enumerate(rows):
        if position + offset < sequence.scheduled.prompt_length and row in scores:
            sequence.prompt_scores[position + offset] = scores[row]


def _failed(request_id: str, index: int, message: str) -> SequenceEvent:
    return SequenceEvent(request_id=request_id, index=index, finish_reason="error", error=message)
