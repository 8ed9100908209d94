"""Devices that are wrong in one way, and the checks that must find out."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from midspan.conformance.report import CheckOutcome
from midspan.conformance.subject import Subject, open_subject
from midspan.conformance.suite import level_checks, run_check
from midspan.devices.discovery import DiscoveredDevice, discover
from midspan.interface import (
    Batch,
    Cache,
    Capabilities,
    Device,
    DeviceInfo,
    DevicePlugin,
    Found,
    Program,
    StepOutput,
    StepResult,
)
from midspan.interface.program import FinishedStep
from midspan.interface.version import INTERFACE_VERSION
from midspan.runtimes.reference import ReferenceDevice
from midspan.runtimes.reference.device import CAPABILITIES

SMALL = replace(CAPABILITIES, dtypes=("float32",), cache_dtypes=("float32",), block_sizes=(16, 8), max_world_size=1)
INFO = DeviceInfo(id="wrong", description="wrong in one way", memory_bytes=2**30)


class AlteredProgram:
    """A program whose runs go through a function of the test."""

    def __init__(self, program: Program, run: Callable[[Program, Batch, Cache], StepOutput]) -> None:
        self.placement, self.evaluate = program.placement, program.evaluate
        self.memory_bytes, self.close = program.memory_bytes, program.close
        self._program, self._run = program, run

    def run(self, batch: Batch, cache: Cache) -> StepOutput:
        return self._run(self._program, batch, cache)


@pytest.fixture
def altered() -> type[AlteredProgram]:
    """``altered(program, run)``: a program that runs batches by ``run(program, batch, cache)``."""
    return AlteredProgram


class ResultDevice(ReferenceDevice):
    """The reference, its results passed through a function of the test."""

    change: Callable[[StepResult, Batch], StepResult]

    def compile(self, *arguments: Any) -> Any:
        def run(program: Program, batch: Batch, cache: Cache) -> FinishedStep:
            return FinishedStep(step_result=self.change(program.run(batch, cache).result(), batch))

        return AlteredProgram(super().compile(*arguments), run)


@pytest.fixture
def with_results() -> Callable[..., Callable[[DeviceInfo], Device]]:
    """``with_results(change, claims)``: opens a device whose results are ``change(result, batch)``."""

    def make(change: Callable[[StepResult, Batch], StepResult], claims: Capabilities = SMALL) -> Any:
        def open_device(info: DeviceInfo) -> ReferenceDevice:
            device = ResultDevice(info, capabilities=claims)
            device.change = change
            return device

        return open_device

    return make


@pytest.fixture
def subject_of() -> Iterator[Callable[[Callable[[DeviceInfo], Device]], Subject]]:
    """``subject_of(open_device)``: a subject whose device the function makes, in this process."""
    made: list[Subject] = []

    def make(open_device: Callable[[DeviceInfo], Device]) -> Subject:
        plugin = DevicePlugin(
            name="wrong",
            interface=INTERFACE_VERSION,
            probe=lambda: Found((INFO,)),
            open=lambda info, options: open_device(info),
        )
        discovered = DiscoveredDevice(plugin=plugin, distribution="tests", version="1", probe=Found((INFO,)))
        made.append(Subject(name="wrong", options={}, discovered=discovered, info=INFO))
        return made[-1]

    yield make
    for subject in made:
        subject.close()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Subject]]:
    """``installed(source)``: a subject of a package that new processes find too.

    The source defines ``open_device(info, options)``.
    """
    made: list[Subject] = []

    def make(source: str) -> Subject:
        module = f"wrong_device_{tmp_path.name.replace('-', '_')}"
        folder = tmp_path / "site"
        (folder / "wrong-1.0.dist-info").mkdir(parents=True)
        (folder / "wrong-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong\nVersion: 1.0\n")
        (folder / "wrong-1.0.dist-info" / "entry_points.txt").write_text(f"[midspan.plugins]\nwrong = {module}\n")
        (folder / f"{module}.py").write_text(HEAD + textwrap.dedent(source) + FOOT)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.syspath_prepend(str(folder))
        made.append(open_subject("wrong", catalogue=discover()))
        return made[-1]

    yield make
    for subject in made:
        subject.close()
        sys.modules.pop(subject.plugin.open.__module__, None)


HEAD = """
import dataclasses, os, threading, time
import numpy as np
from midspan.interface import Capabilities, DeviceInfo, DevicePlugin, Found, hookimpl
from midspan.runtimes.reference import KERNELS, ReferenceDevice
from midspan.runtimes.reference.device import CAPABILITIES
from midspan.runtimes.reference.socket_collectives import SocketCollectives

"""
FOOT = """

def _probe():
    return Found((DeviceInfo(id="wrong", description="wrong in one way", memory_bytes=2**30),))

@hookimpl
def midspan_devices():
    return (DevicePlugin(name="wrong", interface=(0, 9), probe=_probe, open=open_device),)
"""


@pytest.fixture
def outcome() -> Callable[..., CheckOutcome]:
    """``outcome(subject, "level/name")``: what came of one check."""

    def run(subject: Subject, check_id: str) -> CheckOutcome:
        level, _, name = check_id.partition("/")
        check = next(check for check in level_checks(subject, level) if check.name == name)
        return run_check(subject, check)

    return run


@pytest.fixture
def outcomes() -> Callable[..., dict[str, Any]]:
    """``outcomes(subject, level)``: name -> what came of each check of a level."""

    def run(subject: Subject, level: str) -> dict[str, Any]:
        return {check.name: run_check(subject, check) for check in level_checks(subject, level)}

    return run
