"""Who patches the core is found out; our own plugins do not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

import pytest

pytestmark = pytest.mark.slow

Install = Callable[..., None]
InChild = Callable[..., subprocess.CompletedProcess[str]]

COUNT = "import json, sys; from midspan.devices.rebinding import count_rebindings; "
COUNT += "print(json.dumps(count_rebindings(sys.argv[1])))"

PATCHES = {
    "midspan.engine.warm_up.warm_up": "import midspan.engine.warm_up as m; m.warm_up = print",
    "midspan.engine.warm_up.json": "import json, midspan.engine.warm_up as m; m.json = json",
    "midspan.scheduling.scheduler.Scheduler.schedule": "Scheduler.schedule = print",
    "midspan.scheduling.scheduler.Scheduler.dream": "Scheduler.dream = print",
    "midspan.interface.graph.Graph.__getattr__": "Graph.__getattr__ = lambda self, name: None",
    "midspan.interface.operations.OPERATIONS['dream']": "OPERATIONS['dream'] = OPERATIONS['add']",
    "midspan.runtimes.reference.kernels.KERNELS[0].prepare": "object.__setattr__(KERNELS[0], 'prepare', print)",
    "midspan.weights.checkpoint.open_checkpoint.__code__": "open_checkpoint.__code__ = (lambda *given: None).__code__",
    "midspan.engine.frames": "sys.modules['midspan.engine.frames'] = types.ModuleType('midspan.engine.frames')",
    "midspan.text.stop_strings.annotations": "import midspan.text.stop_strings as m; del m.annotations",
}
MOMENTS = ("at import", "in the hook", "in the probe", "when opened", "when closed")

PLUGIN = """
import sys, types
from midspan.interface import *
from midspan.runtimes.reference import ReferenceDevice
from midspan.runtimes.reference.kernels import KERNELS
from midspan.scheduling.scheduler import Scheduler
from midspan.weights.checkpoint import open_checkpoint

def at(moment):
    for patch in {patches!r}.get(moment, ()):
        exec(patch, globals())

class Box(ReferenceDevice):
    def close(self):
        at("when closed")
        super().close()

def probe():
    at("in the probe")
    return Found((DeviceInfo(id="box", description="a box", memory_bytes=1),))

def open_box(info, options):
    at("when opened")
    return Box(info)

@hookimpl
def midspan_devices():
    at("in the hook")
    return [DevicePlugin(name="box", interface=(0, 9), probe=probe, open=open_box)]

at("at import")
"""


def plugin(patches: Sequence[str]) -> str:
    """A package whose patches are spread over the moments of a plugin's life."""
    spread = {moment: list(patches[index :: len(MOMENTS)]) for index, moment in enumerate(MOMENTS)}
    return PLUGIN.format(patches=spread)


def count(in_child: InChild, entry: str) -> list[str]:
    done = in_child("-c", COUNT, entry)
    assert done.returncode == 0, done.stderr
    names: list[str] = json.loads(done.stdout)
    return names


def test_every_kind_of_patch_is_found_once_at_every_moment(install: Install, in_child: InChild) -> None:
    install("midspan-box", plugin(list(PATCHES.values())), entry="box")
    assert count(in_child, "box") == sorted(PATCHES)


def test_a_plugin_that_only_uses_the_core_rebinds_nothing(install: Install, in_child: InChild) -> None:
    uses = (
        "import midspan.runtimes.reference.sampling",
        "midspan.LLM",
        "import logging; logging.getLogger('midspan.x')",
    )
    install("midspan-box", plugin(("import midspan", *uses)), entry="box")
    assert count(in_child, "box") == []


OWN = [entry.name for entry in entry_points(group="midspan.plugins") if (entry.module or "").startswith("midspan_")]


@pytest.mark.parametrize("entry", ["", *sorted(OWN)])
def test_our_own_plugins_rebind_nothing(in_child: InChild, entry: str) -> None:
    assert count(in_child, entry) == []


def test_a_plugin_that_is_not_there_or_broken_is_an_error(install: Install, in_child: InChild) -> None:
    done = in_child("-c", COUNT, "dream")
    assert done.returncode == 1
    assert "No installed package has the entry point 'dream'" in done.stderr
    install("midspan-bad", "1 / 0", entry="bad")
    done = in_child("-c", COUNT, "bad")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
