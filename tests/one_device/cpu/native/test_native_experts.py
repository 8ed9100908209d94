"""Kernels of mixtures of experts: the same bits as the linear kernels give row by row, and what the definitions say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from midspan.errors import PluginError
from midspan.runtimes.reference.activations import ACTIVATIONS
from midspan.runtimes.reference.mixture import route
from midspan_cpu.native_interface import MatricesConfig, WeightConfig
from midspan_cpu.native_library import NativeLibrary

BFLOAT16 = ml_dtypes.bfloat16
GROUP = 32
BLOCK_BYTES = {"gguf.q4_1": (32, 20), "gguf.q8_0": (32, 34), "gguf.q4_k": (256, 144)}

FORMATS = ["float32", "bfloat16", "pairs", "int8.channel", "int8.dynamic", "int4.group", *BLOCK_BYTES]

# rows, experts, chosen, hidden, inner
SHAPES = [(1, 4, 2, 256, 256), (7, 9, 3, 512, 256), (230, 2, 1, 256, 512)]
ODD_SHAPES = [(1, 3, 2, 33, 7), (5, 8, 3, 100, 131), (101, 3, 2, 65, 64)]


def dense_matrices(rng: np.random.Generator, shape: tuple[int, int, int], dtype: Any) -> Any:
    """Numbers whose products with small inputs stay near 1."""
    return (rng.standard_normal(shape) / np.sqrt(shape[2])).astype(dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrices:
    """One matrix of each expert, packed alone for the linear kernel and together for the experts."""

    alone: list[Any]
    biases: Any
    config: MatricesConfig
    keep: Any


def packed(
    kernels: Any, arrays: Any, rng: np.random.Generator, name: str, shape: tuple[int, int, int], biased: bool
) -> Matrices:
    """Random matrices [experts, n, k] of a format."""
    experts, n, k = shape
    numbers: list[dict[str, Any]] = [{} for _ in range(experts)]
    if name in BLOCK_BYTES:
        values, size = BLOCK_BYTES[name]
        rows = rng.integers(0, 256, (experts, n, k // values, size)).astype(np.uint8)
        factors = 2 if name != "gguf.q8_0" else 1
        rows[..., : 2 * factors] = np.full(factors, 2.0**-9, np.float16).view(np.uint8)
        rows = rows.reshape(experts, n, -1)
    elif name == "int4.group":
        rows = rng.integers(0, 256, (experts, n, k // 2)).astype(np.uint8)
        numbers = [
            {
                "scales": rng.uniform(0.002, 0.004, (n, k // GROUP)).astype(np.float32),
                "zeros": rng.integers(0, 17, (n, k // GROUP)).astype(np.uint8),
            }
            for _ in range(experts)
        ]
    elif name.startswith("int8"):
        rows = rng.integers(-127, 128, (experts, n, k)).astype(np.int8)
        numbers = [{"scales": rng.uniform(0.0002, 0.0004, n).astype(np.float32)} for _ in range(experts)]
    else:
        rows = dense_matrices(rng, shape, np.float32 if name == "float32" else BFLOAT16)
    weight_format = None if name in ("float32", "bfloat16") else name
    alone = [kernels.pack(rows[e], weight_format, k=k, **numbers[e]) for e in range(experts)]
    step = -(-alone[0].memory.nbytes // 64) * 64
    memory = arrays.aligned_bytes(experts * step)
    for expert, each in enumerate(alone):
        memory[expert * step : expert * step + each.memory.nbytes] = each.memory
    biases = rng.standard_normal((experts, n)).astype(np.float32) if biased else None
    strip = WeightConfig(n=64, k=k, format=alone[0].code, group=alone[0].group)
    config = MatricesConfig(
        packed=arrays.address(memory),
        bytes=step,
        strip_bytes=kernels.library.packed_linear_bytes(strip),
        bias=None if biases is None else arrays.address(biases),
        bias_stride=n,
        format=alone[0].code,
        group=alone[0].group,
    )
    return Matrices(alone=alone, biases=biases, config=config, keep=(memory, rows))


def one_by_one(kernels: Any, x: Any, ids: Any, shares: Any, gate: Matrices, up: Matrices, down: Matrices) -> Any:
    """Row by row and expert by expert with the linear kernels; shares are powers of two, so that sums round once."""
    y = np.zeros(x.shape, np.float32)
    for row in range(len(x)):
        for expert, share in zip(ids[row], shares[row], strict=True):
            gated = kernels.gated(*(_product(kernels, x[row : row + 1], each, expert) for each in (gate, up)), "silu")
            y[row] += share * _product(kernels, gated.astype(x.dtype), down, expert)[0]
    return y.astype(x.dtype)


def _product(kernels: Any, x: Any, matrices: Matrices, expert: int) -> Any:
    bias = None if matrices.biases is None else matrices.biases[expert]
    return kernels.linear(x, matrices.alone[expert], bias=bias, output="float32")


def chosen_by(rng: np.random.Generator, rows: int, experts: int, chosen: int) -> tuple[Any, Any]:
    ids = np.stack([rng.permutation(experts)[:chosen] for _ in range(rows)]).astype(np.int32)
    shares = 2.0 ** rng.integers(-3, 1, (rows, chosen))
    return ids, shares.astype(np.float32)


def skip_what_is_not_there(kernels: Any, name: str) -> None:
    library: NativeLibrary = kernels.library
    if name == "pairs" and library.dense_format(1, 1) != 3:
        pytest.skip("an instruction set without products of pairs")


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in FORMATS for shape in SHAPES])
@pytest.mark.parametrize("activation", [np.float32, BFLOAT16])
def test_experts_have_the_bits_of_linear_kernels_one_by_one(
    kernels: Any, native_arrays: Any, rng: np.random.Generator, name: str, shape: tuple[int, ...], activation: Any
) -> None:
    skip_what_is_not_there(kernels, name)
    if name == "pairs" and activation is np.float32:
        return
    rows, experts, chosen, *_ = shape
    check(kernels, native_arrays, rng, name, shape, activation, chosen_by(rng, rows, experts, chosen))


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("name", ["float32", "pairs", "int8.dynamic"])
def test_experts_of_odd_sizes_do_too(
    kernels: Any, native_arrays: Any, rng: np.random.Generator, name: str, shape: tuple[int, ...]
) -> None:
    skip_what_is_not_there(kernels, name)
    rows, experts, chosen, *_ = shape
    activation = BFLOAT16 if name == "pairs" else np.float32
    check(kernels, native_arrays, rng, name, shape, activation, chosen_by(rng, rows, experts, chosen), biased=True)


@pytest.mark.parametrize("expert", [0, 4])
def test_all_rows_may_go_to_one_expert_and_others_have_none(
    kernels: Any, native_arrays: Any, rng: np.random.Generator, expert: int
) -> None:
    ids = np.full((97, 1), expert, np.int32)
    chosen = ids, np.ones(ids.shape, np.float32)
    check(kernels, native_arrays, rng, "float32", (97, 5, 1, 64, 96), np.float32, chosen)


def test_an_expert_may_be_chosen_twice(kernels: Any, native_arrays: Any, rng: np.random.Generator) -> None:
    ids = np.array([[1, 1, 0], [2, 1, 2]], np.int32)
    chosen = ids, np.full(ids.shape, 0.5, np.float32)
    check(kernels, native_arrays, rng, "float32", (2, 3, 3, 40, 24), np.float32, chosen)


def check(
    kernels: Any,
    arrays: Any,
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, ...],
    activation: Any,
    chosen: tuple[Any, Any],
    biased: bool = False,
) -> None:
    rows, experts, _, hidden, inner = shape
    gate, up = (packed(kernels, arrays, rng, name, (experts, inner, hidden), biased) for _ in range(2))
    down = packed(kernels, arrays, rng, name, (experts, hidden, inner), biased)
    x = rng.standard_normal((rows, hidden)).astype(activation)
    found = kernels.experts(x, *chosen, (gate.config, up.config, down.config), experts=experts, inner=inner)
    looked_at = np.arange(rows)[:: max(1, rows // 12)]  # each row alone: enough of them, the last block's too
    looked_at = np.unique(np.append(looked_at, rows - 1))
    expected = one_by_one(kernels, x[looked_at], *(each[looked_at] for each in chosen), gate, up, down)
    assert found[looked_at].tobytes() == expected.tobytes()
    assert np.abs(expected.astype(np.float32)).max() > 1e-3


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh"])
def test_gates_are_cut_sloped_and_shifted_as_the_definition_says(
    kernels: Any, native_arrays: Any, rng: np.random.Generator, function: str
) -> None:
    rows, experts, chosen, hidden, inner = 9, 4, 2, 48, 37
    gate, up = (packed(kernels, native_arrays, rng, "float32", (experts, inner, hidden), True) for _ in range(2))
    down = packed(kernels, native_arrays, rng, "float32", (experts, hidden, inner), True)
    x = (3.0 * rng.standard_normal((rows, hidden))).astype(np.float32)
    ids, shares = chosen_by(rng, rows, experts, chosen)
    found = kernels.experts(
        x,
        ids,
        shares,
        (gate.config, up.config, down.config),
        experts=experts,
        inner=inner,
        function=function,
        limit=1.5,
        slope=1.702,
        up_offset=1.0,
    )
    expected = np.zeros(x.shape)
    for row in range(rows):
        for expert, share in zip(ids[row], shares[row], strict=True):
            left, right = (each.keep[1][expert] @ x[row] + each.biases[expert] for each in (gate, up))
            left = ACTIVATIONS[function](np.minimum(left, 1.5) * np.float32(1.702)) / 1.702
            middle = left * (np.clip(right, -1.5, 1.5) + 1.0)
            expected[row] += share * (down.keep[1][expert] @ middle + down.biases[expert])
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_expert_that_is_none_is_refused(kernels: Any, native_arrays: Any, rng: np.random.Generator) -> None:
    matrices = [packed(kernels, native_arrays, rng, "float32", (2, 8, 8), False) for _ in range(3)]
    x, shares = np.ones((3, 8), np.float32), np.ones((3, 1), np.float32)
    for wrong in (-1, 2):
        ids = np.array([[0], [wrong], [1]], np.int32)
        with pytest.raises(PluginError, match="outside"):
            kernels.experts(x, ids, shares, tuple(each.config for each in matrices), experts=2, inner=8)


ROUTES: list[dict[str, Any]] = [
    {},
    {"normalize": True},
    {"scoring": "sigmoid", "normalize": True, "scale": 2.5},
    {"groups": 4, "top_groups": 2},
    {"scoring": "sigmoid", "groups": 4, "top_groups": 2, "group_scoring": "two_largest", "normalize": True},
    {"group_scoring": "two_largest", "groups": 2, "top_groups": 1},
]


@pytest.mark.parametrize("changes", ROUTES, ids=str)
@pytest.mark.parametrize("activation", [np.float32, BFLOAT16])
@pytest.mark.parametrize("corrected", [False, True])
def test_route_chooses_as_the_definition_does(
    kernels: Any, rng: np.random.Generator, changes: dict[str, Any], activation: Any, corrected: bool
) -> None:
    common = {"scoring": "softmax", "normalize": False, "groups": 1, "top_groups": 1, "group_scoring": "largest"}
    settings = {**common, "scale": 1.0, **changes}
    for experts, rows, top_k in ((8, 1, 2), (40, 33, 6), (128, 7, 8)):
        # Distances between logits far above what a score may be off, so that ranks cannot differ; some are equal.
        logits = np.stack([rng.permutation(experts) for _ in range(rows)]) * (6.0 / experts) - 3.0
        logits = (np.round(logits * 16) / 16).astype(activation)
        bias = (rng.integers(-2, 3, experts) * 2.0).astype(np.float32) if corrected else None
        ids, shares = kernels.route(logits, bias, top_k=min(top_k, experts // 4), **settings)
        wanted, wanted_shares = route(logits, bias, top_k=min(top_k, experts // 4), **settings)
        np.testing.assert_array_equal(ids, wanted)
        np.testing.assert_allclose(shares, wanted_shares, rtol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("changes", ROUTES, ids=str)
def test_route_names_experts_that_exist_whatever_logits_are(kernels: Any, bad: float, changes: dict[str, Any]) -> None:
    common = {"scoring": "softmax", "normalize": False, "groups": 1, "top_groups": 1, "group_scoring": "largest"}
    logits = np.full((3, 16), bad, np.float32)
    logits[1, ::2] = 1.0
    logits[2] = -logits[0]
    bias = np.where(np.arange(16) % 2, np.inf, -np.inf).astype(np.float32)
    for correction in (None, bias):
        ids, _ = kernels.route(logits, correction, top_k=4, **{**common, "scale": 1.0, **changes})
        assert all(len(set(row)) == 4 for row in ids)
        assert ids.min() >= 0
        assert ids.max() < 16


@pytest.mark.parametrize("activation", [np.float32, BFLOAT16, np.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (40, 515)])
def test_sums_and_products_round_once(
    kernels: Any, rng: np.random.Generator, activation: Any, shape: tuple[int, int]
) -> None:
    x, x2 = (rng.standard_normal(shape).astype(activation) for _ in range(2))
    wide, wide2 = x.astype(np.float32), x2.astype(np.float32)
    factor = np.float32(0.22)
    assert kernels.combine("add", x, x2).tobytes() == (wide + wide2).astype(activation).tobytes()
    assert kernels.combine("multiply", x, x2).tobytes() == (wide * wide2).astype(activation).tobytes()
    assert kernels.combine("scale", x, factor=0.22).tobytes() == (wide * factor).astype(activation).tobytes()
    scaled = kernels.combine("scale_rows", x, x2)
    assert scaled.tobytes() == (wide * wide2[:, :1]).astype(activation).tobytes()
    sigmoid = kernels.combine("scale_rows", x, x2, sigmoid=True).astype(np.float32)
    unit = {np.float32: 2**-20, BFLOAT16: 2**-7, np.float16: 2**-10}[activation]
    np.testing.assert_allclose(sigmoid, wide / (1.0 + np.exp(-wide2[:, :1])), rtol=unit, atol=1e-7)
