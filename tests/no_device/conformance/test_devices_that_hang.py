"""A device that hangs, dies or cannot be closed: the report is there, and says in which check."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Install = Callable[..., Path]
RunPytest = Callable[..., Any]

ADD = "operations/add-float32"
EMBEDDING_PASSED = {"operations/embedding-float32"}
BOTH_PASSED = EMBEDDING_PASSED | {ADD}
CLOSING = "lifecycle/closes-at-the-end"


def suite_on(fault: str, checks: str, seconds: str = "120") -> tuple[str, ...]:
    device = ("--device", "flawed", "--device-option", f"fault={fault}", "-k", checks)
    return (*device, "--conformance-report", "r.json", "--conformance-timeout", seconds)


def failed_in(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "r.json").read_text(encoding="utf-8"))
    return {check["id"]: check["message"] for check in report["checks"] if check["outcome"] == "failed"}


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("hangs in add", ADD),
        ("hangs in close", CLOSING),
        ("hangs in open", "lifecycle/opens-for-the-list-of-checks"),
    ],
)
def test_a_device_that_hangs_ends_the_run_with_a_report(
    fault: str, check: str, install_plugin: Install, conformance: RunPytest, tmp_path: Path
) -> None:
    install_plugin()
    done = conformance(*suite_on(fault, "operations/embedding-float32 or operations/add-float32", "4"))
    assert done.code == pytest.ExitCode.TESTS_FAILED
    assert failed_in(tmp_path) == {check: "gave no answer within 4 s"}
    assert f"FAILED {check}: gave no answer within 4 s" in done.text
    assert "most recent call first" in done.text
    assert not (tmp_path / "r.json.running").exists()
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    expected = {"hangs in add": EMBEDDING_PASSED, "hangs in close": BOTH_PASSED, "hangs in open": set()}
    assert {check["id"] for check in report["checks"] if check["outcome"] == "passed"} == expected[fault]
    assert report["capabilities"].get("dtypes") == (None if fault == "hangs in open" else ["float32"])


def test_a_process_of_several_that_hangs_is_reported_by_name(
    install_plugin: Install, conformance: RunPytest, tmp_path: Path
) -> None:
    install_plugin()
    done = conformance(*suite_on("hangs in add", "operations/scale-float32 or operations/add-float32", "4"), "-n", "2")
    assert done.code == pytest.ExitCode.TESTS_FAILED
    assert set(failed_in(tmp_path)) == {ADD}
    assert f"{ADD} gave no answer within 4 s" in done.text


def test_after_an_abort_the_check_that_ran_can_be_read(
    install_plugin: Install, conformance: RunPytest, tmp_path: Path
) -> None:
    install_plugin()
    done = conformance(*suite_on("aborts in add", "operations/scale-float32 or operations/add-float32"))
    assert done.code != 0
    assert (tmp_path / "r.json.running").read_text(encoding="utf-8") == f"{ADD}\n"


@pytest.mark.parametrize("more", [(), ("-n", "2")], ids=["one process", "several"])
def test_a_device_that_does_not_close_is_a_failed_check_and_the_report_is_there(
    more: tuple[str, ...], install_plugin: Install, conformance: RunPytest, tmp_path: Path
) -> None:
    install_plugin()
    chosen = "operations/scale-float32 or operations/add-float32"
    done = conformance(*suite_on("does not close after work", chosen), *more)
    assert done.code == pytest.ExitCode.TESTS_FAILED
    assert failed_in(tmp_path) == {CLOSING: "closing the device raised RuntimeError: still at work"}
    assert "2 passed" in done.text


RUN_QUICKLY = """
from midspan.conformance.subject import open_subject
from midspan.conformance.suite import all_checks, run_checks
subject = open_subject("flawed", {"fault": %r})
checks = [check for check in all_checks(subject) if check.name in ("scale-float32", "add-float32")]
report = run_checks(subject, checks, seconds=4)
print([outcome.id for outcome in report.outcomes if outcome.outcome.value == "failed"])
"""


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("hangs in add", 1, f"FAILED {ADD}: gave no answer within 4 s"),
        ("hangs in close", 1, f"FAILED {CLOSING}: gave no answer within 4 s"),
        ("does not close after work", 0, f"['{CLOSING}']"),
    ],
)
def test_without_pytest_the_report_is_not_lost_either(
    fault: str, code: int, said: str, install_plugin: Install
) -> None:
    install_plugin()
    command = [sys.executable, "-c", RUN_QUICKLY % fault]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
