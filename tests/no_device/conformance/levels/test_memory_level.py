"""The level of memory: the reference passes, and devices that lose or hide memory, or close badly, are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from midspan.conformance.levels import memory
from midspan.conformance.report import Outcome
from midspan.conformance.subject import Subject, open_subject
from midspan.interface import (
    Batch,
    CacheLayout,
    DeviceInfo,
    MemoryReport,
    StepResult,
)
from midspan.runtimes.reference import ReferenceCache, ReferenceDevice
from midspan.runtimes.reference.device import CAPABILITIES

SMALL = replace(CAPABILITIES, dtypes=("float32",), cache_dtypes=("float32",), block_sizes=(16,), max_world_size=1)
SubjectOf = Callable[[Callable[[DeviceInfo], Any]], Subject]


def failed(found: dict[str, Any]) -> set[str]:
    return {name for name, outcome in found.items() if outcome.outcome is Outcome.FAILED}


def test_the_reference_passes(outcomes: Any) -> None:
    subject = open_subject("reference")
    found = outcomes(subject, "memory")
    subject.close()
    assert failed(found) == set(), {name: found[name].message for name in failed(found)}
    assert all(outcome.outcome is Outcome.PASSED for outcome in found.values())


def test_memory_that_is_not_given_back_is_found(subject_of: SubjectOf, outcome: Any) -> None:
    class Forgets(ReferenceDevice):
        most = 0

        def memory(self) -> MemoryReport:
            report = super().memory()
            self.most = max(self.most, report.used_bytes)
            return replace(report, used_bytes=self.most)

    found = outcome(subject_of(lambda info: Forgets(info, capabilities=SMALL)), "memory/program-and-cache-are-counted")
    assert "used_bytes" in found.message


def test_memory_that_is_never_counted_is_found(subject_of: SubjectOf, outcome: Any) -> None:
    class CountsNothing(ReferenceDevice):
        def memory(self) -> MemoryReport:
            return replace(super().memory(), used_bytes=0)

    subject = subject_of(lambda info: CountsNothing(info, capabilities=SMALL))
    assert "used_bytes went by 0" in outcome(subject, "memory/program-and-cache-are-counted").message


def test_a_cache_that_claims_too_little_is_found(subject_of: SubjectOf, outcome: Any) -> None:
    class Modest(ReferenceCache):
        def memory_bytes(self) -> int:
            return super().memory_bytes() // 2

    subject = subject_of(lambda info: ReferenceDevice(info, capabilities=SMALL, make_cache=Modest))
    found = outcome(subject, "memory/program-and-cache-are-counted").message
    assert "cache claims" in found


def test_memory_that_all_devices_of_a_process_lose_is_found(subject_of: SubjectOf, outcome: Any) -> None:
    kept: list[int] = []

    class Leaks(ReferenceDevice):
        def close(self) -> None:
            kept.append(super().memory().used_bytes + 1)
            super().close()

        def memory(self) -> MemoryReport:
            report = super().memory()
            return replace(report, used_bytes=report.used_bytes + sum(kept))

    found = outcome(subject_of(lambda info: Leaks(info, capabilities=SMALL)), "memory/memory-comes-back")
    assert "while others came and went" in found.message


def test_pages_that_are_kept_are_found_although_the_report_is_right(subject_of: SubjectOf, outcome: Any) -> None:
    kept = []

    class Keeps(ReferenceCache):
        def close(self) -> None:
            kept.append(self._arrays)
            super().close()

    subject = subject_of(lambda info: ReferenceDevice(info, capabilities=SMALL, make_cache=Keeps))
    assert outcome(subject, "memory/memory-comes-back").outcome is Outcome.PASSED
    assert "the process kept" in outcome(subject, "memory/host-memory-comes-back").message


def test_a_device_that_takes_any_cache_is_found(subject_of: SubjectOf, outcome: Any) -> None:
    class Boundless(ReferenceDevice):
        def _require_room(self, wanted: int, what: str) -> None:
            return

    def small(layout: CacheLayout, blocks: tuple[int, ...]) -> ReferenceCache:
        return ReferenceCache(layout, tuple(min(count, 100) for count in blocks))

    subject = subject_of(lambda info: Boundless(info, capabilities=SMALL, make_cache=small))
    assert "was allocated" in outcome(subject, "memory/a-cache-too-large-is-refused").message


def test_a_report_that_contradicts_itself_is_found(subject_of: SubjectOf, outcome: Any) -> None:
    class Generous(ReferenceDevice):
        def memory(self) -> MemoryReport:
            report = super().memory()
            return replace(report, free_bytes=report.total_bytes + 1)

    subject = subject_of(lambda info: Generous(info, capabilities=SMALL))
    assert "contradicts itself" in outcome(subject, "memory/memory-comes-back").message


CLOSING = {
    "crashes": ("os.abort()", "ended with code -6"),
    "hangs": ("threading.Event().wait()", "did not end in time"),
    "goes on": ("pass", "went on as if the device were open"),
}


@pytest.mark.parametrize("how", CLOSING)
def test_a_device_that_closes_badly_under_load_is_found(
    how: str, installed: Any, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CLOSING_SECONDS", 0.7)
    action, message = CLOSING[how]
    subject = installed(
        f"""
        class Device(ReferenceDevice):
            def close(self):
                if self._programs:
                    {action}

        def open_device(info, options):
            return Device(info)
        """
    )
    assert message in outcome(subject, "memory/closing-under-load").message


def test_a_step_that_cannot_be_repeated_in_parts_is_found(
    subject_of: SubjectOf, outcome: Any, with_results: Any
) -> None:
    """Parts of a step that was refused whole come out wrong."""

    def change(result: StepResult, batch: Batch) -> StepResult:
        return replace(result, token_ids=(result.token_ids + (len(batch.token_ids) < 5)) % 97)

    found = outcome(subject_of(with_results(change)), "memory/a-step-too-large-is-cut")
    assert "the reference's choice" in found.message
