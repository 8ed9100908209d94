"""The page of the device interface says what the code says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import midspan.interface
from midspan.devices.contract import check_plugin, check_probe_answer
from midspan.devices.interface_version import check_interface
from midspan.interface import OPERATIONS, StoredTensor, Unavailable, hooks
from midspan.weights.published.catalogue import read_quantized
from midspan.weights.quantization import dequantize
from midspan.weights.stored_tensor import Checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def interface_page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("interface_page")


def test_the_page_is_made_of_the_present_docstrings(interface_page: ModuleType) -> None:
    assert interface_page.PAGE.read_text(encoding="utf-8") == interface_page.page(), "run: make pages"


def test_the_page_shows_every_public_name_operation_and_hook(interface_page: ModuleType) -> None:
    page = interface_page.page()
    elsewhere = {"INTERFACE_VERSION", "OPERATIONS", "Operation", "hookimpl", "hookspec"}
    names = set(midspan.interface.__all__) - elsewhere
    assert [name for name in sorted(names) if f"\n### {name}\n" not in page] == []
    assert [name for name in OPERATIONS if f"\n| `{name}` |" not in page] == []
    assert [name for name in vars(hooks) if name.startswith("midspan_") and f"| `{name}(" not in page] == []


def test_everything_on_the_page_is_explained(interface_page: ModuleType) -> None:
    page = interface_page.page()
    unexplained = [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not unexplained, "\n".join(unexplained)
    sections = page.split("\n### ")[1:]
    assert len(sections) > 40
    silent = [section.splitlines()[0] for section in sections if not prose(section.split("\n", 1)[1])]
    assert not silent, silent


def prose(section: str) -> str:
    """A section's text without tables, code and origins."""
    outside = "".join(section.split("```")[::2])
    return "".join(line for line in outside.splitlines() if line and not line.startswith(("|", "From ", "`")))


def test_headings_are_unique_so_that_links_lead_to_one_place(interface_page: ModuleType) -> None:
    headings = [line.lstrip("# ").lower() for line in interface_page.page().splitlines() if line.startswith("##")]
    assert sorted(headings) == sorted(set(headings))


def test_the_examples_of_the_hooks_do_what_the_hooks_ask_for() -> None:
    text = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/hooks.md", "exec"), names)
    assert {name for name in vars(hooks) if name.startswith("midspan_")} <= set(names)
    (plugin,) = names["midspan_devices"]()
    check_plugin(plugin)
    check_interface(plugin, "midspan-mychip")
    assert isinstance(check_probe_answer(plugin, plugin.probe()), Unavailable)
    assert list(names["midspan_architectures"]()) == ["DreamForCausalLM"]
    data, scale = np.arange(6, dtype=np.int8).reshape(2, 3), np.array([0.5, 2.0], np.float16)
    config = {"quantization_config": {"quant_method": "bytes"}}
    tensors = {name: stored(name, array) for name, array in (("a.qbytes", data), ("a.qscale", scale))}
    checkpoint = Checkpoint(path=ROOT, config=config, generation_config={}, tensors=tensors)
    read = read_quantized(checkpoint, readers=names["midspan_quantizations"]()).tensors
    assert list(read) == ["a.weight"]
    assert dequantize(read["a.weight"].packed()).tolist() == (data * scale[:, None]).tolist()


def stored(name: str, array: np.ndarray) -> StoredTensor:
    kind = str(array.dtype)
    return StoredTensor(
        name=name, shape=array.shape, format="dense", dtype=kind, nbytes=array.nbytes, read=lambda: {"data": array}
    )
