"""What tests of the cpu device share: the opened device, and single operations run on torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from midspan.conformance.operation_case import OperationCase
from midspan.interface import Bounds, Device
from midspan.runtimes.torch.element_types import copy_in, copy_out, torch_type
from midspan.runtimes.torch.program import TorchRuntime
from midspan_cpu.kernels.table import KernelSet
from midspan_cpu.plugin import PLUGIN


@pytest.fixture
def cpu_device() -> Iterator[Device]:
    """The cpu device with two threads."""
    device = PLUGIN.open(PLUGIN.probe().devices[0], {"threads": "2"})
    yield device
    device.close()


@pytest.fixture
def kernel_set() -> Iterator[KernelSet]:
    """The device's kernels, with two threads."""
    kernels = KernelSet(threads=2, instruction_set=None)
    yield kernels
    kernels.close()


def _tensor(array: Any, dtype: str, op: str) -> torch.Tensor:
    as_it_is = array.dtype != np.float32 or op == "sample"
    return torch.from_numpy(array.copy()) if as_it_is else copy_in(array, torch_type(dtype), torch.device("cpu"))


@pytest.fixture(scope="session")
def run_case() -> Callable[..., tuple[list[Any], Any, str]]:
    """``run_case(case, runtime, dtype, cache_dtype, kernel=None)`` -> outputs, cache afterwards, kernel name."""

    def run(
        case: OperationCase, runtime: TorchRuntime, dtype: str, cache_dtype: str, kernel: str | None = None
    ) -> tuple[list[Any], Any, str]:
        bounds = Bounds(
            max_tokens=512,
            max_requests=64,
            max_context=1024,
            max_sampled_rows=64,
            block_size=16,
            dtype=dtype,
            cache_dtype=cache_dtype,
            kernels={} if kernel is None else {case.op: kernel},
        )
        graph = case.graph()
        program = runtime.compile(graph, case, bounds)
        cache = None
        if case.cache is not None:
            cache = runtime.allocate_cache(case.cache.layout(cache_dtype), (case.cache.blocks,))
            cache.write("full", range(case.cache.blocks), case.cache.data)
        inputs = {
            role: _tensor(value, dtype, case.op) if isinstance(value, np.ndarray) else value
            for role, value in zip(graph.inputs, case.inputs, strict=True)
        }
        found = program.evaluate(inputs, cache).values()
        outputs = [copy_out(tensor) if tensor.is_floating_point() else tensor.numpy() for tensor in found]
        blocks = None if cache is None else cache.read("full", range(cache.blocks[0]))
        return outputs, blocks, program.placement.nodes[0].kernel

    return run
