"""The suite in pytest: options, one item for each check, the report at the end.

Knows pytest and the list of checks. Nothing here depends on the user's own settings of
what a test file, class or function is called, nor on their filters for warnings.

Invariants: the items of a device are the same in every process of a run, in the same
order; what the report needs travels with pytest's own reports, so that runs in several
processes give the same report.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.modes import MODES, Mode
from midspan.conformance.pytest_entry import PACKAGE
from midspan.conformance.report import CheckOutcome, Identity, Outcome, Report, identify, to_text
from midspan.conformance.subject import Subject, open_subject
from midspan.conformance.suite import CLOSING, close_subject, limit_of, run_check
from midspan.conformance.time_limit import CHECK_SECONDS, no_answer, time_limit
from midspan.devices.discovery import discover
from midspan.errors import MidspanError, SettingsError

FOLDER = Path(__file__).resolve().parent
OPENING = ("lifecycle", "opens-for-the-list-of-checks")
"""Level and name under which a device stands in the report whose opening, for its claims, hangs."""


def add_options(parser: pytest.Parser) -> None:
    """Add the suite's options. A short name that somebody else has stays theirs; the long one always works."""
    group = parser.getgroup("midspan conformance")
    _add(group, "device", metavar="NAME", help="the device to examine")
    _add(
        group,
        "device-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the device's own; may be repeated",
    )
    _add(
        group,
        "switch-off",
        action="append",
        default=[],
        metavar="LEVEL/NAME:REASON",
        help="leave a check out, for a reason that the report shows; may be repeated",
    )
    group.addoption(
        "--conformance-mode",
        choices=[mode.value for mode in Mode],
        default=Mode.CORRECT.value,
        help="correct: the suite; speed: each kernel timed beside the portable one; support: what runs by which kernel",
    )
    group.addoption(
        "--conformance-report",
        metavar="FILE",
        help="write the report as JSON; while checks run, FILE.running holds the name of the one that runs, so that it "
        "can be read after the process died (with -n, pytest names it)",
    )
    group.addoption(
        "--conformance-timeout",
        metavar="SECONDS",
        type=float,
        default=CHECK_SECONDS,
        help="a check that takes longer fails and ends the run, with what was found so far in the report (default: "
        f"{CHECK_SECONDS:g}; 0: no limit; there is none in the mode speed)",
    )


def _add(group: Any, name: str, **keywords: Any) -> None:
    long, place = f"--conformance-{name}", f"conformance_{name.replace('-', '_')}"
    try:
        group.addoption(f"--{name}", long, dest=place, **keywords)
    except (ValueError, argparse.ArgumentError):
        group.addoption(long, dest=place, **keywords)


