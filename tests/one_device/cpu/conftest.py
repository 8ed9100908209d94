"""What tests of the cpu device share: the opened device, and single operations run on torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from midspan.conformance.operation_case import OperationCase
from midspan.conformance.operation_run import Setting
from midspan.interface import Capabilities, Device
from midspan.runtimes.torch.program import TorchRuntime
from midspan_cpu.kernels.table import KernelSet
from midspan_cpu.plugin import PLUGIN


@pytest.fixture
def open_cpu() -> Iterator[Callable[[int], Device]]:
    """``open_cpu(threads)``: the cpu device; closed after the test, and torch has as many threads as before."""
    opened: list[Device] = []
    before = torch.get_num_threads()

    def open_one(threads: int) -> Device:
        opened.append(PLUGIN.open(PLUGIN.probe().devices[0], {"threads": str(threads)}))
        return opened[-1]

    yield open_one
    for device in opened:
        device.close()
    torch.set_num_threads(before)


@pytest.fixture
def cpu_device(open_cpu: Callable[[int], Device]) -> Device:
    """The cpu device with two threads."""
    return open_cpu(2)


@pytest.fixture
def kernel_set() -> Iterator[KernelSet]:
    """The device's kernels, with two threads."""
    kernels = KernelSet(threads=2, instruction_set=None)
    yield kernels
    kernels.close()


@pytest.fixture(scope="session")
def run_case() -> Callable[..., tuple[list[Any], Any, str]]:
    """``run_case(case, runtime, dtype, cache_dtype, kernel=None)`` -> outputs, cache afterwards, kernel name."""

    def run(
        case: OperationCase, runtime: TorchRuntime, dtype: str, cache_dtype: str, kernel: str | None = None
    ) -> tuple[list[Any], Any, str]:
        kernels = {} if kernel is None else {case.op: kernel}
        bounds = Setting(dtype=dtype, cache_dtype=cache_dtype, block_size=16, kernels=kernels).bounds(
            Capabilities(), case
        )
        graph = case.graph()
        program = runtime.compile(graph, case, bounds)
        cache = None
        if case.cache is not None:
            cache = runtime.allocate_cache(case.cache.layout(cache_dtype), (case.cache.blocks,))
            cache.write("full", range(case.cache.blocks), case.cache.data)
        outputs = list(program.evaluate(dict(zip(graph.inputs, case.inputs, strict=True)), cache))
        blocks = None if cache is None else cache.read("full", range(cache.blocks[0]))
        return outputs, blocks, program.placement.nodes[0].kernel

    return run
