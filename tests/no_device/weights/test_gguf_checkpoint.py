"""A GGUF file gives the tensors and the config of the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.models.catalogue import build_graph
from midspan.models.config_reader import ConfigReader
from midspan.models.rotary_scaling import read_rotary
from midspan.weights.checkpoint import open_checkpoint
from midspan.weights.quantization import dequantize

Write = Callable[..., Path]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_0"])
def test_tensors_have_the_published_names_and_row_order(
    tmp_path: Path, write_gguf: Write, published_tensors: Any, kind: str
) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", published_tensors, kind=kind))
    assert set(checkpoint.tensors) == set(published_tensors)
    for name, array in published_tensors.items():
        number = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        expected = gguf.quants.dequantize(gguf.quants.quantize(array, number), number)
        tensor = checkpoint.tensors[name]
        assert tensor.shape == array.shape
        content = tensor.packed()
        assert (content.name, content.format) == (name, tensor.format)
        np.testing.assert_array_equal(dequantize(content), expected, err_msg=name)


def test_only_llama_has_its_query_and_key_rows_put_back(
    tmp_path: Path, write_gguf: Write, published_tensors: Any
) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", published_tensors, architecture="qwen2"))
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(dequantize(checkpoint.tensors[name].packed()), published_tensors[name])


def test_the_config_is_the_published_one(
    tmp_path: Path, write_gguf: Write, published_tensors: Any, published_config: Any
) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", published_tensors, kind="BF16"))
    assert checkpoint.config.items() >= published_config.items()
    assert checkpoint.config["rope_scaling"] is None
    assert (checkpoint.config["bos_token_id"], checkpoint.config["eos_token_id"]) == (1, 2)
    assert checkpoint.dtype == "bfloat16"


def test_a_file_without_output_matrix_is_tied(tmp_path: Path, write_gguf: Write, published_tensors: Any) -> None:
    tied = {name: array for name, array in published_tensors.items() if name != "lm_head.weight"}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tied, kind="Q8_0"))
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.tensors
    assert "torch_dtype" not in checkpoint.config
    assert checkpoint.dtype is None


@pytest.mark.parametrize(
    ("architecture", "window", "class_name"),
    [
        ("llama", None, "LlamaForCausalLM"),
        ("llama", 128, "MistralForCausalLM"),
        ("qwen2", None, "Qwen2ForCausalLM"),
        ("qwen3", None, "Qwen3ForCausalLM"),
    ],
)
def test_a_graph_can_be_built_from_every_architecture(
    tmp_path: Path, write_gguf: Write, published_tensors: Any, architecture: str, window: int | None, class_name: str
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        if window is not None:
            writer.add_sliding_window(window)

    path = write_gguf(tmp_path / "m.gguf", published_tensors, architecture=architecture, change=change)
    config = open_checkpoint(path).config
    graph = build_graph(config)
    assert config["architectures"] == [graph.architecture] == [class_name]
    assert {group.window for group in graph.cache} == {window}


def test_rope_factors_give_the_frequencies_of_the_published_scaling(
    tmp_path: Path, write_gguf: Write, published_tensors: Any, published_config: Any
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    read = {"head_size": 16, "max_position": 512}
    plain = read_rotary(ConfigReader(published_config), **read)
    published = read_rotary(ConfigReader({**published_config, "rope_scaling": scaling}), **read)
    factors = np.array(plain.inverse_frequencies) / np.array(published.inverse_frequencies)
    assert factors.max() == pytest.approx(8.0)
    path = write_gguf(tmp_path / "m.gguf", published_tensors, factors=factors.astype(np.float32))
    checkpoint = open_checkpoint(path)
    found = read_rotary(ConfigReader(checkpoint.config), **read)
    # The factor is rounded to float32 once, and once more in each of: power, product, quotient, on
    # either side; 8 half units in the last place.
    np.testing.assert_allclose(found.inverse_frequencies, published.inverse_frequencies, rtol=8 * 2**-24)
    assert found.amplitude == 1.0
    assert "rope_freqs.weight" not in checkpoint.tensors


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
        ("none", None),
    ],
)
def test_rope_scalings_are_read(
    tmp_path: Path, write_gguf: Write, published_tensors: Any, kind: str, expected: Any
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", published_tensors, change=change))
    assert checkpoint.config["rope_scaling"] == expected


def test_recommended_sampling_and_all_end_tokens_are_the_generation_config(
    tmp_path: Path, write_gguf: Write, published_tensors: Any
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(7)
        writer.add_float32("general.sampling.temp", 0.7)
        writer.add_uint32("general.sampling.top_k", 20)

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", published_tensors, change=change))
    assert checkpoint.generation_config == {
        "temperature": 0.7,
        "top_k": 20,
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda writer: writer.add_expert_count(8), "mixture of experts"),
        (lambda writer: writer.add_value_length(32), "value heads"),
        (lambda writer: writer.add_rope_dimension_count(8), "rotates a part"),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"), "longrope"),
        (lambda writer: writer.add_uint16("split.count", 3), "one of 3 parts"),
        (lambda writer: writer.add_tensor("blk.0.attn_qkv.weight", np.zeros((4, 4), np.float32)), r"attn_qkv\.weight"),
        (
            lambda writer: writer.add_tensor(
                "blk.0.ffn_norm.bias", np.zeros((1, 82), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ2_S
            ),
            r"IQ2_S.*Q4_K",
        ),
    ],
)
def test_what_is_not_understood_is_refused_and_not_skipped(
    tmp_path: Path, write_gguf: Write, published_tensors: Any, change: Callable[[Any], None], says: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", published_tensors, change=change)
    with pytest.raises(UnsupportedModel, match=f"(?s){says}"):
        open_checkpoint(path)


def test_an_unknown_architecture_says_which_exist(tmp_path: Path, write_gguf: Write, published_tensors: Any) -> None:
    path = write_gguf(tmp_path / "m.gguf", published_tensors, architecture="mamba")
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*llama, qwen2, qwen3"):
        open_checkpoint(path)


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"llama\.embedding_length' is missing"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path, write_gguf: Write, published_tensors: Any) -> None:
    path = write_gguf(tmp_path / "m.gguf", published_tensors)
    assert open_checkpoint(tmp_path).path == path
    (tmp_path / "second.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"2 GGUF files: m\.gguf, second\.gguf"):
        open_checkpoint(tmp_path)


def test_the_real_model_is_what_its_publisher_says(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    graph = build_graph(checkpoint.config)
    assert graph.architecture == "LlamaForCausalLM"
    sources = {source for weight in graph.weights.values() for source in weight.sources or (weight.name,)}
    assert sources == set(checkpoint.tensors)
    # From the config.json that was published with the model.
    assert (
        checkpoint.config.items()
        >= {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 100000.0,
            "rms_norm_eps": 1e-05,
            "max_position_embeddings": 8192,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        }.items()
    )
    assert {tensor.format for tensor in checkpoint.tensors.values()} == {"dense", "gguf.q4_1", "gguf.q8_0"}
