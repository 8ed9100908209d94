"""The setting ``quantization``: what it makes of a model, what it says of it, and where it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midspan import LLM, SamplingParams, SettingsError
from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice, load_plugins
from midspan.engine.status import StartupPhase
from midspan.interface import Capabilities, DeviceInfo, DevicePlugin, Found
from midspan.interface.version import INTERFACE_VERSION
from midspan.runtimes.reference import ReferenceDevice

PROMPTS = ["the quick brown fox jumps", "a tale of two cities and of three bears"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
INFO = DeviceInfo(id="chip", description="a chip", memory_bytes=2**24)


def chip(*quantizations: str) -> DeviceCatalogue:
    """A device that computes as the reference and claims these packed formats."""
    plugin = DevicePlugin(
        name="chip",
        interface=INTERFACE_VERSION,
        probe=lambda: Found((INFO,)),
        open=lambda info, options: ReferenceDevice(INFO, capabilities=Capabilities(quantizations=quantizations)),
    )
    found = DiscoveredDevice(plugin=plugin, distribution="tests", version="1", probe=plugin.probe())
    return DeviceCatalogue(plugins={"chip": found}, failures=(), registry=load_plugins([]))


@pytest.fixture
def load(tiny_model: Path) -> Callable[..., tuple[LLM, list[str]]]:
    """An LLM, and what was said of quantization while it was loaded: ``load(catalogue, **settings)``."""

    def make(catalogue: DeviceCatalogue, *, model: Path = tiny_model, **settings: Any) -> tuple[LLM, list[str]]:
        phases: list[StartupPhase] = []
        llm = LLM(str(model), catalogue=catalogue, report=phases.append, kv_cache_memory_bytes=2**20, **settings)
        return llm, [phase.detail for phase in phases if phase.name == "quantization"]

    return make


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("int8", "8 linear weights became int8.dynamic (int8)"),
        ("w8a16", "8 linear weights became int8.channel (w8a16)"),
        ("fp8", "8 linear weights became fp8.channel (fp8)"),
        ("int4", "6 linear weights became int4.group (int4); 2 have no groups of 128 or 32 columns"),
    ],
)
def test_a_quantized_model_generates_and_says_how_its_weights_lie(
    load: Any, reference_only: DeviceCatalogue, name: str, summary: str
) -> None:
    llm, told = load(reference_only, quantization=name)
    with llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12, 12]
    assert len(told) == 1
    assert told[0].startswith(summary)
    assert llm.model.quantization == told[0]


def test_it_takes_less_memory(load: Any, reference_only: DeviceCatalogue) -> None:
    sizes = {}
    for name in (None, "int8"):
        llm, told = load(reference_only, quantization=name)
        sizes[name] = llm.model.weights_bytes
        assert bool(told) == bool(llm.model.quantization) == (name is not None)
        llm.close()
    # The tables, of 2 * 320 * 32 float32, stay; of 2 * 7,680 others a byte is left, and a scale for each row.
    assert sizes[None] - sizes["int8"] > 2.8 * 2 * 7680


def test_a_device_that_does_not_take_the_format_is_not_given_it_unpacked(load: Any) -> None:
    with pytest.raises(SettingsError, match=r"format int8\.dynamic, which the device chip does not take") as caught:
        load(chip(), quantization="int8")
    assert caught.value.remedy == "Leave it out, or take another device."
    with pytest.raises(SettingsError, match=r"fp8\.channel") as caught:
        load(chip("int8.channel", "int4.group"), quantization="fp8")
    assert caught.value.remedy == "Take w8a16, int4."


def test_an_unknown_name_lists_those_that_exist(load: Any, reference_only: DeviceCatalogue) -> None:
    with pytest.raises(SettingsError, match="no quantization 'int3'") as caught:
        load(reference_only, quantization="int3")
    assert "int8, w8a16, int4, fp8" in caught.value.remedy
    with pytest.raises(SettingsError, match="quantization must be a text"):
        load(reference_only, quantization=8)


def test_a_model_that_is_quantized_already_is_not_quantized_again(
    load: Any,
    reference_only: DeviceCatalogue,
    tiny_model: Path,
    tmp_path: Path,
    write_tiny_gguf: Callable[[Path], None],
) -> None:
    write_tiny_gguf(tmp_path / "model.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / name)
    with pytest.raises(SettingsError, match=r"was published quantized already \(gguf\)"):
        load(reference_only, model=tmp_path, quantization="int8", tokenizer=str(tiny_model))
    for name in ("gguf", None):
        llm, told = load(reference_only, model=tmp_path, quantization=name, tokenizer=str(tiny_model))
        llm.close()
        assert told == ["8 matrices of gguf.q8_0 unpacked to float32: the device takes none"]


@pytest.fixture
def write_tiny_gguf(tiny_model: Path) -> Callable[[Path], None]:
    """Writes the tiny model with its attention as Q8_0; in which order rows lie does not matter here."""
    import gguf
    from safetensors.numpy import load_file

    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

    def write(path: Path) -> None:
        config = json.loads((tiny_model / "config.json").read_text())
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_token_list([str(number) for number in range(config["vocab_size"])])
        for name, array in load_file(tiny_model / "model.safetensors").items():
            stem = name.removesuffix(".weight")
            short = outer.get(stem)
            if short is None:
                _, _, layer, *middle = stem.split(".")
                short = f"blk.{layer}.{names['.'.join(middle)]}"
            packs = "attn_" in short and array.ndim > 1
            kind = gguf.GGMLQuantizationType["Q8_0" if packs else "F32"]
            writer.add_tensor(f"{short}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write
