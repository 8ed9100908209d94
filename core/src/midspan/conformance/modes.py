"""What the suite can be asked: is the device right, how fast is it, what does it take.

Knows for each mode where its list of checks comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

from midspan.conformance.check import Check
from midspan.conformance.speed import speed_checks
from midspan.conformance.subject import Subject
from midspan.conformance.suite import all_checks
from midspan.conformance.support import support_checks


class Mode(str, Enum):
    """A question."""

    CORRECT = "correct"
    SPEED = "speed"
    SUPPORT = "support"


MODES: Mapping[str, Callable[[Subject], list[Check]]] = {
    Mode.CORRECT.value: all_checks,
    Mode.SPEED.value: speed_checks,
    Mode.SUPPORT.value: support_checks,
}
"""Mode -> the checks that answer it."""
