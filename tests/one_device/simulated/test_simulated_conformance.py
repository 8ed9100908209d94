"""The suite that every device runs, on the simulated one: quick checks of levels that start no process."""

from __future__ import annotations

import pytest

from midspan.conformance.report import Outcome, Report, to_text
from midspan.conformance.subject import open_subject
from midspan.conformance.suite import all_checks, run_checks

pytestmark = pytest.mark.slow

EVERYTHING = {
    "dtypes": "float32,bfloat16",
    "block_sizes": "24,7,1",
    "quantizations": "gguf.q8_0",
    "batch_invariant": "on",
    "deterministic": "on",
    "asynchronous": "on",
    "captures_graphs": "on",
    "max_tokens": "96",
    "max_requests": "12",
    "max_sampled_rows": "40",
    "max_logprobs": "5",
}


def report(levels: tuple[str, ...], **options: str) -> Report:
    subject = open_subject("simulated", options)
    try:
        return run_checks(subject, [check for check in all_checks(subject) if check.quick and check.level in levels])
    finally:
        subject.close()


@pytest.mark.parametrize(
    ("levels", "options"),
    [(("operations", "caches"), {}), (("operations", "caches"), EVERYTHING), (("engine", "determinism"), EVERYTHING)],
    ids=["nothing switched on", "everything", "everything in the engine"],
)
def test_it_passes_with_nothing_switched_on_and_with_everything(
    levels: tuple[str, ...], options: dict[str, str]
) -> None:
    found = report(levels, **options)
    assert not found.failed, to_text(found)
    assert found.count(Outcome.PASSED) > 3


def test_a_kernel_that_lies_fails_it() -> None:
    found = report(("operations",), fault="kernel")
    failed = [outcome.id for outcome in found.outcomes if outcome.outcome is Outcome.FAILED]
    assert failed
    assert all("linear" in check for check in failed)
