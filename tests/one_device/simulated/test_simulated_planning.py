"""Models too large for this machine are planned on it: memory that is really counted, time that is modelled."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midspan import SamplingParams
from midspan.errors import CacheTooSmall, MidspanError, OutOfDeviceMemory, SettingsError
from midspan.graph.passes import apply_passes
from midspan.interface import Bounds, CacheLayout, Graph, PackedTensor, Weight
from midspan.models.catalogue import build_graph
from midspan_simulated.data_sheet_table import DATA_SHEETS
from midspan_simulated.stored_weights import STORED_FORMATS, stored_bytes

OpenSimulated = Callable[..., Any]
MakeLLM = Callable[..., Any]

LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
LINEAR_PARAMETERS_70B = 80 * (8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672)
TABLE_PARAMETERS_70B = 2 * 128256 * 8192
NORM_PARAMETERS_70B = 161 * 8192


@pytest.fixture(scope="module")
def folder_70b(write_config: Callable[..., Path]) -> Path:
    return write_config(**LLAMA_70B)


class NoWeights:
    """A source that nobody may ask."""

    def load(self, weight: Weight) -> PackedTensor:
        raise AssertionError(f"'{weight.name}' was asked for")


def bounds(**changes: Any) -> Bounds:
    chosen: dict[str, Any] = {"dtype": "bfloat16", "cache_dtype": "bfloat16", "block_size": 16, **changes}
    return Bounds(max_tokens=2048, max_requests=64, max_context=8192, max_sampled_rows=64, **chosen)


@pytest.fixture(scope="module")
def graph_70b() -> Graph:
    return apply_passes(build_graph({**LLAMA_70B, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}))


def test_seventy_billion_parameters_are_served_in_seconds_and_no_weight_is_made(
    make_llm: MakeLLM, folder_70b: Path
) -> None:
    llm = make_llm("simulated:mi300x", {"numerics": "off"}, model=folder_70b, max_model_len=4096)
    params = SamplingParams(max_tokens=64, ignore_eos=True, logprobs=2)
    outputs = llm.generate([list(range(10, 400)) for _ in range(8)], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [64] * 8
    statistics = llm.statistics()
    weights = 2 * (LINEAR_PARAMETERS_70B + TABLE_PARAMETERS_70B + NORM_PARAMETERS_70B)
    assert 0 < llm.model.weights_bytes - weights < 3e9
    assert llm.model.cache_bytes <= 192e9 - weights
    # All weights are read in each step, so no step of the last requests can be faster than that.
    assert statistics.step_device_seconds > 2 * LINEAR_PARAMETERS_70B / 5.3e12


def test_the_same_requests_get_the_same_made_up_tokens(make_llm: MakeLLM) -> None:
    params = SamplingParams(max_tokens=20, seed=5, temperature=1.0, ignore_eos=True, prompt_logprobs=1)
    one, other = (make_llm("simulated:h100", {"numerics": "off"}) for _ in range(2))
    (first,), (second,) = one.generate([[1, 2, 3]], params), other.generate([[1, 2, 3]], params)
    assert first.outputs == second.outputs
    assert len(set(first.outputs[0].token_ids)) > 5
    assert [next(iter(scores)) for scores in first.prompt_logprobs[1:]] == [2, 3]


def test_what_does_not_fit_is_said_with_what_would_help(make_llm: MakeLLM, folder_70b: Path) -> None:
    with pytest.raises(
        OutOfDeviceMemory, match=r"takes 14\d\.\d GB, and device 'simulated:h100' has 80\.0 GB free"
    ) as error:
        make_llm("simulated:h100", {"numerics": "off"}, model=folder_70b)
    assert "devices=N" in error.value.remedy
    assert "weights=int4" in error.value.remedy
    with pytest.raises(CacheTooSmall):
        make_llm(
            "simulated:h100",
            {"numerics": "off", "weights": "int4", "memory": "41GB"},
            model=folder_70b,
            max_model_len=8192,
        )


def test_it_fits_on_four_devices_or_as_int4_on_one(make_llm: MakeLLM, folder_70b: Path) -> None:
    four = make_llm("simulated:h100", {"numerics": "off", "devices": "4"}, model=folder_70b, max_model_len=2048)
    int4 = make_llm("simulated:h100", {"numerics": "off", "weights": "int4"}, model=folder_70b, max_model_len=2048)
    assert four.model.weights_bytes > 141e9
    packed = math.ceil(LINEAR_PARAMETERS_70B * STORED_FORMATS["int4"]) + 2 * TABLE_PARAMETERS_70B
    assert packed < int4.model.weights_bytes < packed + 3e9
    for llm in (four, int4):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    read = 2 * LINEAR_PARAMETERS_70B / 4 / 3.35e12
    assert read < four.statistics().step_device_seconds < 1.3 * read + 1e-3 + 161 * 6 * 3e-6


def test_weights_are_counted_by_shape_and_format(graph_70b: Graph) -> None:
    dense = stored_bytes(graph_70b, "bfloat16", None)
    assert sum(dense.values()) == 2 * (LINEAR_PARAMETERS_70B + TABLE_PARAMETERS_70B + NORM_PARAMETERS_70B)
    eight = stored_bytes(graph_70b, "bfloat16", "fp8")
    assert sum(eight.values()) == LINEAR_PARAMETERS_70B + 2 * (TABLE_PARAMETERS_70B + NORM_PARAMETERS_70B)


def test_memory_is_counted_from_opening_to_closing(open_simulated: OpenSimulated, graph_70b: Graph) -> None:
    device = open_simulated("mi300x", numerics="off")
    assert (device.memory().free_bytes, device.memory().used_bytes) == (192 * 10**9, 0)
    program = device.compile(graph_70b, NoWeights(), bounds())
    layout = CacheLayout(groups=graph_70b.cache, block_size=16, dtype="bfloat16")
    assert device.block_bytes(layout) == (80 * 8 * 2 * 128 * 16 * 2,)
    cache = device.allocate_cache(layout, (1000,))
    assert cache.memory_bytes() == 1000 * device.block_bytes(layout)[0]
    used = program.memory_bytes() + cache.memory_bytes()
    assert (device.memory().used_bytes, device.memory().free_bytes) == (used, 192 * 10**9 - used)
    with pytest.raises(OutOfDeviceMemory, match="A cache takes"):
        device.allocate_cache(layout, (10**5,))
    assert not cache.read("full", [3]).any()
    cache.write("full", [3], cache.read("full", [3]) + 1)
    cache.copy("full", [(3, 4)])
    assert not cache.read("full", [3, 4]).any()
    cache.close()
    program.close()
    assert device.memory().used_bytes == 0


def test_several_devices_hold_the_model_once_and_what_they_share_several_times(
    open_simulated: OpenSimulated, graph_70b: Graph
) -> None:
    layout = CacheLayout(groups=graph_70b.cache, block_size=16, dtype="bfloat16")
    one, eight, sixteen = (open_simulated("mi300x", numerics="off", devices=str(count)) for count in (1, 8, 16))
    assert sixteen.info.memory_bytes == sixteen.memory().total_bytes == 16 * 192 * 10**9
    assert eight.block_bytes(layout) == one.block_bytes(layout)
    assert sixteen.block_bytes(layout) == (2 * one.block_bytes(layout)[0],)
    sizes = [device.compile(graph_70b, NoWeights(), bounds()).memory_bytes() for device in (one, eight)]
    assert sizes[0] < sizes[1] < 1.15 * sizes[0]


def test_a_device_that_computes_nothing_says_so_when_it_is_asked_for_numbers(
    open_simulated: OpenSimulated, graph_70b: Graph
) -> None:
    device = open_simulated("mi300x", numerics="off")
    program = device.compile(graph_70b, NoWeights(), bounds())
    assert {node.kernel for node in program.placement.nodes} == {"modelled"}
    with pytest.raises(MidspanError, match="numerics=off"):
        program.evaluate({})
    with pytest.raises(SettingsError, match="computes nothing"):
        device.compile(graph_70b, NoWeights(), bounds(kernels={"linear": "simulated"}))
    with pytest.raises(SettingsError, match="no block_size '17'"):
        device.compile(graph_70b, NoWeights(), bounds(block_size=17))
    with pytest.raises(SettingsError, match="no dtype 'float16'"):
        open_simulated("tpu-v5e", numerics="off").compile(graph_70b, NoWeights(), bounds(dtype="float16"))


def test_options_about_time_need_a_data_sheet_and_plans_need_numerics_off(open_simulated: OpenSimulated) -> None:
    for options in ({"devices": "2"}, {"weights": "int4"}):
        with pytest.raises(SettingsError, match="needs numerics=off"):
            open_simulated("h100", **options)
        with pytest.raises(SettingsError, match="no data sheet"):
            open_simulated(numerics="off", **options)
    with pytest.raises(SettingsError, match="no data sheet"):
        open_simulated(compute_efficiency="0.5")
    with pytest.raises(SettingsError, match="No link"):
        open_simulated("epyc-9654", numerics="off", devices="2")
    with pytest.raises(SettingsError, match="published"):
        open_simulated("tpu-v5e", dtypes="float32")


def test_every_sheet_has_sources_and_figures_that_can_be_right() -> None:
    assert len(DATA_SHEETS) >= 8
    assert len({sheet.product.split()[0] for sheet in DATA_SHEETS.values()}) >= 5
    for name, sheet in DATA_SHEETS.items():
        assert name == sheet.name
        assert sheet.sources
        assert all(source.url.startswith("https://") for source in sheet.sources)
        assert 10**10 < sheet.memory_bytes < 10**12
        assert 10**11 < sheet.bandwidth < 10**13
        assert sheet.dtypes()
        assert set(sheet.peaks) == set(sheet.dtypes())
        assert all(10 < peak / sheet.bandwidth < 1000 for peak in list(sheet.peaks.values())[:1])
        assert sheet.link_bandwidth is None or sheet.link_bandwidth < sheet.bandwidth
