"""The tutorial's program for a whole graph, taken from its text and used under a model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from midspan import LLM, SamplingParams
from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice, load_plugins
from midspan.interface import INTERFACE_VERSION, Bounds, DeviceInfo, DevicePlugin, Found, Graph, WeightSource
from midspan.runtimes.reference import ReferenceDevice

TUTORIAL = Path(__file__).resolve().parents[3] / "docs/write-a-device.md"
INFO = DeviceInfo(id="whole", description="takes whole graphs", memory_bytes=2**30)


@pytest.fixture
def whole_graph() -> DeviceCatalogue:
    """A device whose programs are the tutorial's; the definitions stand in for a compiler."""
    block = re.compile(r"^```\n(from midspan.interface.*?class WholeProgram.*?)^```$", re.MULTILINE | re.DOTALL)
    (text,) = block.findall(TUTORIAL.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(compile(text, str(TUTORIAL), "exec"), names)

    class WholeDevice(ReferenceDevice):
        def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> Any:
            made = super().compile(graph, weights, bounds)
            return names["WholeProgram"](self.info.id, graph, made.evaluate, made.memory_bytes())

    plugin = DevicePlugin(
        name="whole",
        interface=INTERFACE_VERSION,
        probe=lambda: Found((INFO,)),
        open=lambda info, options: WholeDevice(info),
    )
    found = DiscoveredDevice(plugin=plugin, distribution="tests", version="1", probe=plugin.probe())
    return DeviceCatalogue(plugins={"whole": found}, failures=(), registry=load_plugins([]))


@pytest.mark.parametrize("logprobs", [None, 3])
def test_a_program_of_the_whole_graph_serves_a_model_as_the_reference_does(
    whole_graph: DeviceCatalogue, tiny_model: Path, tiny_llm: LLM, logprobs: int | None
) -> None:
    llm = LLM(str(tiny_model), catalogue=whole_graph, kv_cache_memory_bytes=4 * 2**20)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=logprobs)
    (one,), (other,) = (
        [dataclasses.asdict(item) for item in each.generate(["a tale of"], params, use_tqdm=False)[0].outputs]
        for each in (llm, tiny_llm)
    )
    assert one["token_ids"] == other["token_ids"]
    assert (one["logprobs"] is None) == (logprobs is None)
    assert set(llm.model.placement["linear"]) == {"whole graph"}
