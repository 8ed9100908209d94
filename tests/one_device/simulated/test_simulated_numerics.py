"""The simulated device computes what the reference computes, whatever its layout and its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from midspan import SamplingParams
from midspan.conformance.operation_case import OperationCase
from midspan.conformance.operation_cases import operation_cases
from midspan.conformance.operation_check import disagreement
from midspan.errors import GraphError, MidspanError, SettingsError, UnsupportedOperation
from midspan.interface import Bounds, CacheGroup, CacheLayout, PackedTensor
from midspan.runtimes.reference import ReferenceCache
from midspan_simulated.array_space import ArraySpace
from midspan_simulated.data_sheet_table import DATA_SHEETS
from midspan_simulated.packed_weights import unpacked

OpenSimulated = Callable[..., Any]
MakeLLM = Callable[..., Any]

PROMPTS = [*(list(range(5, 5 + length)) for length in (3, 40, 17, 90)), list(range(100, 190))]
PARAMS = [
    SamplingParams(max_tokens=25, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=25, temperature=1.0, seed=3, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=25, temperature=0.7, seed=4, ignore_eos=True),
    SamplingParams(max_tokens=25, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=25, temperature=0.0, ignore_eos=True, prompt_logprobs=1),
]
SETTINGS: dict[str, Any] = {"kv_cache_memory_bytes": 64 * 1024, "max_num_batched_tokens": 48, "max_model_len": 128}
"""A cache for 256 tokens and chunks of 48, so that prompts are cut and sequences preempted."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Any:
    from midspan import LLM

    llm = LLM(str(tiny), load_format="dummy", device="reference", **SETTINGS)
    outputs = [output.outputs for output in llm.generate(PROMPTS, PARAMS)]
    llm.close()
    return outputs


@pytest.mark.parametrize(
    ("options", "block_size"),
    [
        ({}, 24),
        ({}, 7),
        ({"block_sizes": "5,3"}, 3),
        ({"asynchronous": "on"}, 24),
        ({"refuse": "attention,linear,embedding,logits"}, 7),
        ({"refuse": "attention", "asynchronous": "on", "captures_graphs": "on", "block_sizes": "9"}, 9),
    ],
)
def test_the_engine_gets_the_reference_s_tokens_and_logprobs(
    make_llm: MakeLLM, expected: Any, options: dict[str, str], block_size: int
) -> None:
    llm = make_llm("simulated", options, block_size=block_size, **SETTINGS)
    outputs = llm.generate(PROMPTS, PARAMS)
    assert [output.outputs for output in outputs] == expected
    assert llm.statistics().preemptions > 0


def test_a_device_with_a_data_sheet_computes_the_same(make_llm: MakeLLM, expected: Any) -> None:
    llm = make_llm("simulated:rtx4090", {"dtypes": "float32"}, block_size=7, **SETTINGS)
    assert [output.outputs for output in llm.generate(PROMPTS, PARAMS)] == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", operation_cases(block_size=7), ids=str)
def test_every_operation_is_what_it_is_defined_to_be(
    open_simulated: OpenSimulated, case: OperationCase, dtype: str
) -> None:
    device = open_simulated(dtypes=dtype, block_sizes="7")
    graph = case.graph()
    program = device.compile(graph, case, _bounds(dtype))
    (placed,) = program.placement.nodes
    own = case.op in ("embedding", "linear", "logits", "attention")
    assert (placed.kernel, placed.fallback) == (("simulated", False) if own else ("numpy", True))
    cache = after = None
    if case.cache is not None:
        cache = device.allocate_cache(case.cache.layout(dtype), (case.cache.blocks,))
        cache.write("full", range(case.cache.blocks), case.cache.data)
    outputs = program.evaluate(dict(zip(graph.inputs, case.inputs, strict=True)), cache)
    if cache is not None:
        after = cache.read("full", range(cache.blocks[0]))
    assert disagreement(case, dtype, dtype, list(outputs), after) is None


def _bounds(dtype: str, **changes: Any) -> Bounds:
    return Bounds(
        max_tokens=512,
        max_requests=64,
        max_context=1024,
        max_sampled_rows=64,
        block_size=7,
        dtype=dtype,
        cache_dtype=dtype,
        **changes,
    )


def test_a_refusal_shows_in_the_placement_and_a_strict_program_is_not_made(open_simulated: OpenSimulated) -> None:
    device = open_simulated(refuse="linear", block_sizes="7")
    case = next(case for case in operation_cases(block_size=7) if case.op == "linear")
    (placed,) = device.compile(case.graph(), case, _bounds("float32")).placement.nodes
    assert (placed.kernel, placed.fallback) == ("numpy", True)
    assert placed.refused == (("simulated", "the device option refuse=linear asks for it"),)
    with pytest.raises(UnsupportedOperation, match="refuse=linear"):
        device.compile(case.graph(), case, _bounds("float32", strict=True))


def test_numpy_cannot_read_an_array_of_the_device_nor_compute_with_it() -> None:
    array = ArraySpace("simulated").put(np.ones((2, 3), np.float32))
    assert (array.shape, array.dtype) == ((2, 3), "float32")
    with pytest.raises(TypeError, match="handed to numpy"):
        np.asarray(array)
    with pytest.raises(TypeError):
        np.ones(3, np.float32) + array  # type: ignore[operator]


def test_arrays_of_two_devices_do_not_mix_even_when_the_devices_have_one_name() -> None:
    one, other = ArraySpace("simulated"), ArraySpace("simulated")
    array = one.put(np.arange(3, dtype=np.int32))
    with pytest.raises(MidspanError, match="another device"):
        other.get(array)
    with pytest.raises(MidspanError, match="instead of its own array"):
        one.get(np.arange(3))  # type: ignore[arg-type]
    content = one.get(array)
    content[0] = 7
    assert one.get(array)[0] == 0


