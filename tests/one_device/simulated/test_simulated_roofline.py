"""Modelled time: worked out by hand for small graphs, and in the right proportion for large ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midspan.graph.passes import apply_passes
from midspan.interface import Graph, Node, Value, Weight
from midspan.models.catalogue import build_graph
from midspan_simulated.data_sheet_table import DATA_SHEETS
from midspan_simulated.node_work import ELEMENTWISE_OPERATIONS, AttentionWork, GraphWork, NodeWork, graph_work
from midspan_simulated.ring import TURN_LATENCY, Ring
from midspan_simulated.roofline import (
    HOST_LINK_BANDWIDTH,
    HOST_LINK_LATENCY,
    LAUNCH_SECONDS,
    Rates,
    StepShape,
    rates_of,
    read_tokens,
    seen_pairs,
    step_seconds,
)
from midspan_simulated.stored_weights import stored_bytes

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
LINEAR_PARAMETERS_8B = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
HEAD_PARAMETERS_8B = 128256 * 4096
KV_BYTES_8B = 32 * 8 * 2 * 128 * 2
"""Of one token, in bfloat16."""


def shape(new: list[int], contexts: list[int], host_bytes: int = 0) -> StepShape:
    return StepShape(
        tokens=sum(new),
        sampled=len(new),
        new=np.array(new, np.int64),
        contexts=np.array(contexts, np.int64),
        host_bytes=host_bytes,
    )


def linear_graph(split: str | None = "rows") -> Graph:
    """One product of T rows of 64 by a [32, 64] matrix."""
    return Graph(
        name="one linear",
        architecture="",
        inputs=("x",),
        outputs=("y",),
        values={"x": Value(name="x", shape=("T", 64)), "y": Value(name="y", shape=("T", 32))},
        weights={"w": Weight(name="w", shape=(32, 64))},
        nodes=(
            Node(
                name="linear",
                op="linear",
                inputs=("x",),
                outputs=("y",),
                weights={"weight": "w"},
                attributes={"split": split},
            ),
        ),
        cache=(),
        vocab_size=1,
        hidden_size=64,
        max_position=16,
    )


def work_of(graph: Graph, *, dtype: str = "bfloat16", stored: str | None = None, devices: int = 1) -> GraphWork:
    weights = stored_bytes(graph, dtype, stored)
    return graph_work(graph, weights, dtype=dtype, cache_dtype=dtype, devices=devices)


RATES = Rates(operations=1e9, bandwidth=1e8, ring=Ring(devices=1, bandwidth=1e7))
FREE = 2 * HOST_LINK_LATENCY
"""Of a step whose batch has no bytes, apart from its token ids."""


def test_a_product_takes_its_bytes_while_rows_are_few_and_its_operations_when_they_are_many() -> None:
    work = work_of(linear_graph())
    assert work.nodes == ((NodeWork(rows="T", operations=4096, row_bytes=192, fixed_bytes=4096), 1),)
    one = step_seconds(work, RATES, shape([1], [1]))
    assert one == pytest.approx(LAUNCH_SECONDS + (4096 + 192) / 1e8 + FREE + 4 / HOST_LINK_BANDWIDTH, rel=1e-12)
    many = step_seconds(work, RATES, shape([100], [100], host_bytes=3200))
    assert many == pytest.approx(LAUNCH_SECONDS + 100 * 4096 / 1e9 + FREE + 3204 / HOST_LINK_BANDWIDTH, rel=1e-12)


def test_two_devices_take_half_the_product_and_the_sum_s_turns() -> None:
    work = work_of(linear_graph("rows"), devices=2)
    rates = replace(RATES, ring=Ring(devices=2, bandwidth=1e7))
    # The output of 32 bfloat16 numbers is whole on both; the ring needs two turns of half of its 64 bytes.
    bound = (4096 / 2 + 128 + 64) / 1e8
    turns = 2 * (64 / 2 / 1e7 + TURN_LATENCY)
    expected = LAUNCH_SECONDS + bound + turns + FREE + 4 / HOST_LINK_BANDWIDTH
    assert step_seconds(work, rates, shape([1], [1])) == pytest.approx(expected, rel=1e-12)


def test_columns_are_divided_and_need_no_sum_and_a_linear_without_a_split_is_kept_whole() -> None:
    (columns, _), *_ = work_of(linear_graph("columns"), devices=4).nodes
    assert (columns.operations, columns.fixed_bytes, columns.row_bytes) == (1024, 1024, 128 + 16)
    assert (columns.summed_bytes, columns.gathered_bytes) == (0, 0)
    (whole, _), *_ = work_of(linear_graph(None), devices=4).nodes
    assert (whole.operations, whole.fixed_bytes, whole.row_bytes, whole.summed_bytes) == (4096, 4096, 192, 0)


def test_a_ring_s_sum_is_a_scattered_sum_and_a_gathering() -> None:
    ring = Ring(devices=4, bandwidth=1e9, latency=1e-6)
    assert ring.all_gather(4000) == pytest.approx(3 * (1000 / 1e9 + 1e-6), rel=1e-12)
    assert ring.all_reduce(4000) == pytest.approx(6 * (1000 / 1e9 + 1e-6), rel=1e-12)
    assert ring.point_to_point(1000) == pytest.approx(2e-6, rel=1e-12)
    assert Ring(devices=1, bandwidth=1e9).all_reduce(4000) == 0


def test_what_a_token_sees_is_counted_to_the_pair() -> None:
    def pairs(new: list[int], contexts: list[int], window: int | None) -> tuple[int, int]:
        seen, read = 0, set()
        for request, (count, context) in enumerate(zip(new, contexts, strict=True)):
            for position in range(context - count, context):
                first = 0 if window is None else max(0, position - window + 1)
                seen += position + 1 - first
                read |= {(request, place) for place in range(first, position + 1)}
        return seen, len(read)

    for window in (None, 1, 4, 9, 100):
        for new, contexts in (([1], [1]), ([5, 1], [5, 30]), ([7, 3, 1], [12, 3, 9])):
            columns = np.array(new, np.int64), np.array(contexts, np.int64), window
            assert (seen_pairs(*columns), read_tokens(*columns)) == pairs(new, contexts, window)


def test_attention_reads_each_request_s_cache_once_and_computes_for_every_pair() -> None:
    attention = AttentionWork(window=None, pair_operations=100.0, token_bytes=50.0, row_bytes=20.0)
    work = GraphWork(devices=1, nodes=(), attentions=((attention, 3),), launches=3)
    host = FREE + 8 / HOST_LINK_BANDWIDTH
    decode = step_seconds(work, RATES, shape([1, 1], [10, 40]))
    assert decode == pytest.approx(3 * LAUNCH_SECONDS + 3 * (50 * (50 + 2) + 20 * 2) / 1e8 + host, rel=1e-12)
    prefill = step_seconds(work, RATES, shape([100], [100]))
    pairs = 100 * 101 // 2
    assert prefill == pytest.approx(3 * LAUNCH_SECONDS + 3 * pairs * 100 / 1e9 + host - 4 / HOST_LINK_BANDWIDTH)


@pytest.fixture(scope="module")
def llama_8b() -> Graph:
    return apply_passes(build_graph(LLAMA_8B))


def test_a_decoding_step_of_8_billion_parameters_takes_its_bytes_over_the_bandwidth(llama_8b: Graph) -> None:
    sheet = DATA_SHEETS["h100"]
    rates = rates_of(sheet, "bfloat16", captures_graphs=True)
    seconds = step_seconds(work_of(llama_8b), rates, shape([1], [1024]))
    read = 2 * (LINEAR_PARAMETERS_8B + HEAD_PARAMETERS_8B) + 1024 * KV_BYTES_8B
    floor = read / sheet.bandwidth
    assert floor == pytest.approx(4.52e-3, rel=5e-3)
    # Beside weights and cache there are only activations of one token, logits and 25 microseconds of launch and host.
    assert floor < seconds < 1.02 * floor


def test_int4_weights_make_decoding_faster_by_what_they_save_of_the_bytes(llama_8b: Graph) -> None:
    rates = rates_of(DATA_SHEETS["h100"], "bfloat16", captures_graphs=True)
    dense = step_seconds(work_of(llama_8b), rates, shape([1], [1024]))
    packed = step_seconds(work_of(llama_8b, stored="int4"), rates, shape([1], [1024]))
    saved = LINEAR_PARAMETERS_8B * (2 - 0.5 - 2 / 128) / DATA_SHEETS["h100"].bandwidth
    assert dense - packed == pytest.approx(saved, rel=1e-9)


def test_a_long_prompt_takes_its_operations_over_the_peak(llama_8b: Graph) -> None:
    sheet = DATA_SHEETS["h100"]
    tokens = 4096
    seconds = step_seconds(work_of(llama_8b), rates_of(sheet, "bfloat16"), shape([tokens], [tokens]))
    operations = 2 * LINEAR_PARAMETERS_8B * tokens + 32 * 2 * 32 * 256 * (tokens * (tokens + 1) // 2)
    assert operations / sheet.peaks["bfloat16"] < seconds < 1.25 * operations / sheet.peaks["bfloat16"]


def test_every_launch_is_paid_unless_the_step_is_captured(llama_8b: Graph) -> None:
    work = work_of(llama_8b)
    assert work.launches == sum(node.op != "split" for node in llama_8b.nodes)
    eager = step_seconds(work, rates_of(DATA_SHEETS["a100"], "bfloat16"), shape([1], [8]))
    captured = step_seconds(work, rates_of(DATA_SHEETS["a100"], "bfloat16", captures_graphs=True), shape([1], [8]))
    assert eager - captured == pytest.approx((work.launches - 1) * LAUNCH_SECONDS, rel=1e-9)
    whole = rates_of(DATA_SHEETS["tpu-v5e"], "bfloat16")
    assert whole.launches_once


def test_efficiencies_scale_what_they_are_about() -> None:
    work = work_of(linear_graph())
    half = rates_of(DATA_SHEETS["a100"], "bfloat16", compute_efficiency=0.5, bandwidth_efficiency=0.25)
    full = rates_of(DATA_SHEETS["a100"], "bfloat16")
    assert (half.operations, half.bandwidth) == (0.5 * full.operations, 0.25 * full.bandwidth)
    assert half.ring.bandwidth == 0.25 * full.ring.bandwidth
    assert step_seconds(work, half, shape([1], [1])) > step_seconds(work, full, shape([1], [1]))


def test_nodes_without_a_product_move_their_bytes(llama_8b: Graph) -> None:
    work = dict(work_of(llama_8b).nodes)
    embedding = NodeWork(rows="T", operations=0.0, row_bytes=4 + 2 * 8192)
    norm = NodeWork(
        rows="T", operations=ELEMENTWISE_OPERATIONS * 8192, row_bytes=4 * 8192, fixed_bytes=8192, summed_bytes=0.0
    )
    sample = NodeWork(rows="S", operations=ELEMENTWISE_OPERATIONS * 128256, row_bytes=4 * 128256 + 6 * 4)
    norms = [node for node in llama_8b.nodes if node.op == "add_rms_norm"]
    assert work[embedding] == 1
    assert work[norm] == sum(llama_8b.values[node.outputs[0]].shape[0] == "T" for node in norms) > 60
    assert work[sample] == 1


def test_a_step_reads_the_experts_that_its_rows_can_have_chosen() -> None:
    config = {**LLAMA_8B, "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_hidden_layers": 1}
    graph = apply_passes(build_graph(config))
    (experts,) = (node for node, _ in work_of(graph).nodes if node.chosen_limit)
    one = 3 * 4096 * 14336
    assert experts.operations == 2 * 2 * one
    assert [experts.weight_bytes(rows) for rows in (0, 1, 3, 4, 90)] == [2 * one * count for count in (0, 2, 6, 8, 8)]
    (half,) = (node for node, _ in work_of(graph, devices=2).nodes if node.chosen_limit)
    assert (half.operations, half.weight_bytes(1)) == (2 * one, 2 * one)
    assert half.summed_bytes == 2 * 4096


counts = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3000)), min_size=1, max_size=6)
SMALL = apply_passes(build_graph({**LLAMA_8B, "num_hidden_layers": 2, "vocab_size": 1024}))
sheets = st.sampled_from(sorted(DATA_SHEETS))


def seconds_of(requests: list[tuple[int, int]], sheet: str, **changes: Any) -> float:
    dtype = DATA_SHEETS[sheet].dtypes()[0]
    devices = changes.pop("devices", 1)
    rates = rates_of(DATA_SHEETS[sheet], dtype, devices=devices, **changes)
    new = [count for count, _ in requests]
    contexts = [count + past for count, past in requests]
    return step_seconds(work_of(SMALL, dtype=dtype, devices=devices), rates, shape(new, contexts))


@settings(max_examples=60, deadline=None)
@given(requests=counts, sheet=sheets, more=st.tuples(st.integers(1, 300), st.integers(0, 3000)))
def test_more_tokens_longer_contexts_and_more_requests_never_take_less_time(
    requests: list[tuple[int, int]], sheet: str, more: tuple[int, int]
) -> None:
    before = seconds_of(requests, sheet)
    (count, past), *others = requests
    assert seconds_of([(count + more[0], past), *others], sheet) >= before
    assert seconds_of([(count, past + more[1]), *others], sheet) >= before
    assert seconds_of([*requests, more], sheet) >= before


@settings(max_examples=60, deadline=None)
@given(requests=counts, sheet=sheets, share=st.floats(0.05, 1.0))
def test_a_slower_accelerator_never_takes_less_time(requests: list[tuple[int, int]], sheet: str, share: float) -> None:
    before = seconds_of(requests, sheet)
    assert seconds_of(requests, sheet, compute_efficiency=share) >= before
    assert seconds_of(requests, sheet, bandwidth_efficiency=share) >= before
    assert seconds_of(requests, sheet, captures_graphs=True) <= before


@settings(max_examples=40, deadline=None)
@given(requests=counts, devices=st.sampled_from([2, 4, 8]))
def test_devices_together_take_less_work_each_and_time_for_the_exchange(
    requests: list[tuple[int, int]], devices: int
) -> None:
    alone, shared = work_of(SMALL), work_of(SMALL, devices=devices)
    for work in (alone, shared):
        assert all(node.operations >= 0 and node.row_bytes >= 0 for node, _ in work.nodes)
    assert sum(node.fixed_bytes * times for node, times in shared.nodes) < sum(
        node.fixed_bytes * times for node, times in alone.nodes
    )
    assert sum(times for node, times in shared.nodes if node.summed_bytes) == 2 * 2 + 1
    assert sum(times for node, times in shared.nodes if node.gathered_bytes) == 1
    fast = replace(rates_of(DATA_SHEETS["h100"], "bfloat16"), ring=Ring(devices=devices, bandwidth=1e30, latency=0.0))
    new, contexts = [count for count, _ in requests], [count + past for count, past in requests]
    one = step_seconds(alone, replace(fast, ring=Ring(devices=1, bandwidth=1e30)), shape(new, contexts))
    assert step_seconds(shared, fast, shape(new, contexts)) <= one


def test_the_device_tells_the_modelled_seconds_with_every_step_and_never_the_host_s(
    make_llm: Callable[..., Any],
) -> None:
    llm = make_llm("simulated:h100", {"numerics": "off"}, max_num_seqs=2)
    program = llm._core._loaded.program
    found: list[float] = []
    run = program.run

    def watched(batch: Any, cache: Any) -> Any:
        output = run(batch, cache)
        found.append(output.result().device_seconds)
        return output

    program.run = watched
    llm.generate([[1, 2, 3]], use_tqdm=False)
    assert llm._core._loaded.device.capabilities.virtual_clock
    assert len(found) > 1
    assert all(1e-5 < seconds < 1e-3 for seconds in found)
