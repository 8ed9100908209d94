"""What tests of every kind share: their order, weights in memory, and sequences driven through a device by hand.

``drive`` runs a graph on any opened ``Device`` without scheduler, engine or text:
it hands out blocks in a shuffled order, gives blocks before a window back, mixes
prefill chunks and decodes in one batch, and samples greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from midspan.errors import CheckpointError
from midspan.interface import (
    Batch,
    Bounds,
    Cache,
    CacheGroup,
    CacheLayout,
    Device,
    Found,
    Graph,
    PackedTensor,
    Program,
    SamplingBatch,
    StepResult,
    Weight,
    WeightSource,
)
from midspan.interface.cache import PADDING_BLOCK
from midspan.runtimes.reference.device import PLUGIN as REFERENCE


def pytest_configure(config: pytest.Config) -> None:
    """Where files are dealt out to several processes, let it be in the order below and not by their number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """There the files that take long come first: begun last, one would keep a process busy and the others waiting."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@dataclass(frozen=True)
class DictWeights:
    """A ``WeightSource`` over arrays by published name."""

    arrays: Mapping[str, NDArray[Any]]

    def load(self, weight: Weight) -> PackedTensor:
        sources = (weight.name,) if weight.name in self.arrays else weight.sources or (weight.name,)
        missing = [name for name in sources if name not in self.arrays]
        if missing:
            raise CheckpointError(f"tensor '{missing[0]}' is missing")
        parts = [self.arrays[name] for name in sources]
        data = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if data.shape != weight.shape:
            raise CheckpointError(f"'{weight.name}' has shape {data.shape}, the graph wants {weight.shape}")
        return PackedTensor(name=weight.name, shape=weight.shape, format="dense", parts={"data": data})


@dataclass
class DrivenSequence:
    """One sequence: its tokens, how many are in the cache, and its blocks by group."""

    tokens: list[int]
    prompt_length: int
    computed: int = 0
    blocks: dict[str, list[int]] = field(default_factory=dict)
    logprobs: list[dict[int, float]] = field(default_factory=list)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]


class SequenceDriver:
    """A program, a cache, and hand-built batches for some sequences."""

    def __init__(
        self,
        device: Device,
        graph: Graph,
        weights: WeightSource,
        *,
        dtype: str = "float32",
        cache_dtype: str = "float32",
        block_size: int = 16,
        max_context: int = 256,
        max_requests: int = 64,
        max_tokens: int = 2048,
        kernels: dict[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.graph = graph
        self.block_size = block_size
        bounds = Bounds(
            max_tokens=max_tokens,
            max_requests=max_requests,
            max_context=max_context,
            max_sampled_rows=max_tokens,
            block_size=block_size,
            dtype=dtype,
            cache_dtype=cache_dtype,
            kernels=kernels or {},
        )
        self.program: Program = device.compile(graph, weights, bounds)
        count = 1 + max_requests * (max_context // block_size + 1)
        layout = CacheLayout(groups=graph.cache, block_size=block_size, dtype=cache_dtype)
        self.cache: Cache = device.allocate_cache(layout, (count,) * len(graph.cache))
        random = np.random.default_rng(seed)
        self._free = {group.name: [int(b) for b in 1 + random.permutation(count - 1)] for group in graph.cache}

    def close(self) -> None:
        self.cache.close()
        self.program.close()

    def sequence(self, prompt: Sequence[int]) -> DrivenSequence:
        return DrivenSequence(list(prompt), len(prompt), blocks={group.name: [] for group in self.graph.cache})

    def release(self, sequence: DrivenSequence) -> None:
        """Give all blocks of a sequence back; it can start again from its first token."""
        for group, blocks in sequence.blocks.items():
            self._free[group].extend(block for block in blocks if block != PADDING_BLOCK)
            blocks.clear()
        sequence.computed = 0

    def batch(
        self,
        chunks: Sequence[tuple[DrivenSequence, int]],
        *,
        sampling: Callable[[Sequence[DrivenSequence]], SamplingBatch] | None = None,
        num_logprobs: int | None = None,
    ) -> tuple[Batch, list[DrivenSequence]]:
        """A batch that computes so many next tokens of each sequence, and the sequences that are sampled."""
        slots: dict[str, list[int]] = {group.name: [] for group in self.graph.cache}
        sampled, rows, total = [], [], 0
        for sequence, count in chunks:
            for group in self.graph.cache:
                slots[group.name] += self._place(sequence, group, count)
            total += count
            if sequence.computed + count == len(sequence.tokens):
                sampled.append(sequence)
                rows.append(total - 1)
        numbers = self._numbers(chunks)
        tables = {group.name: self._table(chunks, group.name) for group in self.graph.cache}
        make = sampling or (lambda chosen: self.greedy(chosen, num_logprobs))
        batch = Batch(
            **numbers,
            block_tables=tables,
            slots={name: np.array(values, np.int32) for name, values in slots.items()},
            rows_to_sample=np.array(rows, np.int32),
            sampling=make(sampled),
        )
        return batch, sampled

    def step(self, chunks: Sequence[tuple[DrivenSequence, int]], **options: Any) -> StepResult:
        """Run one batch, and append what was sampled."""
        batch, sampled = self.batch(chunks, **options)
        result = self.program.run(batch, self.cache).result()
        for sequence, count in chunks:
            sequence.computed += count
        for row, sequence in enumerate(sampled):
            sequence.tokens.append(int(result.token_ids[row]))
            if result.logprobs is not None:
                ids, values = result.logprobs.top_token_ids[row], result.logprobs.top[row]
                sequence.logprobs.append({int(i): float(v) for i, v in zip(ids, values, strict=True)})
        return result

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        steps: int,
        *,
        budget: int = 2048,
        arrivals: Sequence[int] | None = None,
        **options: Any,
    ) -> list[DrivenSequence]:
        """Continuous batching: ``budget`` tokens a step, oldest first, prompts cut into chunks to fit.

        ``arrivals`` are the steps at which the sequences come in.
        """
        sequences = [self.sequence(prompt) for prompt in prompts]
        starts = list(arrivals or [0] * len(sequences))
        now = 0
        while any(len(sequence.generated) < steps for sequence in sequences):
            chunks, left = [], budget
            for sequence, start in zip(sequences, starts, strict=True):
                wanted = min(left, len(sequence.tokens) - sequence.computed)
                if start <= now and wanted > 0 and len(sequence.generated) < steps:
                    chunks.append((sequence, wanted))
                    left -= wanted
            if chunks:
                self.step(chunks, **options)
            now += 1
        return sequences

    def greedy(self, sampled: Sequence[DrivenSequence], num_logprobs: int | None = None) -> SamplingBatch:
        rows = len(sampled)
        return SamplingBatch(
            temperature=np.zeros(rows, np.float32),
            top_k=np.full(rows, self.graph.vocab_size, np.int32),
            top_p=np.ones(rows, np.float32),
            min_p=np.zeros(rows, np.float32),
            seeds=np.zeros(rows, np.uint64),
            positions=np.array([len(sequence.tokens) for sequence in sampled], np.int64),
            num_logprobs=num_logprobs,
        )

    def _numbers(self, chunks: Sequence[tuple[DrivenSequence, int]]) -> dict[str, NDArray[np.int32]]:
        spans = [(sequence, sequence.computed, sequence.computed + count) for sequence, count in chunks]
        return {
            "token_ids": np.concatenate([sequence.tokens[first:end] for sequence, first, end in spans]).astype(
                np.int32
            ),
            "positions": np.concatenate([np.arange(first, end) for _, first, end in spans]).astype(np.int32),
            "query_starts": np.cumsum([0, *(count for _, count in chunks)]).astype(np.int32),
            "context_lengths": np.array([end for _, _, end in spans], np.int32),
        }

    def _place(self, sequence: DrivenSequence, group: CacheGroup, count: int) -> list[int]:
        """Blocks for the next tokens; gives back what no token of this step or later can see. Returns slots."""
        blocks, size = sequence.blocks[group.name], self.block_size
        while len(blocks) * size < sequence.computed + count:
            blocks.append(self._free[group.name].pop())
        if group.window is not None:
            unseen = max(0, sequence.computed - group.window + 1) // size
            for index, block in enumerate(blocks[:unseen]):
                if block != PADDING_BLOCK:
                    self._free[group.name].append(block)
                    blocks[index] = PADDING_BLOCK
        positions = range(sequence.computed, sequence.computed + count)
        return [blocks[position // size] * size + position % size for position in positions]

    def _table(self, chunks: Sequence[tuple[DrivenSequence, int]], group: str) -> NDArray[np.int32]:
        rows = [sequence.blocks[group] for sequence, _ in chunks]
        table = np.full((len(rows), max(map(len, rows))), PADDING_BLOCK, np.int32)
        for index, blocks in enumerate(rows):
            table[index, : len(blocks)] = blocks
        return table


@pytest.fixture
def drive() -> Iterator[Callable[..., SequenceDriver]]:
    """Make a ``SequenceDriver``: ``drive(device, graph, weights, **options)``; weights by name, or a source."""
    drivers: list[SequenceDriver] = []

    def make(
        device: Device, graph: Graph, weights: Mapping[str, NDArray[Any]] | WeightSource, **options: Any
    ) -> SequenceDriver:
        source = DictWeights(weights) if isinstance(weights, Mapping) else weights
        driver = SequenceDriver(device, graph, source, **options)
        drivers.append(driver)
        return driver

    yield make
    for driver in drivers:
        driver.close()


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., dict[str, NDArray[np.float32]]]:
    """Make float32 arrays for all weights of a graph that no pass has changed: ``random_weights(graph, seed=0)``.

    Matrices are scaled to keep the size of their input; norm weights lie around 1, biases around 0.
    """

    def make(graph: Graph, seed: int = 0) -> dict[str, NDArray[np.float32]]:
        random = np.random.default_rng(seed)
        arrays = {}
        for name, weight in graph.weights.items():
            array = random.standard_normal(weight.shape, np.float32)
            if len(weight.shape) > 1:
                array *= np.float32(weight.shape[-1] ** -0.5)
            elif name.endswith(".weight"):
                array = 1 + np.float32(0.1) * array
            arrays[name] = array.astype(np.float32)
        return arrays

    return make


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., dict[str, Any]]:
    """Make a published config of a tiny Llama; any field can be replaced: ``tiny_config(num_hidden_layers=3)``."""

    def make(**fields: Any) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            **fields,
        }

    return make


@pytest.fixture
def reference_device() -> Iterator[Device]:
    """The reference device, opened."""
    found = REFERENCE.probe()
    assert isinstance(found, Found)
    device = REFERENCE.open(found.devices[0], {})
    yield device
    device.close()
