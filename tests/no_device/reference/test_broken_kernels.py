"""Kernels that break their contract: named, with what to do, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from midspan.conformance.operation_cases import operation_cases
from midspan.errors import PluginError
from midspan.interface import Bounds, DeviceInfo, Kernel, KernelSite
from midspan.runtimes.reference import ReferenceDevice

INFO = DeviceInfo(id="box:3", description="a box", memory_bytes=2**30)
BOUNDS: dict[str, Any] = {
    "max_tokens": 64,
    "max_requests": 8,
    "max_context": 64,
    "max_sampled_rows": 8,
    "block_size": 16,
    "dtype": "float32",
    "cache_dtype": "float32",
}


def _prepare(site: KernelSite) -> Callable[..., Any]:
    return np.add


def _raises(site: KernelSite) -> Any:
    raise ZeroDivisionError("no width")


BROKEN: dict[str, tuple[list[Kernel], str]] = {
    "supports raises": (
        [Kernel(name="fast", op="add", prepare=_prepare, supports=_raises, priority=1)],
        "it raised ZeroDivisionError('no width')",
    ),
    "supports says True": (
        [Kernel(name="fast", op="add", prepare=_prepare, supports=lambda site: True, priority=1)],  # type: ignore[arg-type,return-value]
        "it returned True and neither Yes() nor No(...)",
    ),
    "supports says nothing": (
        [Kernel(name="fast", op="add", prepare=_prepare, supports=lambda site: None, priority=1)],  # type: ignore[arg-type,return-value]
        "it returned None",
    ),
    "two of one name": ([Kernel(name="fast", op="add", prepare=_prepare)] * 2, "two of that name"),
    "no such operation": ([Kernel(name="fast", op="dream", prepare=_prepare)], "there is no such operation"),
}


@pytest.mark.parametrize(("kernels", "told"), BROKEN.values(), ids=BROKEN)
def test_a_broken_kernel_is_named_when_a_graph_is_compiled(kernels: list[Kernel], told: str) -> None:
    case = next(case for case in operation_cases(block_size=16) if case.op == "add")
    device = ReferenceDevice(INFO, kernels=kernels)
    with pytest.raises(PluginError) as caught:
        device.compile(case.graph(), case, Bounds(**BOUNDS))
    assert f"The kernel 'fast' for '{kernels[0].op}' of device 'box:3' is broken" in caught.value.message
    assert told in caught.value.message
    assert caught.value.plugin == "box"
    assert caught.value.remedy


def test_another_kernel_can_be_taken_in_place_of_a_broken_one() -> None:
    case = next(case for case in operation_cases(block_size=16) if case.op == "add")
    device = ReferenceDevice(INFO, kernels=BROKEN["supports raises"][0])
    program = device.compile(case.graph(), case, Bounds(**BOUNDS, kernels={"add": "numpy"}))
    assert [node.kernel for node in program.placement.nodes] == ["numpy"]
