"""Each check of the lifecycle fails for the fault that it is meant for, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from midspan.conformance.children.lifecycle import STEPS
from midspan.conformance.subject import Subject

SOURCE = (Path(__file__).resolve().parent / "flawed_plugin.txt").read_text(encoding="utf-8")

Failures = Callable[..., set[str]]
Open = Callable[..., Subject]

EVERY_STEP = set(STEPS)


def test_a_device_that_is_right_fails_nothing(open_flawed: Open, failures: Failures) -> None:
    assert failures(open_flawed(), "lifecycle") == set()


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ("closes once", {"closes-twice"}),
        ("closing twice ends the process", {"closes-twice"}),
        ("one at a time", {"two-open-at-once"}),
        ("takes any option", {"unknown-option-is-refused"}),
        ("more is free than there is", {"memory-report"}),
        ("says that it is another", {"opened-device-keeps-the-contract"}),
    ],
)
def test_a_fault_is_caught_by_the_check_for_it(
    fault: str, caught_by: set[str], open_flawed: Open, failures: Failures
) -> None:
    assert failures(open_flawed(fault), "lifecycle") == caught_by


def test_a_device_that_opens_once_fails_wherever_it_is_opened_again(open_flawed: Open, failures: Failures) -> None:
    steps = {"closes-twice", "opens-again", "two-open-at-once", "unknown-option-is-refused"}
    found = failures(open_flawed("opens once"), "lifecycle", tuple(EVERY_STEP))
    assert "opens-in-a-new-process" not in found
    assert {"opens-again", "two-open-at-once"} <= found <= steps


def probe_that(body: str) -> str:
    return SOURCE.replace("def probe():\n", f"def probe():\n    {body}\n")


@pytest.mark.parametrize(
    ("body", "caught_by"),
    [
        ("__import__('time').sleep(0.15)", {"probe-is-cheap"}),
        ("import msgspec", {"probe-imports-no-vendor-library"}),
        (
            "OPEN.append(0); return Found((replace(INFO, id=f'flawed:{len(OPEN)}'), INFO))",
            {"probe-answer"},
        ),
    ],
)
def test_what_a_probe_may_not_do_is_caught(
    body: str, caught_by: set[str], open_flawed: Open, failures: Failures
) -> None:
    subject = open_flawed(source=probe_that(body))
    assert failures(subject, "lifecycle", ("probe",)) == caught_by


def test_a_heavy_import_at_the_head_of_the_plugin_is_caught_too(open_flawed: Open, failures: Failures) -> None:
    subject = open_flawed(source=SOURCE.replace("import os\n", "import os\n\nimport msgspec\n"))
    assert failures(subject, "lifecycle", ("probe",)) == {"probe-imports-no-vendor-library"}
