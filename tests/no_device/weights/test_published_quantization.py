"""Published quantized checkpoints, written here in their layouts, against the plain numbers that they stand for.

Each is read twice: packed, and unpacked as for a device that takes no packed format. Numbers are compared bit for
bit; logits with 1e-4, since the same numbers are multiplied in another order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from published_cases import BY_ROW, CASES, E4M3, PACKED, Arrays, Write, compressed, gptq_config, integers, write_folder
from published_layouts import Layer, float8, gptq, packed_integers, plain_int8

from midspan.errors import CheckpointError, PluginError, UnsupportedModel
from midspan.graph.passes import apply_passes
from midspan.interface import Device, StoredTensor
from midspan.models.catalogue import build_graph
from midspan.weights.array_formats import ARRAY_FORMATS
from midspan.weights.checkpoint import open_checkpoint
from midspan.weights.published.catalogue import read_quantized
from midspan.weights.quantization import dequantize
from midspan.weights.store import CheckpointWeights
from midspan.weights.stored_tensor import Checkpoint


@dataclass(frozen=True)
class Published:
    """A checkpoint as it was written, and the plain tensors that it stands for."""

    checkpoint: Checkpoint
    plain: Arrays


@pytest.fixture
def publish(
    tmp_path: Path, tiny_config: Callable[..., Any], random_weights: Callable[..., Any]
) -> Callable[..., Published]:
    """``publish(config, write, dense=(), **model)``: a tiny Llama, its layers written by a function.

    Layers that hold one of the words in ``dense`` stay as they are, and so do tables.
    """

    def make(config: Any, write: Write, *, dense: tuple[str, ...] = (), **model: Any) -> Published:
        fields = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False, "num_hidden_layers": 1}
        published = tiny_config(**{**fields, **model})
        weights = random_weights(build_graph(published))
        plain = write_folder(tmp_path, published, weights, config, write, dense=dense)
        return Published(open_checkpoint(tmp_path), plain)

    return make


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_the_published_one_packed_or_not(name: str, publish: Callable[..., Published]) -> None:
    case = CASES[name]
    published = publish(case.config, case.write, **case.model)
    checkpoint = read_quantized(published.checkpoint)
    graph = apply_passes(build_graph(checkpoint.config))
    packed = CheckpointWeights(checkpoint, quantizations=tuple(ARRAY_FORMATS))
    unpacked = CheckpointWeights(checkpoint, quantizations=())
    for weight in graph.weights.values():
        wanted = np.concatenate([published.plain[source] for source in weight.sources or (weight.name,)])
        found = packed.load(weight)
        quantized = "proj" in weight.name and not any(
            word in weight.name and "+" in weight.name for word in case.unjoined
        )
        if "desc_act" in name or "actorder" in name:
            # Written with one order for all, so joined as well.
            assert "order" in found.parts or not quantized
        assert found.format == (case.format if quantized else "dense"), weight.name
        np.testing.assert_array_equal(dequantize(found), wanted)
        plain = unpacked.load(weight)
        assert plain.format == "dense"
        np.testing.assert_array_equal(plain.parts["data"], wanted)
    assert checkpoint.nbytes == published.checkpoint.nbytes


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_plain_numbers(
    name: str, publish: Callable[..., Published], reference_device: Device, drive: Callable[..., Any]
) -> None:
    case = CASES[name]
    published = publish(case.config, case.write, **case.model)
    checkpoint = read_quantized(published.checkpoint)
    graph = apply_passes(build_graph(checkpoint.config))
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, graph.vocab_size, 19)]

    def logits(weights: Any) -> NDArray[Any]:
        driver = drive(reference_device, graph, weights)
        batch, _ = driver.batch([(driver.sequence(tokens), len(tokens))])
        found: NDArray[Any] = driver.program.values(batch, driver.cache, ["lm_head"])["lm_head"]
        return found

    found = logits(CheckpointWeights(checkpoint, quantizations=tuple(ARRAY_FORMATS)))
    wanted = logits(published.plain)
    # Where inputs are rounded to 8 bits as well, logits move by some hundredths.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.15 if case.format == "int8.dynamic" else 1e-4)
    assert np.abs(wanted).max() > 0.5


def test_a_device_without_rounded_inputs_gets_the_same_integers_as_weights_alone(
    publish: Callable[..., Published],
) -> None:
    case = CASES["compressed w8a8"]
    checkpoint = read_quantized(publish(case.config, case.write).checkpoint)
    graph = apply_passes(build_graph(checkpoint.config))
    weights = CheckpointWeights(checkpoint, quantizations=("int8.channel",))
    formats = {weights.load(weight).format for name, weight in graph.weights.items() if "proj" in name}
    assert formats == {"int8.channel"}
    assert set(weights.packed_as()) == {("int8.dynamic", "int8.channel")}


@pytest.mark.parametrize(
    ("name", "field", "entry"),
    [
        ("gptq 4 bits", "modules_to_not_convert", "model.layers.0.mlp.down_proj"),
        ("awq", "modules_to_not_convert", "down_proj"),
        ("fp8 one scale", "modules_to_not_convert", "model.layers.0.mlp.down_proj"),
        ("compressed w8a8", "ignore", "re:.*down_proj"),
        ("compressed w4a16", "ignore", "model.layers.0.mlp.down_proj"),
    ],
)
def test_layers_on_the_list_of_those_that_were_left_alone_are_dense(
    name: str, field: str, entry: str, publish: Callable[..., Published]
) -> None:
    case = CASES[name]
    published = publish({**case.config, field: [entry, "lm_head"]}, case.write, dense=("down_proj",))
    checkpoint = read_quantized(published.checkpoint)
    formats = {key: tensor.format for key, tensor in checkpoint.tensors.items() if key.endswith("proj.weight")}
    assert {key for key, kind in formats.items() if kind == "dense"} == {"model.layers.0.mlp.down_proj.weight"}
    graph = apply_passes(build_graph(checkpoint.config))
    weights = CheckpointWeights(checkpoint, quantizations=tuple(ARRAY_FORMATS))
    for weight in graph.weights.values():
        wanted = np.concatenate([published.plain[source] for source in weight.sources or (weight.name,)])
        np.testing.assert_array_equal(dequantize(weights.load(weight)), wanted)


def test_groups_of_layers_are_rounded_as_each_group_says(publish: Callable[..., Published]) -> None:
    config = compressed("mixed-precision", integers(8), BY_ROW)
    groups = config["config_groups"]
    groups["group_1"] = {"targets": ["re:.*mlp.*"], "weights": integers(4, "group", group_size=32)}
    int4 = partial(packed_integers, bits=4, group=32, symmetric=True)
    sizes = {96}

    def write(w: NDArray[Any]) -> Layer:
        return int4(w) if sizes & set(w.shape) else plain_int8(w)

    published = publish(config, write)
    checkpoint = read_quantized(published.checkpoint)
    for name, tensor in checkpoint.tensors.items():
        if "proj" in name:
            assert tensor.format == ("int4.group" if ".mlp." in name else "int8.dynamic")
            np.testing.assert_array_equal(dequantize(tensor.packed()), published.plain[name])


def test_zero_points_beside_unpacked_integers(publish: Callable[..., Published]) -> None:
    def write(w: NDArray[Any]) -> Layer:
        layer = plain_int8(w)
        zero = np.arange(w.shape[0], dtype=np.int8)[:, None] % 5 - np.int8(2)
        scale = layer.tensors["weight_scale"]
        means = (layer.tensors["weight"].astype(np.float32) - zero) * scale
        return Layer({**layer.tensors, "weight_zero_point": zero}, means)

    published = publish(compressed("naive-quantized", integers(8, symmetric=False)), write)
    tensor = read_quantized(published.checkpoint).tensors["model.layers.0.self_attn.o_proj.weight"]
    assert tensor.format == "int8.group"
    np.testing.assert_array_equal(dequantize(tensor.packed()), published.plain[tensor.name])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes.*16 fixed floating numbers"),
        ({"quant_method": "hqq"}, "quantized with hqq, which cannot be read here"),
        ({}, None),
        ({"bits": 4}, "an unnamed method"),
        (gptq_config(4, 32, True, checkpoint_format="marlin"), "layout 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout 'gemv'"),
        ({**E4M3, "fmt": "e5m2"}, "float8 e5m2"),
        (compressed("nvfp4-pack-quantized", integers(4)), "nvfp4-pack-quantized"),
        (compressed(PACKED, integers(4), sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (compressed(PACKED, integers(4), transform_config={"config_groups": {"u": {"type": "hadamard"}}}), "rotated"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "layout 'marlin'"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    config: Any, says: str | None, publish: Callable[..., Published]
) -> None:
    published = publish(config, lambda w: Layer({"weight": w}, w))
    if says is None:
        assert read_quantized(published.checkpoint) is published.checkpoint
        return
    with pytest.raises(UnsupportedModel, match=says) as caught:
        read_quantized(published.checkpoint)
    assert caught.value.remedy


def without(write: Callable[..., Layer], suffix: str) -> Callable[[NDArray[Any]], Layer]:
    def written(w: NDArray[Any]) -> Layer:
        layer = write(w)
        return Layer({name: array for name, array in layer.tensors.items() if name != suffix}, layer.means)

    return written


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("gptq 4 bits", "scales"),
        ("awq", "qzeros"),
        ("fp8 one scale", "weight_scale"),
        ("compressed w4a16", "weight_shape"),
    ],
)
def test_a_missing_tensor_is_named_with_its_layer(name: str, suffix: str, publish: Callable[..., Published]) -> None:
    case = CASES[name]
    published = publish(case.config, without(case.write, suffix))
    with pytest.raises(CheckpointError, match=f"model.layers.0.*{suffix}"):
        read_quantized(published.checkpoint)


@pytest.mark.parametrize(
    ("config", "write", "says"),
    [
        (gptq_config(4, 16, True), partial(gptq, bits=4, group=32, symmetric=True), "config.json says 16 columns each"),
        (gptq_config(2, 32, True), partial(gptq, bits=2, group=32, symmetric=True), "2 bits a number"),
        ({**E4M3, "weight_block_size": [64, 64]}, partial(float8, strategy="block"), r"blocks of \[64, 64\]"),
        ({**E4M3, "weight_block_size": [128, 128]}, partial(float8, strategy="channel"), "does not fit a weight"),
        (compressed("int-quantized", integers(8), ignore=["re:("]), plain_int8, r"invalid pattern 're:\('"),
        ("4 bits", plain_int8, "must be an object"),
        ({**compressed("int-quantized", integers(8)), "config_groups": []}, plain_int8, "names no 'config_groups'"),
        (compressed(PACKED, integers(3)), partial(packed_integers, bits=4, group=-1, symmetric=True), "with 3 bits"),
        (
            compressed(PACKED, integers(8)),
            partial(packed_integers, bits=4, group=-1, symmetric=True),
            "cannot hold a weight of the shape",
        ),
    ],
)
def test_files_that_contradict_their_config_are_refused(
    config: Any, write: Any, says: str, publish: Callable[..., Published]
) -> None:
    published = publish(config, write)
    with pytest.raises((CheckpointError, UnsupportedModel), match=says) as caught:
        read_quantized(published.checkpoint)
    assert caught.value.remedy


def test_layers_with_settings_of_their_own_may_have_groups_of_another_size(publish: Callable[..., Published]) -> None:
    config = gptq_config(4, 16, True, dynamic={"+:.*": {"group_size": 32}})
    published = publish(config, partial(gptq, bits=4, group=32, symmetric=True))
    tensor = read_quantized(published.checkpoint).tensors["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(dequantize(tensor.packed()), published.plain[tensor.name])


@pytest.mark.parametrize("layout", ["gptq 4 bits", "fp8 blocks"])
def test_experts_are_unpacked_to_the_published_numbers(
    layout: str, tmp_path: Path, tiny_config: Callable[..., Any], random_weights: Callable[..., Any]
) -> None:
    case = CASES[layout]
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    config = tiny_config(
        architectures=["Qwen3MoeForCausalLM"], head_dim=8, hidden_size=64, num_hidden_layers=1, **sizes
    )
    graph = build_graph(config)
    weights = {}
    for name, array in random_weights(graph).items():
        sources = graph.weights[name].sources or (name,)
        rows = np.concatenate(array) if len(array.shape) == 3 else array
        weights |= dict(zip(sources, np.split(rows, len(sources)), strict=True))
    plain = write_folder(tmp_path, config, weights, case.config, case.write)
    checkpoint = read_quantized(open_checkpoint(tmp_path))
    assert checkpoint.tensors["model.layers.0.mlp.experts.2.down_proj.weight"].format == case.format
    loaded = CheckpointWeights(checkpoint, quantizations=tuple(ARRAY_FORMATS))
    for weight in graph.weights.values():
        wanted = np.concatenate([plain[source] for source in weight.sources or (weight.name,)]).reshape(weight.shape)
        np.testing.assert_array_equal(dequantize(loaded.load(weight)), wanted)
        assert len(weight.shape) < 3 or loaded.load(weight).format == "dense"


def test_a_packages_reader_wins_over_the_cores_own(publish: Callable[..., Published]) -> None:
    case = CASES["gptq 4 bits"]
    published = publish(case.config, case.write)
    seen = []

    def read(config: Any, tensors: Any) -> Any:
        seen.append(config)
        return {"made": StoredTensor(name="made", shape=(1,), format="dense", dtype="float32", nbytes=4, read=dict)}

    found = read_quantized(published.checkpoint, readers={"gptq": read})
    assert list(found.tensors) == ["made"]
    assert seen == [case.config]


def made(**fields: Any) -> dict[str, StoredTensor]:
    tensor = {"name": "x", "shape": (1,), "format": "dense", "dtype": "float32", "nbytes": 4, "read": dict, **fields}
    return {"x": StoredTensor(**tensor)}


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (None, "it returned None"),
        ({"x": None}, "'x' is none"),
        (made(name="y"), "'x' is"),
        (made(format="?"), "'x' is"),
    ],
)
def test_a_reader_that_returns_something_else_is_at_fault(
    result: Any, says: str, publish: Callable[..., Published]
) -> None:
    published = publish({"quant_method": "dream"}, lambda w: Layer({"weight": w}, w))
    with pytest.raises(PluginError, match=f"quantized with dream must return.*{says}") as caught:
        read_quantized(published.checkpoint, readers={"dream": lambda config, tensors: result})
    assert caught.value.remedy


def test_groups_that_do_not_divide_the_columns_are_refused(publish: Callable[..., Published]) -> None:
    def write(w: NDArray[Any]) -> Layer:
        layer = gptq(w, bits=4, group=32, symmetric=True)
        group_of = np.minimum(np.arange(w.shape[1]) // 40, layer.tensors["scales"].shape[0] - 1).astype(np.int32)
        return Layer({**layer.tensors, "g_idx": group_of}, layer.means)

    checkpoint = read_quantized(publish(gptq_config(4, 0, True), write).checkpoint)
    with pytest.raises(UnsupportedModel, match="groups of different sizes"):
        checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].packed()
