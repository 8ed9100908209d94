"""Mode ``speed``: each kernel beside the portable one, in one run, in turns.

What is timed is ``Program.evaluate`` and waiting for it: the node, and what brings its
values from the host and back, which is the same for all kernels of a case. A device that
compiles graphs whole stands beside the reference device. Knows no device.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from midspan.conformance.case_fitting import fitting
from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.operation_case import OperationCase
from midspan.conformance.operation_run import Setting, compile_case
from midspan.conformance.speed_cases import speed_cases
from midspan.conformance.subject import Subject
from midspan.conformance.support import WHOLE
from midspan.errors import UnsupportedOperation
from midspan.interface import Device, Found, NodePlacement
from midspan.runtimes.reference.device import PLUGIN as REFERENCE
from midspan.weights.quantization import KNOWN_FORMATS

LEVEL = "speed"
LEAST_TURNS = 5
MOST_TURNS = 200
SECONDS = 0.5
"""For all turns of a case, as soon as there were the least."""

Timed = dict[str, Callable[[], None]]
"""Kernel -> evaluates once and waits."""


def speed_checks(subject: Subject) -> list[Check]:
    """One for each case, in the device's preferred type; what it finds is the fact ``speed``, a list of

    ``case``, ``dtype``, ``kernel``, ``beside`` (the kernel or device that it is compared with, or null),
    ``median_seconds``, ``spread_seconds`` (between the quartiles), ``turns`` and ``ratio`` (how many times
    faster than that, by the medians).
    """
    claims = subject.capabilities
    unclaimed = "virtual_clock is claimed: its steps take no time that the host could measure"
    known = tuple(name for name in claims.quantizations if name in KNOWN_FORMATS)
    cases = fitting(list(speed_cases(claims.block_sizes[0], known)), claims)
    setting = Setting(dtype=claims.dtypes[0], cache_dtype=claims.cache_dtypes[0], block_size=claims.block_sizes[0])
    return [
        Check(
            level=LEVEL,
            name=case.name.replace(",", "").replace(" ", "-"),
            run=functools.partial(_time_case, subject, case, setting),
            unclaimed=unclaimed if claims.virtual_clock else None,
        )
        for case in cases
    ]


def _time_case(subject: Subject, case: OperationCase, setting: Setting) -> None:
    with ExitStack() as stack:
        timed, beside = _contestants(subject.device(), case, setting, stack)
        times = _take_turns(timed)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    rows = []
    for name, taken in times.items():
        lower, _, upper = statistics.quantiles(taken, n=4)
        row: dict[str, Any] = {
            "case": case.name,
            "dtype": setting.dtype,
            "kernel": name,
            "beside": beside,
            "median_seconds": medians[name],
            "spread_seconds": upper - lower,
            "turns": len(taken),
            "ratio": None if beside is None else medians[beside] / medians[name],
        }
        rows.append(row)
    subject.facts["speed"] = rows


def _contestants(device: Device, case: OperationCase, setting: Setting, stack: ExitStack) -> tuple[Timed, str | None]:
    """Every kernel that serves the case, and the one to compare with."""
    timed: Timed = {}
    try:
        placed = _enter(device, case, setting, stack, timed)
    except UnsupportedOperation as refusal:
        raise CheckFailed(f"{case.name} is refused: {refusal}") from refusal
    if placed is None:
        reference = stack.enter_context(_reference())
        own = timed.pop(WHOLE)
        _enter(reference, case, setting, stack, timed)
        (beside, run), *_ = timed.items()
        return {WHOLE: own, f"{REFERENCE.name}: {beside}": run}, f"{REFERENCE.name}: {beside}"
    order = [*(name for name, _ in placed.refused), placed.kernel, *placed.others]
    for name in placed.others:
        _enter(device, case, replace(setting, kernels={case.op: name}), stack, timed)
    # Portable kernels are asked last.
    return timed, order[-1] if order[-1] in timed and len(timed) > 1 else None


def _enter(
    device: Device, case: OperationCase, setting: Setting, stack: ExitStack, timed: Timed
) -> NodePlacement | None:
    """Compile for what serves the case in this setting; how it is served, or None for a graph compiled whole."""
    graph, program = compile_case(device, case, setting)
    stack.callback(program.close)
    nodes = program.placement.nodes
    cache = None
    if case.cache is not None:
        cache = device.allocate_cache(case.cache.layout(setting.cache_dtype), (case.cache.blocks,))
        stack.callback(cache.close)
        cache.write(case.cache.group.name, range(case.cache.blocks), case.cache.data)
    inputs = dict(zip(graph.inputs, case.inputs, strict=True))

    def once() -> None:
        program.evaluate(inputs, cache)
        device.synchronize()

    timed.setdefault(nodes[0].kernel if nodes else WHOLE, once)
    return nodes[0] if nodes else None


@contextmanager
def _reference() -> Iterator[Device]:
    found = REFERENCE.probe()
    if not isinstance(found, Found):
        raise CheckFailed(f"the reference device is not there to compare with: {found.reason}")
    device = REFERENCE.open(found.devices[0], {})
    try:
        yield device
    finally:
        device.close()


def _take_turns(timed: Timed) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in timed}
    for run in timed.values():
        run()
    begun = time.perf_counter()
    for turn in range(MOST_TURNS):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if turn + 1 >= LEAST_TURNS and time.perf_counter() - begun > SECONDS:
            break
    return times
