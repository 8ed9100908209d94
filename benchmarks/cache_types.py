"""What the type of the KV cache costs: time of attention in one step over long contexts.

A Llama of few layers with random weights runs one step, in which each sequence has one token (or, with ``--tokens``,
a chunk of its prompt) and a cache full of random keys and values. Shown are the milliseconds of a layer's attention,
writing the tokens included; the bytes of a layer's cache; and how many of them are read a second. The types are
measured in turn, several times over, and the best of each is taken, so that other work on the machine disturbs
little. Knows the device by its plugin's name only, and wants programs that time their nodes (``profile``).

    python benchmarks/cache_types.py
    python benchmarks/cache_types.py --sequences 1 --context 32768 --types bfloat16,int8
    python benchmarks/cache_types.py --sequences 1 --tokens 512
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from midspan.graph.passes import apply_passes
from midspan.interface import Batch, Bounds, Cache, CacheLayout, Device, Graph, SamplingBatch
from midspan.models.catalogue import build_graph
from midspan.weights.dummy_weights import with_dummy_weights
from midspan.weights.store import CheckpointWeights
from midspan.weights.stored_tensor import Checkpoint

LAYERS = 2
VOCABULARY = 512


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A program and the one batch that is timed."""

    program: Any
    cache: Cache
    batch: Batch

    def milliseconds(self) -> float:
        """A layer's attention, mean over the layers, best of a few turns."""
        times = self.program.profile(self.batch, self.cache, repeat=5)
        return float(statistics.mean(time.nanoseconds for time in times if time.op == "attention")) / 1e6

    def kernels(self) -> str:
        """Who serves attention."""
        return ",".join(sorted({node.kernel for node in self.program.placement.nodes if node.op == "attention"}))

    def close(self) -> None:
        """Give the memory back."""
        self.cache.close()
        self.program.close()


def llama(arguments: argparse.Namespace) -> dict[str, Any]:
    """A published config with the heads that were asked for."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "head_dim": arguments.head_size,
        "max_position_embeddings": arguments.context + 1,
        "rms_norm_eps": 1e-5,
        "torch_dtype": arguments.dtype,
    }


def prepare(device: Device, graph: Graph, weights: CheckpointWeights, cache_dtype: str, arguments: Any) -> Measured:
    """Compile, and fill the cache; blocks lie scattered, as they do in a server that has run for a while."""
    sequences, context, block_size = arguments.sequences, arguments.context, device.capabilities.block_sizes[0]
    per_sequence, count = -(-context // block_size), arguments.tokens
    bounds = Bounds(
        max_tokens=sequences * count,
        max_requests=sequences,
        max_context=context + 1,
        max_sampled_rows=sequences,
        block_size=block_size,
        dtype=arguments.dtype,
        cache_dtype=cache_dtype,
    )
    program = device.compile(graph, weights, bounds)
    (group,) = graph.cache
    layout = CacheLayout(groups=graph.cache, block_size=block_size, dtype=cache_dtype)
    cache = device.allocate_cache(layout, (1 + sequences * per_sequence,))
    random = np.random.default_rng(0)
    table = (1 + random.permutation(sequences * per_sequence)).astype(np.int32).reshape(sequences, per_sequence)
    shape = (group.layers, 2, per_sequence, block_size, group.kv_heads, group.key_size)
    content = random.standard_normal(shape, np.float32)
    for row in table:
        cache.write(group.name, row.tolist(), content)
    positions = np.arange(context - count, context, dtype=np.int32)
    starts = np.arange(sequences + 1, dtype=np.int32) * count
    sampling = SamplingBatch(
        temperature=np.zeros(sequences, np.float32),
        top_k=np.full(sequences, VOCABULARY, np.int32),
        top_p=np.ones(sequences, np.float32),
        min_p=np.zeros(sequences, np.float32),
        seeds=np.zeros(sequences, np.uint64),
        positions=np.full(sequences, context, np.int64),
        num_logprobs=None,
    )
    slots = table[:, positions // block_size] * block_size + positions % block_size
    batch = Batch(
        token_ids=np.arange(sequences * count, dtype=np.int32) % VOCABULARY,
        positions=np.tile(positions, sequences),
        query_starts=starts,
        context_lengths=np.full(sequences, context, np.int32),
        block_tables={group.name: table},
        slots={group.name: slots.ravel().astype(np.int32)},
        rows_to_sample=starts[1:] - 1,
        sampling=sampling,
    )
    return Measured(program=program, cache=cache, batch=batch)


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="a plugin's name")
    parser.add_argument("--option", action="append", default=[], help="KEY=VALUE for the device")
    parser.add_argument("--dtype", default="bfloat16", help="of activations")
    parser.add_argument("--types", default="bfloat16,int8,float8_e4m3")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1, help="of each sequence in the step")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    plugin = import_module(f"midspan_{arguments.device}.plugin").PLUGIN
    device = plugin.open(plugin.probe().devices[0], dict(option.split("=", 1) for option in arguments.option))
    graph = build_graph(llama(arguments))
    checkpoint = Checkpoint(path=Path("random"), config=llama(arguments), generation_config={}, tensors={})
    weights = CheckpointWeights(with_dummy_weights(checkpoint, graph), quantizations=())
    types = arguments.types.split(",")
    prepared = {name: prepare(device, apply_passes(graph), weights, name, arguments) for name in types}
    best = dict.fromkeys(types, float("inf"))
    for _ in range(arguments.repetitions):
        for name, measured in prepared.items():
            best[name] = min(best[name], measured.milliseconds())
    for name, measured in prepared.items():
        read = measured.cache.memory_bytes() / LAYERS
        gigabytes = read / best[name] / 1e6
        print(
            f"{name:<12} {measured.kernels():<9} {best[name]:8.3f} ms a layer   {read / 1e6:8.1f} MB   "
            f"{gigabytes:6.1f} GB/s   {best[types[0]] / best[name]:5.2f} times {types[0]}",
            flush=True,
        )
        measured.close()
    device.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
