"""The reference device: same bits in any company, its memory, its cache, its errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midspan.errors import (
    CheckpointError,
    GraphError,
    MidspanError,
    OutOfDeviceMemory,
    SettingsError,
    UnsupportedOperation,
)
from midspan.graph.passes import apply_passes
from midspan.interface import (
    Bounds,
    CacheGroup,
    CacheLayout,
    Device,
    Found,
    Graph,
    PackedTensor,
    SamplingBatch,
    Weight,
)
from midspan.models.catalogue import build_graph
from midspan.runtimes.reference.device import PLUGIN

BOUNDS = Bounds(
    max_tokens=64,
    max_requests=8,
    max_context=64,
    max_sampled_rows=64,
    block_size=8,
    dtype="float32",
    cache_dtype="float32",
)


def _prompts(count: int, vocabulary: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, vocabulary, random.integers(1, 40)).tolist() for _ in range(count)]


def _mixed_graph(tiny_config: Any) -> Graph:
    """Full and windowed layers, normed heads, and sizes that are no powers of two."""
    return build_graph(
        tiny_config(
            architectures=["Qwen3ForCausalLM"],
            head_dim=10,
            use_sliding_window=True,
            sliding_window=11,
            max_window_layers=1,
            hidden_size=36,
            intermediate_size=50,
        )
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logprobs_have_the_same_bits_alone_and_in_a_batch_of_64(
    dtype: str, tiny_config: Any, drive: Callable[..., Any], random_weights: Any, reference_device: Device
) -> None:
    plain = _mixed_graph(tiny_config)
    graph, weights = apply_passes(plain), random_weights(plain)
    options: dict[str, Any] = {"dtype": dtype, "cache_dtype": dtype, "block_size": 8, "max_context": 64}
    prompts = _prompts(64, graph.vocab_size)
    together = drive(reference_device, graph, weights, **options).generate(
        prompts, 6, budget=90, arrivals=[index // 8 for index in range(64)], num_logprobs=5
    )
    alone = drive(reference_device, graph, weights, **options, seed=1)
    for index in (0, 1, 17, 38, 63):
        sequence = alone.generate([prompts[index]], 6, num_logprobs=5)[0]
        assert sequence.tokens == together[index].tokens
        assert sequence.logprobs == together[index].logprobs


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.integers(1, 50), temperature=st.sampled_from([0.0, 1.0]), order=st.permutations(range(4)))
def test_tokens_do_not_depend_on_chunks_order_or_neighbours(
    budget: int,
    temperature: float,
    order: list[int],
    tiny_config: Any,
    drive: Callable[..., Any],
    random_weights: Any,
    reference_device: Device,
) -> None:
    plain = build_graph(tiny_config())
    driver = drive(reference_device, apply_passes(plain), random_weights(plain), block_size=4, max_requests=8)
    prompts = _prompts(4, plain.vocab_size)

    def sampling(sampled: list[Any]) -> SamplingBatch:
        greedy: SamplingBatch = driver.greedy(sampled)
        seeds = np.array([sequence.tokens[0] for sequence in sampled], np.uint64)
        return replace(greedy, temperature=np.full(len(sampled), temperature, np.float32), seeds=seeds)

    chunked = driver.generate([prompts[index] for index in order], 5, budget=budget, sampling=sampling)
    for index, sequence in zip(order, chunked, strict=True):
        assert sequence.tokens == driver.generate([prompts[index]], 5, sampling=sampling)[0].tokens


def test_a_sequence_computed_again_after_losing_its_blocks_goes_on_with_the_same_tokens(
    tiny_config: Any, drive: Callable[..., Any], random_weights: Any, reference_device: Device
) -> None:
    plain = build_graph(tiny_config())
    driver = drive(reference_device, plain, random_weights(plain))
    prompt = _prompts(1, plain.vocab_size)[0]
    whole = driver.generate([prompt], 8)[0]
    again = driver.generate([prompt], 3)[0]
    driver.release(again)
    while len(again.generated) < 8:
        driver.step([(again, len(again.tokens) - again.computed)])
    assert again.tokens == whole.tokens


def test_a_row_that_is_no_number_fails_alone(
    tiny_config: Any, drive: Callable[..., Any], random_weights: Any, reference_device: Device
) -> None:
    plain = build_graph(tiny_config())
    weights = random_weights(plain)
    weights["model.embed_tokens.weight"][7] = np.nan
    driver = drive(reference_device, apply_passes(plain), weights)
    sick, well = driver.sequence([1, 7, 2]), driver.sequence([1, 8, 2])
    result = driver.step([(sick, 3), (well, 3)])
    assert result.invalid is not None
    assert result.invalid.tolist() == [True, False]
    assert well.tokens == driver.generate([[1, 8, 2]], 1)[0].tokens


def test_a_step_that_samples_nothing_returns_nothing(
    tiny_config: Any, drive: Callable[..., Any], random_weights: Any, reference_device: Device
) -> None:
    plain = build_graph(tiny_config())
    driver = drive(reference_device, apply_passes(plain), random_weights(plain))
    result = driver.step([(driver.sequence([1, 2, 3, 4]), 2)])
    assert result.token_ids.shape == (0,)
    assert result.logprobs is None
    assert result.invalid is None


def test_the_placement_names_a_kernel_for_every_node(
    tiny_config: Any, drive: Callable[..., Any], random_weights: Any, reference_device: Device
) -> None:
    graph = build_graph(tiny_config())
    placement = drive(reference_device, graph, random_weights(graph)).program.placement
    assert placement.device == "reference"
    assert [node.node for node in placement.nodes] == [node.name for node in graph.nodes]
    assert not any(node.fallback for node in placement.nodes)


def test_the_probe_finds_one_device_and_options_are_refused() -> None:
    found = PLUGIN.probe()
    assert isinstance(found, Found)
    assert [(device.id, device.preference) for device in found.devices] == [("reference", 0)]
    assert found.devices[0].memory_bytes > 2**20
    with pytest.raises(SettingsError, match="threads"):
        PLUGIN.open(found.devices[0], {"threads": "3"})


def test_memory_counts_what_is_open(tiny_config: Any, random_weights: Any, reference_device: Device) -> None:
    graph = build_graph(tiny_config())
    arrays = random_weights(graph)
    before = reference_device.memory()
    assert before.used_bytes == 0
    assert 0 < before.free_bytes <= before.total_bytes
    program = reference_device.compile(graph, _Source(arrays), BOUNDS)
    assert program.memory_bytes() > sum(array.nbytes for array in arrays.values())
    cache = reference_device.allocate_cache(CacheLayout(groups=graph.cache, block_size=8, dtype="bfloat16"), (10,))
    assert cache.memory_bytes() == 2 * 2 * 10 * 8 * 2 * 8 * 2
    assert reference_device.memory().used_bytes == program.memory_bytes() + cache.memory_bytes()
    cache.close()
    program.close()
    assert reference_device.memory().used_bytes == 0


class _Source:
    def __init__(self, arrays: dict[str, Any], packed: str = "") -> None:
        self.arrays = arrays
        self.packed = packed

    def load(self, weight: Weight) -> PackedTensor:
        if weight.name not in self.arrays:
            raise CheckpointError(f"tensor '{weight.name}' is missing")
        kind = "gguf.q8_0" if weight.name == self.packed else "dense"
        parts = {"data": self.arrays[weight.name]}
        return PackedTensor(name=weight.name, shape=weight.shape, format=kind, parts=parts)


def test_a_missing_tensor_is_an_error_at_compile(
    tiny_config: Any, random_weights: Any, reference_device: Device
) -> None:
    graph = build_graph(tiny_config())
    arrays = random_weights(graph)
    del arrays["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        reference_device.compile(graph, _Source(arrays), BOUNDS)


def test_a_packed_weight_is_refused_with_the_node_and_the_reason(
    tiny_config: Any, random_weights: Any, reference_device: Device
) -> None:
    graph = build_graph(tiny_config())
    source = _Source(random_weights(graph), packed="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UnsupportedOperation, match=r"gguf\.q8_0") as caught:
        reference_device.compile(graph, source, BOUNDS)
    assert caught.value.node == "model.layers.1.mlp.up_proj"
    assert len(caught.value.reasons) == 1


@pytest.mark.parametrize("field", ["dtype", "cache_dtype"])
def test_a_type_that_it_does_not_claim_is_refused(
    field: str, tiny_config: Any, random_weights: Any, reference_device: Device
) -> None:
    graph = build_graph(tiny_config())
    with pytest.raises(SettingsError, match="int3"):
        reference_device.compile(graph, _Source(random_weights(graph)), replace(BOUNDS, **{field: "int3"}))


def test_a_closed_program_and_a_closed_cache_say_so(
    tiny_config: Any, drive: Callable[..., Any], random_weights: Any, reference_device: Device
) -> None:
    graph = build_graph(tiny_config())
    driver = drive(reference_device, graph, random_weights(graph))
    driver.cache.close()
    with pytest.raises(MidspanError, match="cache was closed"):
        driver.step([(driver.sequence([1]), 1)])
    driver.program.close()
    with pytest.raises(MidspanError, match="program was closed"):
        driver.step([(driver.sequence([1]), 1)])


GROUPS = (
    CacheGroup(name="full", layers=2, kv_heads=2, key_size=4, value_size=3),
    CacheGroup(name="window.5", layers=1, kv_heads=1, key_size=2, value_size=6, window=5),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cache_blocks_are_read_written_and_copied_in_the_canonical_layout(dtype: str, reference_device: Device) -> None:
    cache = reference_device.allocate_cache(CacheLayout(groups=GROUPS, block_size=4, dtype=dtype), (6, 5))
    data = np.arange(2 * 2 * 2 * 4 * 2 * 4).reshape(2, 2, 2, 4, 2, 4).astype(np.float32)
    data[:, 1, ..., 3] = 0.0
    cache.write("full", [3, 1], data)
    assert np.array_equal(cache.read("full", [3, 1]), data)
    assert np.array_equal(cache.read("full", [1]), data[:, :, 1:])
    assert not cache.read("full", [0, 2, 4, 5]).any()
    cache.copy("full", [(3, 5), (1, 3), (5, 1)])
    assert np.array_equal(cache.read("full", [5, 3]), data)
    assert not cache.read("full", [1]).any()
    assert cache.read("window.5", [4]).shape == (1, 2, 1, 4, 1, 6)
    cache.copy("full", [])


def test_a_cache_group_that_does_not_exist_is_an_error(reference_device: Device) -> None:
    cache = reference_device.allocate_cache(CacheLayout(groups=GROUPS, block_size=4, dtype="float32"), (2, 2))
    with pytest.raises(GraphError, match=r"window\.5"):
        cache.read("nothing", [0])


def test_a_cache_larger_than_memory_is_refused(reference_device: Device) -> None:
    with pytest.raises(OutOfDeviceMemory, match="does not fit"):
        reference_device.allocate_cache(CacheLayout(groups=GROUPS, block_size=4, dtype="float32"), (2**40, 2))
