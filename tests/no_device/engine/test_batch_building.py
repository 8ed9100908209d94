"""The arrays of a batch are those that plain loops over tokens would make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from midspan.decoding.sampling_params import SamplingParams
from midspan.decoding.sampling_state import SamplingState
from midspan.engine.batch_building import StepSlice, build_batch, limit_rows
from midspan.interface import CacheGroup
from midspan.scheduling.request import BlockTable, Request

BLOCK_SIZE = 4
VOCAB_SIZE = 50
GROUPS = tuple(
    CacheGroup(name=name, layers=1, kv_heads=1, key_size=2, value_size=2, window=window)
    for name, window in (("full", None), ("window.8", 8))
)


def make_request(number: int, tokens: int, capacity: int, blocks: Sequence[Sequence[int]]) -> Request:
    request = Request(str(number), [(number * 7 + i) % VOCAB_SIZE for i in range(tokens)], max_total_tokens=1000)
    tables = []
    for row in blocks:
        table = BlockTable()
        table.blocks.extend(row)
        tables.append(table)
    request.tables = tuple(tables)
    request.capacity = capacity
    return request


@st.composite
def steps(draw: st.DrawFn) -> StepSlice:
    requests, starts, counts, sampled = [], [], [], []
    for number in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, 20))
        count = draw(st.integers(1, 12))
        known = start + count + draw(st.integers(0, 3))
        entries = -(-(start + count) // BLOCK_SIZE) + draw(st.integers(0, 2))
        blocks = [draw(st.lists(st.integers(1, 99), min_size=entries, max_size=entries)) for _ in GROUPS]
        requests.append(make_request(number, known, entries * BLOCK_SIZE, blocks))
        starts.append(start)
        counts.append(count)
        sampled.append(draw(st.integers(0, count)))
    states = [
        SamplingState(SamplingParams(), request.prompt_ids, seed=number, vocab_size=VOCAB_SIZE)
        for number, request in enumerate(requests)
    ]
    rows = [sum(sampled[:place]) for place in range(len(requests))]
    return StepSlice(
        requests=requests,
        states=states,
        starts=starts,
        counts=counts,
        sampled=sampled,
        places=range(len(requests)),
        rows=rows,
    )


@given(steps())
def test_every_array_is_what_loops_over_tokens_make(step: StepSlice) -> None:
    tokens, positions, rows, sampled_positions = [], [], [], []
    slots: dict[str, list[int]] = {group.name: [] for group in GROUPS}
    for request, start, count, sampled in zip(step.requests, step.starts, step.counts, step.sampled, strict=True):
        for position in range(start, start + count):
            for number, group in enumerate(GROUPS):
                block = request.tables[number].blocks[position // BLOCK_SIZE]
                slots[group.name].append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            if position >= start + count - sampled:
                rows.append(len(tokens))
                sampled_positions.append(position + 1)
            tokens.append(request.token_ids[position])
            positions.append(position)
    batch = build_batch(step, GROUPS, BLOCK_SIZE, VOCAB_SIZE)
    assert batch.token_ids.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.query_starts.tolist() == np.cumsum([0, *step.counts]).tolist()
    assert batch.context_lengths.tolist() == [s + c for s, c in zip(step.starts, step.counts, strict=True)]
    assert batch.rows_to_sample.tolist() == rows
    assert batch.sampling.positions.tolist() == sampled_positions
    for number, group in enumerate(GROUPS):
        assert batch.slots[group.name].tolist() == slots[group.name]
        for row, request in zip(batch.block_tables[group.name].tolist(), step.requests, strict=True):
            blocks = request.tables[number].blocks.tolist()
            assert row == blocks + [0] * (len(row) - len(blocks))
    arrays = [batch.token_ids, batch.positions, batch.query_starts, batch.context_lengths, batch.rows_to_sample]
    arrays += [*batch.slots.values(), *batch.block_tables.values()]
    assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in arrays)


@given(steps())
def test_a_row_whose_next_token_is_known_scores_it_and_the_others_choose(step: StepSlice) -> None:
    sampling = build_batch(step, GROUPS, BLOCK_SIZE, VOCAB_SIZE).sampling
    expected = []
    for request, start, count, sampled in zip(step.requests, step.starts, step.counts, step.sampled, strict=True):
        following = request.token_ids[start + count - sampled + 1 : start + count + 1]
        expected += [*following, *[None] * (sampled - len(following))]
    if sampling.targets is None or sampling.has_target is None:
        assert expected == [None] * len(expected)
    else:
        found = zip(sampling.targets.tolist(), sampling.has_target.tolist(), strict=True)
        assert [target if has else None for target, has in found] == expected


@settings(max_examples=200)
@given(steps(), st.integers(1, 10))
def test_limiting_the_rows_of_a_run_divides_a_step_and_loses_nothing(step: StepSlice, limit: int) -> None:
    runs = limit_rows(step, limit)
    tokens: dict[int, list[int]] = {}
    rows: dict[int, int] = {}
    for run in runs:
        assert sum(run.sampled) <= limit
        assert len(set(run.places)) == len(run)
        for place, start, count, sampled, row in zip(
            run.places, run.starts, run.counts, run.sampled, run.rows, strict=True
        ):
            tokens.setdefault(place, []).extend(range(start, start + count))
            for offset in range(sampled):
                position = start + count - sampled + offset
                assert position not in rows.values() or row + offset not in rows
                rows[row + offset] = position
    expected_rows: dict[int, int] = {}
    for place, (start, count, sampled, row) in enumerate(
        zip(step.starts, step.counts, step.sampled, step.rows, strict=True)
    ):
        assert tokens[place] == list(range(start, start + count))
        for offset in range(sampled):
            expected_rows[row + offset] = start + count - sampled + offset
    assert rows == expected_rows
