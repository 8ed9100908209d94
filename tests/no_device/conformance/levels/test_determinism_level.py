"""The determinism level: the reference passes, and devices whose bits change are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from midspan.conformance.report import Outcome
from midspan.conformance.subject import Subject, open_subject
from midspan.interface import Batch, Cache, DeviceInfo, Program, StepResult
from midspan.runtimes.reference import ReferenceDevice
from midspan.runtimes.reference.device import CAPABILITIES

SMALL = replace(CAPABILITIES, dtypes=("float32",), cache_dtypes=("float32",), block_sizes=(16,), max_world_size=1)
SubjectOf = Callable[[Callable[[DeviceInfo], Any]], Subject]


def failed(found: dict[str, Any]) -> set[str]:
    return {name for name, outcome in found.items() if outcome.outcome is Outcome.FAILED}


def test_the_reference_passes(outcomes: Any) -> None:
    subject = open_subject("reference")
    found = outcomes(subject, "determinism")
    subject.close()
    assert failed(found) == set(), {name: found[name].message for name in failed(found)}
    assert all(outcome.outcome is Outcome.PASSED for outcome in found.values())


def test_a_device_whose_results_change_from_run_to_run_is_found(
    subject_of: SubjectOf, outcomes: Any, with_results: Any
) -> None:
    random = np.random.default_rng(0)

    def change(result: StepResult, batch: Batch) -> StepResult:
        if result.logprobs is None:
            return result
        return replace(
            result,
            logprobs=replace(result.logprobs, chosen=result.logprobs.chosen * np.float32(random.uniform(1.0, 1.00001))),
        )

    found = outcomes(subject_of(with_results(change)), "determinism")
    assert {"same-batch-float32", "among-neighbours-float32", "in-small-chunks-float32"} <= failed(found)
    honest = replace(SMALL, deterministic=False, batch_invariant=False)
    found = outcomes(subject_of(with_results(change, honest)), "determinism")
    assert failed(found) == set()
    assert found["same-batch-float32"].message == "deterministic is not claimed"


def test_a_device_whose_bits_depend_on_the_number_of_tokens_is_found(
    subject_of: SubjectOf, outcomes: Any, with_results: Any
) -> None:
    def change(result: StepResult, batch: Batch) -> StepResult:
        if result.logprobs is None or len(batch.token_ids) < 30:
            return result
        return replace(result, logprobs=replace(result.logprobs, chosen=np.nextafter(result.logprobs.chosen, 0)))

    found = failed(outcomes(subject_of(with_results(change)), "determinism"))
    assert "among-neighbours-float32" in found
    assert "same-batch-float32" not in found


def test_a_device_that_keeps_one_result_for_all_steps_is_found(
    subject_of: SubjectOf, outcome: Any, altered: Any
) -> None:
    class LastResult:
        def __init__(self, device: Any) -> None:
            self._device = device

        def result(self) -> StepResult:
            return self._device.last  # type: ignore[no-any-return]

    class Forgetful(ReferenceDevice):
        last: StepResult

        def compile(self, *arguments: Any) -> Any:
            def run(program: Program, batch: Batch, cache: Cache) -> Any:
                self.last = program.run(batch, cache).result()
                return LastResult(self)

            return altered(super().compile(*arguments), run)

    subject = subject_of(lambda info: Forgetful(info, capabilities=SMALL))
    assert outcome(subject, "determinism/same-batch-float32").outcome is Outcome.PASSED
    assert "before it was" in outcome(subject, "determinism/steps-started-ahead").message
