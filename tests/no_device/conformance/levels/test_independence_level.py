"""The level of independence: patches of the core and undeclared uses are found."""

from __future__ import annotations

from typing import Any

import pytest

from midspan.conformance.declared_only import UseLog, declared_names
from midspan.conformance.report import Outcome
from midspan.conformance.subject import open_subject
from midspan.engine.runner import Runner
from midspan.interface import CacheLayout, DeviceInfo
from midspan.runtimes.reference import ReferenceDevice


def test_the_reference_passes(outcomes: Any) -> None:
    subject = open_subject("reference")
    found = outcomes(subject, "independence")
    subject.close()
    wrong = {name: outcome.message for name, outcome in found.items() if outcome.outcome is not Outcome.PASSED}
    assert wrong == {}
    assert found["no-patches-of-the-core"].facts["core_patches"] == 0


def test_a_plugin_that_patches_the_core_is_found_and_counted(installed: Any, outcome: Any) -> None:
    subject = installed(
        """
        import midspan.engine.runner

        def open_device(info, options):
            midspan.engine.runner.Runner.run = lambda self, step: None
            return ReferenceDevice(info)
        """
    )
    found = outcome(subject, "independence/no-patches-of-the-core")
    assert found.facts["core_patches"] == 1
    assert "midspan.engine.runner.Runner.run" in found.message


def test_a_core_that_asks_for_what_is_not_declared_is_found(outcome: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Runner.run

    def run(self: Runner, step: Any) -> Any:
        getattr(self._program, "_steps", None)
        getattr(self._cache, "layer", None)
        return right(self, step)

    monkeypatch.setattr(Runner, "run", run)
    subject = open_subject("reference")
    message = outcome(subject, "independence/core-uses-what-is-declared").message
    subject.close()
    assert "Program._steps" in message
    assert "Cache.layer" in message


def test_a_proxy_hands_on_what_is_declared_and_nothing_else() -> None:
    log = UseLog()
    inner = ReferenceDevice(DeviceInfo(id="inner", description="seen through a proxy", memory_bytes=1))
    device = log.wrap_device(inner)
    cache = device.allocate_cache(CacheLayout(groups=(), block_size=16, dtype="float32"), ())
    assert cache.memory_bytes() == 0
    assert (device.info.id, cache.layout.block_size) == ("inner", 16)
    assert log.undeclared == []
    for name in ("_programs", "secret"):
        with pytest.raises(AttributeError, match="declares no"):
            getattr(device, name)
    with pytest.raises(AttributeError, match="must not set"):
        device.info = inner.info
    assert log.undeclared == ["Device._programs", "Device.secret", "Device.info (set)"]
    device.close()


def test_the_names_of_a_protocol_are_its_methods_and_its_attributes() -> None:
    assert {"info", "capabilities", "compile", "join", "close"} <= declared_names("Device")
    assert declared_names("StepOutput") == {"result"}
    assert {"layout", "blocks", "read", "write", "copy", "memory_bytes", "close"} == declared_names("Cache")
