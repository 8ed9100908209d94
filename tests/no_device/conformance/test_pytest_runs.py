"""Runs of the suite in pytest: in several processes, with failures, in the other modes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Install = Callable[..., Path]
RunPytest = Callable[..., Any]


def test_several_processes_give_the_report_of_one(conformance: RunPytest, tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    for more in ((), ("-n", "2")):
        done = conformance("--device", "reference", "-k", "caches and copy", "--conformance-report", "r.json", *more)
        assert done.code == 0, done.text
        reports.append(json.loads((tmp_path / "r.json").read_text(encoding="utf-8")))
    alone, shared = reports
    assert shared["counts"] == alone["counts"]
    assert {check["id"] for check in shared["checks"]} == {check["id"] for check in alone["checks"]}
    for field in ("device", "plugin", "core", "capabilities"):
        assert shared[field] == alone[field]


def test_a_failure_ends_the_run_with_what_is_wrong(install_plugin: Install, conformance: RunPytest) -> None:
    install_plugin()
    chosen = ("--device", "flawed", "--device-option", "fault=add is a little off", "-k", "operations/add-")
    done = conformance(*chosen)
    assert done.code == pytest.ExitCode.TESTS_FAILED
    assert "FAILED operations/add-float32: " in done.text
    assert "(kernel 'own'): output 0: " in done.text


def test_a_device_that_does_not_open_still_gets_a_report(install_plugin: Install, conformance: RunPytest) -> None:
    install_plugin()
    done = conformance("--device", "flawed", "--device-option", "fault=does not open", "-k", "contract")
    assert done.code == pytest.ExitCode.TESTS_FAILED
    assert "FAILED lifecycle/opened-device-keeps-the-contract: RuntimeError: broken" in done.text


def test_the_modes_print_their_tables(install_plugin: Install, conformance: RunPytest, tmp_path: Path) -> None:
    install_plugin()
    chosen = ("--device", "flawed", "--device-option", "fault=linear's second kernel lies")
    support = conformance(*chosen, "--conformance-mode", "support", "--conformance-report", "r.json")
    assert support.code == 0, support.text
    assert "OPERATION" in support.text
    assert "numpy*" in support.text
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["facts"]["support"]
    assert {row["row"].split()[0] for row in rows} >= {"linear", "attention", "sample"}
    assert all(row["served"] for row in rows)
    speed = conformance(*chosen[:2], "--conformance-mode", "speed", "-k", "add-decode or attention-decode")
    assert speed.code == 0, speed.text
    assert "TIMES AS FAST" in speed.text


def test_speed_is_not_measured_by_processes_that_run_at_once(conformance: RunPytest) -> None:
    done = conformance("--device", "reference", "--conformance-mode", "speed", "-n", "2")
    assert done.code == pytest.ExitCode.USAGE_ERROR
    assert "leave -n out" in done.text
