"""Runs a case on an opened device, through the interface and nothing else.

Knows what ``Device``, ``Program`` and ``Cache`` promise, and no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.check import CheckFailed
from midspan.conformance.operation_case import OperationCase
from midspan.conformance.operation_check import disagreement
from midspan.interface import Bounds, Capabilities, Device, Graph, NodePlacement, Program

MAX_TOKENS = 512
MAX_REQUESTS = 64
MAX_CONTEXT = 1024
"""What most cases need at most; a device's own limits may be lower, see ``case_fitting``."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a case is compiled.

    Attributes:
        dtype, cache_dtype, block_size: as in ``Bounds``.
        kernels: operation -> kernel, as in ``Bounds``.
        strict: as in ``Bounds``.
    """

    dtype: str
    cache_dtype: str
    block_size: int
    kernels: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False

    def bounds(self, claims: Capabilities, case: OperationCase) -> Bounds:
        """Room for a case, within what the device claims; the same for most cases."""
        return Bounds(
            max_tokens=_within(MAX_TOKENS, claims.max_tokens),
            max_requests=_within(MAX_REQUESTS, claims.max_requests),
            max_context=_within(max(MAX_CONTEXT, case.context()), claims.max_context),
            max_sampled_rows=_within(MAX_REQUESTS, claims.max_sampled_rows),
            block_size=self.block_size,
            dtype=self.dtype,
            cache_dtype=self.cache_dtype,
            kernels=dict(self.kernels),
            strict=self.strict,
        )


def _within(wanted: int, limit: int | None) -> int:
    return wanted if limit is None else min(wanted, limit)


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseRun:
    """What a case gave.

    Attributes:
        outputs: of the node, on the host.
        cache: all blocks after the step in the canonical layout, for attention.
        placed: how the node was served; None where the device compiles graphs whole and says nothing.
    """

    outputs: tuple[NDArray[Any], ...]
    cache: NDArray[np.float32] | None
    placed: NodePlacement | None


def compile_case(device: Device, case: OperationCase, setting: Setting) -> tuple[Graph, Program]:
    """Compile a case's graph.

    Raises:
        UnsupportedOperation: the device refuses it.
    """
    graph = case.graph()
    return graph, device.compile(graph, case, setting.bounds(device.capabilities, case))


def run_case(device: Device, case: OperationCase, setting: Setting) -> CaseRun:
    """Compile and run a case, and release what it took.

    Raises:
        UnsupportedOperation: the device refuses it.
        CheckFailed: an input was written to.
    """
    graph, program = compile_case(device, case, setting)
    try:
        cache = None
        if case.cache is not None:
            cache = device.allocate_cache(case.cache.layout(setting.cache_dtype), (case.cache.blocks,))
            cache.write(case.cache.group.name, range(case.cache.blocks), case.cache.data)
        try:
            before = [value.copy() if isinstance(value, np.ndarray) else None for value in case.inputs]
            outputs = program.evaluate(dict(zip(graph.inputs, case.inputs, strict=True)), cache)
            _require_untouched(case, before)
            blocks = None
            if cache is not None and case.cache is not None:
                blocks = cache.read(case.cache.group.name, range(case.cache.blocks))
        finally:
            if cache is not None:
                cache.close()
        nodes = program.placement.nodes
        return CaseRun(outputs=tuple(outputs), cache=blocks, placed=nodes[0] if nodes else None)
    finally:
        program.close()


def require_agreement(device: Device, case: OperationCase, setting: Setting) -> CaseRun:
    """Run a case and hold what came out against the definition.

    Raises:
        CheckFailed: they disagree.
        UnsupportedOperation: the device refuses it.
    """
    run = run_case(device, case, setting)
    problem = disagreement(case, setting.dtype, setting.cache_dtype, run.outputs, run.cache)
    if problem:
        served = "" if run.placed is None else f" (kernel '{run.placed.kernel}')"
        raise CheckFailed(f"{case.name}{served}: {problem}")
    return run


def _require_untouched(case: OperationCase, before: list[NDArray[Any] | None]) -> None:
    for place, (copy, value) in enumerate(zip(before, case.inputs, strict=True)):
        if copy is not None and isinstance(value, np.ndarray) and not np.array_equal(copy, value, equal_nan=True):
            raise CheckFailed(f"{case.name}: evaluate() wrote to the host array of input {place}")
