"""The report: its JSON is stable, its text tells what ran, what did not, and why."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from midspan.conformance.check import LEVELS, Check, CheckFailed
from midspan.conformance.report import CheckOutcome, Outcome, Report, identify, to_text
from midspan.conformance.subject import Subject, open_subject
from midspan.conformance.suite import all_checks, run_checks


def make_checks(subject: Subject) -> list[Check]:
    def passes() -> None:
        subject.facts["refused"] = ["a case: a reason"]

    def fails() -> None:
        subject.facts["refused"] = ["another case: a reason"]
        raise CheckFailed("it is wrong\nin two ways")

    def breaks() -> None:
        raise ZeroDivisionError("by nothing")

    return [
        Check(level="lifecycle", name="passes", run=passes),
        Check(level="lifecycle", name="fails", run=fails),
        Check(level="caches", name="breaks", run=breaks),
        Check(level="caches", name="unclaimed", run=fails, unclaimed="max_world_size is 1"),
        Check(level="engine", name="off", run=fails),
    ]


@pytest.fixture
def report() -> Report:
    subject = open_subject("reference")
    seen: list[tuple[str, int, int]] = []
    result = run_checks(
        subject,
        make_checks(subject),
        switched_off={"engine/off": "the maker says so"},
        progress=lambda check, place, count: seen.append((check.id, place, count)),
    )
    assert seen[1] == ("lifecycle/fails", 1, 5)
    subject.close()
    return result


def test_the_json_has_the_fields_that_are_promised(report: Report) -> None:
    data = json.loads(report.to_json_text())
    assert set(data) == {
        "format",
        "device",
        "plugin",
        "core",
        "machine",
        "capabilities",
        "counts",
        "core_patches",
        "facts",
        "checks",
    }
    assert data["format"] == 1
    assert data["counts"] == {"passed": 1, "failed": 2, "skipped": 1, "switched_off": 1}
    assert data["core_patches"] is None
    assert data["facts"] == {"refused": ["a case: a reason", "another case: a reason"]}
    assert data["plugin"]["distribution"] == "midspan"
    assert data["machine"]["packages"]["numpy"]
    outcomes = {check["id"]: check for check in data["checks"]}
    assert set(outcomes["caches/breaks"]) == {"id", "level", "name", "outcome", "seconds", "message", "trace"}
    assert outcomes["caches/breaks"]["message"] == "ZeroDivisionError: by nothing"
    assert "ZeroDivisionError" in outcomes["caches/breaks"]["trace"]
    assert outcomes["caches/unclaimed"]["message"] == "max_world_size is 1"
    assert outcomes["engine/off"] == {
        **outcomes["engine/off"],
        "outcome": "switched_off",
        "message": "the maker says so",
    }


def test_the_text_tells_failures_reasons_and_skips(report: Report) -> None:
    text = to_text(report)
    assert "FAILED lifecycle/fails: it is wrong\n       in two ways" in text
    assert "Switched off engine/off: the maker says so" in text
    assert "Skipped 1, max_world_size is 1: caches/unclaimed" in text
    assert "refused, with a reason each: 2" in text
    assert "in two ways" not in to_text(report, whole_messages=False)
    assert report.failed


def test_outcomes_travel_as_plain_data(report: Report) -> None:
    for outcome in report.outcomes:
        assert CheckOutcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


def test_a_report_of_nothing_executed_is_a_failure() -> None:
    subject = open_subject("reference")
    skipped = CheckOutcome(level="caches", name="x", outcome=Outcome.SKIPPED, message="not claimed")
    assert Report(identity=identify(subject), outcomes=(skipped,)).failed
    subject.close()


def test_checks_have_unique_names_without_spaces_and_every_level_has_some() -> None:
    subject = open_subject("reference")
    checks = all_checks(subject)
    subject.close()
    ids = [check.id for check in checks]
    assert len(set(ids)) == len(ids)
    assert not [name for name in ids if " " in name or ":" in name]
    assert list(dict.fromkeys(check.level for check in checks)) == list(LEVELS)


def test_nothing_but_the_pytest_side_imports_pytest() -> None:
    program = (
        "import sys\n"
        "from midspan.conformance.subject import open_subject\n"
        "from midspan.conformance.modes import MODES\n"
        "subject = open_subject('reference')\n"
        "assert all(make(subject) for make in MODES.values())\n"
        "assert 'pytest' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
