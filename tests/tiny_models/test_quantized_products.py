"""Packed weights on the reference and on the portable torch kernels: the same cases, the same models.

Tolerance of logits: both unpack to the same numbers and multiply in float32, so 1e-4 as for dense models.
Where inputs are rounded too, a number that lies at a half may fall either way; of the step that this makes,
s * |w|, one in a few thousand numbers is hit, and 5e-3 leaves room for some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from midspan.conformance.operation_run import Setting, require_agreement
from midspan.conformance.packed_cases import packed_cases
from midspan.graph.passes import apply_passes
from midspan.interface import Capabilities, Device, PackedTensor, Weight
from midspan.models.catalogue import build_graph
from midspan.runtimes.reference.packed_weights import DynamicInt8, rounded_rows
from midspan.runtimes.torch.portable import dynamic_int8
from midspan.runtimes.torch.program import TorchRuntime
from midspan.weights.array_formats import ARRAY_FORMATS
from midspan.weights.load_quantization import SCHEMES, QuantizingWeights
from midspan.weights.quantization import dequantize


class TorchHost:
    """The portable torch kernels as a device, with none of anybody's own."""

    capabilities = Capabilities(dtypes=("float32", "bfloat16", "float16"), quantizations=tuple(ARRAY_FORMATS))

    def __init__(self, widens_products: bool = False) -> None:
        self._runtime = TorchRuntime(device="cpu", device_id="host", widens_products=widens_products)

    def compile(self, *arguments: Any) -> Any:
        return self._runtime.compile(*arguments)

    def allocate_cache(self, *arguments: Any) -> Any:
        return self._runtime.allocate_cache(*arguments)


@pytest.fixture(scope="module")
def host() -> Any:
    return TorchHost()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ARRAY_FORMATS)
def test_portable_products_agree_with_the_definition(host: Any, name: str, dtype: str) -> None:
    for case in packed_cases(name):
        require_agreement(host, case, Setting(dtype=dtype, cache_dtype="float32", block_size=16))


@pytest.mark.parametrize("name", ARRAY_FORMATS)
def test_the_reference_device_agrees_with_the_definition(reference_device: Device, name: str) -> None:
    assert name in reference_device.capabilities.quantizations
    for case in packed_cases(name):
        require_agreement(reference_device, case, Setting(dtype="bfloat16", cache_dtype="float32", block_size=16))


def test_a_dynamic_product_is_integers_and_two_scales() -> None:
    random = np.random.default_rng(2)
    x = random.standard_normal((3, 50)).astype(np.float32)
    x[1] = 0.0
    x[2, :4] = [127.0, 0.5, 1.5, -2.5]  # a step of exactly 1: halves go to the even number
    x[2, 4:] = 0.0
    data = random.integers(-127, 128, (7, 50)).astype(np.int8)
    scale = random.uniform(0.5, 2.0, 7).astype(np.float32)
    found = DynamicInt8(data=data, scale=scale).product(x)
    for row in range(3):
        step = np.float32(np.abs(x[row]).max()) / np.float32(127)
        integers = [round(float(value / step)) if step else 0 for value in x[row]]
        for out in range(7):
            total = sum(a * int(b) for a, b in zip(integers, data[out], strict=True))
            assert found[row, out] == np.float32(total) * step * scale[out]
    assert rounded_rows(x)[0][2, :4].tolist() == [127, 0, 2, -2]
    assert (found[1] == 0).all()


def test_sums_of_many_columns_stay_exact_in_the_portable_product() -> None:
    columns = 5 * dynamic_int8.EXACT_COLUMNS + 3
    x = np.full((2, columns), 3.0, np.float32)
    data = np.full((1, columns), 127, np.int8)
    data[0, -1] = 126
    parts = {"data": data, "scale": np.ones(1, np.float32)}
    weight = PackedTensor(name="w", shape=(1, columns), format="int8.dynamic", parts=parts)
    preparation: Any = type("Host", (), {"device": torch.device("cpu"), "account": lambda self, nbytes: None})()
    found = dynamic_int8.dynamic_product(weight, None, preparation)(torch.from_numpy(x)).numpy()
    total = 127 * (127 * (columns - 1) + 126)
    assert found[0, 0] == np.float32(total) * (np.float32(3) / np.float32(127))
    np.testing.assert_array_equal(found, DynamicInt8(data=data, scale=parts["scale"]).product(x))


class Arrays:
    """A source of dense arrays by published name."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self._arrays = arrays

    def load(self, weight: Weight) -> PackedTensor:
        data = np.concatenate([self._arrays[name] for name in weight.sources or (weight.name,)])
        return PackedTensor(name=weight.name, shape=weight.shape, format="dense", parts={"data": data})


class Unpacked:
    """What another source gives, as plain numbers."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def load(self, weight: Weight) -> PackedTensor:
        tensor = self._source.load(weight)
        return PackedTensor(name=tensor.name, shape=tensor.shape, format="dense", parts={"data": dequantize(tensor)})


@pytest.fixture
def model(tiny_config: Callable[..., Any], random_weights: Callable[..., Any]) -> Any:
    config = tiny_config(hidden_size=64, intermediate_size=96, attention_bias=True, tie_word_embeddings=False)
    built = build_graph(config)
    return apply_passes(built), random_weights(built)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_quantized_model_gives_the_same_logits_on_both_and_near_those_of_its_plain_numbers(
    name: str, model: Any, host: Any, reference_device: Device, drive: Callable[..., Any]
) -> None:
    graph, arrays = model
    source = QuantizingWeights(Arrays(arrays), graph, SCHEMES[name])
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, graph.vocab_size, 23)]

    def logits(device: Any, weights: Any) -> Any:
        driver = drive(device, graph, weights)
        batch, _ = driver.batch([(driver.sequence(tokens), len(tokens))])
        return driver.program.values(batch, driver.cache, ["lm_head"])["lm_head"]

    wanted = logits(reference_device, source)
    rounds = SCHEMES[name].format == "int8.dynamic"
    np.testing.assert_allclose(logits(host, source), wanted, rtol=0, atol=5e-3 if rounds else 1e-4)
    plain = logits(reference_device, Unpacked(source))
    exact = logits(reference_device, Arrays(arrays))
    assert np.abs(exact).max() > 0.5
    # Weights alone: the very numbers. Inputs too: near, and further off than float32 rounds.
    assert np.abs(wanted - plain).max() < (0.1 if rounds else 1e-4)
    assert (np.abs(wanted - plain).max() > 1e-3) == rounds
    assert 1e-3 < np.abs(wanted - exact).max() < (0.5 if name == "int4" else 0.2)