def test_a_cache_of_another_kind_is_refused_by_the_device_s_attention(open_simulated: OpenSimulated) -> None:
    case = next(case for case in operation_cases(block_size=7) if case.cache is not None)
    assert case.cache is not None
    device = open_simulated(block_sizes="7")
    graph = case.graph()
    program = device.compile(graph, case, _bounds("float32"))
    foreign = ReferenceCache(case.cache.layout("float32"), (case.cache.blocks,))
    with pytest.raises(MidspanError, match="did not make"):
        program.evaluate(dict(zip(graph.inputs, case.inputs, strict=True)), foreign)


def test_blocks_keep_their_content_through_the_odd_layout_and_copies_read_before_they_write(
    open_simulated: OpenSimulated,
) -> None:
    group = CacheGroup(name="full", layers=2, kv_heads=3, key_size=4, value_size=6)
    layout = CacheLayout(groups=(group,), block_size=7, dtype="float32")
    cache = open_simulated(block_sizes="7").allocate_cache(layout, (5,))
    data = np.random.default_rng(0).standard_normal((2, 2, 2, 7, 3, 6)).astype(np.float32)
    data[:, 0, ..., 4:] = 0
    cache.write("full", [3, 1], data)
    assert np.array_equal(cache.read("full", [3, 1]), data)
    assert not cache.read("full", [0, 2, 4]).any()
    cache.copy("full", [(3, 1), (1, 2), (4, 3)])
    assert np.array_equal(cache.read("full", [1, 2]), data)
    assert not cache.read("full", [3]).any()
    for blocks in ([5], [-1]):
        with pytest.raises(GraphError, match="no block"):
            cache.read("full", blocks)
    with pytest.raises(GraphError, match="data of"):
        cache.write("full", [0], data)
    with pytest.raises(GraphError, match="no group 'window'"):
        cache.read("window", [0])
    cache.close()
    with pytest.raises(MidspanError, match="closed"):
        cache.read("full", [0])


def test_packed_weights_are_read_as_gguf_defines_them(open_simulated: OpenSimulated) -> None:
    from midspan.weights.quantization import dequantize

    random = np.random.default_rng(1)
    blocks = np.zeros((4, 2, 34), np.uint8)
    blocks[..., :2] = random.uniform(0.01, 0.1, (4, 2)).astype(np.float16)[..., None].view(np.uint8)
    blocks[..., 2:] = random.integers(-127, 128, (4, 2, 32), np.int8).view(np.uint8)
    tensor = PackedTensor(name="w", shape=(4, 64), format="gguf.q8_0", parts={"blocks": blocks.reshape(4, -1)})
    assert np.array_equal(unpacked(tensor).parts["data"], dequantize(tensor))


def test_a_packed_linear_runs_where_the_format_is_claimed_and_nowhere_else(open_simulated: OpenSimulated) -> None:
    case = next(case for case in operation_cases(block_size=7) if case.op == "linear" and "bias" not in str(case))
    graph = case.graph()
    packed = _AsQ8(case)
    if packed.width % 32:
        pytest.fail("the first linear case has no width that q8_0 can hold")
    inputs = dict(zip(graph.inputs, case.inputs, strict=True))
    claiming = open_simulated(block_sizes="7", quantizations="gguf.q8_0")
    (found,) = claiming.compile(graph, packed, _bounds("float32")).evaluate(inputs)
    (wanted,) = open_simulated(block_sizes="7").compile(graph, packed.dense(), _bounds("float32")).evaluate(inputs)
    assert np.array_equal(found, wanted)
    with pytest.raises(UnsupportedOperation, match=r"packed as gguf\.q8_0"):
        open_simulated(block_sizes="7").compile(graph, packed, _bounds("float32"))


class _AsQ8:
    """A case's weights, the matrix packed."""

    def __init__(self, case: OperationCase, packs: bool = True) -> None:
        self._case, self._packs = case, packs
        self.width = next(iter(case.graph().weights.values())).shape[-1]

    def dense(self) -> _AsQ8:
        return _AsQ8(self._case, packs=False)

    def load(self, weight: Any) -> PackedTensor:
        tensor = self._case.load(weight)
        if len(weight.shape) != 2:
            return tensor
        rows = tensor.parts["data"].astype(np.float32).reshape(weight.shape[0], -1, 32)
        scales = (np.abs(rows).max(-1) / 127).astype(np.float16)
        blocks = np.zeros((*rows.shape[:2], 34), np.uint8)
        blocks[..., :2] = scales[..., None].view(np.uint8)
        quotients = rows / np.maximum(scales.astype(np.float32), 1e-9)[..., None]
        blocks[..., 2:] = np.clip(np.rint(quotients), -127, 127).astype(np.int8).view(np.uint8)
        packed = PackedTensor(
            name=weight.name,
            shape=weight.shape,
            format="gguf.q8_0",
            parts={"blocks": blocks.reshape(weight.shape[0], -1)},
        )
        return packed if self._packs else unpacked(packed)


def test_types_and_block_sizes_that_are_not_claimed_are_refused(open_simulated: OpenSimulated) -> None:
    case = next(iter(operation_cases(block_size=7)))
    with pytest.raises(SettingsError, match="no dtype 'bfloat16'"):
        open_simulated(block_sizes="7").compile(case.graph(), case, _bounds("bfloat16"))
    assert open_simulated().capabilities.block_sizes == (24, 7, 16)
    assert open_simulated(next(iter(DATA_SHEETS))).capabilities.dtypes == ("float16", "float32")
