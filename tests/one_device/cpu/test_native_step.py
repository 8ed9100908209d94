"""Steps that run as plans: the same numbers as node by node, whatever kernels stand between."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midspan.conformance.operation_cases import operation_cases
from midspan.errors import MidspanError
from midspan.graph.passes import apply_passes
from midspan.interface import CACHE_ELEMENT_BYTES, Bounds, Device, Graph
from midspan.models.catalogue import build_graph
from midspan_cpu import plugin
from midspan_cpu.native_step import NativeStep
from midspan_cpu.value_places import place_values

PROMPTS = [[5, 9, 2, 77, 30], list(range(1, 40)), [3]]

FALLBACKS: list[dict[str, str]] = [
    {},
    {"rotary": "portable"},
    {"attention": "portable"},
    {"linear": "onednn"},
    {"rms_norm": "portable", "add_rms_norm": "portable"},
    {"embedding": "portable", "select_rows": "portable", "logits": "portable"},
]


def bounds(**changes: Any) -> Bounds:
    values: dict[str, Any] = {
        "max_tokens": 64,
        "max_requests": 8,
        "max_context": 128,
        "max_sampled_rows": 8,
        "block_size": 16,
        "dtype": "float32",
        "cache_dtype": "float32",
    }
    return Bounds(**{**values, **changes})


@pytest.mark.parametrize("kernels", FALLBACKS, ids=str)
def test_a_plan_broken_by_other_kernels_gives_the_tokens_of_the_definition(
    kernels: dict[str, str],
    cpu_device: Device,
    reference_device: Device,
    drive: Callable[..., Any],
    tiny_config: Callable[..., Any],
    random_weights: Callable[..., Any],
) -> None:
    graph = build_graph(tiny_config())
    weights = random_weights(graph)
    graph = apply_passes(graph)
    expected = drive(reference_device, graph, weights).generate(PROMPTS, 8, budget=16, num_logprobs=2)
    found = drive(cpu_device, graph, weights, kernels=kernels).generate(PROMPTS, 8, budget=16)
    for sequence, wanted in zip(found, expected, strict=True):
        # The two best logits lie further apart than float32 rounding over some thirty nodes can move them.
        gaps = [abs(np.subtract(*list(found.values())[:2])) for found in wanted.logprobs]
        assert min(gaps) > 1e-3
        assert sequence.generated == wanted.generated


@pytest.mark.parametrize("cache_dtype", CACHE_ELEMENT_BYTES)
def test_a_plan_runs_all_nodes_of_a_llama_but_sampling_in_one_piece(
    cache_dtype: str,
    cpu_device: Device,
    tiny_config: Callable[..., Any],
    drive: Callable[..., Any],
    random_weights: Callable[..., Any],
) -> None:
    graph = build_graph(tiny_config())
    weights = random_weights(graph)
    graph = apply_passes(graph)
    step = drive(cpu_device, graph, weights, cache_dtype=cache_dtype).program._step
    assert isinstance(step, NativeStep)
    lines = step.listing().splitlines()
    assert [line for line in lines if line.startswith("on tensors")] == ["on tensors: sample (sample)"]
    # Attention is two instructions, a split none, all others one.
    ops = [node.op for node in graph.nodes]
    assert len(lines) - 1 == len(ops) + ops.count("attention") - ops.count("split") - 1


def test_every_node_is_timed_as_it_runs_in_the_plan(
    cpu_device: Device, tiny_config: Callable[..., Any], drive: Callable[..., Any], random_weights: Callable[..., Any]
) -> None:
    graph = build_graph(tiny_config())
    driver = drive(cpu_device, apply_passes(graph), random_weights(graph), kernels={"rotary": "portable"})
    sequence = driver.sequence([1, 2, 3])
    batch, _ = driver.batch([(sequence, 3)])
    times = driver.program.profile(batch, driver.cache, repeat=2)
    assert [(time.node, time.kernel) for time in times] == [
        (placed.node, placed.kernel) for placed in driver.program.placement.nodes
    ]
    assert all((time.nanoseconds > 0) == (time.op != "split") for time in times)


def test_a_plan_works_on_the_cache_it_is_given_whatever_was_used_before(
    cpu_device: Device, tiny_config: Callable[..., Any], drive: Callable[..., Any], random_weights: Callable[..., Any]
) -> None:
    graph = build_graph(tiny_config())
    weights = random_weights(graph)
    graph = apply_passes(graph)
    driver = drive(cpu_device, graph, weights)
    other = drive(cpu_device, graph, weights)
    sequence = driver.sequence(list(range(1, 40)))
    driver.step([(sequence, 39)])
    batch, _ = driver.batch([(sequence, 1)])
    expected = driver.program.run(batch, driver.cache).result().token_ids
    # The same program's nodes, one by one, on another cache: nothing of it may stay with the plan.
    driver.program.values(batch, other.cache, graph.outputs)
    other.cache.write("full", range(other.cache.blocks[0]), -other.cache.read("full", range(other.cache.blocks[0])))
    np.testing.assert_array_equal(driver.program.run(batch, driver.cache).result().token_ids, expected)


def test_threads_that_share_a_program_get_their_own_results(cpu_device: Device) -> None:
    case = next(case for case in operation_cases() if case.name.startswith("linear, [37, 128]"))
    program = cpu_device.compile(case.graph(), case, bounds())
    inputs = [np.asarray(case.inputs[0]) * factor for factor in (1.0, 0.5, -2.0, 3.0)]
    expected = [program.evaluate({"x": x})[0] for x in inputs]

    def repeat(number: int) -> bool:
        results = [program.evaluate({"x": inputs[number]})[0] for _ in range(200)]
        return all(np.array_equal(result, expected[number]) for result in results)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(repeat, range(4)))


def test_a_program_does_not_run_once_its_device_was_closed() -> None:
    device = plugin.PLUGIN.open(plugin.PLUGIN.probe().devices[0], {})
    case = next(case for case in operation_cases() if case.name.startswith("linear, [5, 33]"))
    program = device.compile(case.graph(), case, bounds())
    device.close()
    with pytest.raises(MidspanError, match="closed"):
        program.evaluate({"x": case.inputs[0]})


def test_results_do_not_change_when_the_next_step_runs(cpu_device: Device) -> None:
    case = next(case for case in operation_cases() if case.name.startswith("linear, [5, 33]"))
    program = cpu_device.compile(case.graph(), case, bounds())
    (x,) = case.inputs
    (first,) = program.evaluate({"x": x})
    before = first.copy()
    (second,) = program.evaluate({"x": np.asarray(x) * 2})
    np.testing.assert_array_equal(first, before)
    assert (second != first).any()


def test_a_step_larger_than_the_bounds_is_refused(cpu_device: Device) -> None:
    case = next(case for case in operation_cases() if case.name.startswith("linear, [37, 128]"))
    program = cpu_device.compile(case.graph(), case, bounds(max_tokens=36))
    with pytest.raises(MidspanError, match="37 tokens"):
        program.evaluate({"x": case.inputs[0]})


@pytest.fixture(scope="module")
def graphs() -> list[Graph]:
    common = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    plain = build_graph(common)
    return [plain, apply_passes(plain), apply_passes(plain, until="merge_projections")]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_two_living_values_share_a_byte(graphs: list[Graph], data: st.DataObject) -> None:
    graph = data.draw(st.sampled_from(graphs))
    native = {node.name for node in graph.nodes if node.op not in ("split", "sample") and data.draw(st.booleans())}
    limit = bounds(max_tokens=data.draw(st.integers(1, 40)), dtype=data.draw(st.sampled_from(["float32", "bfloat16"])))
    arena = place_values(graph, native, limit)
    last = {name: index for index, node in enumerate(graph.nodes) for name in (*node.inputs, *node.outputs)}
    last.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
    living: dict[str, int] = {}
    owner: dict[int, str] = {}
    for index, node in enumerate(graph.nodes):
        for name in node.outputs:
            if name in arena.places:
                living[name] = index
        owner.clear()
        for name in living:
            place = arena.places[name]
            rows = limit.max_tokens if place.rows == "T" else limit.max_sampled_rows
            size = place.dtype.itemsize
            for row in range(rows):
                begin = place.offset + row * place.stride * size
                assert begin + place.columns * size <= arena.nbytes
                for byte in range(begin, begin + place.columns * size, size):
                    other = owner.setdefault(byte, name)
                    assert other == name or _is_part(graph, other, name)
        living = {name: born for name, born in living.items() if last[name] > index}


def _is_part(graph: Graph, one: str, other: str) -> bool:
    return any(
        node.op == "split" and (node.inputs[0], part) in ((one, other), (other, one))
        for node in graph.nodes
        for part in node.outputs
    )
