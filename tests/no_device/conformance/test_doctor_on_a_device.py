"""``midspan doctor --device NAME``: the overview, and the quick part of the suite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Install = Callable[..., Path]


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "midspan_cli", "doctor", *arguments]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_device_that_is_right_passes_its_self_test(install_plugin: Install) -> None:
    install_plugin()
    done = doctor("--device", "flawed", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["choice"].startswith("Device flawed (has one fault)")
    assert report["conformance"]["counts"]["failed"] == 0
    assert {check["level"] for check in report["conformance"]["checks"]} >= {
        "lifecycle",
        "operations",
        "caches",
        "engine",
    }
    assert report["problems"] == []


def test_a_device_that_fails_is_a_problem_and_the_exit_status_says_so(install_plugin: Install) -> None:
    install_plugin()
    done = doctor("--device", "flawed", "--device-option", "fault=does not open")
    assert done.returncode == 1
    assert "FAILED lifecycle/opens-in-a-new-process" in done.stdout
    assert "Problem: The device failed" in done.stdout


def test_without_a_device_it_tells_what_auto_would_take_and_why_and_tests_nothing() -> None:
    done = doctor()
    assert done.returncode == 0, done.stderr
    assert "taken by 'auto' for its preference of" in done.stdout
    assert "PASSED" not in done.stdout


def test_a_device_that_is_not_here_is_an_error_that_lists_those_that_are() -> None:
    done = doctor("--device", "nothing")
    assert done.returncode == 1
    assert "There is no device 'nothing' here" in done.stderr
    assert "reference" in done.stderr
