"""Each operation against a naive formula in float64, in all activation types.

Tolerance: the definition computes in float32 and rounds once. A sum of n <= 64 terms
in float32 is off by at most n * 2^-24 of the sum of sizes (4e-6), functions by a few
units in the last place; then comes one rounding to the activation type, half a unit:
2^-24, 2^-11 or 2^-8 relative for float32, float16 and bfloat16.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from midspan.interface.cache import CacheGroup, CacheLayout
from midspan.interface.operations import OPERATIONS
from midspan.runtimes.reference.cache import ReferenceCache
from midspan.runtimes.reference.element_types import ELEMENT_TYPES
from midspan.runtimes.reference.operations import ACTIVATIONS, REFERENCE

HALF_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
FLOAT32_SUMS = 64 * 2.0**-24

types = pytest.mark.parametrize("dtype", ELEMENT_TYPES)


def _random(*shape: int, dtype: str = "float32", seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(ELEMENT_TYPES[dtype])


def _exact(x: NDArray[Any]) -> NDArray[np.float64]:
    return x.astype(np.float32).astype(np.float64)


def _check(result: NDArray[Any], expected: NDArray[np.float64], dtype: str, size: float = 1.0) -> None:
    assert result.dtype == ELEMENT_TYPES[dtype]
    error = np.abs(_exact(result) - expected)
    assert np.all(error <= 1.01 * HALF_UNIT[dtype] * np.abs(expected) + FLOAT32_SUMS * size)


def test_every_operation_has_a_definition_with_its_inputs_weights_and_attributes() -> None:
    assert set(REFERENCE) == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        parameters = inspect.signature(REFERENCE[name]).parameters
        keywords = {key for key, value in parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}
        positional = [key for key in parameters if key not in keywords]
        roles = (*operation.weights, *operation.optional_weights)
        assert set(operation.attributes) <= keywords, name
        assert set(roles) <= set(parameters), name
        assert positional[: len(operation.inputs)] == list(operation.inputs), name


@types
@pytest.mark.parametrize("scale", [1.0, 5.5])
def test_embedding_takes_rows_times_scale(dtype: str, scale: float) -> None:
    table = _random(9, 6, dtype=dtype)
    ids = np.array([3, 0, 8, 3], np.int32)
    _check(REFERENCE["embedding"](ids, table, scale=scale), _exact(table)[ids] * scale, dtype, size=0.0)


@types
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_a_matrix_product_and_a_bias(dtype: str, bias: bool) -> None:
    x, weight = _random(5, 64, dtype=dtype), _random(33, 64)
    weights = {"weight": weight, **({"bias": _random(33)} if bias else {})}
    expected = np.einsum("ni,oi->no", _exact(x), _exact(weight)) + (_exact(weights["bias"]) if bias else 0.0)
    _check(REFERENCE["linear"](x, **weights, split="rows"), expected, dtype, size=64.0)


@types
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_logits_are_float32_scaled_and_capped(dtype: str, soft_cap: float | None) -> None:
    x, weight = _random(5, 64, dtype=dtype), _random(33, 64)
    scores = 0.25 * np.einsum("ni,oi->no", _exact(x), _exact(weight))
    expected = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
    result = REFERENCE["logits"](x, weight, scale=0.25, soft_cap=soft_cap)
    _check(result, expected, "float32", size=64.0)


@types
@pytest.mark.parametrize(("columns", "size"), [(48, 48), (48, 16)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_divides_each_run_by_its_root_mean_square(dtype: str, columns: int, size: int, offset: float) -> None:
    x, weight = _random(5, columns, dtype=dtype), _random(size)
    expected = np.empty((5, columns))
    for row in range(5):
        for start in range(0, columns, size):
            run = _exact(x)[row, start : start + size]
            root = math.sqrt(sum(value * value for value in run) / size + 1e-3)
            expected[row, start : start + size] = run / root * (_exact(weight) + offset)
    _check(REFERENCE["rms_norm"](x, weight, epsilon=1e-3, offset=offset), expected, dtype, size=4.0)


@types
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_has_mean_0_and_variance_1(dtype: str, bias: bool) -> None:
    x, weight = _random(5, 48, dtype=dtype), _random(48)
    weights = {"weight": weight, **({"bias": _random(48, seed=1)} if bias else {})}
    wide = _exact(x)
    centred = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-3)
    expected = centred * _exact(weight) + (_exact(weights["bias"]) if bias else 0.0)
    _check(REFERENCE["layer_norm"](x, **weights, epsilon=1e-3), expected, dtype, size=4.0)


@types
def test_element_wise_operations_round_once(dtype: str) -> None:
    a, b = _random(5, 8, dtype=dtype), _random(5, 8, dtype=dtype, seed=1)
    _check(REFERENCE["add"](a, b), _exact(a) + _exact(b), dtype)
    _check(REFERENCE["multiply"](a, b), _exact(a) * _exact(b), dtype, size=0.01)
    _check(REFERENCE["scale"](a, factor=0.3), _exact(a) * 0.3, dtype, size=0.01)


FORMULAS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x / 2 * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


@types
@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations_follow_their_formulas_alone_and_as_gates(dtype: str, function: str) -> None:
    x, up = _random(7, 16, dtype=dtype), _random(7, 16, dtype=dtype, seed=1)
    x = (x * ELEMENT_TYPES[dtype].type(3)).astype(ELEMENT_TYPES[dtype])
    expected = np.vectorize(FORMULAS[function])(_exact(x))
    _check(REFERENCE["activation"](x, function=function), expected, dtype)
    gated = REFERENCE["gated"](x, up, function=function)
    _check(gated, expected * _exact(up), dtype, size=4.0)
    pair = REFERENCE["gated_pair"](np.concatenate([x, up], axis=1), function=function)
    assert np.array_equal(pair, gated)


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations_of_huge_numbers_are_no_nan(function: str) -> None:
    x = np.array([[-3e38, -200.0, 0.0, 200.0]], np.float32)
    with np.errstate(all="ignore"):
        assert np.all(np.isfinite(REFERENCE["activation"](x, function=function)[:, 1:]))
        assert not np.isnan(REFERENCE["activation"](x, function=function)).any()


@types
def test_add_rms_norm_is_an_addition_and_a_norm_of_the_rounded_sum(dtype: str) -> None:
    x, residual, weight = _random(5, 8, dtype=dtype), _random(5, 8, dtype=dtype, seed=1), _random(8)
    normed, total = REFERENCE["add_rms_norm"](x, residual, weight, epsilon=1e-5, offset=0.0)
    assert np.array_equal(total, REFERENCE["add"](x, residual))
    assert np.array_equal(normed, REFERENCE["rms_norm"](total, weight, epsilon=1e-5, offset=0.0))


def test_split_and_select_rows_only_copy() -> None:
    x = _random(5, 9)
    parts = REFERENCE["split"](x, sizes=(4, 3, 2))
    assert [part.shape for part in parts] == [(5, 4), (5, 3), (5, 2)]
    assert np.array_equal(np.concatenate(parts, axis=1), x)
    assert np.array_equal(REFERENCE["select_rows"](x, np.array([4, 0], np.int32)), x[[4, 0]])
    assert REFERENCE["select_rows"](x, np.zeros(0, np.int32)).shape == (0, 9)


@types
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_size", [8, 4])
def test_rotary_multiplies_pairs_as_complex_numbers(dtype: str, interleaved: bool, rotary_size: int) -> None:
    frequencies = tuple(float(np.float32(value)) for value in (1.0, 0.3, 0.01, 0.002)[: rotary_size // 2])
    query, key = _random(3, 16, dtype=dtype), _random(3, 8, dtype=dtype, seed=1)
    positions = np.array([0, 5, 1000], np.int32)
    turned = REFERENCE["rotary"](
        query,
        key,
        positions,
        head_size=8,
        rotary_size=rotary_size,
        inverse_frequencies=frequencies,
        amplitude=1.25,
        interleaved=interleaved,
    )
    half = rotary_size // 2
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    for before, after in zip((query, key), turned, strict=True):
        expected = _exact(before)
        for row, position in enumerate(positions):
            for head in range(0, before.shape[1], 8):
                for index, (real, imaginary) in enumerate(pairs):
                    angle = float(np.float32(position) * np.float32(frequencies[index]))
                    number = complex(_exact(before)[row, head + real], _exact(before)[row, head + imaginary])
                    number *= 1.25 * complex(math.cos(angle), math.sin(angle))
                    expected[row, head + real], expected[row, head + imaginary] = number.real, number.imag
        _check(after, expected, dtype, size=4.0)


HEADS, KV_HEADS, KEY_SIZE, VALUE_SIZE = 4, 2, 6, 5
ATTENTION_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "soft cap": {"soft_cap": 1.5},
    "alibi": {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0, 0.0], np.float32)},
    "all": {
        "window": 4,
        "soft_cap": 1.5,
        "alibi_slopes": (0.5, 0.25, 0.125, 0.0625),
        "sinks": np.array([0.5, -1.0, 2.0, 0.0], np.float32),
    },
}


def _naive_attention(query: Any, key: Any, value: Any, **options: Any) -> NDArray[np.float64]:
    """One sequence at once, head by head and token by token, in float64."""
    count = len(query)
    output = np.zeros((count, HEADS, VALUE_SIZE))
    for token in range(count):
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            scores, values = [], []
            for other in range(token + 1):
                if options.get("window") is not None and token - other >= options["window"]:
                    continue
                score = float(query[token, head] @ key[other, kv_head]) * 0.7
                if options.get("soft_cap") is not None:
                    score = options["soft_cap"] * math.tanh(score / options["soft_cap"])
                if options.get("alibi_slopes") is not None:
                    score += options["alibi_slopes"][head] * (other - token)
                scores.append(math.exp(score))
                values.append(value[other, kv_head])
            total = sum(scores)
            if options.get("sinks") is not None:
                total += math.exp(float(options["sinks"][head]))
            output[token, head] = sum(s * v for s, v in zip(scores, values, strict=True)) / total
    return output.reshape(count, -1)


@types
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_in_chunks_and_scattered_blocks_equals_the_naive_formula(case: str, dtype: str) -> None:
    options = {"window": None, "soft_cap": None, "alibi_slopes": None, **ATTENTION_CASES[case]}
    lengths, block_size = (9, 5), 2
    data = [
        tuple(
            _random(length, heads * size, dtype=dtype, seed=seed + 3 * index)
            for seed, (heads, size) in enumerate(((HEADS, KEY_SIZE), (KV_HEADS, KEY_SIZE), (KV_HEADS, VALUE_SIZE)))
        )
        for index, length in enumerate(lengths)
    ]
    group = CacheGroup(name="g", layers=2, kv_heads=KV_HEADS, key_size=KEY_SIZE, value_size=VALUE_SIZE)
    cache = ReferenceCache(CacheLayout(groups=(group,), block_size=block_size, dtype=dtype), (12,))
    tables = np.array([[7, 1, 11, 4, 9], [3, 8, 2, 0, 0]], np.int32)
    found: list[list[NDArray[Any]]] = [[], []]
    done = [0, 0]
    for step in ((4, 1), (1, 3), (4, 1)):
        spans = [np.arange(done[i], done[i] + count) for i, count in enumerate(step)]
        query, key, value = (np.concatenate([data[i][part][span] for i, span in enumerate(spans)]) for part in range(3))
        slots = np.concatenate(
            [tables[i][span // block_size] * block_size + span % block_size for i, span in enumerate(spans)]
        )
        done = [done[i] + count for i, count in enumerate(step)]
        result = REFERENCE["attention"](
            query,
            key,
            value,
            np.array([0, step[0], sum(step)], np.int32),
            np.array(done, np.int32),
            tables,
            slots.astype(np.int32),
            cache,
            group="g",
            layer=1,
            heads=HEADS,
            kv_heads=KV_HEADS,
            key_size=KEY_SIZE,
            value_size=VALUE_SIZE,
            scale=0.7,
            **options,
        )
        found[0].append(result[: step[0]])
        found[1].append(result[step[0] :])
    for index, parts in enumerate(found):
        query, key, value = (_exact(part) for part in data[index])
        shaped = (query.reshape(-1, HEADS, KEY_SIZE), key.reshape(-1, KV_HEADS, KEY_SIZE))
        expected = _naive_attention(*shaped, value.reshape(-1, KV_HEADS, VALUE_SIZE), **options)
        _check(np.concatenate(parts), expected, dtype, size=8.0)
    assert not cache.read("g", range(12))[0].any()


def test_bfloat16_is_the_type_of_ml_dtypes() -> None:
    assert ELEMENT_TYPES["bfloat16"] == np.dtype(ml_dtypes.bfloat16)
