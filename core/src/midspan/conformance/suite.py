"""The list of checks for a device, and how one is run.

Knows levels by name, loaded when they are asked for. Imports no test runner, so that
the command line needs none.
"""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from midspan.conformance.check import LEVELS, Check, CheckFailed
from midspan.conformance.report import CheckOutcome, Outcome, Report, identify, to_text
from midspan.conformance.subject import Subject
from midspan.conformance.time_limit import CHECK_SECONDS, no_answer, time_limit
from midspan.devices.contract import error_text
from midspan.errors import DeviceLost, SettingsError

Progress = Callable[[Check, int, int], None]
"""(the check that starts, its place from 0, how many there are)."""

CLOSING = ("lifecycle", "closes-at-the-end")
"""Level and name under which a device stands in the report that could not be closed after all checks."""


def all_checks(subject: Subject) -> list[Check]:
    """Every check, in the order of the levels.

    A device that cannot be opened has no capabilities to derive checks from; what is left
    of the suite then is the lifecycle, which says why.

    Args:
        subject: its shared device is opened.

    Raises:
        SettingsError: the device does not take the options that were given.
    """
    error = subject.opening_error()
    if isinstance(error, SettingsError) and subject.options:
        raise error
    levels = LEVELS if error is None else LEVELS[:1]
    return [check for level in levels for check in level_checks(subject, level)]


def level_checks(subject: Subject, level: str) -> Sequence[Check]:
    """The checks of one level, see ``LEVELS``."""
    checks: Sequence[Check] = importlib.import_module(f"midspan.conformance.levels.{level}").checks(subject)
    return checks


def quick_checks(subject: Subject) -> list[Check]:
    """The self-test: those that take less than a minute in all."""
    return [check for check in all_checks(subject) if check.quick]


def run_checks(
    subject: Subject,
    checks: Sequence[Check],
    *,
    switched_off: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    seconds: float = CHECK_SECONDS,
) -> Report:
    """Run checks one after the other, and close the device.

    A device that gives no answer cannot be left behind: the report so far is written to the
    error stream then, and the process ends with code 1.

    Args:
        subject: what they were made for; its shared device is closed at the end.
        checks: of ``all_checks``, all or some.
        switched_off: check id -> why it is not run.
        progress: told before each.
        seconds: that a check may take; 0: for ever.
    """
    reasons = switched_off or {}
    outcomes: list[CheckOutcome] = []

    def give_up(level: str, name: str, limit: float) -> None:
        late = CheckOutcome(level=level, name=name, outcome=Outcome.FAILED, message=no_answer(limit), seconds=limit)
        report = Report(identity=identify(subject, may_open=False), outcomes=(*outcomes, late))
        sys.stderr.write(f"\n{to_text(report)}\n")

    for place, check in enumerate(checks):
        if progress is not None:
            progress(check, place, len(checks))
        limit = limit_of(check, seconds)
        with time_limit(limit, partial(give_up, check.level, check.name, limit)):
            outcomes.append(run_check(subject, check, reasons.get(check.id)))
    identity = identify(subject)
    with time_limit(seconds, partial(give_up, *CLOSING, seconds)):
        closed = close_subject(subject)
    return Report(identity=identity, outcomes=(*outcomes, *([] if closed is None else [closed])))


def limit_of(check: Check, seconds: float) -> float:
    """How long a check may take, where checks may take so many seconds; 0: for ever."""
    return seconds + check.waits_seconds if seconds else 0.0


def close_subject(subject: Subject) -> CheckOutcome | None:
    """Close the shared device at the end of a run.

    Returns:
        A failed check when that raised, else None.
    """
    level, name = CLOSING
    try:
        subject.close()
    except Exception as error:
        message = f"closing the device raised {error_text(error)}"
        trace = traceback.format_exc()
        return CheckOutcome(level=level, name=name, outcome=Outcome.FAILED, message=message, trace=trace)
    return None


def run_check(subject: Subject, check: Check, switched_off: str | None = None) -> CheckOutcome:
    """Run one check; whatever it raises is its outcome.

    Args:
        subject: what it was made for.
        check: the check.
        switched_off: why it is not run, or None.
    """
    if switched_off is not None:
        return CheckOutcome(level=check.level, name=check.name, outcome=Outcome.SWITCHED_OFF, message=switched_off)
    if check.unclaimed is not None:
        return CheckOutcome(level=check.level, name=check.name, outcome=Outcome.SKIPPED, message=check.unclaimed)
    subject.facts.clear()
    outcome, message, trace = Outcome.PASSED, "", ""
    start = time.perf_counter()
    try:
        check.run()
    except CheckFailed as failure:
        outcome, message = Outcome.FAILED, str(failure)
    except Exception as error:
        outcome, message, trace = Outcome.FAILED, error_text(error), traceback.format_exc()
        if isinstance(error, DeviceLost):
            with suppress(Exception):
                subject.close()  # The next check opens it again.
    seconds = time.perf_counter() - start
    facts = dict(subject.facts)
    subject.facts.clear()
    return CheckOutcome(
        level=check.level, name=check.name, outcome=outcome, message=message, trace=trace, seconds=seconds, facts=facts
    )
