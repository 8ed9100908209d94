"""Models that were published quantized, from their folder to generated text: as the numbers that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from published_cases import CASES, Case, gptq_config, write_folder
from published_layouts import gptq
from safetensors.numpy import load_file, save_file

from midspan import LLM, SamplingParams, SettingsError
from midspan.devices.discovery import DeviceCatalogue
from midspan.engine.status import StartupPhase
from midspan.errors import UnsupportedModel

PROMPTS = ["the quick brown fox jumps", "a tale of two cities and of three bears"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

GPTQ = Case(gptq_config(4, 16, False), partial(gptq, bits=4, group=16, symmetric=False), "int4.group")


@pytest.fixture
def folders(tiny_model: Path, tmp_path: Path) -> Callable[[Case], tuple[Path, Path]]:
    """The tiny model quantized, and as the plain numbers which that stands for: ``folders(case)``."""

    def make(case: Case) -> tuple[Path, Path]:
        quantized, plain = tmp_path / "quantized", tmp_path / "plain"
        for folder in (quantized, plain):
            shutil.copytree(tiny_model, folder)
        config = json.loads((tiny_model / "config.json").read_text())
        weights = load_file(tiny_model / "model.safetensors")
        save_file(write_folder(quantized, config, weights, case.config, case.write), plain / "model.safetensors")
        return quantized, plain

    return make


def generated(folder: Path, catalogue: DeviceCatalogue, **settings: Any) -> tuple[list[tuple[int, ...]], list[str]]:
    """Greedy tokens, and what was said of quantization while the model was loaded."""
    phases: list[StartupPhase] = []
    with LLM(str(folder), catalogue=catalogue, report=phases.append, kv_cache_memory_bytes=2**20, **settings) as llm:
        tokens = [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    return tokens, [phase.detail for phase in phases if phase.name == "quantization"]


@pytest.mark.parametrize(
    "case", [GPTQ, CASES["compressed w8a16 plain"], CASES["fp8 one scale"]], ids=["gptq", "compressed-tensors", "fp8"]
)
def test_a_published_folder_generates_what_its_numbers_generate(
    case: Case, folders: Callable[[Case], tuple[Path, Path]], reference_only: DeviceCatalogue
) -> None:
    quantized, plain = folders(case)
    wanted, silent = generated(plain, reference_only)
    for asked in (None, case.config["quant_method"]):
        tokens, told = generated(quantized, reference_only, quantization=asked)
        assert tokens == wanted
        assert told == [f"14 matrices as {case.format}"]
    assert silent == []
    assert len(set(wanted[0])) > 3


def test_a_published_quantized_model_is_not_quantized_again(
    folders: Callable[[Case], tuple[Path, Path]], reference_only: DeviceCatalogue
) -> None:
    quantized, _ = folders(GPTQ)
    with pytest.raises(SettingsError, match=r"was published quantized already \(gptq\)"):
        LLM(str(quantized), catalogue=reference_only, quantization="int8")


def test_a_quantization_that_nobody_reads_is_refused_with_those_that_are_read(
    tiny_model: Path, tmp_path: Path, reference_only: DeviceCatalogue
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(UnsupportedModel, match="quantized with hqq") as caught:
        LLM(str(folder), catalogue=reference_only)
    assert "awq, compressed-tensors, fbgemm_fp8, fp8, gptq" in caught.value.remedy
