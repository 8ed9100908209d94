"""Cases of the attention operation: ragged batches over a paged cache.

Numpy only; see ``operation_case``. Blocks are handed out in random order, so that
nothing can rely on neighbours, and the padding block belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from midspan.conformance.operation_case import CacheContent, OperationCase
from midspan.conformance.random_values import grid
from midspan.interface.cache import CacheGroup
from midspan.interface.graph import Attribute


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What to make a case of.

    Attributes:
        requests: for each (tokens in the cache before the step, new tokens).
        heads, kv_heads, key_size, value_size, window: as in the operation.
        layers: layers of the cache group; the node is the last of them.
        attributes: further attributes of the node.
        sinks: give the node sinks.
    """

    requests: Sequence[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    key_size: int = 32
    value_size: int = 32
    window: int | None = None
    layers: int = 1
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    sinks: bool = False


RAGGED = ((0, 5), (17, 1), (30, 3), (0, 1), (63, 1), (15, 2))
"""Prefill, decode and chunks together, some at block borders."""


SHAPES: Mapping[str, AttentionShape] = {
    "one decode": AttentionShape(requests=((40, 1),)),
    "first token": AttentionShape(requests=((0, 1),)),
    "one prefill": AttentionShape(requests=((0, 37),)),
    "a long prefill in several pieces": AttentionShape(requests=((3, 300),), heads=2, kv_heads=1),
    "a ragged batch": AttentionShape(requests=RAGGED),
    "many decodes": AttentionShape(requests=tuple((3 * index, 1) for index in range(33))),
    "multi-head": AttentionShape(requests=RAGGED, heads=3, kv_heads=3),
    "nine heads share three": AttentionShape(requests=RAGGED, heads=9, kv_heads=3, key_size=64, value_size=64),
    "one head for all": AttentionShape(requests=RAGGED, heads=8, kv_heads=1),
    "wide heads": AttentionShape(requests=RAGGED, key_size=128, value_size=128),
    "odd head size": AttentionShape(requests=RAGGED, key_size=80, value_size=80),
    "head size of no vector": AttentionShape(requests=RAGGED, key_size=20, value_size=20),
    "keys wider than values": AttentionShape(requests=RAGGED, key_size=48, value_size=32),
    "values wider than keys": AttentionShape(requests=RAGGED, key_size=32, value_size=64),
    "second layer": AttentionShape(requests=RAGGED, layers=2),
    "window": AttentionShape(requests=RAGGED, window=16),
    "window of one": AttentionShape(requests=RAGGED, window=1),
    "window across blocks, long chunk": AttentionShape(requests=((50, 90), (200, 1)), window=33),
    "soft cap": AttentionShape(requests=RAGGED, attributes={"soft_cap": 5.0}),
    "alibi": AttentionShape(requests=RAGGED, attributes={"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)}),
    "sinks": AttentionShape(requests=RAGGED, sinks=True),
    "sinks and window and cap": AttentionShape(
        requests=RAGGED, sinks=True, window=20, attributes={"soft_cap": 10.0, "scale": 0.5}
    ),
    "large scores": AttentionShape(requests=RAGGED, attributes={"scale": 8.0}),
    "no tokens": AttentionShape(requests=()),
}
"""Every variation of the operation, alone and together."""


def attention_cases(block_size: int) -> list[OperationCase]:
    """All cases for a block size that the device takes."""
    return [
        make_case(name, shape, block_size, np.random.default_rng(number))
        for number, (name, shape) in enumerate(SHAPES.items())
    ]


def make_case(name: str, shape: AttentionShape, block_size: int, random: np.random.Generator) -> OperationCase:
    """A case of a shape, with random content.

    Args:
        name: what is special.
        shape: see ``AttentionShape``.
        block_size: tokens per block.
        random: where everything random comes from.
    """
    group = CacheGroup(
        name="full",
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        key_size=shape.key_size,
        value_size=shape.value_size,
        window=shape.window,
    )
    lengths = [before + new for before, new in shape.requests]
    needed = [-(-length // block_size) for length in lengths]
    blocks = sum(needed) + 2
    order = random.permutation(np.arange(1, blocks)).tolist()
    tables = np.zeros((len(lengths), max(needed, default=0) + 1), np.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = [order.pop() for _ in range(count)]
    data = np.full((shape.layers, 2, blocks, block_size, shape.kv_heads, max(shape.key_size, shape.value_size)), np.nan)
    slots = []
    for row, (before, new) in enumerate(shape.requests):
        places = [
            int(tables[row, place // block_size]) * block_size + place % block_size for place in range(before + new)
        ]
        for slot in places[:before]:
            data[:, 0, slot // block_size, slot % block_size, :, : shape.key_size] = grid(
                random, (shape.layers, shape.kv_heads, shape.key_size)
            )
            data[:, 1, slot // block_size, slot % block_size, :, : shape.value_size] = grid(
                random, (shape.layers, shape.kv_heads, shape.value_size)
            )
        slots += places[before:]
    tokens = len(slots)
    return OperationCase(
        name=f"attention, {name}",
        op="attention",
        inputs=(
            grid(random, (tokens, shape.heads * shape.key_size)),
            grid(random, (tokens, shape.kv_heads * shape.key_size)),
            grid(random, (tokens, shape.kv_heads * shape.value_size)),
            np.cumsum([0, *(new for _, new in shape.requests)]).astype(np.int32),
            np.array(lengths, np.int32),
            tables,
            np.array(slots, np.int32),
        ),
        weights={"sinks": grid(random, (shape.heads,))} if shape.sinks else {},
        attributes={
            "group": "full",
            "layer": shape.layers - 1,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "key_size": shape.key_size,
            "value_size": shape.value_size,
            "scale": shape.key_size**-0.5,
            "window": shape.window,
            **shape.attributes,
        },
        cache=CacheContent(group=group, block_size=block_size, blocks=blocks, data=data.astype(np.float32)),
    )
