"""Models that are a config and a tokenizer, with made-up weights; devices and engines for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from midspan import LLM
from midspan.interface import Device
from midspan_simulated.plugin import PLUGIN

WriteConfig = Callable[..., Path]
OpenSimulated = Callable[..., Device]
MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="session")
def write_config(tmp_path_factory: pytest.TempPathFactory) -> WriteConfig:
    """Write a Llama's config and a tokenizer of bytes: ``write_config(hidden_size=64)``."""

    def write(**fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("config")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "torch_dtype": "float32",
            "tie_word_embeddings": False,
            **fields,
        }
        (folder / "config.json").write_text(json.dumps(config))
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return write


@pytest.fixture(scope="session")
def tiny(write_config: WriteConfig) -> Path:
    """The folder of a Llama of two layers, 320 tokens and 256 positions; its weights are made up when it is loaded."""
    return write_config()


@pytest.fixture
def open_simulated() -> Iterator[OpenSimulated]:
    """Open devices: ``open_simulated("h100", numerics="off")``; the plain one without a name."""
    opened: list[Device] = []
    infos = {info.id: info for info in PLUGIN.probe().devices}  # type: ignore[union-attr]

    def open_one(sheet: str = "", **options: str) -> Device:
        device = PLUGIN.open(infos[f"simulated:{sheet}" if sheet else "simulated"], options)
        opened.append(device)
        return device

    yield open_one
    for device in opened:
        device.close()


@pytest.fixture
def make_llm(tiny: Path) -> Iterator[MakeLLM]:
    """``make_llm("simulated:h100", {"numerics": "off"}, max_num_seqs=4)``: the tiny model, or another, in an engine."""
    made: list[LLM] = []

    def make(device: str, options: dict[str, str] | None = None, *, model: Path = tiny, **settings: Any) -> LLM:
        llm = LLM(str(model), load_format="dummy", device=device, device_options=options or {}, **settings)
        made.append(llm)
        return llm

    yield make
    for llm in made:
        llm.close()
