"""Devices with limits, block sizes and cache types of their own: the engine keeps within them and loses nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from midspan import LLM, SamplingParams, SettingsError
from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice, load_plugins
from midspan.engine.status import StartupPhase
from midspan.interface import (
    Batch,
    Bounds,
    Cache,
    CacheLayout,
    Capabilities,
    DeviceInfo,
    DevicePlugin,
    Found,
    Graph,
    Program,
    StepOutput,
    WeightSource,
)
from midspan.interface.version import INTERFACE_VERSION
from midspan.runtimes.reference import ReferenceCache, ReferenceDevice

PROMPTS = ["the quick brown fox jumps", "a tale of two cities and of three bears", "to be", "naïve café"]
GREEDY = SamplingParams(temperature=0, max_tokens=21, ignore_eos=True)
MEMORY = 16 * 2**20
INFO = DeviceInfo(id="odd", description="odd in every way", memory_bytes=MEMORY)


class WatchedProgram:
    """The reference's program; remembers how large the largest step was, and what it was compiled for."""

    def __init__(self, program: Program, bounds: Bounds) -> None:
        self.placement = program.placement
        self.bounds = bounds
        self.tokens = self.requests = self.rows = self.context = 0
        self._program = program
        self.evaluate, self.memory_bytes, self.close = program.evaluate, program.memory_bytes, program.close

    def run(self, batch: Batch, cache: Cache) -> StepOutput:
        self.tokens = max(self.tokens, len(batch.token_ids))
        self.requests = max(self.requests, len(batch.context_lengths))
        self.rows = max(self.rows, len(batch.rows_to_sample))
        self.context = max(self.context, int(batch.context_lengths.max()))
        return self._program.run(batch, cache)


class OddDevice(ReferenceDevice):
    """The definitions, behind claims of its own."""

    program: WatchedProgram

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> Any:
        self.program = WatchedProgram(super().compile(graph, weights, bounds), bounds)
        return self.program


class Float8Cache:
    """Keeps float8, an element type of which the core has never heard."""

    def __init__(self, layout: CacheLayout, blocks: tuple[int, ...]) -> None:
        self.layout, self.blocks = layout, blocks
        self._inner = ReferenceCache(dataclasses.replace(layout, dtype="float32"), blocks)
        self.copy, self.close = self._inner.copy, self._inner.close

    def read(self, group: str, blocks: Sequence[int]) -> NDArray[np.float32]:
        return self._inner.read(group, blocks)

    def write(self, group: str, blocks: Sequence[int], data: NDArray[np.float32]) -> None:
        self._inner.write(group, blocks, data.astype(ml_dtypes.float8_e4m3).astype(np.float32))

    def memory_bytes(self) -> int:
        return self._inner.memory_bytes() // 4


class Float8Device(OddDevice):
    """Lays out float8 in its own way."""

    def block_bytes(self, layout: CacheLayout) -> tuple[int, ...]:
        return tuple(group.values_per_token() * layout.block_size + 64 for group in layout.groups)


Make = Callable[..., tuple[LLM, OddDevice, list[StartupPhase]]]


@pytest.fixture
def make_odd(tiny_model: Path) -> Make:
    """An LLM on an odd device: ``make_odd(capabilities, kind=OddDevice, make_cache=ReferenceCache, **settings)``."""

    def make(
        capabilities: Capabilities,
        *,
        kind: type[OddDevice] = OddDevice,
        make_cache: Any = ReferenceCache,
        **settings: Any,
    ) -> tuple[LLM, OddDevice, list[StartupPhase]]:
        device = kind(INFO, capabilities=capabilities, make_cache=make_cache)
        plugin = DevicePlugin(
            name="odd", interface=INTERFACE_VERSION, probe=lambda: Found((INFO,)), open=lambda info, options: device
        )
        found = DiscoveredDevice(plugin=plugin, distribution="tests", version="1", probe=plugin.probe())
        catalogue = DeviceCatalogue(plugins={"odd": found}, failures=(), registry=load_plugins([]))
        phases: list[StartupPhase] = []
        return LLM(str(tiny_model), catalogue=catalogue, report=phases.append, **settings), device, phases

    return make


