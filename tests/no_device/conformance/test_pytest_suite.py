"""The suite in pytest, as its users start it: in a process of its own, in a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunPytest = Callable[..., Any]

REFERENCE_CHECKS = "lifecycle or (operations and float32 and not kernels) or (caches and float32-blocks-16)"


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A project whose own settings fit nothing of the suite, with an option of the same name."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\npython_files = check_*.py\npython_functions = never_*\n"
        "norecursedirs = * midspan\naddopts = --strict-markers --strict-config --doctest-modules\n",
        encoding="utf-8",
    )
    (folder / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--device', default='theirs')\n", encoding="utf-8"
    )
    return folder


def test_the_reference_passes_from_any_folder_whatever_its_settings(
    hostile_folder: Path, conformance: RunPytest
) -> None:
    report_file = hostile_folder / "report.json"
    done = conformance(
        hostile_folder,
        "--conformance-device",
        "reference",
        "-k",
        REFERENCE_CHECKS,
        "--conformance-report",
        "report.json",
        folder=hostile_folder,
    )
    assert done.code == 0, done.text
    assert "Skipped 1, the quantization gguf.q4_0 is not claimed: operations/packed-gguf.q4_0-float32" in done.text
    report = json.loads(report_file.read_text(encoding="utf-8"))
    assert report["device"]["id"] == report["plugin"]["name"] == "reference"
    assert report["counts"]["failed"] == 0
    assert report["counts"]["passed"] > 40
    assert report["counts"]["skipped"] == 8
    assert report["capabilities"]["batch_invariant"] is True
    assert "The probe takes" in done.text
    assert {check["outcome"] for check in report["checks"]} == {"passed", "skipped"}


def test_without_a_device_it_says_which_there_are(conformance: RunPytest) -> None:
    done = conformance()
    assert done.code == pytest.ExitCode.USAGE_ERROR
    assert "--device NAME, one of: " in done.text
    assert "reference" in done.text


def test_a_device_that_is_not_here_is_never_replaced_by_another(conformance: RunPytest) -> None:
    for name in ("nothing", "auto"):
        done = conformance("--device", name)
        assert done.code == pytest.ExitCode.USAGE_ERROR
        assert "reference" in done.text


def test_a_check_is_switched_off_with_a_reason_and_only_with_one(conformance: RunPytest) -> None:
    chosen = ("--device", "reference", "-k", "plugin-record or interface-version")
    off = conformance(*chosen, "--switch-off", "lifecycle/plugin-record: known to the maker")
    assert off.code == 0, off.text
    assert "Switched off lifecycle/plugin-record: known to the maker" in off.text
    for wrong in ("lifecycle/plugin-record", "lifecycle/plugin-record:"):
        done = conformance(*chosen, "--switch-off", wrong)
        assert done.code == pytest.ExitCode.USAGE_ERROR
        assert "a check and a reason" in done.text
    unknown = conformance(*chosen, "--switch-off", "lifecycle/nothing: because")
    assert unknown.code != 0
    assert "checks that do not exist: lifecycle/nothing" in unknown.text


def test_a_run_that_executes_nothing_fails(conformance: RunPytest) -> None:
    done = conformance("--device", "reference", "-k", "packed-gguf.q4_0-float32")
    assert done.code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "1 skipped" in done.text


def test_other_runs_of_pytest_know_nothing_of_the_suite(hostile_folder: Path, run_pytest: RunPytest) -> None:
    (hostile_folder / "check_own.py").write_text(
        "def never_wrong(request):\n    assert request.config.getoption('--device') == 'mine'\n", encoding="utf-8"
    )
    done = run_pytest("--device", "mine", "check_own.py", folder=hostile_folder)
    assert done.code == 0, done.text
    assert "1 passed" in done.text
    assert "--conformance" not in run_pytest("--help", folder=hostile_folder).text
