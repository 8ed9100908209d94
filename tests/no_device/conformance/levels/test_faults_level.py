"""The level of faults: the reference passes, and devices that let faults spread or pass are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from midspan.conformance.report import Outcome
from midspan.conformance.subject import Subject, open_subject
from midspan.errors import CheckpointError
from midspan.interface import (
    Batch,
    CacheLayout,
    DeviceInfo,
    Graph,
    MemoryReport,
    PackedTensor,
    StepResult,
    Weight,
    WeightSource,
)
from midspan.runtimes.reference import KERNELS, ReferenceCache, ReferenceDevice
from midspan.runtimes.reference.device import CAPABILITIES

SMALL = replace(CAPABILITIES, dtypes=("float32",), cache_dtypes=("float32",), block_sizes=(16,), max_world_size=1)
SubjectOf = Callable[[Callable[[DeviceInfo], Any]], Subject]


def failed(found: dict[str, Any]) -> set[str]:
    return {name for name, outcome in found.items() if outcome.outcome is Outcome.FAILED}


def test_the_reference_passes(outcomes: Any) -> None:
    subject = open_subject("reference")
    found = outcomes(subject, "faults")
    subject.close()
    assert failed(found) == set(), {name: found[name].message for name in failed(found)}
    assert all(outcome.outcome is Outcome.PASSED for outcome in found.values())


def test_what_can_be_used_after_it_was_closed_is_found(installed: Any, outcome: Any) -> None:
    subject = installed(
        """
        class Device(ReferenceDevice):
            def compile(self, *arguments):
                program = super().compile(*arguments)
                program.close = lambda: None
                return program

        def open_device(info, options):
            return Device(info)
        """
    )
    message = outcome(subject, "faults/use-after-close").message
    assert "running a closed program" in message
    assert "reading a closed cache" not in message


def test_a_process_that_ends_when_something_closed_is_used_is_found(installed: Any, outcome: Any) -> None:
    subject = installed(
        """
        from midspan.runtimes.reference import ReferenceCache

        class Cache(ReferenceCache):
            def write(self, group, blocks, data):
                if not self._arrays:
                    os.abort()
                return super().write(group, blocks, data)

        def open_device(info, options):
            return ReferenceDevice(info, make_cache=Cache)
        """
    )
    assert "writing a closed cache ended with code -6" in outcome(subject, "faults/use-after-close").message


def test_rows_of_no_numbers_that_are_not_flagged_are_found(
    subject_of: SubjectOf, outcome: Any, with_results: Any
) -> None:
    def change(result: StepResult, batch: Batch) -> StepResult:
        return replace(result, invalid=None)

    found = outcome(subject_of(with_results(change)), "faults/not-a-number-float32")
    assert "flagged invalid" in found.message


def test_rows_of_no_numbers_that_spoil_their_neighbours_are_found(
    subject_of: SubjectOf, outcome: Any, with_results: Any
) -> None:
    def change(result: StepResult, batch: Batch) -> StepResult:
        return result if result.invalid is None else replace(result, invalid=np.ones_like(result.invalid))

    found = outcome(subject_of(with_results(change)), "faults/not-a-number-float32")
    assert "failed" in found.message


def test_numbers_that_are_none_and_stay_in_blocks_are_found(subject_of: SubjectOf, outcome: Any) -> None:
    """A device that multiplies what it masks by zero."""

    class Masks(ReferenceCache):
        def layer(self, group: str, layer: int) -> Any:
            keys, values = super().layer(group, layer)
            if np.isnan(keys.data[1:]).any():
                values.data[1:] = np.nan
            return keys, values

    definition = next(kernel for kernel in KERNELS if kernel.op == "attention")
    own = replace(definition, name="masks", priority=1)
    subject = subject_of(lambda info: ReferenceDevice(info, capabilities=SMALL, kernels=(own,), make_cache=Masks))
    assert outcome(subject, "faults/not-a-number-float32").outcome is Outcome.FAILED


class TakesAnything(ReferenceDevice):
    """Compiles for any type and any kernel's name."""

    def compile(self, graph: Graph, weights: WeightSource, bounds: Any) -> Any:
        known = replace(bounds, dtype="float32", cache_dtype="float32", kernels={})
        return super().compile(graph, weights, known)

    def allocate_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> Any:
        return super().allocate_cache(replace(layout, dtype="float32"), blocks)


@pytest.mark.parametrize("what", ["unclaimed-dtype", "unclaimed-cache-dtype", "unknown-kernel"])
def test_settings_that_are_taken_without_a_word_are_found(what: str, subject_of: SubjectOf, outcome: Any) -> None:
    found = outcome(subject_of(lambda info: TakesAnything(info, capabilities=SMALL)), f"faults/{what}-is-refused")
    assert "was not refused" in found.message


def test_weights_that_are_missing_and_made_up_are_found(subject_of: SubjectOf, outcome: Any) -> None:
    class MakesUp:
        def __init__(self, source: WeightSource) -> None:
            self._source = source

        def load(self, weight: Weight) -> PackedTensor:
            try:
                return self._source.load(weight)
            except CheckpointError:
                data = np.zeros(weight.shape, np.float32)
                return PackedTensor(name=weight.name, shape=weight.shape, format="dense", parts={"data": data})

    class Device(ReferenceDevice):
        def compile(self, graph: Graph, weights: WeightSource, bounds: Any) -> Any:
            return super().compile(graph, MakesUp(weights), bounds)

    found = outcome(subject_of(lambda info: Device(info, capabilities=SMALL)), "faults/damaged-weights")
    assert "one of its weights is missing" in found.message


def test_memory_that_a_failed_compilation_keeps_is_found(subject_of: SubjectOf, outcome: Any) -> None:
    class Device(ReferenceDevice):
        kept = 0

        def compile(self, *arguments: Any) -> Any:
            try:
                return super().compile(*arguments)
            except CheckpointError:
                self.kept += 1000
                raise

        def memory(self) -> MemoryReport:
            report = super().memory()
            return replace(report, used_bytes=report.used_bytes + self.kept)

    found = outcome(subject_of(lambda info: Device(info, capabilities=SMALL)), "faults/damaged-weights")
    assert "left 1000 bytes" in found.message
