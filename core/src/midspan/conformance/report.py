"""What a run of the suite found: for people, and as JSON.

Knows outcomes and a device's description, and no device. The JSON has these fields,
which later versions only add to:

    format          1
    device          id, name (as asked for), description, options
    plugin          name, distribution, version, interface [major, minor]
    core            version, interface [major, minor]
    machine         system, architecture, python, packages {name: version}
    capabilities    every field of ``Capabilities``
    counts          passed, failed, skipped, switched_off
    core_patches    attributes of the core that the plugin rebinds; null when not counted
    facts           what checks found beside their outcome, by name: "refused", a list of "case:
                    reason"; "probe_seconds"; "speed" and "support", the tables of those modes
    checks          for each: id, level, name, outcome (passed | failed | skipped |
                    switched_off), seconds, message, trace

Invariants: a skipped check's message names the claim that is missing; a switched-off
check's message is the reason that was given.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from importlib.metadata import distributions
from typing import Any

from midspan import __version__
from midspan.conformance.mode_tables import speed_table, support_table
from midspan.conformance.subject import Subject
from midspan.interface import INTERFACE_VERSION

FORMAT = 1
"""Of the JSON."""

CORE_PATCHES = "core_patches"
"""The fact under which a check reports how many of the core's attributes the plugin rebinds."""

REFUSED = "refused"
"""The fact under which cases stand that the device refused, as "case: reason"."""


class Outcome(str, Enum):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    SWITCHED_OFF = "switched_off"


@dataclass(frozen=True, kw_only=True)
class CheckOutcome:
    """One check's result.

    Attributes:
        level, name: the check's.
        outcome: what became of it.
        message: what is wrong; or why it was skipped or switched off.
        trace: the traceback of an error that no check expected.
        seconds: how long it took.
        facts: what it found out beside that.
    """

    level: str
    name: str
    outcome: Outcome
    message: str = ""
    trace: str = ""
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """``level/name``."""
        return f"{self.level}/{self.name}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, facts included."""
        return {**asdict(self), "outcome": self.outcome.value}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> CheckOutcome:
        """What ``to_json`` gave."""
        return CheckOutcome(**{**data, "outcome": Outcome(data["outcome"])})


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What was examined, where and by what; plain data, as in the JSON."""

    device: Mapping[str, Any]
    plugin: Mapping[str, Any]
    core: Mapping[str, Any]
    machine: Mapping[str, Any]
    capabilities: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run.

    Attributes:
        identity: of the device, its plugin and the machine.
        outcomes: in the order in which the checks ran.
    """

    identity: Identity
    outcomes: tuple[CheckOutcome, ...]

    def count(self, outcome: Outcome, level: str | None = None) -> int:
        """Checks that ended so, of one level or of all."""
        return sum(item.outcome is outcome and level in (None, item.level) for item in self.outcomes)

    @property
    def failed(self) -> bool:
        """Whether any check failed, or none ran at all."""
        return self.count(Outcome.FAILED) > 0 or self.count(Outcome.PASSED) == 0

    def facts(self) -> dict[str, Any]:
        """What checks found out, joined: lists are joined, else the last one counts."""
        joined: dict[str, Any] = {}
        for outcome in self.outcomes:
            for key, value in outcome.facts.items():
                both = isinstance(value, list) and isinstance(joined.get(key), list)
                joined[key] = [*joined[key], *value] if both else value
        return joined

    def to_json(self) -> dict[str, Any]:
        """Plain data; the fields are those in the head of this module."""
        facts = self.facts()
        checks = []
        for outcome in self.outcomes:
            entry = {"id": outcome.id, **outcome.to_json()}
            del entry["facts"]
            checks.append(entry)
        return {
            "format": FORMAT,
            **asdict(self.identity),
            "counts": {outcome.value: self.count(outcome) for outcome in Outcome},
            CORE_PATCHES: facts.pop(CORE_PATCHES, None),
            "facts": facts,
            "checks": checks,
        }

    def to_json_text(self) -> str:
        """The JSON, indented."""
        return json.dumps(self.to_json(), indent=2) + "\n"


