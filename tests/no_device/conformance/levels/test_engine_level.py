"""The engine level: the reference passes, and each kind of wrong device is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from midspan.conformance import loads
from midspan.conformance.engine_drive import DriveSettings, ProgramShelf, drive
from midspan.conformance.levels import engine
from midspan.conformance.reference_judge import ReferenceJudge
from midspan.conformance.report import Outcome
from midspan.conformance.subject import Subject, open_subject
from midspan.conformance.tiny_model import CONFIGS, tiny_model
from midspan.interface import Batch, Cache, DeviceInfo, Kernel, KernelSite, Program, StepResult
from midspan.runtimes.reference import KERNELS, ReferenceDevice
from midspan.runtimes.reference.device import CAPABILITIES, PLUGIN

SMALL = replace(CAPABILITIES, dtypes=("float32",), cache_dtypes=("float32",), block_sizes=(16, 8), max_world_size=1)
SubjectOf = Callable[[Callable[[DeviceInfo], Any]], Subject]
Change = Callable[[StepResult, Batch], StepResult]


def failed(found: dict[str, Any]) -> set[str]:
    return {name for name, outcome in found.items() if outcome.outcome is Outcome.FAILED}


def whose_attention(change: Callable[..., tuple[Any, ...]]) -> Callable[[DeviceInfo], ReferenceDevice]:
    """A device whose attention is the definition on inputs that a function changed."""
    definition = next(kernel for kernel in KERNELS if kernel.op == "attention")

    def prepare(site: KernelSite) -> Callable[..., Any]:
        right = definition.prepare(site)

        def run(*inputs: Any) -> Any:
            *leading, cache = inputs
            return right(*change(*leading), cache)

        return run

    wrong = Kernel(name="wrong", op="attention", prepare=prepare, priority=1)
    return lambda info: ReferenceDevice(info, capabilities=SMALL, kernels=(wrong, *KERNELS))


def test_the_reference_passes(outcomes: Any) -> None:
    subject = open_subject("reference")
    found = outcomes(subject, "engine")
    subject.close()
    assert failed(found) == set(), {name: found[name].message for name in failed(found)}
    assert {name for name in found if found[name].outcome is Outcome.SKIPPED} == {"steps-as-large-as-claimed"}


@pytest.mark.parametrize("name", CONFIGS)
def test_in_float32_the_allowed_distance_leaves_one_token_in_every_place(name: str) -> None:
    model = tiny_model(name)
    device = PLUGIN.open(PLUGIN.probe().devices[0], {})  # type: ignore[union-attr]
    with drive(ProgramShelf(device), model, DriveSettings(dtype="float32")) as made:
        found = made.run(loads.arriving(loads.simple(model.graph.vocab_size, 640), 2))
    judge = ReferenceJudge(model)
    rows = judge.logits(found, "float32", "float32")
    allowed = judge.tolerance(found, rows, "float32", "float32")
    for generated, logits in zip(found, rows, strict=True):
        best = np.sort(logits[len(generated.request.prompt) - 1 : -1], axis=1)
        assert float((best[:, -1] - best[:, -2]).min()) > 2.0 * allowed
        assert generated.tokens == logits[len(generated.request.prompt) - 1 : -1].argmax(axis=1).tolist()
    device.close()


def test_attention_that_leaves_a_token_out_in_decode_alone_is_found(subject_of: SubjectOf, outcomes: Any) -> None:
    def skip_itself(
        query: Any, key: Any, value: Any, starts: Any, lengths: Any, table: Any, slots: Any
    ) -> tuple[Any, ...]:
        decode = (np.diff(starts) == 1) & (lengths > 1)
        return query, key, value, starts, (lengths - decode).astype(np.int32), table, slots

    found = outcomes(subject_of(whose_attention(skip_itself)), "engine")
    assert {"one-request-plain-in-float32", "prefill-and-decode-together-windowed-in-float32"} <= failed(found)
    assert "the reference's choice" in found["one-request-plain-in-float32"].message


def test_attention_that_forgets_what_earlier_steps_computed_of_a_prompt_is_found(
    subject_of: SubjectOf, outcomes: Any
) -> None:
    def only_this_step(query: Any, key: Any, value: Any, starts: Any, lengths: Any, table: Any, slots: Any) -> Any:
        counts = np.diff(starts)
        return query, key, value, starts, np.where(counts > 1, counts, lengths).astype(np.int32), table, slots

    found = failed(outcomes(subject_of(whose_attention(only_this_step)), "engine"))
    assert {"prompts-in-chunks-plain", "shared-prefix-plain", "prompts-in-chunks-windowed"} <= found
    assert "one-request-plain-in-float32" not in found


def test_a_block_size_that_does_not_work_is_found(subject_of: SubjectOf, outcomes: Any) -> None:
    def break_eights(site: KernelSite) -> Callable[..., Any]:
        right = next(kernel for kernel in KERNELS if kernel.op == "attention").prepare(site)
        if site.block_size != 8:
            return right
        return lambda *inputs: right(*inputs) * np.float32(1.1)

    wrong = Kernel(name="wrong", op="attention", prepare=break_eights, priority=1)
    subject = subject_of(lambda info: ReferenceDevice(info, capabilities=SMALL, kernels=(wrong, *KERNELS)))
    assert failed(outcomes(subject, "engine")) == {"blocks-of-8"}


def test_random_numbers_that_forget_the_position_are_found(subject_of: SubjectOf, outcomes: Any, altered: Any) -> None:
    class Forgetful(ReferenceDevice):
        def compile(self, *arguments: Any) -> Any:
            def run(program: Program, batch: Batch, cache: Cache) -> Any:
                sampling = replace(batch.sampling, positions=np.zeros_like(batch.sampling.positions))
                return program.run(replace(batch, sampling=sampling), cache)

            return altered(super().compile(*arguments), run)

    found = outcomes(subject_of(lambda info: Forgetful(info, capabilities=SMALL)), "engine")
    assert failed(found) == {"several-sequences-drawn-with-seeds"}
    assert "the definition draws" in found["several-sequences-drawn-with-seeds"].message


def test_logprobs_that_are_a_little_off_are_found(subject_of: SubjectOf, outcomes: Any, with_results: Any) -> None:
    def change(result: StepResult, batch: Batch) -> StepResult:
        if result.logprobs is None:
            return result
        return replace(result, logprobs=replace(result.logprobs, chosen=result.logprobs.chosen - np.float32(0.01)))

    found = outcomes(subject_of(with_results(change)), "engine")
    assert failed(found) == {"logprobs", "several-sequences-drawn-with-seeds"}


def test_limits_that_are_claimed_are_kept_and_reached(subject_of: SubjectOf, outcomes: Any, with_results: Any) -> None:
    claims = replace(
        SMALL, block_sizes=(24, 5), max_tokens=40, max_requests=3, max_context=90, max_sampled_rows=2, max_logprobs=1
    )

    def refuse(result: StepResult, batch: Batch) -> StepResult:
        assert len(batch.token_ids) <= 40
        assert len(batch.context_lengths) <= 3
        assert batch.context_lengths.max(initial=0) <= 90
        assert len(batch.rows_to_sample) <= 2
        assert (batch.sampling.num_logprobs or 0) <= 1
        return result

    found = outcomes(subject_of(with_results(refuse, claims)), "engine")
    assert failed(found) == set(), {name: found[name].message for name in failed(found)}
    assert found["steps-as-large-as-claimed"].outcome is Outcome.PASSED


def test_a_device_for_one_request_skips_what_needs_two_and_passes_the_rest(
    subject_of: SubjectOf, outcomes: Any
) -> None:
    claims = replace(SMALL, max_requests=1)
    found = outcomes(subject_of(lambda info: ReferenceDevice(info, capabilities=claims)), "engine")
    assert failed(found) == set(), {name: found[name].message for name in failed(found)}
    assert found["preemption-plain"].message == "max_requests is 1"


@pytest.mark.parametrize("size", [1, 3, 16, 24, 100, 256])
def test_loads_bring_about_what_they_are_for_in_blocks_of_any_size(
    size: int, subject_of: SubjectOf, outcome: Any
) -> None:
    claims = replace(SMALL, block_sizes=(size,))
    subject = subject_of(lambda info: ReferenceDevice(info, capabilities=claims))
    for check in (
        "engine/preemption-windowed",
        "engine/shared-prefix-plain",
        "determinism/after-losing-its-blocks-float32",
    ):
        found = outcome(subject, check)
        assert found.outcome is Outcome.PASSED, found.message


def test_the_level_lists_every_claimed_type_and_block_size(subject_of: SubjectOf) -> None:
    names = {check.name for check in engine.checks(subject_of(lambda info: ReferenceDevice(info)))}
    assert {f"blocks-of-{size}" for size in CAPABILITIES.block_sizes} <= names
    assert {f"one-request-{model}-in-{dtype}" for model in CONFIGS for dtype in CAPABILITIES.dtypes} <= names


def test_a_device_whose_requests_are_shorter_than_a_block_passes(subject_of: SubjectOf, outcomes: Any) -> None:
    for context in (8, 3):
        claims = replace(SMALL, block_sizes=(16,), max_context=context)
        subject = subject_of(lambda info, claims=claims: ReferenceDevice(info, capabilities=claims))  # type: ignore[misc]
        for level in ("engine", "determinism", "faults"):
            found = outcomes(subject, level)
            # A process of its own does not find the device of this test.
            wrong = {name: found[name].message for name in failed(found) - {"use-after-close"}}
            assert wrong == {}, (context, level)


def result_check(outcome: Any, subject: Subject) -> str:
    return str(outcome(subject, "engine/results-as-declared").message)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda result: replace(result, token_ids=result.token_ids.astype(np.int64)), "token_ids is of int64"),
        (lambda result: replace(result, token_ids=result.token_ids[:, None]), "token_ids has the shape"),
        (lambda result: replace(result, invalid=np.zeros(len(result.token_ids), np.int8)), "invalid is of int8"),
        (lambda result: replace(result, device_seconds=-0.5), "device_seconds is -0.5"),
        (lambda result: replace(result, device_seconds=float("nan")), "device_seconds is nan"),
    ],
)
def test_results_of_other_types_are_found(
    change: Callable[[StepResult], StepResult], said: str, subject_of: SubjectOf, outcome: Any, with_results: Any
) -> None:
    subject = subject_of(with_results(lambda result, batch: change(result)))
    assert said in result_check(outcome, subject)


def test_logprobs_of_other_types_are_found(subject_of: SubjectOf, outcome: Any, with_results: Any) -> None:
    def change(result: StepResult, batch: Batch) -> StepResult:
        if result.logprobs is None:
            return result
        return replace(result, logprobs=replace(result.logprobs, ranks=result.logprobs.ranks.astype(np.int64)))

    assert "logprobs.ranks is of int64" in result_check(outcome, subject_of(with_results(change)))


def test_a_virtual_clock_tells_the_time_of_every_step(subject_of: SubjectOf, outcome: Any, with_results: Any) -> None:
    claims = replace(SMALL, virtual_clock=True)
    silent = subject_of(with_results(lambda result, batch: replace(result, device_seconds=None), claims))
    assert "virtual_clock is claimed, and StepResult.device_seconds is None" in result_check(outcome, silent)
    right = subject_of(with_results(lambda result, batch: replace(result, device_seconds=0.0), claims))
    assert result_check(outcome, right) == ""
