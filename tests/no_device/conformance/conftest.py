"""A device plugin that a stranger might install, with any of many faults, and ways to hold it against the suite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from midspan.conformance.report import Outcome
from midspan.conformance.subject import Subject, open_subject
from midspan.conformance.suite import level_checks, run_check

HERE = Path(__file__).resolve().parent

Install = Callable[..., Path]
Failures = Callable[..., set[str]]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nearly all of them run a good part of the suite, or start processes that do."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.slow)


def write_plugin(folder: Path, *, name: str = "flawed", source: str | None = None) -> Path:
    """Put a package's module and its metadata where Python finds them, as an installer would."""
    text = (HERE / "flawed_plugin.txt").read_text(encoding="utf-8") if source is None else source
    (folder / f"{name}_plugin.py").write_text(text, encoding="utf-8")
    metadata = folder / f"midspan_{name}-2.5.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: midspan-{name}\nVersion: 2.5\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[midspan.plugins]\n{name} = {name}_plugin\n", encoding="utf-8")
    return folder


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install_plugin(source=None)``: for this process and those that it starts; returns the folder."""

    def install(source: str | None = None) -> Path:
        folder = tmp_path / "site"
        folder.mkdir()
        write_plugin(folder, source=source)
        monkeypatch.delitem(sys.modules, "flawed_plugin", raising=False)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", str(folder))
        return folder

    return install


@pytest.fixture
def open_flawed(install_plugin: Install) -> Iterator[Callable[..., Subject]]:
    """``open_flawed(fault, source=None)``: the flawed device as a subject; no fault: a device that is right."""
    subjects: list[Subject] = []

    def make(fault: str = "", source: str | None = None) -> Subject:
        install_plugin(source)
        subjects.append(open_subject("flawed", {"fault": fault} if fault else {}))
        return subjects[-1]

    yield make
    for subject in subjects:
        subject.close()


@pytest.fixture
def failures() -> Failures:
    """``failures(subject, level, containing=())``: names of the level's checks that fail, of those with such a part."""

    def run(subject: Subject, level: str, containing: tuple[str, ...] = ("",)) -> set[str]:
        chosen = [
            check
            for check in level_checks(subject, level)
            if check.unclaimed is None and any(part in check.name for part in containing)
        ]
        assert chosen
        outcomes = [run_check(subject, check) for check in chosen]
        return {outcome.name for outcome in outcomes if outcome.outcome is Outcome.FAILED}

    return run


@dataclass(frozen=True)
class Finished:
    """What a run of pytest left behind."""

    code: int
    text: str


@pytest.fixture
def run_pytest(tmp_path: Path) -> Callable[..., Finished]:
    """``run_pytest(*arguments, folder=None)``: in a process of its own, in a folder of the user's."""

    def run(*arguments: str, folder: Path | None = None) -> Finished:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        # What is slow to load and has no part in this.
        left_out = [f"-pno:{name}" for name in ("hypothesispytest", "anyio", "pytest_cov", "cacheprovider")]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *left_out, *arguments],
            cwd=folder or tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        return Finished(code=done.returncode, text=done.stdout + done.stderr)

    return run


@pytest.fixture
def conformance(run_pytest: Callable[..., Finished]) -> Callable[..., Finished]:
    """``conformance(*arguments, folder=None)``: the suite, as people start it."""

    def run(*arguments: str, folder: Path | None = None) -> Finished:
        return run_pytest("--pyargs", "midspan.conformance", *arguments, folder=folder)

    return run
