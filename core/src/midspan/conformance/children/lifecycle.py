"""Opening and closing a device in a process of its own, which it may crash.

Each step opens what it needs.
"""

from __future__ import annotations

from typing import Any

from midspan.conformance.check import CheckFailed
from midspan.conformance.child_process import answer
from midspan.conformance.child_steps import Steps, take_steps
from midspan.conformance.operation_case import OperationCase
from midspan.conformance.operation_cases import elementwise_cases
from midspan.conformance.operation_run import Setting, require_agreement
from midspan.conformance.subject import Subject
from midspan.errors import SettingsError
from midspan.interface import Device

UNKNOWN_OPTION = "no-such-option"


def _use(device: Device) -> None:
    """Compile and run one small node."""
    claims = device.capabilities
    setting = Setting(dtype=claims.dtypes[0], cache_dtype=claims.cache_dtypes[0], block_size=claims.block_sizes[0])
    require_agreement(device, _small_case(), setting)


def _small_case() -> OperationCase:
    return next(case for case in elementwise_cases() if case.op == "add" and len(case.inputs[0]))  # type: ignore[arg-type]


def _opens(subject: Subject) -> None:
    with subject.open() as device:
        _use(device)


def _closes_twice(subject: Subject) -> None:
    device = subject.plugin.open(subject.info, subject.options)
    _use(device)
    device.close()
    device.close()


def _opens_again(subject: Subject) -> None:
    _opens(subject)
    _opens(subject)


def _two_at_once(subject: Subject) -> None:
    with subject.open() as first:
        with subject.open() as second:
            _use(first)
            _use(second)
            _use(first)
        _use(first)


def _refuses_an_unknown_option(subject: Subject) -> None:
    try:
        device = subject.plugin.open(subject.info, {**subject.options, UNKNOWN_OPTION: "1"})
    except SettingsError as error:
        if UNKNOWN_OPTION not in str(error):
            raise CheckFailed(f"the SettingsError does not name the option '{UNKNOWN_OPTION}': {error}") from error
        return
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise CheckFailed(f"an unknown option must raise SettingsError and raised {found}") from error
    device.close()
    raise CheckFailed(f"the device was opened with the unknown option '{UNKNOWN_OPTION}' without a word")


STEPS: Steps = {
    "opens-in-a-new-process": _opens,
    "closes-twice": _closes_twice,
    "opens-again": _opens_again,
    "two-open-at-once": _two_at_once,
    "unknown-option-is-refused": _refuses_an_unknown_option,
}
"""Name of the check -> what it does."""


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the steps that the parent asks for."""
    return take_steps(STEPS, arguments)


if __name__ == "__main__":
    answer(main)
