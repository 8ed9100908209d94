"""The cpu device passes the quick part of the suite's first levels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from midspan.conformance.report import Outcome
from midspan.conformance.subject import Subject, open_subject
from midspan.conformance.suite import level_checks, run_checks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cpu() -> Iterator[Subject]:
    subject = open_subject("cpu", {"threads": "2"})
    yield subject
    subject.close()


@pytest.mark.parametrize("level", ["lifecycle", "operations", "caches"])
def test_the_quick_checks_of_a_level_pass(level: str, cpu: Subject) -> None:
    report = run_checks(cpu, [check for check in level_checks(cpu, level) if check.quick])
    failed = {outcome.id: outcome.message for outcome in report.outcomes if outcome.outcome is Outcome.FAILED}
    assert failed == {}
    assert report.count(Outcome.PASSED) > 10
