"""What is to go wrong, and when: faults as they are written and as data.

Knows no device. Steps are counted from 1, from the opening of the device on; the engine's
warm-up takes the first one or two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FAULTS: Mapping[str, str] = {
    "lost": "lost@STEP the device is gone from this step on",
    "oom": "oom@STEP this step does not fit into memory",
    "hang": "hang@STEP this step does not end until the device is closed",
    "wrong": "wrong@STEP this step's tokens are wrong",
    "nan": "nan@STEP this step's logits are not numbers",
    "compile": "compile nothing can be compiled",
    "allocate": "allocate no cache can be allocated",
    "kernel": "kernel the device's own linear kernel computes wrong numbers",
}
"""Each kind of fault, and how it is written."""

STEP_FAULTS = ("lost", "oom", "hang", "wrong", "nan")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        kind: a key of ``FAULTS``.
        step: when, counted from 1; None for kinds that are not about a step.
    """

    kind: str
    step: int | None = None


def read_faults(text: str) -> tuple[Fault, ...]:
    """Faults from their text, ``lost@12,nan@3``.

    Raises:
        ValueError: a kind or a step that there is not.
    """
    return tuple(_fault(part) for part in text.split(","))


def _fault(text: str) -> Fault:
    kind, at, step = text.partition("@")
    if kind not in FAULTS:
        raise ValueError(f"there is no fault '{kind}'; there are: {'; '.join(FAULTS.values())}")
    if (kind in STEP_FAULTS) != bool(at):
        raise ValueError(f"'{text}' is written so: {FAULTS[kind]}")
    if not at:
        return Fault(kind=kind)
    if not step.isascii() or not step.isdigit() or int(step) < 1:
        raise ValueError(f"'{step}' is no number of a step, from 1 on")
    return Fault(kind=kind, step=int(step))
