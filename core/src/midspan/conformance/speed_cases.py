"""Cases whose time is worth knowing: sizes of a small model's layers, in decode and in prefill.

Numpy only; see ``operation_case``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from midspan.conformance.attention_cases import AttentionShape, make_case
from midspan.conformance.operation_case import OperationCase
from midspan.conformance.packed_cases import packed_product
from midspan.conformance.random_values import grid
from midspan.interface import SamplingBatch

HIDDEN, INNER, VOCABULARY, HEADS, KV_HEADS, HEAD = 576, 1536, 8192, 9, 3, 64
DECODE, PREFILL = 4, 128
"""Rows of a step."""


def speed_cases(block_size: int, quantizations: tuple[str, ...]) -> Iterator[OperationCase]:
    """Every case.

    Args:
        block_size: tokens per cache block.
        quantizations: packed formats, for products beside the dense ones.
    """
    random = np.random.default_rng(41)
    for name, rows in (("decode", DECODE), ("prefill", PREFILL)):
        yield from _rows(name, rows, random)
        for packed in quantizations:
            yield packed_product(f"linear, {packed}, {name}", packed, rows, INNER, 512, random)
    yield _logits(random)
    decode = AttentionShape(
        requests=((250, 1),) * DECODE, heads=HEADS, kv_heads=KV_HEADS, key_size=HEAD, value_size=HEAD
    )
    prefill = AttentionShape(requests=((0, PREFILL),), heads=HEADS, kv_heads=KV_HEADS, key_size=HEAD, value_size=HEAD)
    yield make_case("decode", decode, block_size, random)
    yield make_case("prefill", prefill, block_size, random)
    for name, temperature in (("greedy", 0.0), ("random", 0.8)):
        yield OperationCase(
            name=f"sample, {name}",
            op="sample",
            inputs=(grid(random, (DECODE, VOCABULARY)), _sampling(DECODE, temperature)),
        )


def _rows(name: str, rows: int, random: np.random.Generator) -> Iterator[OperationCase]:
    x, inner = grid(random, (rows, HIDDEN), 2.0), grid(random, (rows, INNER))
    weight, vector = grid(random, (INNER, HIDDEN)), grid(random, (HIDDEN,))
    epsilon = {"epsilon": 1e-5}
    yield OperationCase(name=f"linear, {name}", op="linear", inputs=(x,), weights={"weight": weight})
    yield OperationCase(
        name=f"rms_norm, {name}", op="rms_norm", inputs=(x,), weights={"weight": vector}, attributes=epsilon
    )
    yield OperationCase(
        name=f"add_rms_norm, {name}", op="add_rms_norm", inputs=(x, x), weights={"weight": vector}, attributes=epsilon
    )
    yield OperationCase(name=f"add, {name}", op="add", inputs=(x, x))
    yield OperationCase(name=f"gated, {name}", op="gated", inputs=(inner, inner), attributes={"function": "silu"})
    yield OperationCase(name=f"gated_pair, {name}", op="gated_pair", inputs=(inner,), attributes={"function": "silu"})
    frequencies = tuple(float(10000.0 ** (-2.0 * pair / HEAD)) for pair in range(HEAD // 2))
    yield OperationCase(
        name=f"rotary, {name}",
        op="rotary",
        inputs=(
            grid(random, (rows, HEADS * HEAD)),
            grid(random, (rows, KV_HEADS * HEAD)),
            np.arange(rows, dtype=np.int32),
        ),
        attributes={"head_size": HEAD, "rotary_size": HEAD, "inverse_frequencies": frequencies},
    )
    ids = random.integers(0, INNER, rows).astype(np.int32)
    yield OperationCase(name=f"embedding, {name}", op="embedding", inputs=(ids,), weights={"weight": weight})


def _logits(random: np.random.Generator) -> OperationCase:
    weight = grid(random, (VOCABULARY, HIDDEN))
    return OperationCase(
        name="logits, decode", op="logits", inputs=(grid(random, (DECODE, HIDDEN)),), weights={"weight": weight}
    )


def _sampling(rows: int, temperature: float) -> SamplingBatch:
    return SamplingBatch(
        temperature=np.full(rows, temperature, np.float32),
        top_k=np.full(rows, VOCABULARY, np.int32),
        top_p=np.full(rows, 0.9, np.float32),
        min_p=np.zeros(rows, np.float32),
        seeds=np.arange(rows, dtype=np.uint64),
        positions=np.arange(10, 10 + rows, dtype=np.int64),
    )