class PytestSuite:
    """Hooks of one run.

    Args:
        config: of the run; its options are read when the session starts.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._subject: Subject | None = None
        self._switched_off: dict[str, str] = {}
        self._outcomes: dict[str, CheckOutcome] = {}
        self._identity: Identity | None = None
        self._report: Report | None = None
        self._errors = 2

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Find the device, or say what there is."""
        self._errors = os.dup(2)  # Where it leads before pytest captures it.
        try:
            self._subject = self._find()
        except MidspanError as error:
            raise pytest.UsageError(str(error)) from error
        self._switched_off = dict(
            _split(text, ":", "--switch-off") for text in self._config.getoption("conformance_switch_off")
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """The suite's folder holds checks; the package around it leads there and nowhere else."""
        if path.resolve() == FOLDER:
            return _CheckFolder.from_parent(parent, path=path, nodeid=PACKAGE, suite=self)
        if path.resolve() == FOLDER.parent:
            return _PackageFolder.from_parent(parent, path=path)
        return None

    def checks(self) -> list[Check]:
        """The checks of the chosen mode for the device, which is opened for that."""
        mode = self._config.getoption("conformance_mode")
        try:
            with self._limited(*OPENING, self._seconds):
                found = MODES[mode](self.subject)
        except SettingsError as error:
            raise pytest.UsageError(str(error)) from error
        unknown = sorted(set(self._switched_off) - {check.id for check in found})
        if unknown:
            raise pytest.UsageError(f"--switch-off names checks that do not exist: {', '.join(unknown)}")
        return found

    @property
    def subject(self) -> Subject:
        """The device under examination."""
        if self._subject is None:
            raise pytest.UsageError("The suite's device is known only while a session runs.")
        return self._subject

    def run(self, check: Check) -> CheckOutcome:
        """Run one check."""
        with self._limited(check.level, check.name, limit_of(check, self._seconds)):
            return run_check(self.subject, check, self._switched_off.get(check.id))

    @property
    def _seconds(self) -> float:
        """That a check may take; 0: for ever."""
        is_timed = self._config.getoption("conformance_mode") == Mode.SPEED.value
        return 0.0 if is_timed else float(self._config.getoption("conformance_timeout"))

    @contextmanager
    def _limited(self, level: str, name: str, seconds: float) -> Iterator[None]:
        """Do something that may hang or end the process, under the name of a check."""
        running = self._file(".running")
        if running is not None:
            running.write_text(f"{level}/{name}\n", "utf-8")
        with time_limit(seconds, partial(self._give_up, level, name, seconds), errors=self._errors):
            yield

    def _give_up(self, level: str, name: str, seconds: float) -> None:
        """A check hangs: report it and what came before it. The process ends afterwards."""
        with open(self._errors, "w", encoding="utf-8", closefd=False) as errors:
            errors.write(f"\n{level}/{name} {no_answer(seconds)}; the process is ended\n")
            if not self._is_worker:
                errors.write(self._reported_late(level, name, seconds))

    def _reported_late(self, level: str, name: str, seconds: float) -> str:
        """Write the report with a check that hangs as the last one; the table that people read."""
        message = no_answer(seconds)
        late = CheckOutcome(level=level, name=name, outcome=Outcome.FAILED, message=message, seconds=seconds)
        self._keep(late)
        report = self._write_report(self._identity or identify(self.subject, may_open=False))
        return f"\n{to_text(report)}\n"

    @property
    def _is_worker(self) -> bool:
        """Whether this is one of a parallel run's processes, which have no report of their own."""
        return hasattr(self._config, "workeroutput")

    def _file(self, ending: str = "") -> Path | None:
        """The report's file or the one beside it; None where none is to be written."""
        file = self._config.getoption("conformance_report")
        if file is None or self._is_worker:
            return None
        return self._config.invocation_params.dir.joinpath(f"{file}{ending}")

    def _write_report(self, identity: Identity) -> Report:
        report = Report(identity=identity, outcomes=tuple(self._outcomes.values()))
        file, running = self._file(), self._file(".running")
        if file is not None and running is not None:
            file.write_text(report.to_json_text(), "utf-8")
            running.unlink(missing_ok=True)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Let the outcome travel with pytest's report."""
        report = yield
        if isinstance(item, _CheckItem) and item.outcome is not None and report.when == "call":
            report.conformance = item.outcome.to_json()
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what came of a check, in whichever process it ran."""
        data = getattr(report, "conformance", None)
        if data is not None:
            self._keep(CheckOutcome.from_json(data))
        elif report.failed and "::" in report.nodeid:
            # A process that died in the middle of a check, or a failure around it.
            level, _, name = report.nodeid.partition("::")[2].partition("/")
            message = str(report.longrepr)
            self._keep(CheckOutcome(level=level, name=name, outcome=Outcome.FAILED, message=message))

    def _keep(self, outcome: CheckOutcome) -> None:
        self._outcomes[outcome.id] = outcome

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A process of a parallel run ended: take its description of the device."""
        sent = getattr(node, "workeroutput", {}).get("conformance_identity")
        if sent is not None:
            self._identity = Identity(**json.loads(sent))
        closed = getattr(node, "workeroutput", {}).get("conformance_closing")
        if closed is not None:
            self._keep(CheckOutcome.from_json(closed))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Close the device, and write the report."""
        if self._subject is None:
            return
        output = getattr(self._config, "workeroutput", None)
        if output is not None:
            output["conformance_identity"] = json.dumps(vars(identify(self._subject)))
        elif self._outcomes:
            self._identity = self._identity or identify(self._subject)
        with self._limited(*CLOSING, self._seconds):
            closed = close_subject(self._subject)
        if closed is not None and output is not None:
            output["conformance_closing"] = closed.to_json()
        elif closed is not None:
            self._keep(closed)
        if self._identity is not None and self._outcomes:
            self._report = self._write_report(self._identity)
        running = self._file(".running")
        if running is not None:
            running.unlink(missing_ok=True)
        if self._report is not None and self._report.failed and session.exitstatus == pytest.ExitCode.OK:
            failed = self._report.count(Outcome.FAILED)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.NO_TESTS_COLLECTED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The readable report."""
        if self._report is not None:
            terminalreporter.section("conformance")
            terminalreporter.write_line(to_text(self._report, whole_messages=False))

    def _find(self) -> Subject:
        catalogue = discover()
        name = self._config.getoption("conformance_device") or self._config.getoption("--device", None)
        if not isinstance(name, str):
            listed = ", ".join(info.id for info in catalogue.devices())
            raise pytest.UsageError(f"Name the device to examine: --device NAME, one of: {listed}.")
        options = dict(
            _split(text, "=", "--device-option") for text in self._config.getoption("conformance_device_option")
        )
        if self._config.getoption("conformance_mode") == Mode.SPEED.value and self._config.getoption(
            "numprocesses", None
        ):
            raise pytest.UsageError("Timings of processes that run at once mean nothing: leave -n out.")
        return open_subject(name, options, catalogue)


def _split(text: str, sign: str, option: str) -> tuple[str, str]:
    key, found, value = (part.strip() for part in text.partition(sign))
    if not (key and found and value):
        what = "a check and a reason" if sign == ":" else "a key and a value"
        raise pytest.UsageError(f"{option} '{text}' must be {what} with '{sign}' between them.")
    return key, value


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """The user's filters are for the user's own tests: here a warning is shown and is no error."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


class _PackageFolder(pytest.Directory):
    """The package that the suite is in; nothing else in it is a test."""

    def collect(self) -> Iterator[pytest.Collector]:
        yield self.ihook.pytest_collect_directory(path=self.path / FOLDER.name, parent=self)


class _CheckFolder(pytest.Directory):
    """The suite's folder: an item for each check."""

    def __init__(self, *, suite: PytestSuite, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._suite = suite

    def collect(self) -> Iterator[pytest.Item]:
        with _warnings_shown():
            checks = self._suite.checks()
        for check in checks:
            yield _CheckItem.from_parent(self, name=check.id, check=check, suite=self._suite)


class _CheckItem(pytest.Item):
    """One check."""

    def __init__(self, *, check: Check, suite: PytestSuite, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._check = check
        self._suite = suite
        self.outcome: CheckOutcome | None = None
        self.add_marker(pytest.mark.filterwarnings("default"))

    def runtest(self) -> None:
        self.outcome = self._suite.run(self._check)
        if self.outcome.outcome is Outcome.FAILED:
            raise CheckFailed(self.outcome.message)
        if self.outcome.outcome is not Outcome.PASSED:
            off = self.outcome.outcome is Outcome.SWITCHED_OFF
            pytest.skip(f"switched off: {self.outcome.message}" if off else self.outcome.message)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, CheckFailed) and self.outcome is not None:
            return self.outcome.trace + self.outcome.message if self.outcome.trace else self.outcome.message
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self._check.id
