"""The list of checks for a device, and how one is run.

Knows levels by name, loaded when they are asked for. Imports no test runner, so that
the command line needs none.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from midspan.conformance.check import LEVELS, Check, CheckFailed
from midspan.conformance.report import CheckOutcome, Outcome, Report, identify
from midspan.conformance.subject import Subject
from midspan.devices.contract import error_text
from midspan.errors import DeviceLost, SettingsError

Progress = Callable[[Check, int, int], None]
"""(the check that starts, its place from 0, how many there are)."""


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
) -> Report:
    """Run checks one after the other.

    Args:
        subject: what they were made for.
        checks: of ``all_checks``, all or some.
        switched_off: check id -> why it is not run.
        progress: told before each.
    """
    reasons = switched_off or {}
    outcomes = []
    for place, check in enumerate(checks):
        if progress is not None:
            progress(check, place, len(checks))
        outcomes.append(run_check(subject, check, reasons.get(check.id)))
    return Report(identity=identify(subject), outcomes=tuple(outcomes))


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
