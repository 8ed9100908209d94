"""From the scheduler's choice to the arrays of a batch.

Arithmetic over columns: the work in Python is a constant for each request, never
for each token. Knows no device and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midspan.decoding.sampling_state import SamplingRow, SamplingState, build_sampling_batch
from midspan.interface.batch import Batch, Int32Array
from midspan.interface.cache import PADDING_BLOCK, CacheGroup
from midspan.scheduling.request import Request


@dataclass(frozen=True, kw_only=True, eq=False)
class StepSlice:
    """Requests that one run of the program takes, as columns; all or a part of a step.

    Attributes:
        requests: each once at most.
        states: their sampling states.
        starts: position of the first token.
        counts: how many tokens, at least 1.
        sampled: how many of the last rows are sampled.
        places: where each request stands in the whole step.
        rows: for each request, which of the whole step's sampled rows is its first here.
    """

    requests: Sequence[Request]
    states: Sequence[SamplingState]
    starts: Sequence[int]
    counts: Sequence[int]
    sampled: Sequence[int]
    places: Sequence[int]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.requests)

    def part(self, begin: int, end: int) -> StepSlice:
        """Some of the requests."""
        return StepSlice(
            requests=self.requests[begin:end],
            states=self.states[begin:end],
            starts=self.starts[begin:end],
            counts=self.counts[begin:end],
            sampled=self.sampled[begin:end],
            places=self.places[begin:end],
            rows=self.rows[begin:end],
        )

    def choose(self, indexes: Sequence[int]) -> StepSlice:
        """The requests at some indexes."""
        return StepSlice(
            requests=[self.requests[index] for index in indexes],
            states=[self.states[index] for index in indexes],
            starts=[self.starts[index] for index in indexes],
            counts=[self.counts[index] for index in indexes],
            sampled=[self.sampled[index] for index in indexes],
            places=[self.places[index] for index in indexes],
            rows=[self.rows[index] for index in indexes],
        )

    def cut_tokens(self, index: int, count: int) -> tuple[StepSlice, StepSlice]:
        """One request alone, its tokens in two parts: the first ``count``, and the rest."""
        late = min(self.sampled[index], self.counts[index] - count)
        early = self.sampled[index] - late
        alone = self.part(index, index + 1)
        first = StepSlice(
            requests=alone.requests,
            states=alone.states,
            starts=alone.starts,
            counts=[count],
            sampled=[early],
            places=alone.places,
            rows=alone.rows,
        )
        second = StepSlice(
            requests=alone.requests,
            states=alone.states,
            starts=[self.starts[index] + count],
            counts=[self.counts[index] - count],
            sampled=[late],
            places=alone.places,
            rows=[self.rows[index] + early],
        )
        return first, second

    def joined(self, other: StepSlice) -> StepSlice:
        """These requests and then others."""
        return StepSlice(
            requests=[*self.requests, *other.requests],
            states=[*self.states, *other.states],
            starts=[*self.starts, *other.starts],
            counts=[*self.counts, *other.counts],
            sampled=[*self.sampled, *other.sampled],
            places=[*self.places, *other.places],
            rows=[*self.rows, *other.rows],
        )


def limit_rows(step: StepSlice, limit: int) -> list[StepSlice]:
    """Cut a step into runs that sample no more rows than a limit each.

    A request whose prompt is scored may sample many rows; its tokens are then
    divided over consecutive runs.
    """
    if sum(step.sampled) <= limit:
        return [step]
    runs: list[StepSlice] = []
    rest = step
    while len(rest):
        room, index = limit, 0
        while index < len(rest) and rest.sampled[index] <= room:
            room -= rest.sampled[index]
            index += 1
        run, rest = rest.part(0, index), rest.part(index, len(rest))
        if len(rest) and room:
            first, second = rest.cut_tokens(0, rest.counts[0] - rest.sampled[0] + room)
            run, rest = run.joined(first), second.joined(rest.part(1, len(rest)))
        runs.append(run)
    return runs


def build_batch(step: StepSlice, groups: tuple[CacheGroup, ...], block_size: int, vocab_size: int) -> Batch:
    """The arrays of one run.

    Args:
        step: what to run; blocks for all of its tokens are in the requests' tables.
        groups: the cache groups, in the order of the tables.
        block_size: tokens per block.
        vocab_size: number of logits.
    """
    counts = np.array(step.counts, np.int32)
    starts = np.array(step.starts, np.int32)
    query_starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=query_starts[1:])
    positions = np.arange(query_starts[-1], dtype=np.int32) - np.repeat(query_starts[:-1] - starts, counts)
    owners = np.repeat(np.arange(len(counts)), counts)
    tables: dict[str, Int32Array] = {}
    slots: dict[str, Int32Array] = {}
    lengths = np.array([request.capacity for request in step.requests], np.int64) // block_size
    for number, group in enumerate(groups):
        table = _block_table(step.requests, number, lengths)
        blocks = table[owners, positions // block_size]
        tables[group.name] = table
        slots[group.name] = blocks * np.int32(block_size) + positions % block_size
    return Batch(
        token_ids=_token_ids(step),
        positions=positions,
        query_starts=query_starts,
        context_lengths=starts + counts,
        block_tables=tables,
        slots=slots,
        rows_to_sample=_rows_to_sample(query_starts, np.array(step.sampled, np.int32)),
        sampling=build_sampling_batch(_sampling_rows(step), vocab_size),
    )


def _token_ids(step: StepSlice) -> Int32Array:
    ids: list[int] = []
    for request, start, count in zip(step.requests, step.starts, step.counts, strict=True):
        if count == 1:
            ids.append(request.token_ids[start])
        else:
            ids.extend(request.token_ids[start : start + count])
    return np.array(ids, np.int32)


def _block_table(requests: Sequence[Request], group: int, lengths: NDArray[np.int64]) -> Int32Array:
    width = int(lengths.max(initial=1))
    table = np.full((len(requests), width), PADDING_BLOCK, np.int32)
    flat = np.frombuffer(b"".join([request.tables[group].blocks for request in requests]), np.int32)
    table[np.arange(width) < lengths[:, None]] = flat
    return table


def _rows_to_sample(query_starts: Int32Array, sampled: Int32Array) -> Int32Array:
    ends = query_starts[1:]
    before = np.cumsum(sampled) - sampled
    within = np.arange(int(sampled.sum())) - np.repeat(before, sampled)
    return (np.repeat(ends - sampled, sampled) + within).astype(np.int32)


def _sampling_rows(step: StepSlice) -> list[SamplingRow]:
    rows = []
    for request, state, start, count, sampled in zip(
        step.requests, step.states, step.starts, step.counts, step.sampled, strict=True
    ):
        end = start + count
        known = len(request.token_ids)
        for position in range(end - sampled + 1, end + 1):
            target = request.token_ids[position] if position < known else None
            rows.append(SamplingRow(state=state, position=position, target=target))
    return rows
