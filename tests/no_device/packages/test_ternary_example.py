"""The example reader of ternary weights, installed and used as a stranger's."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_cases import CASES, write_folder
from published_layouts import Layer
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

EXAMPLE = "examples/ternary_weights"
ROOT = Path(__file__).resolve().parents[3]

Install = Callable[[str], Any]

AGAINST_TRANSFORMERS = """
import numpy as np, torch
import torch._dynamo
torch._dynamo.config.disable = True
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights
from midspan.devices.discovery import load_plugins, quantizations
from midspan.errors import CheckpointError, UnsupportedModel
from midspan.interface import StoredTensor
from midspan.runtimes.reference.packed_weights import DynamicInt8

read = quantizations(load_plugins())["bitnet"]
torch.manual_seed(0)
ternary, x, factor = torch.randint(-1, 2, (24, 40)), torch.randn(7, 40), torch.tensor([3.7])

def stored(name, array):
    return StoredTensor(name=name, shape=array.shape, format="dense", dtype=str(array.dtype), nbytes=array.nbytes,
                        read=lambda: {"data": array})

packed = pack_weights(ternary.clone())
arrays = {"a.weight": packed.numpy(), "a.weight_scale": factor.numpy(), "b.weight": np.ones((2, 2), np.float32)}
tensors = {name: stored(name, array) for name, array in arrays.items()}

divides = BitLinear(40, 24, False, dtype=torch.float32)
divides.weight.copy_(packed)
divides.weight_scale.copy_(factor)
multiplies = AutoBitLinear(40, 24, bias=False, dtype=torch.float32)
multiplies.weight.data.copy_(ternary)
multiplies.weight_scale.copy_(factor)
for config, layer in (({}, divides), ({"linear_class": "autobitlinear"}, multiplies)):
    made = read(config, tensors)
    assert sorted(made) == ["a.weight", "b.weight"] and made["b.weight"] is tensors["b.weight"]
    weight = made["a.weight"]
    assert (weight.format, weight.shape, weight.nbytes) == ("int8.dynamic", (24, 40), 24 * 40 // 4 + 4)
    parts = weight.packed().parts
    assert np.array_equal(parts["data"], ternary.numpy())
    found = DynamicInt8(data=parts["data"], scale=parts["scale"]).product(x.numpy())
    with torch.no_grad():
        assert np.allclose(found, layer(x).numpy(), rtol=1e-5, atol=1e-5)

for config, error in (({"use_rms_norm": True}, UnsupportedModel), ({"quantization_mode": "online"}, UnsupportedModel)):
    try:
        read(config, tensors)
    except error as found:
        assert found.remedy
    else:
        raise AssertionError(config)
del tensors["a.weight_scale"]
try:
    read({}, tensors)
except CheckpointError as found:
    assert "a.weight" in found.message and found.remedy
else:
    raise AssertionError("a layer without a scale was read")
"""


def scale_and_signs(w: np.ndarray) -> tuple[np.float32, np.ndarray]:
    """BitNet's rounding: the mean magnitude, and -1, 0 and 1."""
    scale = np.float32(1 / np.abs(w).mean())
    return scale, np.clip(np.rint(w * scale), -1, 1).astype(np.int8)


def ternary(w: np.ndarray) -> Layer:
    """A layer as BitNet publishes it: rows far from each other share bytes."""
    scale, signs = scale_and_signs(w)
    packed = np.zeros((len(w) // 4, w.shape[1]), np.uint8)
    for row, values in enumerate(signs):
        place, byte = divmod(row, len(packed))
        packed[byte] |= (values + 1).astype(np.uint8) << np.uint8(2 * place)
    return Layer({"weight": packed, "weight_scale": np.array([scale])}, signs / scale)


def as_bytes(w: np.ndarray) -> Layer:
    """The same numbers as compressed-tensors publishes 8-bit integers."""
    scale, signs = scale_and_signs(w)
    scales = np.full((len(w), 1), 1 / scale, np.float32)
    return Layer({"weight": signs, "weight_scale": scales}, signs * scales)


@pytest.fixture
def folders(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny model with ternary weights, as BitNet publishes it, and as bytes."""
    config = json.loads((tiny_model / "config.json").read_text())
    weights = load_file(tiny_model / "model.safetensors")
    bitnet, plain = tmp_path / "bitnet", tmp_path / "bytes"
    shutil.copytree(tiny_model, bitnet)
    shutil.copytree(tiny_model, plain)
    write_folder(bitnet, config, weights, {"quant_method": "bitnet", "linear_class": "bitlinear"}, ternary)
    write_folder(plain, config, weights, CASES["compressed w8a8"].config, as_bytes)
    return bitnet, plain


def test_a_model_that_the_core_does_not_read_generates_what_its_numbers_generate(
    install_as_a_stranger: Install, folders: tuple[Path, Path]
) -> None:
    bitnet, plain = folders
    example = install_as_a_stranger(EXAMPLE)
    settings = {"kv_cache_memory_bytes": 4 * 2**20, "dtype": "float32"}
    tokens = example.generate("reference", bitnet, **settings)
    assert tokens == example.generate("reference", plain, **settings)
    assert len({tuple(row) for row in tokens}) > 1


def test_a_layer_multiplies_as_that_of_transformers_and_others_are_refused(install_as_a_stranger: Install) -> None:
    install_as_a_stranger(EXAMPLE).python("-W", "ignore", "-c", AGAINST_TRANSFORMERS)


def test_the_package_is_listed_among_the_plugins_without_an_error(install_as_a_stranger: Install) -> None:
    listed = install_as_a_stranger(EXAMPLE).python("-m", "midspan_cli", "plugins", "--json").stdout
    (plugin,) = [item for item in json.loads(listed)["plugins"] if item["distribution"] == "midspan-ternary"]
    assert plugin["status"] != "failed", plugin


def test_it_takes_nothing_from_the_core_but_the_contract() -> None:
    modules = {
        node.module
        for path in (ROOT / EXAMPLE).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("midspan.")
    }
    assert modules == {"midspan.interface", "midspan.errors"}


def test_installing_leaves_nothing_in_the_source_tree(install_as_a_stranger: Install) -> None:
    install_as_a_stranger(EXAMPLE)
    listing = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", EXAMPLE]
    found = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [name for name in found if "__pycache__" not in name] == []