def texts(llm: LLM) -> list[tuple[int, ...]]:
    with llm:
        return [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def expected(tiny_llm: LLM) -> list[tuple[int, ...]]:
    return [tuple(output.outputs[0].token_ids) for output in tiny_llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("block_size", [7, 24, 1, 3])
@pytest.mark.parametrize("settings", [{}, {"kv_cache_memory_bytes": 70 * 1024, "max_model_len": 80}], ids=str)
def test_any_block_size_gives_the_same_tokens(
    make_odd: Make, expected: list[tuple[int, ...]], block_size: int, settings: dict[str, int]
) -> None:
    llm, device, _ = make_odd(Capabilities(block_sizes=(block_size,)), **settings)
    assert llm.model.block_size == device.program.bounds.block_size == block_size
    assert texts(llm) == expected


def test_limits_of_the_device_are_kept_reported_and_cost_no_token(
    make_odd: Make, expected: list[tuple[int, ...]]
) -> None:
    claims = Capabilities(max_tokens=11, max_requests=3, max_context=60, max_sampled_rows=2)
    llm, device, phases = make_odd(claims)
    assert (llm.model.max_num_seqs, llm.model.max_model_len) == (3, 60)
    (told,) = [phase.detail for phase in phases if phase.name == "limits"]
    for limit in ("max_num_batched_tokens is 11", "max_num_seqs is 3", "max_model_len is 60 instead of 256"):
        assert limit in told
    assert texts(llm) == expected
    watched = device.program
    assert (watched.tokens, watched.rows) == (11, 2)
    assert watched.requests <= 3
    assert watched.context <= 60


def test_prompt_scores_keep_within_the_rows_that_a_step_samples(make_odd: Make, tiny_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, ignore_eos=True)
    wanted = tiny_llm.generate(PROMPTS, params)
    llm, device, _ = make_odd(Capabilities(max_sampled_rows=3))
    with llm:
        got = llm.generate(PROMPTS, params)
    for one, other in zip(got, wanted, strict=True):
        assert one.prompt_logprobs == other.prompt_logprobs
    assert device.program.rows == 3


@pytest.mark.parametrize(
    ("claims", "settings", "text"),
    [
        ({"max_tokens": 100}, {"max_num_batched_tokens": 101}, "max_num_batched_tokens is 101.* takes 100 at most"),
        ({"max_requests": 8}, {"max_num_seqs": 9}, "max_num_seqs is 9.* takes 8 at most"),
        ({"max_context": 64}, {"max_model_len": 65}, "max_model_len is 65.* takes 64 at most"),
        ({"block_sizes": (7, 24)}, {"block_size": 16}, "block_size=16.* 7, 24"),
        ({"cache_dtypes": ("float8_own",)}, {"kv_cache_dtype": "float32"}, "kv_cache_dtype=float32.* float8_own"),
    ],
)
def test_what_was_asked_for_and_the_device_does_not_take_is_an_error(
    make_odd: Make, claims: dict[str, Any], settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(SettingsError, match=text):
        make_odd(Capabilities(**claims), **settings)


def test_what_was_asked_for_within_the_limits_is_taken_in_silence(make_odd: Make) -> None:
    claims = Capabilities(max_tokens=100, max_requests=8, max_context=64)
    llm, device, phases = make_odd(claims, max_num_batched_tokens=50, max_num_seqs=8, max_model_len=64)
    with llm:
        bounds = device.program.bounds
        assert (bounds.max_tokens, bounds.max_requests, bounds.max_context) == (50, 8, 64)
        assert [phase for phase in phases if phase.name == "limits"] == []


@pytest.fixture
def float8(make_odd: Make) -> Make:
    """As ``make_odd``, with a cache of float8."""

    def make(**settings: Any) -> tuple[LLM, OddDevice, list[StartupPhase]]:
        claims = Capabilities(cache_dtypes=("float8_own",), block_sizes=(7,))
        return make_odd(claims, kind=Float8Device, make_cache=Float8Cache, **settings)

    return make


def test_a_cache_type_that_the_core_does_not_know_is_planned_by_the_devices_own_bytes(float8: Make) -> None:
    llm, _, _ = float8(kv_cache_memory_bytes=200_000)
    # 2 layers, 2 heads, keys and values of 8: 64 bytes a token, and 64 for each block of 7.
    block = 64 * 8
    assert llm.model.cache_dtype == "float8_own"
    assert llm.model.cache_bytes == 200_000 // block * block
    llm.close()


def test_tokens_attend_to_what_a_rounding_cache_kept_in_the_step_that_wrote_it_and_later(
    float8: Make, expected: list[tuple[int, ...]]
) -> None:
    llm, _, _ = float8(kv_cache_memory_bytes=2**20)
    whole = texts(llm)
    llm, _, _ = float8(kv_cache_memory_bytes=2**20, max_num_batched_tokens=3, enable_prefix_caching=False)
    assert texts(llm) == whole
    assert whole != expected
