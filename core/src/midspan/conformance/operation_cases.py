"""The list of cases for every operation, for whoever holds kernels against the definitions.

Numpy only; see ``operation_case`` for what a case is and ``operation_margins`` for how
exactly it must be met. Sizes are small and often odd, rows are sometimes none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from midspan.conformance.attention_cases import attention_cases
from midspan.conformance.extreme_cases import extreme_cases
from midspan.conformance.mixture_cases import mixture_cases
from midspan.conformance.operation_case import OperationCase
from midspan.conformance.random_values import grid
from midspan.conformance.strided_cases import strided_cases
from midspan.interface.batch import Adjustments, SamplingBatch
from midspan.interface.graph import Attribute

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared", "sigmoid", "tanh")

LINEAR_SIZES = ((1, 64, 32), (0, 32, 16), (3, 7, 5), (4, 576, 192), (5, 33, 65), (16, 96, 48), (37, 128, 100))
"""(rows, inputs, outputs)."""


def operation_cases(block_size: int = 16) -> list[OperationCase]:
    """Every case.

    Args:
        block_size: tokens per cache block, one that the device takes.
    """
    plain = [
        *_row_cases(),
        *_product_cases(),
        *_norm_cases(),
        *elementwise_cases(),
        *_rotary_cases(),
        *attention_cases(block_size),
        *mixture_cases(),
        *_sample_cases(),
    ]
    return [*plain, *extreme_cases(FUNCTIONS), *strided_cases(plain)]


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _row_cases() -> Iterator[OperationCase]:
    random = _random(1)
    for rows, scale in ((0, 1.0), (1, 1.0), (9, 1.0), (9, 11.3125)):
        ids = random.integers(0, 50, rows).astype(np.int32)
        yield OperationCase(
            name=f"embedding, {rows} rows, scale {scale:g}",
            op="embedding",
            inputs=(ids,),
            weights={"weight": grid(random, (50, 27))},
            attributes={"scale": scale},
        )
    for count in (0, 1, 3, 7):
        chosen = np.sort(random.permutation(7)[:count]).astype(np.int32)
        yield OperationCase(name=f"select_rows, {count} of 7", op="select_rows", inputs=(grid(random, (7, 13)), chosen))
    for sizes in ((8, 8, 8), (1, 20, 3), (24,)):
        yield OperationCase(
            name=f"split, {sizes}", op="split", inputs=(grid(random, (5, 24)),), attributes={"sizes": sizes}
        )
    yield OperationCase(
        name="split, no rows", op="split", inputs=(grid(random, (0, 24)),), attributes={"sizes": (16, 8)}
    )


def _product_cases() -> Iterator[OperationCase]:
    random = _random(2)
    for rows, columns, outputs in LINEAR_SIZES:
        for bias in (False, True):
            weights = {"weight": grid(random, (outputs, columns))}
            if bias:
                weights["bias"] = grid(random, (outputs,))
            named = f"[{rows}, {columns}] x [{outputs}, {columns}]{' and bias' if bias else ''}"
            x = grid(random, (rows, columns))
            yield OperationCase(name=f"linear, {named}", op="linear", inputs=(x,), weights=weights)
            yield OperationCase(name=f"logits, {named}", op="logits", inputs=(x,), weights=weights)
    x, weights = grid(random, (3, 40)), {"weight": grid(random, (77, 40))}
    for attributes in ({"scale": 0.25}, {"soft_cap": 30.0}, {"scale": 2.0, "soft_cap": 5.0}):
        yield OperationCase(
            name=f"logits, {attributes}", op="logits", inputs=(x,), weights=weights, attributes=attributes
        )


def _norm_cases() -> Iterator[OperationCase]:
    random = _random(3)
    for rows, columns, size in ((1, 576, 576), (0, 64, 64), (5, 48, 48), (7, 96, 32), (3, 35, 35), (2, 21, 7)):
        x, weight = grid(random, (rows, columns)), grid(random, (size,))
        named = f"[{rows}, {columns}] by {size}"
        for offset in (0.0, 1.0):
            attributes = {"epsilon": 1e-5, "offset": offset}
            yield OperationCase(
                name=f"rms_norm, {named}, offset {offset:g}",
                op="rms_norm",
                inputs=(x,),
                weights={"weight": weight},
                attributes=attributes,
            )
            # Halved, so that the sum is a multiple of 1/32 below 4 and no type rounds it.
            parts = (grid(random, (rows, columns), 2.0), grid(random, (rows, columns), 2.0))
            yield OperationCase(
                name=f"add_rms_norm, {named}, offset {offset:g}",
                op="add_rms_norm",
                inputs=parts,
                weights={"weight": weight},
                attributes=attributes,
            )
        for bias in (False, True):
            yield OperationCase(
                name=f"layer_norm, {named}{' and bias' if bias else ''}",
                op="layer_norm",
                inputs=(x,),
                weights={"weight": weight, "bias": grid(random, (size,))} if bias else {"weight": weight},
                attributes={"epsilon": 1e-5},
            )


def elementwise_cases() -> Iterator[OperationCase]:
    """Sums, products and functions of single numbers."""
    random = _random(4)
    for rows, columns in ((1, 576), (0, 8), (6, 35)):
        a, b = grid(random, (rows, columns)), grid(random, (rows, columns))
        named = f"[{rows}, {columns}]"
        yield OperationCase(name=f"add, {named}", op="add", inputs=(a, b))
        yield OperationCase(name=f"multiply, {named}", op="multiply", inputs=(a, b))
        yield OperationCase(name=f"scale, {named}", op="scale", inputs=(a,), attributes={"factor": 0.7})
        for function in FUNCTIONS:
            attributes = {"function": function}
            pair = np.concatenate((a, b), axis=-1)
            yield OperationCase(
                name=f"activation {function}, {named}", op="activation", inputs=(a,), attributes=attributes
            )
            yield OperationCase(name=f"gated {function}, {named}", op="gated", inputs=(a, b), attributes=attributes)
            yield OperationCase(
                name=f"gated_pair {function}, {named}", op="gated_pair", inputs=(pair,), attributes=attributes
            )


def _rotary_cases() -> Iterator[OperationCase]:
    random = _random(5)
    shapes: tuple[tuple[str, int, int, int, dict[str, Attribute]], ...] = (
        ("whole heads", 5, 32, 32, {}),
        ("no rows", 0, 32, 32, {}),
        ("one row", 1, 64, 64, {}),
        ("part of each head", 5, 48, 16, {}),
        ("interleaved", 5, 32, 32, {"interleaved": True}),
        ("part of each head, interleaved", 3, 40, 20, {"interleaved": True}),
        ("amplitude", 3, 32, 32, {"amplitude": 1.25}),
        ("odd half", 3, 22, 22, {}),
    )
    for name, rows, head_size, rotary_size, attributes in shapes:
        frequencies = 10000.0 ** (-np.arange(rotary_size // 2) * 2.0 / rotary_size)
        yield OperationCase(
            name=f"rotary, {name}",
            op="rotary",
            inputs=(
                grid(random, (rows, 4 * head_size)),
                grid(random, (rows, 2 * head_size)),
                np.sort(random.integers(0, 500, rows)).astype(np.int32),
            ),
            attributes={
                "head_size": head_size,
                "rotary_size": rotary_size,
                "inverse_frequencies": tuple(float(frequency) for frequency in frequencies),
                **attributes,
            },
        )


def _sample_cases() -> Iterator[OperationCase]:
    random = _random(6)
    for rows in (0, 1, 6):
        logits = grid(random, (rows, 331))
        yield OperationCase(name=f"sample, {rows} greedy rows", op="sample", inputs=(logits, _sampling(rows, 0.0)))
        yield OperationCase(name=f"sample, {rows} random rows", op="sample", inputs=(logits, _sampling(rows, 0.8)))
    logits = grid(random, (4, 331))
    yield OperationCase(name="sample, logprobs", op="sample", inputs=(logits, _sampling(4, 0.0, num_logprobs=5)))
    ties = np.zeros((3, 331), np.float32)
    ties[0, [200, 7, 8]] = 2.0
    yield OperationCase(name="sample, the lowest of equals", op="sample", inputs=(ties, _sampling(3, 0.0)))
    broken = grid(random, (5, 331))
    broken[0, 5], broken[1, 300], broken[2] = np.nan, np.inf, -np.inf
    broken[3, 7] = -np.inf
    yield OperationCase(name="sample, rows that are no numbers", op="sample", inputs=(broken, _sampling(5, 0.0)))
    huge = grid(random, (3, 331)) * np.float32(2.0**100)
    yield OperationCase(name="sample, huge logits", op="sample", inputs=(huge, _sampling(3, 0.0, num_logprobs=3)))
    adjustments = Adjustments(
        rows=np.array([0, 0, 1], np.int32),
        token_ids=np.array([3, int(logits[0].argmax()), 9], np.int32),
        repetition=np.array([1.0, 2.0, 1.0], np.float32),
        bias=np.array([0.5, -np.inf, 100.0], np.float32),
    )
    yield OperationCase(
        name="sample, adjustments",
        op="sample",
        inputs=(logits, _sampling(4, 0.0, adjustments=adjustments)),
    )


def _sampling(
    rows: int, temperature: float, *, num_logprobs: int | None = None, adjustments: Adjustments | None = None
) -> SamplingBatch:
    return SamplingBatch(
        temperature=np.full(rows, temperature, np.float32),
        top_k=np.full(rows, 50, np.int32),
        top_p=np.full(rows, 0.9, np.float32),
        min_p=np.zeros(rows, np.float32),
        seeds=np.arange(rows, dtype=np.uint64),
        positions=np.arange(10, 10 + rows, dtype=np.int64),
        num_logprobs=num_logprobs,
        adjustments=adjustments,
    )
