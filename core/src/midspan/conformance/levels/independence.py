"""The core and the plugin leave each other alone: no patches, and nothing used that is not declared.

The first is the plugin's promise, the second the core's own; both are counted with this device under
this load, because that is where they would be broken.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from midspan.conformance import loads
from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.child_process import device_arguments, run_children
from midspan.conformance.declared_only import UseLog
from midspan.conformance.report import CORE_PATCHES
from midspan.conformance.subject import Subject
from midspan.conformance.tiny_model import CONFIGS
from midspan.devices.selection import SelectedDevice
from midspan.engine.loading import OpenedDevice, load_model
from midspan.engine.step_loop import EngineCore
from midspan.settings import EngineSettings

LEVEL = "independence"
CHILD_SECONDS = 120.0
CONTEXT = 128
MOST_STEPS = 1000
EXPECTED_USES = ("Device.compile", "Device.allocate_cache", "Device.memory", "Program.run", "StepOutput.result")
"""What a load cannot do without: a log without these would have watched nothing."""


def checks(subject: Subject) -> Sequence[Check]:
    """The checks of this level."""
    return [
        Check(
            level=LEVEL,
            name="no-patches-of-the-core",
            run=partial(no_patches, subject),
            quick=True,
            waits_seconds=CHILD_SECONDS,
        ),
        Check(level=LEVEL, name="core-uses-what-is-declared", run=partial(declared_uses, subject), quick=True),
    ]


def no_patches(subject: Subject) -> None:
    """The plugin, loaded, probed, opened and closed in a new process, leaves every name of the core as it was."""
    arguments = device_arguments(subject, entry_point=subject.discovered.entry_point)
    (end,) = run_children("midspan.conformance.children.rebindings", [arguments], seconds=CHILD_SECONDS)
    found = end.require("The process that counts what the plugin patches")["rebound"]
    subject.facts[CORE_PATCHES] = len(found)
    if found:
        raise CheckFailed(f"The plugin rebinds {len(found)} names of the core: {', '.join(found)}.")


def declared_uses(subject: Subject) -> None:
    """The core loads a model and serves requests through proxies that hand on declared names alone."""
    log = UseLog()
    for name, config in CONFIGS.items():
        _serve(subject, log, {**config, "max_position_embeddings": CONTEXT}, name)
    missing = [use for use in EXPECTED_USES if use not in log.used]
    if missing:
        raise CheckFailed(f"The load never used {', '.join(missing)}: it did not come as far as it was to.")
    if log.undeclared:
        raise CheckFailed(f"The core asks for names that the interface does not declare: {', '.join(log.undeclared)}.")


def _serve(subject: Subject, log: UseLog, config: dict[str, object], name: str) -> None:
    selected = SelectedDevice(
        plugin=subject.plugin,
        distribution=subject.discovered.distribution,
        info=subject.info,
        explanation="for the conformance suite",
    )
    with tempfile.TemporaryDirectory() as folder, subject.open() as device:
        Path(folder, "config.json").write_text(json.dumps(config), "utf-8")
        opened = OpenedDevice(selected=selected, device=log.wrap_device(device), architectures={})
        settings = EngineSettings(
            model=folder,
            device=subject.name,
            load_format="dummy",
            max_num_seqs=_at_most(subject, 4),
        )
        loaded = load_model(settings, Path(folder), opened=opened)
        core = EngineCore(loaded, settings)
        requests = loads.scored(loaded.graph.vocab_size, loaded.info.max_model_len, min(2, loaded.info.max_logprobs))
        for place, request in enumerate([*requests, *requests]):
            core.add(request.message(str(place)))
        for _ in range(MOST_STEPS):
            if not core.has_work():
                break
            errors = [event.error for event in core.step().sequences if event.error is not None]
            if errors:
                raise CheckFailed(f"A request on the model '{name}' failed: {errors[0]}")
        core.close()


def _at_most(subject: Subject, wanted: int) -> int:
    claimed = subject.capabilities.max_requests
    return wanted if claimed is None else min(wanted, claimed)
