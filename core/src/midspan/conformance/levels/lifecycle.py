"""Discovery and lifecycle: a device is found cheaply, opened, closed and opened again.

What may end the process runs in one of its own. Knows no device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.child_process import run_children
from midspan.conformance.child_steps import SECONDS, run_steps, step
from midspan.conformance.children.lifecycle import STEPS
from midspan.conformance.subject import Subject
from midspan.devices.contract import check_device, check_memory, check_plugin, check_probe_answer
from midspan.devices.interface_version import check_interface
from midspan.devices.probing import SLOW_PROBE_SECONDS

LEVEL = "lifecycle"

PROBE_ATTEMPTS = 5
"""A machine may be busy: the best of so many new processes counts."""
CHILD_SECONDS = 120.0
PROBES = ("probe-is-cheap", "probe-imports-no-vendor-library")
"""Checks that share what new processes say."""


def checks(subject: Subject) -> Sequence[Check]:
    """The level's checks; none of them needs the device to be open already."""
    steps = functools.cache(lambda: run_steps(subject, "lifecycle", list(STEPS)))
    probe = functools.cache(lambda: _probe(subject))
    named: Mapping[str, Callable[[], None]] = {
        "plugin-record": lambda: check_plugin(subject.plugin),
        "interface-version": lambda: check_interface(subject.plugin, subject.discovered.distribution),
        "probe-answer": lambda: _probe_answer(subject),
        "probe-is-cheap": lambda: _probe_is_cheap(subject, probe()),
        "probe-imports-no-vendor-library": lambda: _probe_imports_little(subject, probe()),
        "opened-device-keeps-the-contract": lambda: check_device(subject.device(), subject.plugin, found=subject.info),
        "memory-report": lambda: _memory_report(subject),
        **{name: functools.partial(step, name, steps) for name in STEPS},
    }
    waits = {**dict.fromkeys(STEPS, SECONDS * len(STEPS)), **dict.fromkeys(PROBES, CHILD_SECONDS * PROBE_ATTEMPTS)}
    return [
        Check(level=LEVEL, name=name, run=run, quick=True, waits_seconds=waits.get(name, 0.0))
        for name, run in named.items()
    ]


def _probe_answer(subject: Subject) -> None:
    answer = check_probe_answer(subject.plugin, subject.plugin.probe())
    again = check_probe_answer(subject.plugin, subject.plugin.probe())
    first, second = ([info.id for info in getattr(found, "devices", ())] for found in (answer, again))
    if first != second or subject.info.id not in first:
        raise CheckFailed(
            f"asked twice, the probe found {', '.join(first) or 'none'} and then {', '.join(second) or 'none'}; "
            f"'{subject.info.id}' must be in both"
        )


def _probe(subject: Subject) -> dict[str, Any]:
    """The quickest of some new processes' answers."""
    arguments = {
        "plugin": subject.plugin.name,
        "entry_point": subject.discovered.entry_point,
        "distribution": subject.discovered.distribution,
    }
    best: dict[str, Any] = {}
    for _ in range(PROBE_ATTEMPTS):
        (end,) = run_children("midspan.conformance.children.probe", [arguments], seconds=CHILD_SECONDS)
        answer = end.require("A new process that loads the plugin and asks its probe")
        if not best or answer["probe_seconds"] < best["probe_seconds"]:
            best = answer
        if best["probe_seconds"] < SLOW_PROBE_SECONDS / 2:
            break
    return best


def _probe_is_cheap(subject: Subject, answer: Mapping[str, Any]) -> None:
    subject.facts["probe_seconds"] = round(answer["probe_seconds"], 4)
    subject.facts["plugin_import_seconds"] = round(answer["import_seconds"], 4)
    if answer["probe_seconds"] > SLOW_PROBE_SECONDS:
        raise CheckFailed(
            f"the probe took {answer['probe_seconds']:.3f} s in the quickest of {PROBE_ATTEMPTS} new processes; it "
            f"runs at every start and may take {SLOW_PROBE_SECONDS:g} s"
        )


def _probe_imports_little(subject: Subject, answer: Mapping[str, Any]) -> None:
    """Packages with compiled modules are what makes a start slow, and what may not be there."""
    subject.facts["probe_imports"] = sorted(answer["packages"])
    compiled = [package for package, is_compiled in answer["packages"].items() if is_compiled]
    if compiled:
        raise CheckFailed(
            f"loading the plugin and asking its probe imported {', '.join(compiled)}, with compiled modules, which "
            f"neither Python nor the core had loaded; import them in open"
        )


def _memory_report(subject: Subject) -> None:
    report = check_memory(subject.device().memory(), subject.plugin)
    if not report.free_bytes <= report.total_bytes or not report.total_bytes:
        raise CheckFailed(f"of {report.total_bytes} bytes in all, {report.free_bytes} cannot be free")
    if report.total_bytes > 2 * subject.info.memory_bytes:
        raise CheckFailed(
            f"the device reports {report.total_bytes} bytes in all, its probe found {subject.info.memory_bytes}"
        )