def identify(subject: Subject, *, may_open: bool = True) -> Identity:
    """Describe a subject, its plugin and this machine.

    Args:
        subject: the device under examination.
        may_open: open it for its capabilities; otherwise they stand in the report if it is open.
    """
    found = subject.discovered
    opened = subject.is_open or (may_open and subject.opening_error() is None)
    return Identity(
        device={
            "id": subject.info.id,
            "name": subject.name,
            "description": subject.info.description,
            "options": dict(subject.options),
        },
        plugin={
            "name": found.plugin.name,
            "distribution": found.distribution,
            "version": found.version,
            "interface": list(found.plugin.interface),
        },
        core={"version": __version__, "interface": list(INTERFACE_VERSION)},
        machine={
            "system": platform.platform(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "packages": _packages(found.distribution),
        },
        capabilities=asdict(subject.capabilities) if opened else {},
    )


def _packages(plugin: str) -> dict[str, str]:
    """Versions of numpy, of everything of ours, of the plugin and of what the plugin says it needs."""
    installed = {_plain(item.metadata["Name"]): item for item in distributions() if item.metadata["Name"]}
    wanted = {"numpy", "ml-dtypes", _plain(plugin)} | {name for name in installed if name.split("-")[0] == "midspan"}
    owner = installed.get(_plain(plugin))
    for requirement in (owner.requires or []) if owner is not None else []:
        if "extra ==" not in requirement:
            wanted.add(_plain(requirement.split(";")[0].strip()))
    return {name: installed[name].version for name in sorted(wanted) if name in installed}


def _plain(name: str) -> str:
    """A requirement's or distribution's name as indexes compare it (PEP 503)."""
    for place, letter in enumerate(name):
        if not (letter.isalnum() or letter in "-_."):
            name = name[:place]
            break
    return name.lower().replace("_", "-").replace(".", "-")


def to_text(report: Report, *, whole_messages: bool = True) -> str:
    """The report as people read it: a line for each level, failures, what was left out and why.

    Args:
        report: the run.
        whole_messages: of failures; otherwise their first lines, where the rest stands elsewhere.
    """
    identity = report.identity
    order = list(dict.fromkeys(outcome.level for outcome in report.outcomes))
    lines = [
        f"Device   {identity.device['id']}: {identity.device['description']}",
        f"Plugin   {identity.plugin['name']} of {identity.plugin['distribution']} {identity.plugin['version']}, "
        f"interface {_dotted(identity.plugin['interface'])}; core {identity.core['version']}, "
        f"interface {_dotted(identity.core['interface'])}",
        "",
        f"{'LEVEL':<14}{'PASSED':>8}{'FAILED':>8}{'SKIPPED':>9}{'SWITCHED OFF':>14}",
    ]
    for level in order:
        numbers = [report.count(outcome, level) for outcome in Outcome]
        if any(numbers):
            lines.append(_row(level, numbers))
    lines.append(_row("all", [report.count(outcome) for outcome in Outcome]))
    lines += _failures(report, whole_messages) + _switched_off(report) + _skipped(report) + _facts(report.facts())
    return "\n".join(lines)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(str(part) for part in version)


def _row(level: str, numbers: Sequence[int]) -> str:
    passed, failed, skipped, off = numbers
    return f"{level:<14}{passed:>8}{failed:>8}{skipped:>9}{off:>14}"


def _failures(report: Report, whole: bool) -> list[str]:
    lines = []
    for outcome in report.outcomes:
        if outcome.outcome is Outcome.FAILED:
            first, *rest = outcome.message.splitlines() or [""]
            lines += [f"FAILED {outcome.id}: {first}", *(f"       {line}" for line in rest if whole)]
    return ["", *lines] if lines else []


def _switched_off(report: Report) -> list[str]:
    chosen = [outcome for outcome in report.outcomes if outcome.outcome is Outcome.SWITCHED_OFF]
    lines = [f"Switched off {outcome.id}: {outcome.message}" for outcome in chosen]
    return ["", *lines] if lines else []


def _skipped(report: Report) -> list[str]:
    """Skips, counted for each claim that is missing."""
    claims: dict[str, list[str]] = {}
    for outcome in report.outcomes:
        if outcome.outcome is Outcome.SKIPPED:
            claims.setdefault(outcome.message, []).append(outcome.id)
    lines = [f"Skipped {len(ids)}, {reason}: {', '.join(ids)}" for reason, ids in claims.items()]
    return ["", *lines] if lines else []


def _facts(facts: Mapping[str, Any]) -> list[str]:
    lines = []
    if "probe_seconds" in facts:
        lines.append(f"The probe takes {facts['probe_seconds'] * 1000:.1f} ms in a new process")
    if facts.get(REFUSED):
        lines.append(f"Cases that the device refused, with a reason each: {len(facts[REFUSED])}")
    if "max_world_size" in facts:
        lines.append(f"Devices that work on one model together: {facts['max_world_size']} at most")
    if facts.get(CORE_PATCHES) is not None:
        lines.append(f"Patches of the core by the plugin: {facts[CORE_PATCHES]}")
    lines = ["", *lines] if lines else []
    if "speed" in facts:
        lines += ["", *speed_table(facts["speed"])]
    if "support" in facts:
        lines += ["", *support_table(facts["support"])]
    return lines
